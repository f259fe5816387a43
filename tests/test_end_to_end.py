"""The real scripts, with real vLLM, on the toy, in processes of their own. Those that are killed in
every phase: tests/kill.py.

vLLM takes its time to start, so that a run is shared: the first tests of it look at what it left,
and later runs go on from there.
"""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import epistemic
import evaluate
import kill
import sdpo
from common import DATA, ROOT, Job, few, lines, on_ranks, toy

pytestmark = pytest.mark.vllm

def newest(run_dir):
    return sdpo.resumable(run_dir)[-1]

# --- SDPO: two ranks, killed and started again ---------------------------------------------------

@pytest.fixture(scope="session")
def killed(tmp_path_factory):
    """(run's folder, its step 2 before SIGKILL and as done again, what the second start said)."""
    folder = tmp_path_factory.mktemp("sdpo")
    run = folder / "run"
    argv = [*kill.arguments("sdpo.py", 3, folder), "--run_dir", run]
    job = Job(folder / "log", "sdpo.py", 2, *argv)
    saved = run / "checkpoints/step_2"
    job.wait_for(saved.exists)
    job.kill()
    first = kill.outcome(run, 2)
    saved.rename(saved.with_suffix(".part"))  # as it is when SIGKILL comes a moment earlier
    said = Job(folder / "log_again", "sdpo.py", 2, *argv).end()
    return run, first, kill.outcome(run, 2), said

def test_a_killed_run_does_its_step_again_bit_for_bit(killed):
    run, (metrics, weights), again, said = killed
    assert (metrics[:2], weights) == (again[0][:2], again[1])
    assert f"{run} resumes after step 1" in said and "step 1/3" not in said
    assert said.count("step 3/3  score") == 1  # from the first rank alone
    assert said.count("  eval few  score") == 3 and "error" not in said and "Traceback" not in said

def test_run_folder(killed):
    trained = killed[0]
    (config,) = lines(trained / "config.json")
    assert config["script"] == "sdpo.py" and config["lr"] == 1e-4
    metrics = lines(trained / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert [m["lr"] for m in metrics] == [5e-5, 1e-4, 1e-4]  # two steps of warm-up
    for m in metrics:
        assert 0 < m["score"] <= 1 and m["length"] > 10 and m["epistemic"] > 1
        assert m["loss"] > 0 and 0 < m["trained"] <= 1 and m["trained_tokens"] > 0
        assert m["skipped"] == 0 and m["grad_norm"] > 0 and 0 < m["mismatch"] < 1e-4
        assert all(seconds > 0 for seconds in m["seconds"].values())
        # a group of four a question, of both ranks
        rows = [r["row"] for r in lines(trained / f"rollouts/step_{m['step']}.jsonl")]
        assert rows == sorted([*range(4)] * 4)
    assert sorted(p.name for p in (trained / "eval").iterdir()) == [
        f"step_{n}.{suffix}" for n in (0, 1, 2, 3) for suffix in ("json", "jsonl")]
    answers, (summary,) = lines(trained / "eval/step_3.jsonl"), lines(trained / "eval/step_3.json")
    assert [a["index"] for a in answers] == [0, 1, 2, 3] and summary["few"] == epistemic.averages(
        answers)

def test_the_teacher_is_the_moving_average(killed, tmp_path):
    """--ema 0.05, once a step; of both ranks together, each weight's. All weights have moved."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    states = []
    for step in (2, 3):
        saved = killed[0] / f"checkpoints/step_{step}/trainer_state"
        dcp_to_torch_save(saved, tmp_path / "state.pt")
        states.append(torch.load(tmp_path / "state.pt"))
    before, after = states
    for name, _ in toy().named_parameters():
        average, master = after["averages"][name], after["masters"][name]
        assert torch.equal(average, before["averages"][name].lerp(master, 0.05))
        assert not torch.equal(average, master)
        assert not torch.equal(master, before["masters"][name])

# --- GRPO: to its end on one rank, then more steps on two ----------------------------------------

def test_grpo_ends_on_one_rank_and_goes_on_with_two(tmp_path):
    run, data = tmp_path / "run", few(DATA / "ood.jsonl", 2, tmp_path)
    command = ["--model", "toy/model", "--data", data, "--eval_data", data, "--lr", "1e-4",
               "--questions_per_step", 4, "--minibatch_questions", 2, "--max_response_tokens", 300,
               "--save_every", 100, "--tokens_per_micro_batch", 2000, "--run_dir", run, "--steps"]
    Job(tmp_path / "log", "grpo.py", 1, *command, 2).end()
    said = Job(tmp_path / "log_again", "grpo.py", 2, *command, 3).end()
    assert f"{run} resumes after step 2" in said and said.count("step 3/3  score") == 1
    assert "Traceback" not in said and (run / "eval/step_3.json").exists() and newest(run) == 3
    metrics = lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3] and any(m["trained"] for m in metrics)
    for m in metrics:
        assert m["mismatch"] < 1e-4 and (m["trained"] > 0) == (m["grad_norm"] > 0)
        rows = [r["row"] for r in lines(run / f"rollouts/step_{m['step']}.jsonl")]
        assert rows == sorted([*range(4)] * 8)  # two questions fill a batch of four

# ----- the five contexts, killed, then on two ranks; SFT on their answers; evaluation and tables


@pytest.fixture(scope="session")
def studied(tmp_path_factory):
    """(out, when its first round's file was written, that time at the end, what was said then)."""
    folder = tmp_path_factory.mktemp("conditions")
    out = folder / "out"
    argv = ["--model", "toy/model", "--data", few(DATA / "ood.jsonl", 24, folder), "--samples", 4,
            "--accuracy", 0.25, 0.75, "--num_questions", 3, "--sft_examples", 1000,
            "--questions_per_round", 12, "--max_response_tokens", 400, "--out", out]
    job = Job(folder / "log", "generate_conditions.py", 1, *argv)
    first = out / "rounds/round_0000.jsonl"
    job.wait_for(first.exists)
    job.kill()
    before = first.stat().st_mtime_ns
    said = Job(folder / "log_again", "generate_conditions.py", 2, *argv).end()
    return out, before, first.stat().st_mtime_ns, said


def test_conditions(studied):
    out, before, after, said = studied
    assert before == after and "round 0:" not in said and "round 1:" in said
    assert "(4) regenerated" in said and "ends after 24 questions" in said
    assert "Traceback" not in said
    (summary,) = lines(out / "summary.json")
    assert summary["questions"] >= 1 and summary["asked"] == 24
    asked = set()
    for context in ("unguided", "full", "without_think", "regenerated", "uncertain"):
        rows = lines(out / f"{context}.jsonl")
        assert len(rows) == 4 * summary["questions"]
        asked.add(tuple(r["index"] for r in rows))
        assert summary["contexts"][context]["epistemic"] == pytest.approx(
            sum(r["epistemic"] for r in rows) / len(rows))
    assert len(asked) == 1  # the same questions in all
    full, unguided = (summary["contexts"][c] for c in ("full", "unguided"))
    assert full["epistemic"] < unguided["epistemic"] and full["length"] < unguided["length"]
    d_ug, d_sg = lines(out / "d_ug.jsonl"), lines(out / "d_sg.jsonl")
    assert len(d_ug) == len(d_sg) == summary["pairs"] > 0
    assert [r["prompt"] for r in d_ug] == [r["prompt"] for r in d_sg]
    assert all(len(r["prompt"]) == 1 and "Correct solution" not in r["prompt"][0]["content"]
               for r in d_ug + d_sg)


@pytest.fixture(scope="session")
def distilled(studied, tmp_path_factory):
    """(run's folder, what one rank says, after two were killed)."""
    run = tmp_path_factory.mktemp("sft") / "d_sg"
    argv = ["--model", "toy/model", "--data", studied[0] / "d_sg.jsonl", "--max_response_tokens",
            400, "--batch_size", 8, "--epochs", 2, "--lr", "1e-3", "--tokens_per_micro_batch", 2000,
            "--save_every", 1, "--run_dir", run]
    job = Job(run.parent / "log", "sft_distill.py", 2, *argv)
    job.wait_for((run / "checkpoints/step_1").exists)
    job.kill()
    return run, Job(run.parent / "log_again", "sft_distill.py", 1, *argv).end()


def test_sft_that_was_killed_on_two_ranks_resumes_with_one(distilled):
    run, said = distilled
    assert f"{run} resumes after step" in said and "Traceback" not in said
    metrics = lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    assert all(m["loss"] > 0 and m["grad_norm"] > 0 for m in metrics)
    assert newest(run) == len(metrics)


@pytest.fixture(scope="session")
def evaluated(distilled, tmp_path_factory):
    """(out, the trained model's name there, what was printed): two models, two benchmarks."""
    run, folder = distilled[0], tmp_path_factory.mktemp("evaluate")
    out, step = run / "eval", newest(run)
    sets = [few(DATA / "in.jsonl", 6, folder).rename(folder / "few.jsonl"),  # named as SDPO's is
            few(DATA / "ood.jsonl", 6, folder)]
    job = Job(folder / "log", "evaluate.py", 2, "--samples", 2, "--max_response_tokens", 150,
              "--out", out, "--data", *sets, "--model", "toy/model",
              run / f"checkpoints/step_{step}")
    return out, f"d_sg/step_{step}", job.end()


def test_evaluation(evaluated):
    out, tuned, said = evaluated
    (summary,) = lines(out / "summary.json")
    assert list(summary["models"]) == ["model", tuned] and "Traceback" not in said
    for name, rows in summary["models"].items():
        assert list(rows) == ["few", "few_ood"]
        for benchmark, row in rows.items():
            records = lines(out / name / f"{benchmark}.jsonl")
            assert [r["index"] for r in records] == [i for i in range(6) for _ in range(2)]
            assert row == json.loads(json.dumps(evaluate.summarise(records, 2)))
            assert f"{row['score']:.3f}" in said
    # other weights, the same seed: the engine has each model's
    answers = [(out / name / "few_ood.jsonl").read_text() for name in ("model", tuned)]
    assert answers[0] != answers[1]


def test_report(killed, studied, evaluated, tmp_path):
    """A page from the files of runs."""
    trained, (out, tuned, _) = killed[0], evaluated
    for name, run in dict(a=trained, b=studied[0], c=out).items():
        shutil.copytree(run, tmp_path / name)
    subprocess.run([sys.executable, "-m", "extras.report", tmp_path], cwd=ROOT, check=True)
    page = (tmp_path / "report.html").read_text()
    contexts = lines(studied[0] / "summary.json")[0]["contexts"]
    after = lines(trained / "eval/step_3.json")[0]["few"]
    row = lines(out / "summary.json")[0]["models"][tuned]["few"]
    for number in (f"{contexts['regenerated']['length']:,.0f}", f"{after['score']:.3f}",
                   f"{after['epistemic']:.1f}", f"{row['score']:.3f}"):
        assert number in page


# --- one engine: weights handed over, seeds, tied embeddings -------------------------------------

def ask_engine(folder, data):
    """Hands models to one vLLM and asks both sides; {what: what comes of it}."""
    from transformers import AutoTokenizer
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    args = sdpo.make_parser().parse_args([
        "--model", str(folder), "--max_response_tokens", "60", "--max_prompt_tokens", "450",
        "--temperature", "0.7", "--rollouts", "2"])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), sdpo.load_model(folder)
    llm = sdpo.make_engine(str(folder), args)
    questions = sdpo.read_questions(str(data), tokenizer, args)
    verifier, answers = sdpo.Verifier(), []

    def sample(step=1):
        return sdpo.sample_groups(llm, verifier, tokenizer, questions, step, args)

    @torch.no_grad()
    def gap():
        """The largest difference between vLLM's and our log-probabilities."""
        return max((sdpo.Student(model, args)([r])[1] - torch.tensor(r.logprobs)).abs().max().item()
                   for r in sample())
    results = dict(own_head=model.lm_head.weight is not model.model.embed_tokens.weight)
    sdpo.sync_weights(llm, model)
    results["own"] = gap()
    model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    results["stale"] = gap()
    sdpo.sync_weights(llm, model)
    results["tied"] = gap()
    for args.seed, step in [(0, 1), (0, 1), (1, 1), (0, 2)]:
        answers.append(str([(r.response_ids, r.logprobs) for r in sample(step)]))
    llm.llm_engine.engine_core.shutdown()
    return dict(results, answers=answers)

def test_vllm_agrees_after_a_sync_and_repeats_itself(tmp_path):
    """Where the config ties embeddings: with an LM head of its own beside them (a merged LoRA), and
    without, where vLLM on CPU would keep its first. And answers follow from the seed."""
    folder = shutil.copytree(ROOT / "toy/model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(config, tie_word_embeddings=True)))
    (results,) = on_ranks(1, tmp_path, ask_engine, folder, few(DATA / "in.jsonl", 4, tmp_path))
    assert results["own_head"] and results["own"] < 1e-4 and results["tied"] < 1e-4
    assert results["stale"] > 1e-2  # what test_sdpo.py's update would stop at
    # the same twice, bit for bit; then another seed, another step
    first, again, *others = results["answers"]
    assert first == again and len({first, *others}) == 3
