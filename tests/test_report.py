"""extras/report.py and toy/picture.py on folders written here, with numbers worked out by hand."""
import json
import sys

import pytest
from PIL import Image

from common import refusal
from extras import report
from toy import picture

SAME = dict(model="toy/model", enable_thinking=True, questions_per_step=8, seed=0)
RIGHT, WRONG = (1,) * 40, (0,) * 30 + (1,) * 10


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(benchmarks, corrects, text):
    """One answer a question, graded as told."""
    return [dict(benchmark=benchmark, index=i, question="What is 1 + 2?", answer="3",
                 response=text, correct=float(correct), tokens=10 + i)
            for benchmark in benchmarks for i, correct in enumerate(corrects)]


def train(folder, script, after, text="So 3.", training=(0.5,), benchmarks=["aime24"], **flags):
    """A training run: its scores on the way; before it all answers are right, and what then."""
    usual = dict(data="dapo", num_questions=None, lr=1e-5 if script == "sdpo" else 1e-6)
    write(folder / "config.json", dict(SAME, script=f"{script}.py") | usual | flags)
    write(folder / "metrics.jsonl", *(dict(step=i, score=s, length=100.0, epistemic=4.0)
                                      for i, s in enumerate(training, 1)))
    write(folder / "eval/step_0.jsonl", *answers(benchmarks, (1,) * len(after), "Wait, maybe 3."))
    write(folder / f"eval/step_{len(training)}.jsonl", *answers(benchmarks, after, text))


def sdpo_score(folder, benchmark):
    (setting,) = report.settings(report.load_runs(folder))
    return setting.arms["SDPO"].text("score", benchmark)


def verdicts(folder):
    return {row[0].partition(" (")[0]: row[1:] for s in report.settings(report.load_runs(folder))
            for rows in report.claims(s) for row in rows[1:]}


def test_the_names_of_the_readme(tmp_path, capsys):
    """A run is what its config says: runs/grpo_8b is GRPO, runs/sdpo_8b SDPO, and so on."""
    train(tmp_path / "grpo_8b", "grpo", RIGHT, text="Wait, maybe 3.")
    train(tmp_path / "sdpo_8b", "sdpo", WRONG, text="<script>alert(1)</script> wait \ud800")
    train(tmp_path / "sdpo_7b_ema", "sdpo", (0,) * 40, ema=0.05)
    train(tmp_path / "srpo", "remedies", RIGHT, remedy="srpo", strength=1.0)
    for name, corrects in dict(base=RIGHT, d_ug=RIGHT, d_sg=WRONG, banned=WRONG).items():
        run, result = tmp_path / f"sft/{name}", dict(SAME, top_k=20, script="evaluate.py")
        if name.startswith("d_"):
            write(run / "config.json", dict(SAME, script="sft_distill.py", data=f"x/{name}.jsonl"))
            write(run / "metrics.jsonl", dict(step=1, loss=0.5))
            result["model"] = str(run / "checkpoints/step_75")
        result |= dict(control="banned") if name == "banned" else {}
        write(tmp_path / f"eval_7b/{name}/aime24.jsonl", *answers(["aime24"], corrects, "So 3."))
        write(tmp_path / f"eval_7b/{name}/aime24.json", result)
    write(tmp_path / "eval_7b/summary.json", {})
    write(tmp_path / "conditions/config.json", dict(SAME, data="dapo"))
    for context in "unguided", "without_think", "regenerated", "full", "uncertain":
        text = "Wait." if context == "unguided" else "So 3."
        write(tmp_path / f"conditions/{context}.jsonl", *answers([context], RIGHT, text))
    write(tmp_path / "token_kl.json", {"1": dict(text=" wait", kl=30.0, count=100), "2": dict(
        text="Wait", kl=1.0, count=10), "3": dict(text=" waits", kl=10.0, count=100)})
    found = verdicts(tmp_path)
    assert found["Table 1: all of it, fewer still"][0] == "too close"
    for claim in ("Table 1: part of a solution, fewer markers", "Figure 3: SDPO loses it",
                  "Table 2: SFT on d_ug keeps the score", "Table 2: SFT on d_sg loses it",
                  "Figure 3: GRPO keeps the score", "Figure 6: more, if the teacher follows"):
        assert found[claim][0] == "yes"
    report.report(tmp_path)
    assert "GRPO 1.000±0.000 q ≈ Base 1.000±0.000 q (step 1)" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Remedies" in page and "srpo, strength 1.0 (step 1, seeds 1)" in page
    assert "Base, control banned (step 0, seeds 1)" in page
    assert "wait</mark>’<td>0.300<td>100<td>1.5" in page  # the frequent ones' mean: (.3 + .1) / 2
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "<mark>wait" in page


def test_only_equal_flags_at_a_common_step_stand_in_a_claim(tmp_path):
    train(tmp_path / "sdpo", "sdpo", WRONG, training=(0.5,) * 3)
    train(tmp_path / "grpo", "grpo", RIGHT, questions_per_step=12)
    assert not any("GRPO" in ours and "SDPO" in ours for _, ours in verdicts(tmp_path).values())
    train(tmp_path / "grpo", "grpo", RIGHT, training=(0.5,) * 2)
    assert "(step 2)" in verdicts(tmp_path)["Figure 1b: GRPO learns more than SDPO"][1]
    assert "Figures 3, 4: more than GRPO" not in verdicts(tmp_path)  # no evaluation in common


def test_a_narrow_domain_makes_its_own_claims_and_the_picture(tmp_path, monkeypatch):
    for data, sdpo, grpo in (("narrow", RIGHT, WRONG), ("coverage", WRONG, RIGHT)):
        for script, after in (("sdpo", sdpo), ("grpo", grpo)):
            train(tmp_path / f"{data}_{script}", script, after, "Wait \ud800 $x_$. \\boxed{4}",
                  benchmarks=[f"{data}_test", "ood"], data=f"toy/data/{data}.jsonl")
    found = verdicts(tmp_path)
    assert found["Figure 1a: SDPO learns more than GRPO"][0] == "yes"
    assert "> SDPO 0.250" in found["Figure 1b: GRPO learns more than SDPO"][1]
    monkeypatch.setattr(sys, "argv", ["picture.py", str(tmp_path)])
    picture.main()
    assert Image.open(tmp_path / "demo.png").width == 1600


def test_an_error_is_the_larger_of_that_over_seeds_and_over_questions(tmp_path):
    for seed, after in enumerate([(1, 1, 1, 1), (1, 1, 1, 0), (1, 1, 0, 0)]):
        train(tmp_path / f"seed_{seed}/a", "sdpo", after, seed=seed)
    # seeds: stdev(1, .75, .5) / sqrt(3) = .144; questions: stdev(1, 1, 2/3, 1/3) / 2 = .160
    assert sdpo_score(tmp_path, "aime24") == "0.750±0.160 q"
    for seed, correct in enumerate([1, 0, 1]):  # the same answers to all questions
        train(tmp_path / f"seed_{seed}/a", "sdpo", (correct,) * 4, seed=seed)
    assert sdpo_score(tmp_path, "aime24") == "0.667±0.333 s"


def test_training_is_the_mean_of_the_last_five_steps(tmp_path):
    train(tmp_path / "run", "sdpo", WRONG, training=(0.9, 0.1, 0.2, 0.3, 0.4, 0.5))
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "sco')  # it is still being written
    assert sdpo_score(tmp_path, "training") == "0.300±0.071 q"


def test_few_and_many_questions(tmp_path):
    for size, sdpo, grpo in ((8, 1.0, 0.5), (512, 0.2, 0.8)):
        train(tmp_path / f"a{size}", "sdpo", WRONG, training=(sdpo,) * 5, num_questions=size)
        train(tmp_path / f"b{size}", "grpo", RIGHT, training=(grpo,) * 5, num_questions=size)
    found = verdicts(tmp_path)
    assert found["Figure 7: few questions SDPO learns"][0] == "yes"
    assert found["Figure 7: many less than GRPO"][0] == "yes"


@pytest.mark.parametrize("file, text", [
    ("metrics.jsonl", '{"step": 1, "sco\n{}\n'), ("metrics.jsonl", '{"step": 1, "score": 1}\n'),
    ("config.json", "[]"), ("eval/step_1.jsonl", '{"index": 0}\n'), ("eval/step_1.jsonl", '{"ind')])
def test_a_broken_file_is_named(tmp_path, monkeypatch, file, text):
    train(tmp_path / "run", "sdpo", WRONG)
    (tmp_path / "run" / file).write_text(text)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    assert f"{file}, row 1: " in refusal(report.main)
