"""On a GPU alone: two steps of the toy with its bfloat16, sleeping vLLM and NCCL, and a resume.

`make test` runs this file with the GPU's environment; all others use the CPU's.
"""
import subprocess
import sys

import pytest
import torch

from common import DATA, ROOT, few, lines

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("script", ["sdpo", "grpo"])
def test_two_steps_and_a_resume(script, tmp_path):
    command = [sys.executable, f"{script}.py", "--model", "toy/model", "--run_dir", tmp_path / "run",
               "--data", DATA / "coverage.jsonl", "--eval_data", few(DATA / "in.jsonl", 8, tmp_path),
               "--questions_per_step", 8, "--minibatch_questions", 4, "--max_response_tokens", 320,
               "--lr", 1e-4, "--warmup_steps", 0, "--save_every", 1, "--steps"]
    for steps in (1, 2):  # the second command resumes after the first step
        ended = subprocess.run([*map(str, command), str(steps)], cwd=ROOT, text=True,
                               capture_output=True, timeout=900)
        assert ended.returncode == 0, ended.stderr[-2000:]
    assert "resumes after step 1" in ended.stdout
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["updates"] == 2 and row["mismatch"] < 0.1 for row in rows)
    first, last = (lines(tmp_path / f"run/eval/step_{step}.jsonl") for step in (0, 2))
    assert len(first) == len(last) == 8 and sum(r["correct"] for r in first) >= 4
