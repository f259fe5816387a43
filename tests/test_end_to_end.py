"""The real scripts, with real vLLM, on the toy. Each run is its own process, as a user's would be."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "toy/data"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def run(*command, cwd=ROOT):
    result = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True,
                            env=dict(os.environ, PYTHONPATH=str(ROOT)), timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of 3 SDPO steps on 2 ranks: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    small = folder / "small.jsonl"
    small.write_text("".join((DATA / "in.jsonl").read_text().splitlines(True)[:10]))
    said = run(*TORCHRUN, 2, "sdpo.py", "--model", "toy/model", "--data", DATA / "train.jsonl",
               "--eval_data", small, "--questions_per_step", 8, "--minibatch_questions", 4,
               "--rollouts", 4, "--max_response_tokens", 400, "--lr", "1e-4", "--warmup_steps", 1,
               "--steps", 3, "--eval_every", 2, "--save_every", 2, "--ema", "0.05",
               "--tokens_per_micro_batch", 2000, "--run_dir", folder / "run")
    return folder / "run", said


def test_run_folder(trained):
    folder, said = trained
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == "sdpo.py" and config["world_size"] == 2 and config["lr"] == 1e-4
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        assert 0 < m["score"] <= 1 and m["length"] > 10 and m["epistemic"] > 1
        assert m["loss"] > 0 and m["updates"] == 2 and m["grad_norm"] > 0
        assert m["mismatch"] < 1e-4 and 0 < m["mismatch_max"] < 1e-2
        assert set(m["seconds"]) >= {"rollout", "update", "sync"} and m["peak_memory_gb"] > 0
    assert sorted(p.name for p in (folder / "eval").iterdir()) == [
        f"step_{n}.{suffix}" for n in (0, 2, 3) for suffix in ("json", "jsonl")]
    assert len((folder / "eval/step_3.jsonl").read_text().splitlines()) == 10
    assert sorted(p.name for p in (folder / "rollouts").iterdir()) == [
        "step_1.jsonl", "step_2.jsonl", "step_3.jsonl"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_2", "step_3"]
    assert "step   3  score" in said and "Traceback" not in said


ENGINE = """
import sys, torch, json
from argparse import Namespace
import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer
import sdpo
args = Namespace(model=sys.argv[1], seed=0, max_prompt_tokens=512, max_response_tokens=200,
                 temperature=0.7, tokens_per_micro_batch=4000, top_k=5, alpha=0.5)
device = sdpo.start_process_group()
llm = sdpo.make_engine(args, device, "float32")
tokenizer = AutoTokenizer.from_pretrained(args.model)
questions = sdpo.with_prompts(sys.argv[2], tokenizer, Namespace(**vars(args), enable_thinking=True))
model = AutoModelForCausalLM.from_pretrained(sys.argv[3], dtype=torch.float32)
student = sdpo.Student(model, args, device)

def gaps():
    groups = sdpo.generate(llm, questions, 2, 0, 200, temperature=args.temperature)
    rollouts = [r for group in groups for r in group]
    ours = sdpo.trainer_logprobs(student, rollouts)
    gaps = [np.abs(ours[id(r)].numpy() - r.logprobs) for r in rollouts]
    again = sdpo.generate(llm, questions, 2, 0, 200, temperature=args.temperature)
    same = all(a.response_ids == b.response_ids for a, b in
               zip(rollouts, [r for group in again for r in group]))
    return gaps, dict(max=float(max(g.max() for g in gaps)), repeats=same)

stale, stale_stats = gaps()
try:
    sdpo.check_engine([dict(gap=float(sum(g.sum() for g in stale)),
                            tokens=sum(map(len, stale)))], device)
    noticed = False
except SystemExit:
    noticed = True
sdpo.sync_weights(llm, model)
fresh, fresh_stats = gaps()
print("RESULT", json.dumps(dict(stale=stale_stats, fresh=fresh_stats, noticed=noticed)))
llm.llm_engine.engine_core.shutdown()
"""


@pytest.fixture(scope="session")
def engine(tmp_path_factory, trained):
    """An engine loaded with the trained checkpoint, then given the base weights."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "job.py").write_text(ENGINE)
    small = folder / "small.jsonl"
    small.write_text("".join((DATA / "in.jsonl").read_text().splitlines(True)[:16]))
    # far from the base, so that being stale shows: a trained checkpoint with noise on top
    from transformers import AutoModelForCausalLM, AutoTokenizer
    import torch
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(trained[0] / "checkpoints/step_3")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(ROOT / "toy/model").save_pretrained(folder / "model")
    said = run(sys.executable, folder / "job.py", folder / "model", small, ROOT / "toy/model")
    return json.loads(said.split("RESULT", 1)[1].splitlines()[0])


def test_after_a_sync_vllm_agrees_with_the_trainer(engine):
    assert engine["fresh"]["max"] < 1e-4


def test_a_stale_engine_is_stopped(engine):
    assert engine["stale"]["max"] > 1e-2 and engine["noticed"]


def test_rollouts_repeat_bit_for_bit_under_one_seed(engine):
    assert engine["fresh"]["repeats"] and engine["stale"]["repeats"]


def test_checkpoint_loads_in_transformers_and_vllm(trained, tmp_path):
    from transformers import AutoModelForCausalLM
    import torch

    checkpoint = trained[0] / "checkpoints/step_3"
    model, base = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)
                   for p in (checkpoint, ROOT / "toy/model"))
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters())]
    assert all(moved)
    said = run(*TORCHRUN, 2, "evaluate.py", "--model", checkpoint, "--data", DATA / "ood.jsonl",
               "--samples", 2, "--max_response_tokens", 64, "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out/summary.json").read_text())["benchmarks"]["ood"]
    records = (tmp_path / "out/ood.jsonl").read_text().splitlines()
    assert summary["questions"] == 200 and len(records) == 400
    assert [json.loads(r)["index"] for r in records] == [i for i in range(200) for _ in range(2)]
    assert "score" in said and "Traceback" not in said
    table = run(sys.executable, "epistemic.py", tmp_path / "out/ood.jsonl")
    assert f"{summary['epistemic']:.2f}" in table


def test_report(trained, tmp_path):
    """The demo's table and picture, from the files of a run."""
    (tmp_path / "sdpo").symlink_to(trained[0])
    for name, accuracy in (("before", 0.75), ("after", 0.25)):
        (tmp_path / name).mkdir()
        row = dict(score=accuracy, length=100.0, epistemic=9.5)
        (tmp_path / name / "summary.json").write_text(
            json.dumps(dict(samples=4, benchmarks=dict(ood=row))))
    said = run(sys.executable, "report.py", tmp_path)
    assert "0.750" in said and "0.250" in said
    assert (tmp_path / "sdpo.png").read_bytes()[:4] == b"\x89PNG"
