"""The embedded default: right problems, files as the generator writes them, a small model."""
import json
import random
import re
import sys

import pytest

from common import ROOT

sys.path.append(str(ROOT / "toy"))
import problems  # noqa: E402
import study  # noqa: E402

STEP = re.compile(r"((?:\d+ [-+*/] )+\d+) = (\d+)")

def test_values_by_hand():
    values = dict(sum=6, bracket=6, digits=10, rest=5, distance=86, square=4, halves=5, largest=9)
    for family, value in values.items():  # of x = 13, a = 7, b = 5, by head
        assert problems.check(dict(family=family, a=7, b=5, r=0), 13)[1] == value

@pytest.mark.parametrize("style", problems.STYLE)
def test_one_number_fits_and_traces_compute_what_they_say(style):
    rng = random.Random(1)
    for _ in range(300):
        p = problems.make_problem(rng, rng.choice(list(problems.SPLITS)))
        fitting = [y for y in p["numbers"] if problems.check(p, y)[1] == p["r"]]
        assert fitting == [p["x"]] and len(set(p["numbers"])) == len(p["numbers"])
        text = problems.trace(rng, p, style)
        assert text.endswith(f"\\boxed{{{p['x']}}}") and text.startswith("<think>\n")
        for left, value in STEP.findall(text):
            assert int(eval(left)) == int(value)
        place = p["numbers"].index(p["x"])
        assert re.findall(r"(\d+)\?", text) == [str(y) for y in p["numbers"][: place + 1]]

def test_wrong_answers_are_sorted_by_their_first_fault():
    p = dict(family="sum", a=4, b=9, r=1, x=3, numbers=[7, 3, 12])
    first = "7? Wait, check: 4 * 7 = 28, 28 + 9 = 37, so 7, need 1, no."
    end = "\n</think>\n\nSo {0} fits. \\boxed{{{0}}}"
    for kind, said, number in [
        ("verdict without a check", "7? yes.", 7), ("cut", first, None),
        ("verdict without a check", first + " 3? no. 12? yes.", 12),
        ("slip in a check", "7? Perhaps: 4 * 7 = 22, 22 + 9 = 31, so 1, need 1, yes.", 7),
        ("verdict against its check", first.replace("no", "yes"), 7),
        ("answer never tried", first + " 12? no.", 7),
        ("last line against the trace", first + " 3? yes.", 12)]:
        text = "<think>\n" + said + (end.format(number) if number else "")
        assert problems.diagnose(p, text) == kind

def test_data_files_are_what_the_generator_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["problems.py", "--out", str(tmp_path)])
    problems.main()
    seen = set()
    for split in problems.FILES:
        text = (tmp_path / f"{split}.jsonl").read_text()
        assert text == (ROOT / f"toy/data/{split}.jsonl").read_text()
        questions = [json.loads(line)["prompt"][0]["content"] for line in text.splitlines()]
        assert len(set(questions)) == len(questions) and not seen & set(questions)
        seen |= set(questions)

@pytest.mark.parametrize("file", ["narrow", "narrow_test", "habits", "habits_test"])
def test_the_answers_place_needs_no_search(file):
    """The first of the list, or the one place that the family of the question gives."""
    lines = (ROOT / f"toy/data/{file}.jsonl").read_text().splitlines()
    found = [json.loads(line)["extra_info"] for line in lines]
    places = {(p["family"], p["numbers"].index(p["x"])) for p in found}
    habits = dict(sum=0, bracket=1, digits=2, rest=0, distance=1, square=2, halves=0, largest=1)
    assert places == {(f, 0 if "narrow" in file else place) for f, place in habits.items()}
    assert {len(p["numbers"]) for p in found} == {3, 4, 5}

def test_numbers_are_means_over_seeds(tmp_path):
    folders = [tmp_path / "seed_0", tmp_path / "seed_1"]
    for folder, score in zip(folders, [0.5, 0.7]):
        for run in folder / "sdpo", folder / "sdpo_ema":  # both have evaluated the base
            (run / "eval").mkdir(parents=True)
            (run / "ended").touch()
            (run / "config.json").write_text('{"model": "toy/model", "enable_thinking": true}')
            for step, value in ((0, 0.9), (10, score / 2), (20, score)):
                row = dict(score=value, length=40.0, epistemic=1.0)
                (run / f"eval/step_{step}.json").write_text(json.dumps({"ood": row}))
            (run / "metrics.jsonl").write_text("".join(json.dumps(
                dict(score=n / 20, length=40.0, epistemic=1.0)) + "\n" for n in range(20)))
    ends, curves = study.numbers(folders)
    assert ends["sdpo"]["ood"]["score"] == [0.6, round(0.02 ** 0.5, 4), 2]
    assert ends["base"]["ood"]["score"] == [0.9, 0.0, 2]
    assert ends["sdpo"]["training"]["score"] == [0.725, 0.0, 2]  # of the last ten steps
    assert [row["score"][0] for row in curves["sdpo"]["ood"].values()] == [0.9, 0.3, 0.6]

def test_every_arm_of_the_tables_is_run():
    names = {name for group in study.GROUPS for name in study.runs(group, "o")}
    arms = {arm for _, rows in study.TABLES.values() for row in rows.values()
            for arm in row.split()}
    arms |= {f"{m}_{arm}" for arm, *_ in study.DOMAIN_ROWS.values() for m in ("grpo", "sdpo")}
    assert {a for a in arms if not a.startswith(("context_", "sft_", "base"))} <= names


def test_token_kl_is_weighed_by_counts_over_seeds(tmp_path):
    for seed, kl in enumerate([30.0, 90.0]):
        folder = tmp_path / f"seed_{seed}/token_kl"
        folder.mkdir(parents=True)
        tokens = {5: dict(text=" Wait", kl=kl, count=30), 6: dict(text=" no", kl=0.0, count=30),
                  7: dict(text=" rare", kl=9.0, count=1)}
        (folder / "token_kl.json").write_text(json.dumps(tokens))
    assert study.token_kl(tmp_path)[1:] == [["‘ Wait’", "2.000", "60", "2.0"]]
