"""The real scripts, with real vLLM, on the toy. Each run is processes of its own, as a user's is.

vLLM takes 15 s to start, so that a run is shared: the first tests of it look at what it left, and
later runs go on from there.
"""
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import epistemic
import evaluate
import kill
import sdpo
from common import DATA, ROOT, few, lines, toy

pytestmark = pytest.mark.vllm
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{ROOT}:{ROOT}/tests")


def start(script, ranks, *argv):
    command = [*TORCHRUN, ranks] if ranks > 1 else [sys.executable]
    return subprocess.Popen([str(c) for c in (*command, script, *argv)], cwd=ROOT, env=ENV,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def end(job, code=0):
    """What the job says up to its end, which has to come with this exit code."""
    try:
        said, _ = job.communicate(timeout=600)
    finally:
        kill.kill_family(job.pid)
    assert job.returncode == code, said[-4000:]
    return said


def wait_for(condition, job):
    """Until the condition holds, or the job has ended."""
    while job.poll() is None and not condition():
        time.sleep(0.05)


def process_of(job, script, rank):
    """The process id of one of torchrun's ranks; what it has started itself has its environment."""
    for pid in kill.family(job.pid):
        with contextlib.suppress(OSError):
            said = [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline")]
            if f"\0RANK={rank}\0".encode() in said[0] and f"\0{script}\0".encode() in said[1]:
                return pid


def newest(run_dir):
    return sdpo.resumable(run_dir)[-1]


# -------------------------------------------------- SDPO: two ranks, untouched and killed, 3 steps


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    """(folder with an untouched run and a killed one, what kill.py says of them)."""
    folder = tmp_path_factory.mktemp("sdpo")
    return folder, kill.compare(folder, "sdpo.py", ranks=2, kills=1, steps=3, seed=5)


@pytest.fixture(scope="session")
def trained(compared):
    return compared[0] / "whole/run"


def test_a_killed_run_ends_as_an_untouched_one(compared):
    folder, (hit, metrics, weights) = compared
    assert metrics and weights and sum(hit.values()) == 1
    assert "resumes after step 1" in (folder / "killed/phase.log").read_text()


def test_run_folder(trained):
    (config,) = lines(trained / "config.json")
    assert config["script"] == "sdpo.py" and config["world_size"] == 2 and config["lr"] == 1e-4
    metrics = lines(trained / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert [m["lr"] for m in metrics] == [5e-5, 1e-4, 1e-4]  # two steps of warm-up
    for m in metrics:
        assert 0 < m["score"] <= 1 and m["length"] > 10 and m["epistemic"] > 1
        assert m["loss"] > 0 and 0 < m["trained"] <= 1 and m["trained_tokens"] > 0
        assert m["updates"] >= 1 and m["skipped"] == 0 and m["grad_norm"] > 0
        assert m["mismatch"] < 1e-4 and 0 < m["mismatch_max"] < 1e-2
        assert list(m["seconds"]) == ["rollout", "update"]
        assert 0.1 < m["peak_memory_gb"] < 50 and m["tokens_per_second"] > 0
    assert sorted(p.name for p in (trained / "eval").iterdir()) == [
        f"step_{n}.{suffix}" for n in (0, 1, 2, 3) for suffix in ("json", "jsonl")]
    answers, (summary,) = lines(trained / "eval/step_3.jsonl"), lines(trained / "eval/step_3.json")
    assert [a["index"] for a in answers] == [0, 1, 2, 3] and summary["few"] == epistemic.averages(
        answers)
    for step in (1, 2, 3):  # a group of four a question, of both ranks
        rows = [r["row"] for r in lines(trained / f"rollouts/step_{step}.jsonl")]
        assert rows == sorted([*range(4)] * 4)


def test_what_it_prints(trained):
    said = (trained.parent / "phase.log").read_text()
    assert said.count("step 3/3  score") == 1  # from the first rank alone
    assert said.count("  eval few  score") == 4 and "error" not in said and "Traceback" not in said


def test_checkpoints(trained):
    """An ordinary folder each; all weights have moved; the state of the two newest is there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folders = sorted((trained / "checkpoints").iterdir())
    assert [p.name for p in folders] == ["step_1", "step_2", "step_3"]
    assert [(p / "trainer_state").exists() for p in folders] == [False, True, True]
    before = toy()
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.float32
        assert not any(map(torch.equal, model.parameters(), before.parameters()))
        assert AutoTokenizer.from_pretrained(folder).chat_template
        before = model


def test_the_teacher_is_the_moving_average(trained, tmp_path):
    """--ema 0.05, once a step; of both ranks together, each weight's."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    states = []
    for step in (2, 3):
        dcp_to_torch_save(trained / f"checkpoints/step_{step}/trainer_state", tmp_path / "state.pt")
        states.append(torch.load(tmp_path / "state.pt"))
    before, after = states
    for name, _ in toy().named_parameters():
        average, master = after[f"{name}.average"], after[f"{name}.master"]
        assert torch.equal(average, before[f"{name}.average"].lerp(master, 0.05))
        assert not torch.equal(average, master)


# ----------------------------------- GRPO: to its end on one rank, on two, and on two machines


@pytest.fixture(scope="session")
def rewarded(tmp_path_factory):
    """(run's folder, its command, what two ranks said when --steps had grown)."""
    folder = tmp_path_factory.mktemp("grpo")
    command = ["grpo.py", "--model", "toy/model", "--data", DATA / "ood.jsonl", "--num_questions",
               2, "--eval_data", few(DATA / "ood.jsonl", 1, folder), "--questions_per_step", 4,
               "--minibatch_questions", 2, "--rollouts", 8, "--max_response_tokens", 300, "--lr",
               "1e-4", "--warmup_steps", 1, "--save_every", 100, "--tokens_per_micro_batch", 2000,
               "--run_dir", folder / "run", "--steps"]
    end(start(command[0], 1, *command[1:], 2))
    return folder / "run", command, end(start(command[0], 2, *command[1:], 3))


def test_grpo_resumes_on_another_number_of_ranks(rewarded):
    run, command, said = rewarded
    assert f"{run} resumes after step 2" in said and "step 3/3  score" in said
    assert "Traceback" not in said and newest(run) >= 3
    metrics = lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics][:3] == [1, 2, 3] and any(m["trained"] for m in metrics)
    for m in metrics:
        assert m["mismatch"] < 1e-4 and m["mismatch_max"] < 1e-2 and m["skipped"] == 0
        assert (m["updates"] > 0) == (m["trained"] > 0) == (m["grad_norm"] > 0)
        rows = [r["row"] for r in lines(run / f"rollouts/step_{m['step']}.jsonl")]
        assert rows == sorted([*range(4)] * 8)  # two questions fill a batch of four


NODES = ("selfdistill-a", "selfdistill-b")


@pytest.fixture
def nodes():
    """Names of two network namespaces joined by a cable, which stand for two machines.

    They are 10.77.0.1 and 10.77.0.2; nothing else can be reached from either.
    """
    def ip(*words):
        return subprocess.run(["ip", *words], check=True, capture_output=True)
    try:
        for name in NODES:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", NODES[0], "type", "veth", "peer", "name", "eth0",
           "netns", NODES[1])
        for i, name in enumerate(NODES, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode().strip() or error
        pytest.skip(f"no network namespaces here ({said})")
    else:
        yield NODES
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_machines_continue_it(rewarded, nodes):
    run, script, _ = rewarded
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node",
               "1", "--master_addr", "10.77.0.1", "--master_port", "29400", "--node_rank"]
    jobs = [subprocess.Popen(
        ["ip", "netns", "exec", name, *command, str(i), *map(str, script), "4"], cwd=ROOT,
        text=True, env=dict(ENV, GLOO_SOCKET_IFNAME="eth0"), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT) for i, name in enumerate(nodes)]
    first, second = (end(job) for job in jobs)
    assert "resumes after step 3" in first and "step 4/4  score" in first and "step" not in second
    metrics = lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4] and metrics[-1]["mismatch"] < 1e-4
    rows = [r["row"] for r in lines(run / "rollouts/step_4.jsonl")]
    assert rows == sorted([*range(4)] * 8)  # of both machines
    assert newest(run) == 4 and (run / "eval/step_4.json").exists()


# ------ the five contexts on two ranks, killed once; SFT on their answers; evaluation and tables


@pytest.fixture(scope="session")
def studied(tmp_path_factory):
    """(out, its first round's file as it was when all were killed, what the second start said)."""
    folder = tmp_path_factory.mktemp("conditions")
    out = folder / "out"
    argv = ["--model", "toy/model", "--data", few(DATA / "ood.jsonl", 24, folder), "--samples", 4,
            "--accuracy", 0.25, 0.75, "--num_questions", 3, "--sft_examples", 1000,
            "--questions_per_round", 12, "--max_response_tokens", 400, "--out", out]
    job = start("generate_conditions.py", 2, *argv)
    first = out / "rounds/round_0000.jsonl"
    wait_for(first.exists, job)
    kill.kill_family(job.pid)
    job.communicate()
    before = first.stat().st_mtime_ns
    return out, before, end(start("generate_conditions.py", 2, *argv))


def test_conditions_go_on_after_the_round_that_was_finished(studied):
    out, before, said = studied
    assert (out / "rounds/round_0000.jsonl").stat().st_mtime_ns == before
    assert "round 0:" not in said and "round 1:" in said


def test_conditions(studied):
    out, _, said = studied
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
    """(folder of both runs, what d_ug's said on two ranks until one died, what one then said)."""
    folder = tmp_path_factory.mktemp("sft")

    def train(name, ranks, *flags):
        return start("sft_distill.py", ranks, "--model", "toy/model", "--data",
                     studied[0] / f"{name}.jsonl", "--max_response_tokens", 400, "--batch_size", 8,
                     "--epochs", 2, "--lr", "1e-4", "--tokens_per_micro_batch", 2000,
                     "--save_every", 1, "--run_dir", folder / name, *flags)
    job = train("d_ug", 2)
    wait_for((folder / "d_ug/checkpoints/step_1").exists, job)
    os.kill(process_of(job, "sft_distill.py", 1), signal.SIGKILL)
    said = end(job, code=1)
    return folder, said, end(train("d_ug", 1)) + end(train("d_sg", 1))


def test_sft_on_two_ranks_ends_when_one_dies_and_resumes_with_one(distilled):
    folder, died, said = distilled
    assert "Signal 9 (SIGKILL)" in died and "d_ug resumes after step" in said
    assert "Traceback" not in said
    for name in ("d_ug", "d_sg"):
        metrics = lines(folder / name / "metrics.jsonl")
        assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
        assert all(m["loss"] > 0 and m["grad_norm"] > 0 for m in metrics)
        assert newest(folder / name) == len(metrics)


@pytest.fixture(scope="session")
def evaluated(distilled, tmp_path_factory):
    """(out, its models, what it printed): three models, two benchmarks; of two results that were
    there before, one has been cut."""
    folder, out = tmp_path_factory.mktemp("evaluate"), distilled[0] / "eval"
    tuned = {name: newest(distilled[0] / name) for name in ("d_ug", "d_sg")}
    checkpoints = [distilled[0] / f"{name}/checkpoints/step_{n}" for name, n in tuned.items()]
    sets = [few(DATA / "in.jsonl", 6, folder).rename(folder / "few.jsonl"),  # named as SDPO's is
            few(DATA / "ood.jsonl", 6, folder)]
    argv = ["--samples", 2, "--max_response_tokens", 150, "--out", out, "--data", *sets, "--model",
            "toy/model"]
    end(start("evaluate.py", 1, *argv))
    with open(out / "model/few_ood.jsonl", "a") as file:
        file.write('{"index": ')  # not whole any more
    before = (out / "model/few.jsonl").stat().st_mtime_ns
    said = end(start("evaluate.py", 2, *argv, *checkpoints))
    assert (out / "model/few.jsonl").stat().st_mtime_ns == before
    assert said.count("evaluated again") == 1 and "model/few_ood.jsonl is of other" in said
    return out, [f"{name}/step_{n}" for name, n in tuned.items()], said


def test_evaluation(evaluated):
    out, tuned, said = evaluated
    (summary,) = lines(out / "summary.json")
    assert list(summary["models"]) == ["model", *tuned]  # checkpoints after what they began with
    for name, rows in summary["models"].items():
        assert list(rows) == ["few", "few_ood"]
        for benchmark, row in rows.items():
            records = lines(out / name / f"{benchmark}.jsonl")
            assert [r["index"] for r in records] == [i for i in range(6) for _ in range(2)]
            assert row == json.loads(json.dumps(evaluate.summarise(records, 2)))
            assert f"{row['score']:.3f}" in said
    # other weights, the same seed: the engine has every model's
    answers = [(out / name / "few_ood.jsonl").read_text() for name in summary["models"]]
    assert len(set(answers)) == 3 and "Traceback" not in said
    table = subprocess.run([sys.executable, "epistemic.py", out / "model/few_ood.jsonl"], cwd=ROOT,
                           check=True, capture_output=True, text=True).stdout
    assert f"{summary['models']['model']['few_ood']['epistemic']:.2f}" in table


def test_report(trained, studied, evaluated, tmp_path):
    """Tables and picture from the files of runs; two folders give means and deviations."""
    for seed in ("seed_0", "seed_1"):
        (tmp_path / seed / "sft").mkdir(parents=True)
        left = {"sdpo": trained, "conditions": studied[0], "sft/eval": evaluated[0]}
        for name, run in left.items():
            (tmp_path / seed / name).symlink_to(run)

    def report(*folders):
        return subprocess.run([sys.executable, "report.py", *folders], cwd=ROOT, check=True,
                              capture_output=True, text=True).stdout
    said = report(tmp_path / "seed_0")
    contexts = lines(studied[0] / "summary.json")[0]["contexts"]
    after = lines(trained / "eval/step_3.json")[0]["few"]
    assert f"{contexts['regenerated']['length']:,.0f}" in said
    assert f"{after['score']:.3f}" in said and f"{after['epistemic']:.1f}" in said
    models = lines(evaluated[0] / "summary.json")[0]["models"]
    tuned = models[evaluated[1][1]]["few"]
    (line,) = [line for line in said.splitlines() if line.startswith("SFT on d_sg")]
    assert f"{tuned['score']:.3f}" in line and f"{tuned['length']:,.0f}" in line
    assert (tmp_path / "seed_0/report.png").read_bytes()[:4] == b"\x89PNG"
    said = report(tmp_path / "seed_0", tmp_path / "seed_1")
    assert f"{after['score']:.3f} ± 0.000" in said and "2 seeds" in said


# ----------------------------------------- one engine: weights handed over, seeds, tied embeddings


def drawn_from():
    """The state of the three global generators."""
    return [str(random.getstate()), str(np.random.get_state()), torch.get_rng_state().tolist()]


def ask_engine(folder, data):
    """A process: hands a model with tied embeddings to vLLM, asks both, prints what comes of it."""
    from transformers import AutoModelForCausalLM
    args = sdpo.make_parser().parse_args(["--model", folder, "--max_response_tokens", "60",
                                          "--temperature", "0.7", "--rollouts", "2"])
    device = sdpo.start_process_group()
    path, tokenizer = sdpo.load_tokenizer(folder, 512)
    llm = sdpo.make_engine(path, 512, args, device)
    questions = sdpo.read_questions(data, tokenizer, args)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    student, verifier, results = sdpo.Student(model, args), sdpo.Verifier(), {}

    def sample():
        return sdpo.sample_groups(llm, verifier, tokenizer, questions, 1, args)

    def gap():
        """The largest difference between vLLM's and our log-probabilities."""
        rollouts = sample()
        sdpo.remember_logprobs(student, [[r] for r in rollouts])
        return max((r.old_logprobs - torch.tensor(r.logprobs)).abs().max().item() for r in rollouts)
    sdpo.sync_weights(llm, model)
    results["fresh"] = gap()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    results["stale"] = gap()
    sdpo.sync_weights(llm, model)
    results["synced"] = gap()

    asked, generate = [], llm.generate

    def watched(*args, **how):
        asked.append(drawn_from())
        return generate(*args, **how)
    llm.generate = watched
    results["rollouts"] = []
    # the same twice, then another seed, another step, another rank
    for seed, step, rank in [(0, 1, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]:
        args.seed = seed
        sdpo.dist.get_rank = lambda: rank
        batch = sdpo.sample_groups(llm, verifier, tokenizer, questions * (rank + 1), step, args)
        results["rollouts"].append([[r.response_ids, r.logprobs] for r in batch])
    results["states"] = asked
    print("RESULT", json.dumps(results))
    verifier.close()
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """What ask_engine prints, for a random model of the toy's shape that ties its embeddings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = tmp_path_factory.mktemp("engine")
    torch.manual_seed(0)
    config = toy().config
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "toy/model").save_pretrained(folder)
    data = few(DATA / "in.jsonl", 8, folder)
    call = f"import test_end_to_end; test_end_to_end.ask_engine({str(folder)!r}, {str(data)!r})"
    said = end(subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, env=ENV, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    return json.loads(said.split("RESULT", 1)[1].splitlines()[0])


def test_after_a_sync_vllm_agrees_with_the_trainer(engine):
    """Tied embeddings as well, as Qwen3-1.7B has them: on CPU vLLM would keep the old head."""
    assert engine["fresh"] < 1e-4 and engine["synced"] < 1e-4
    assert engine["stale"] > 1e-2  # what test_sdpo.py's update would stop at


def test_rollouts_repeat_bit_for_bit_and_differ_by_seed_step_and_rank(engine):
    first, again, *others = engine["rollouts"]
    assert first == again
    assert all(other != first for other in others)
    assert len(set(map(str, others))) == 3


def test_all_three_global_generators_are_seeded(engine):
    """vLLM draws from torch's, or, by its newer model runner, from NumPy's."""
    first, again, *others = engine["states"]
    assert first == again
    for i in range(3):
        assert len({str(states[i]) for states in (first, *others)}) == 4
