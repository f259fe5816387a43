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
        assert {"rollout", "update", "sync"} <= set(m["seconds"]) == set(m["peak_memory_gb"])
        assert all(0.1 < gb < 50 for gb in m["peak_memory_gb"].values())
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
llm = sdpo.make_engine(args, device, 0.5)
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


@pytest.fixture(scope="session")
def rewarded(tmp_path_factory):
    """A run of 2 GRPO steps on 2 ranks, on |D| = 4 of the hardest questions."""
    folder = tmp_path_factory.mktemp("grpo") / "run"
    said = run(*TORCHRUN, 2, "grpo.py", "--model", "toy/model", "--data", DATA / "ood.jsonl",
               "--num_questions", 4, "--eval_data", few(DATA / "ood.jsonl", 10, folder.parent),
               "--questions_per_step", 8, "--minibatch_questions", 4, "--rollouts", 8,
               "--max_response_tokens", 400, "--lr", "1e-4", "--warmup_steps", 1, "--steps", 2,
               "--save_every", 2, "--tokens_per_micro_batch", 2000, "--run_dir", folder)
    return folder, said


def few(path, n, folder):
    """The first n questions of a file, as a file."""
    small = folder / f"few_{path.stem}.jsonl"
    small.write_text("".join(path.read_text().splitlines(True)[:n]))
    return small


def test_grpo_on_two_ranks(rewarded):
    folder, said = rewarded
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2]
    for m in metrics:
        assert 0 < m["trained"] < 1 and m["updates"] >= 1 and m["grad_norm"] > 0
        assert m["mismatch"] < 1e-4 and m["mismatch_max"] < 1e-2
    chosen = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    everything = [json.loads(line) for line in (DATA / "ood.jsonl").read_text().splitlines()]
    assert len(chosen) == 4 and all(q["prompt"] in [e["prompt"] for e in everything] for q in chosen)
    assert (folder / "checkpoints/step_2/model.safetensors").exists() and "Traceback" not in said
    rows = [json.loads(line) for line in (folder / "rollouts/step_1.jsonl").read_text().splitlines()]
    assert {r["row"] for r in rows} == set(range(8))  # 4 questions fill a batch of 8


def conditions(folder):
    """generate_conditions.py on 2 ranks, two rounds of 12 hard questions."""
    return run(*TORCHRUN, 2, "generate_conditions.py", "--model", "toy/model",
               "--data", few(DATA / "ood.jsonl", 24, folder), "--samples", 4,
               "--accuracy", 0.25, 0.75, "--num_questions", 3, "--sft_examples", 1000,
               "--questions_per_round", 12, "--max_response_tokens", 400, "--out", folder / "out")


@pytest.fixture(scope="session")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditions")
    return folder, conditions(folder)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_conditions_on_two_ranks(studied):
    folder, said = studied
    out = folder / "out"
    assert "(4) regenerated" in said and "ran out after 24 questions" in said
    assert "Traceback" not in said
    summary = lines(out / "summary.json")[0]
    assert summary["questions"] >= 1 and summary["asked"] == 24
    asked = {}
    for context in ("unguided", "full", "without_think", "regenerated", "uncertain"):
        rows = lines(out / f"{context}.jsonl")
        assert len(rows) == 4 * summary["questions"]
        asked[context] = [r["index"] for r in rows]
        assert summary["contexts"][context]["epistemic"] == pytest.approx(
            sum(r["epistemic"] for r in rows) / len(rows))
    assert len({str(indices) for indices in asked.values()}) == 1  # the same questions in all
    full, unguided = (summary["contexts"][c] for c in ("full", "unguided"))
    assert full["epistemic"] < unguided["epistemic"] and full["length"] < unguided["length"]
    d_ug, d_sg = lines(out / "d_ug.jsonl"), lines(out / "d_sg.jsonl")
    assert len(d_ug) == len(d_sg) == summary["pairs"] > 0
    assert [r["prompt"] for r in d_ug] == [r["prompt"] for r in d_sg]
    assert all(len(r["prompt"]) == 1 and "Correct solution" not in r["prompt"][0]["content"]
               for r in d_ug + d_sg)


def test_conditions_resume_without_asking_again(studied):
    folder, said = studied
    out = folder / "out"
    rounds = {p: p.read_bytes() for p in (out / "rounds").iterdir()}
    summary = (out / "summary.json").read_text()
    again = conditions(folder)
    assert "round" not in again.split("answers in each context")[0]  # no question asked
    assert again.split("Table")[-1] and (out / "summary.json").read_text() == summary
    assert all(p.read_bytes() == before for p, before in rounds.items())
    # killed in the second round: the first is kept, and the second comes out as it did
    last = max(rounds)
    last.unlink()
    conditions(folder)
    assert all(p.read_bytes() == before for p, before in rounds.items())


def test_sft_on_two_ranks(studied, tmp_path):
    out = studied[0] / "out"
    said = run(*TORCHRUN, 2, "sft_distill.py", "--model", "toy/model", "--data", out / "d_ug.jsonl",
               out / "d_sg.jsonl", "--eval_data", few(DATA / "ood.jsonl", 10, tmp_path),
               "--eval_rollouts", 1, "--max_response_tokens", 400, "--batch_size", 8, "--epochs", 1,
               "--lr", "1e-4", "--tokens_per_micro_batch", 2000, "--run_dir", tmp_path / "run")
    assert "SFT on d_sg" in said and "Traceback" not in said
    rows = lines(tmp_path / "run/summary.json")[0]["rows"]
    assert list(rows) == ["base", "SFT on d_ug", "SFT on d_sg"]
    for name in ("d_ug", "d_sg"):
        metrics = lines(tmp_path / f"run/{name}/metrics.jsonl")
        assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
        assert all(m["loss"] > 0 and m["grad_norm"] > 0 for m in metrics)
        step = metrics[-1]["step"]
        assert lines(tmp_path / f"run/{name}/eval/step_{step}.json")[0] == {
            "few_ood": rows[f"SFT on {name}"]["few_ood"]}
        assert (tmp_path / f"run/{name}/checkpoints/step_{step}/model.safetensors").exists()


TIED = """
import sys, torch, json
from argparse import Namespace
import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer
import grpo
args = Namespace(model=sys.argv[1], seed=0, max_prompt_tokens=512, max_response_tokens=60,
                 temperature=1.0, tokens_per_micro_batch=4000, enable_thinking=True)
device = grpo.start_process_group()
llm = grpo.make_engine(args, device, 0.5)
questions = grpo.with_prompts(sys.argv[2], AutoTokenizer.from_pretrained(args.model), args)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
assert model.lm_head.weight is model.model.embed_tokens.weight
student, worst = grpo.Student(model, args, device), []
for _ in range(2):
    grpo.sync_weights(llm, model)
    rollouts = [r for group in grpo.generate(llm, questions, 2, 0, 60, temperature=1.0) for r in group]
    ours = grpo.trainer_logprobs(student, rollouts)
    worst.append(max(float(np.abs(ours[id(r)].numpy() - r.logprobs).max()) for r in rollouts))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
print("RESULT", json.dumps(worst))
llm.llm_engine.engine_core.shutdown()
"""


def test_tied_embeddings_sync(tmp_path):
    """Qwen3-1.7B ties its head to the embeddings: vLLM has to follow, on CPU too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    import torch

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "toy/model", dtype=torch.float32)
    model.config.tie_word_embeddings = True
    tied = AutoModelForCausalLM.from_config(model.config)
    tied.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(ROOT / "toy/model").save_pretrained(tmp_path / "model")
    (tmp_path / "job.py").write_text(TIED)
    said = run(sys.executable, tmp_path / "job.py", tmp_path / "model",
               few(DATA / "in.jsonl", 8, tmp_path))
    before, after = json.loads(said.split("RESULT", 1)[1].splitlines()[0])
    assert before < 1e-4 and after < 1e-4


def test_report(trained, rewarded, studied, tmp_path):
    """Tables and picture from the files of runs; two folders give means and deviations."""
    for seed in ("seed_0", "seed_1"):
        (tmp_path / seed).mkdir()
        (tmp_path / seed / "sdpo").symlink_to(trained[0])
        (tmp_path / seed / "conditions").symlink_to(studied[0] / "out")
    said = run(sys.executable, "report.py", tmp_path / "seed_0")
    summary = lines(studied[0] / "out/summary.json")[0]["contexts"]
    evaluated = lines(trained[0] / "eval/step_3.json")[0]["small"]
    assert f"{summary['regenerated']['length']:,.0f}" in said and "one seed" in said
    assert f"{evaluated['score']:.3f}" in said and f"{evaluated['epistemic']:.1f}" in said
    assert (tmp_path / "seed_0/report.png").read_bytes()[:4] == b"\x89PNG"
    said = run(sys.executable, "report.py", tmp_path / "seed_0", tmp_path / "seed_1")
    assert f"{evaluated['score']:.3f} ± 0.000" in said and "2 seeds" in said


def test_evaluation_goes_on(tmp_path):
    """Killed behind its first benchmark, it does the second, to the same bytes, and keeps the first."""
    sets = [few(DATA / f"{name}.jsonl", 6, tmp_path) for name in ("in", "ood")]
    command = [sys.executable, "evaluate.py", "--model", "toy/model", "--samples", 2, "--data", *sets,
               "--max_response_tokens", 100, "--out", tmp_path / "out"]
    run(*command)
    files = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    first, second = tmp_path / "out/few_in.jsonl", tmp_path / "out/few_ood.jsonl"
    (tmp_path / "out/summary.json").unlink()
    second.unlink()
    stamp = first.stat().st_mtime_ns
    run(*command)
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == files
    assert first.stat().st_mtime_ns == stamp
