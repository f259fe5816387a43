"""evaluate.py: pass@k against enumeration, the summary by hand, Table 11."""
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_against_enumeration(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        marks = [1] * correct + [0] * (n - correct)
        draws = [any(draw) for draw in itertools.combinations(marks, k)]
        assert evaluate.pass_at_k(n, correct, k) == pytest.approx(sum(draws) / len(draws))


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_of_too_few_answers(k):
    with pytest.raises(ValueError):
        evaluate.pass_at_k(3, 1, k)


def test_summary_by_hand():
    records = [dict(index=i, correct=c, tokens=t, finished=f, epistemic=e) for i, c, t, f, e in [
        (0, 1.0, 10, True, 1), (0, 1.0, 20, True, 2), (1, 0.0, 30, False, 3), (1, 1.0, 40, True, 6)]]
    s = evaluate.summarise(records, 2)
    assert s["questions"] == 2 and s["score"] == 0.75 and s["pass_at"] == {1: 0.75, 2: 1.0}
    assert s["length"] == 25 and s["truncated"] == 0.25 and s["epistemic"] == 3
    assert s["standard_error"] == pytest.approx(0.25)  # accuracies 1 and .5, over 2 questions
    assert "0.750" in evaluate.table(dict(amc23=s))


@pytest.mark.parametrize("model_type, template, thinking, expected", [
    ("qwen2", "<｜Assistant｜><think>\n", True, (0.6, 0.95, 20)),
    ("qwen3", "<|im_start|>", True, (0.6, 0.95, 20)),
    ("qwen3", "<|im_start|>", False, (0.7, 0.8, 20)),
    ("olmo3", "<|im_start|>", False, (0.6, 0.95, 20)),
])
def test_sampling_of_table_11(model_type, template, thinking, expected):
    assert evaluate.SAMPLING[evaluate.family(model_type, template, thinking)] == expected


def test_defaults_are_the_papers():
    args = evaluate.parse_args(["--model", "x"])
    assert (args.samples, args.max_response_tokens) == (16, 38912)
    assert args.data == ["aime24", "aime25", "amc23", "math500"]


@pytest.mark.parametrize("flags, said", [
    (["--model", "no/such"], "--model no/such"),
    (["--data", "no/such.parquet"], "no/such.parquet"),
    (["--data", "a/in.jsonl", "b/in.jsonl"], "two benchmarks have one name"),
    (["--out", "full"], "--out full already holds results"),
    (["--samples", "0"], "--samples"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, flags, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/summary.json").write_text("precious")
    for name, value in {"--model": str(ROOT / "toy/model"),
                        "--data": str(ROOT / "toy/data/in.jsonl")}.items():
        flags = flags if name in flags else [*flags, name, value]
    result = subprocess.run([sys.executable, ROOT / "evaluate.py", *flags], cwd=tmp_path,
                            env=dict(os.environ, HF_HUB_OFFLINE="1"), capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert said in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert (tmp_path / "full/summary.json").read_text() == "precious"
