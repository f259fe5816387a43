"""report.py on folders written here, whose numbers are worked out by hand."""
import html
import json
import re
import struct
import sys

import pytest

import epistemic
import report
from common import refusal


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(benchmark, corrects, text="Wait, maybe 3.", **more):
    """One answer a question, graded as told."""
    return [epistemic.record(text, float(c), 10 + i, True, benchmark=benchmark, index=i,
                             answer="3", **more) for i, c in enumerate(corrects)]


def run(folder, scores=(0.5, 0.25), ood=(1, 1, 0, 1), text="So 3.", name="sdpo", **config):
    """A training run: what it did on the way, its evaluation before and after."""
    write(folder / "config.json", dict(model="toy/model", script=f"{name}.py", **config))
    write(folder / "metrics.jsonl", *(dict(step=i, score=s, length=100.0, epistemic=4.0)
                                      for i, s in enumerate(scores, 1)))
    ends = {0: answers("ood", (1, 1, 1, 1)), len(scores): answers("ood", ood, text)}
    for step, records in ends.items():
        write(folder / f"eval/step_{step}.jsonl", *records)
        write(folder / f"eval/step_{step}.json", {"ood": epistemic.averages(records)})


def evaluation(folder, models, benchmark="ood", samples=1, **more):
    """evaluate.py's folder, of {model: what is right}."""
    table = {}
    for name, corrects in models.items():
        records = answers(benchmark, corrects, question="What is 1 + 2?")
        write(folder / name / f"{benchmark}.jsonl", *records)
        table[name] = {benchmark: dict(epistemic.averages(records), samples=samples, **more)}
    write(folder / "summary.json", dict(models=table))


@pytest.fixture(autouse=True)
def afresh():
    report.pictures.clear()
    report.unread.clear()


@pytest.fixture
def made(monkeypatch, capsys, tmp_path):
    """Runs the command; gives (what it printed, the page). Draws only if told: that takes time."""
    def make(*folders, out=tmp_path / "out", draw=False):
        if not draw:
            monkeypatch.setattr(report, "panel", lambda title, *_, **__: (
                f'<img alt="{html.escape(title)}">'))
            monkeypatch.setattr(report, "overview", lambda path: None)
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, folders), "--out", str(out)])
        report.main()
        return capsys.readouterr().out, (out / "report.html").read_text()
    return make


def row(page, name):
    """The cells of the row of this name, first of the page."""
    return re.search(rf"<tr><th>{re.escape(name)}<td>(.*?)</tr>", page)[1].split("<td>")


def test_numbers_of_one_seed(made, tmp_path):
    run(tmp_path / "runs/sdpo", scores=(0.9, 0.1, 0.2, 0.3, 0.4, 0.5))
    said, page = made(tmp_path / "runs")
    # training: the last five; ood: 3 of 4, its error stdev(1, 1, 0, 1) / 2
    assert row(page, "sdpo")[0] == "0.300" and row(page, "base")[0] == "0.900"
    assert row(page, "sdpo")[3:6] == ["0.750 ± 0.250", "12 ± 1", "0.0 ± 0.0"]
    assert row(page, "base")[3:6] == ["1.000 ± 0.000", "12 ± 1", "2.0 ± 0.0"]
    assert "one seed" in said and "0.750 ± 0.250" in said


def test_seeds_are_one_arm(made, tmp_path):
    for seed, ood in enumerate([(1, 1, 1, 1), (1, 1, 1, 0), (1, 1, 0, 0)]):
        run(tmp_path / f"runs/seed_{seed}/sdpo", ood=ood)
    for folders in ([tmp_path / "runs"], sorted((tmp_path / "runs").iterdir())):
        said, page = made(*folders)
        assert row(page, "sdpo")[3] == "0.750 ± 0.144"  # stdev(1, .75, .5) / sqrt(3)
        assert "3 seeds" in said
    assert {f.name for f in report.find([tmp_path / "runs/seed_0/sdpo"])} == {"sdpo"}


def test_runs_of_one_name_in_two_places_are_two_arms(tmp_path):
    for place in ("a", "b"):
        run(tmp_path / place / "sdpo")
    assert [f.name for f in report.find([tmp_path])] == ["a/sdpo", "b/sdpo"]
    assert [f.name for f in report.find([tmp_path / "a", tmp_path / "b"])] == ["a/sdpo", "b/sdpo"]


def test_a_benchmark_that_only_sft_has(made, tmp_path):
    """It was a KeyError."""
    run(tmp_path / "runs/grpo")
    evaluation(tmp_path / "runs/sft/eval", {"model": (1, 1), "d_sg/step_9": (1, 0)}, "aime24")
    said, page = made(tmp_path / "runs")
    assert row(page, "SFT on d_sg")[0] == "0.500 ± 0.500" and "SFT on d_sg" in said


def test_contexts(made, tmp_path):
    folder = tmp_path / "conditions"
    means = {}
    for context, text in dict(unguided="Hmm, wait.", full="So 3.").items():
        records = answers(context, (1, 0), text)
        write(folder / f"{context}.jsonl", *records)
        means[context] = epistemic.averages(records)
    write(folder / "summary.json", dict(contexts=means))
    said, page = made(folder)
    assert row(page, "unguided") == ["0.500 ± 0.500", "10 ± 0", "2.0 ± 0.0"]
    assert "Table 1" in said and "Figure 9" in page
    assert "Where the runs ended: left out, there is no metrics.jsonl" in page


def test_a_run_that_goes_on(made, tmp_path):
    run(tmp_path / "sdpo")
    with open(tmp_path / "sdpo/metrics.jsonl", "a") as f:
        f.write('{"step": 3, "sco')
    _, page = made(tmp_path / "sdpo")
    assert row(page, "sdpo")[0] == "0.375" and "metrics.jsonl: line 3 is no JSON object" in page
    for path in (tmp_path / "sdpo/eval").iterdir():  # nor has it been evaluated yet
        path.unlink()
    assert row(made(tmp_path / "sdpo")[1], "sdpo")[0] == "0.375"


def test_model_text_is_escaped(made, tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror="f()"> wait \ud800 </pre>'
    run(tmp_path / "runs/<b>sdpo", text=evil)
    write(tmp_path / "runs/<b>sdpo/eval/step_2.judged.jsonl",
          dict(index=0, model="m", expressions=["<script>2"], count=1))
    write(tmp_path / "runs/<b>sdpo/errors.json", {"<script>3": {"<script>4": 1}})
    write(tmp_path / "runs/<b>sdpo/token_kl.json", {"5": dict(text=" wait", kl=1.0, count=50)})
    _, page = made(tmp_path / "runs")
    assert "<script" not in page and "<b>sdpo" not in page and "onerror=\"" not in page
    assert "&lt;script&gt;alert(1)" in page and "&lt;script&gt;2" in page
    assert not re.search(r"(src|href)=.?(http|//)", page)  # nothing from the network


def test_traces(made, tmp_path):
    """Those questions first on which the models differ; markers as epistemic counts them."""
    run(tmp_path / "sdpo", ood=(1, 1, 1, 0), text="Unlikely. WAIT, checking.")
    _, page = made(tmp_path / "sdpo")
    details = re.findall("<details>.*?</details>", page, flags=re.S)
    assert len(details) == 4 and "Question 3" in details[0]
    assert "base: right" in details[0] and "sdpo: wrong" in details[0]
    assert details[0].count("<mark>") == epistemic.count("Wait, maybe 3. Unlikely WAIT checking")
    assert "4 of 4 questions" in page


def test_a_long_answer_says_what_is_left_out():
    text = "a" * 15_000 + "wait" + "b" * 15_000
    assert "[10,004 letters are left out here]" in report.highlighted(text)
    assert report.highlighted("x < wait") == "x &lt; <mark>wait</mark>"


def test_the_page_stays_small_with_thousands_of_answers(made, tmp_path):
    run(tmp_path / "sdpo", ood=(1, 0) * 1000, text="wait " * 300)
    write(tmp_path / "sdpo/eval/step_0.jsonl", *answers("ood", (1,) * 2000, "maybe " * 300))
    _, page = made(tmp_path / "sdpo")
    assert len(page) < 200_000 and "6 of 2000 questions" in page


def test_word_shifts():
    """App. B.4, by hand: the base says wait 2, x 1; the model wait 0, x 2, new 5 (not counted)."""
    base, new = ({}, dict(wait=2.0, x=1.0)), ({}, dict(x=2.0, new=5.0))
    assert report.word_shifts([(base, new)]) == (dict(wait=-2.0), dict(x=1.0), 2.0)


def test_runs_that_differ_in_one_flag(made, tmp_path):
    for size in (8, 64):
        run(tmp_path / f"runs/sdpo_{size}", num_questions=size, ema=0.0, seed=size)
        run(tmp_path / f"runs/families_{size}", num_questions=9, ema=0.0,
            data=f"toy/families_{size}.jsonl")
    run(tmp_path / "runs/sdpo_ema", num_questions=8, ema=0.05)
    found = report.find([tmp_path / "runs"])
    ((model, arms),) = report.configs(found).items()
    assert [list(g) for g in report.alike(arms, "num_questions")] == [["sdpo_8", "sdpo_64"]]
    assert [list(g) for g in report.alike(arms, "ema")] == [["sdpo_8", "sdpo_ema"]]
    assert report.alike(arms, "lr") == [] and report.families(arms["families_8"]) == 8
    _, page = made(tmp_path / "runs")
    for title in ("Figure 6", "Figure 7", "Figure 8: over |D|", "Figure 8 over K"):
        assert f"<h2>{title}" in page
    assert "Figure 20a: top-k of the loss: left out" in page


def test_checkpoints_and_pass_at(made, tmp_path):
    evaluation(tmp_path / "eval", {"model": (1, 1), "sdpo/step_9": (1, 0), "sdpo/step_10": (0, 0)},
               samples=2, pass_at={"1": 0.5, "2": 0.75})
    _, page = made(tmp_path / "eval")
    assert row(page, "sdpo")[0] == "0.000 ± 0.000"  # step 10, not 9
    assert 'alt="eval: ood pass@2"' in page and row(page, "sdpo")[3] == "0.750"


def test_table_6(made, tmp_path):
    run(tmp_path / "sdpo")
    write(tmp_path / "sdpo/token_kl.json", {
        "1": dict(text=" wait", kl=30.0, count=100), "2": dict(text="Wait", kl=1.0, count=10),
        "3": dict(text=" waits", kl=10.0, count=100)})
    _, page = made(tmp_path / "sdpo")
    # the mean over frequent tokens: (.3 + .1) / 2
    assert "<tr><th>wait<td>‘ wait’<td>0.300<td>100<td>1.5 x</tr>" in page
    assert "<tr><th>wait<td>‘Wait’<td>0.100<td>10<td>0.5 x</tr>" in page
    assert "2 tokens" in page and "waits" not in page


def test_judge_and_errors(made, tmp_path):
    run(tmp_path / "sdpo")
    write(tmp_path / "sdpo/eval/step_2.judged.jsonl",
          dict(index=0, model="m", expressions=["not sure", "maybe"], count=2),
          dict(index=1, model="m", expressions=["not sure"], count=4),
          dict(index=2, model="m", expressions=None, count=None))
    write(tmp_path / "sdpo/errors.json", {"sdpo": {"slip": 7, "early": 3}})
    _, page = made(tmp_path / "sdpo")
    assert row(page, "sdpo eval/step_2") == ["0", "2", "3.00 ± 1.00", "not sure; maybe"]
    assert "<th>slip<th>early</tr><tr><th>sdpo<td>7<td>3</tr>" in page


def test_pictures(made, tmp_path):
    """Every kind of drawing once."""
    for seed in (0, 1):
        for size in (8, 64):
            run(tmp_path / f"runs/seed_{seed}/sdpo_{size}", num_questions=size)
    write(tmp_path / "runs/seed_0/sdpo_8/eval/step_2.judged.jsonl", dict(count=2), dict(count=4))
    _, page = made(tmp_path / "runs", draw=True)
    assert page.count("data:image/png;base64,iVBOR") == len(report.pictures)
    kinds = " ".join(report.pictures)
    for kind in ("training_score", "at_the_end", "toy_model_ood", "uncertainty_expressions"):
        assert kind in kinds
    for file in [*(tmp_path / "out/figures").iterdir(), tmp_path / "out/report.png"]:
        width, height = struct.unpack(">II", file.read_bytes()[16:24])
        assert width >= 500 and height >= 150


def test_a_band_goes_from_the_lowest_seed_to_the_highest():
    _, axis = report.pyplot.subplots()
    report.lines(axis, dict(sdpo=[{0: 1.0, 1: 2.0}, {0: 3.0}]))
    assert axis.lines[0].get_ydata().tolist() == [2, 2]  # at step 1 there is one seed as yet
    assert {tuple(p) for p in axis.collections[0].get_paths()[0].vertices} == {
        (0, 1), (0, 3), (1, 2)}
    report.pyplot.close()


def test_nothing_to_report(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    assert "no metrics.jsonl and no summary.json" in refusal(report.main)
