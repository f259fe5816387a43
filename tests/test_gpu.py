"""On a GPU: two steps of the toy with its bfloat16, sleeping vLLM and NCCL, and a resume. Anywhere:
benchmarks/gpu.py itself, on the toy.

`make test` runs this file with the GPU's environment, too; all others use the CPU's.
"""
import subprocess
import sys

import pytest
import torch

from common import DATA, ROOT, Job, few, lines


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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
    assert all(row["grad_norm"] > 0 and row["mismatch"] < 0.1 for row in rows)
    first, last = (lines(tmp_path / f"run/eval/step_{step}.jsonl") for step in (0, 2))
    assert len(first) == len(last) == 8 and sum(r["correct"] for r in first) >= 4


@pytest.mark.vllm
def test_the_benchmark_of_a_gpu(tmp_path):
    said = Job(tmp_path / "log", "benchmarks/gpu.py", 1, "--model", "toy/model", "--profile",
               "--max_response_tokens", 160, "--tokens_per_micro_batch", 600).end()
    assert "Self CPU time total" in said
    rows = [[cell.strip() for cell in line.strip("| ").split("|")]
            for line in said.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[3][1] == "32 of 16 to 64" and rows[4][1] == "8 of 160 to 160"
    assert all(float(row[3]) < (0.1 if torch.cuda.is_available() else 1e-4) for row in rows[:2])
    assert all(0 < float(row[11].rstrip("%")) for row in rows)
