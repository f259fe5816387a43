"""Killed runs go on exactly; a checkpoint is whole or is not one. The long version: tests/kill.py."""
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import grpo
import kill
import sdpo
import sft_distill

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def trained(alone):
    """(model, tokenizer, optimizer) after one step of AdamW."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "toy/model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    return model, AutoTokenizer.from_pretrained(ROOT / "toy/model"), optimizer


def step(model, optimizer):
    for p in model.parameters():
        p.grad = torch.sin(p.detach() * 100)
    optimizer.step()


def settings(folder, **more):
    return Namespace(**{"run_dir": str(folder), "keep_checkpoints": 2, "resume": True, **more})


def save(trained, number, args):
    model, tokenizer, optimizer = trained
    sdpo.save_checkpoint(model, tokenizer, number, sdpo.trainer_state(model, optimizer), args)


# with masters: bfloat16 weights and MasterAdamW, what a GPU would run
@pytest.mark.parametrize("script, ranks, masters", [("sdpo.py", 1, True), ("grpo.py", 2, False)])
def test_a_killed_run_ends_as_an_untouched_one(script, ranks, masters):
    hit, metrics, weights = kill.compare(script, ranks, 1, 2, masters, seed=ranks)
    assert metrics and weights
    assert sum(hit.values()) == 1


def test_state_comes_back(tmp_path, trained):
    from transformers import AutoModelForCausalLM
    args = settings(tmp_path)
    save(trained, 3, args)
    number, folder = sdpo.resume_point(args)
    assert (number, folder) == (3, tmp_path / "checkpoints/step_3")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-3)
    sdpo.load_trainer_state(folder, again, optimizer)
    step(trained[0], trained[2])
    step(again, optimizer)
    for a, b in zip(trained[0].parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_masters_come_back(tmp_path, trained):
    """bfloat16 weights and their float32 masters, which are finer than what the weights show."""
    from transformers import AutoModelForCausalLM
    def make(source):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        return model, sdpo.MasterAdamW(model.parameters(), "cpu", lr=1e-5)
    model, optimizer = make(ROOT / "toy/model")
    step(model, optimizer)
    save((model, trained[1], optimizer), 1, settings(tmp_path))
    folder = tmp_path / "checkpoints/step_1"
    again, other = make(folder)
    sdpo.load_trainer_state(folder, again, other)
    step(model, optimizer)
    step(again, other)
    masters = zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True)
    assert all(torch.equal(a, b) for a, b in masters)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, trained, capsys, harm):
    args = settings(tmp_path)
    save(trained, 1, args)
    save(trained, 2, args)
    weights = tmp_path / "checkpoints/step_2/model.safetensors"
    content = bytearray(weights.read_bytes())
    if harm == "cut":
        weights.write_bytes(content[:-100])
    elif harm == "changed":
        content[-7] ^= 1
        weights.write_bytes(content)
    elif harm == "gone":
        weights.unlink()
    else:
        (weights.parent / "manifest.json").unlink()
    assert sdpo.resume_point(args)[0] == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1 and said[0].startswith(f"{weights.parent} is damaged")
    save(trained, 2, args)  # the run comes here again, and replaces it
    assert sdpo.resume_point(args)[0] == 2


def test_half_written_is_none_and_old_ones_go(tmp_path, trained):
    args = settings(tmp_path)
    for number in (1, 2, 3):
        save(trained, number, args)
    (tmp_path / "checkpoints/step_4.part").mkdir()
    assert [p.name for p in sdpo.checkpoints(tmp_path)] == ["step_3", "step_2"]
    assert sdpo.resume_point(args)[0] == 3
    save(trained, 4, args)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_3", "step_4"]


def test_metrics_behind_the_checkpoint_go(tmp_path, trained):
    args = settings(tmp_path)
    save(trained, 2, args)
    lines = [json.dumps(dict(step=n)) + "\n" for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "sco')  # killed in it
    sdpo.resume_point(args)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])


FULL = """
import sys, resource
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from argparse import Namespace
from pathlib import Path
import torch, sdpo, test_resume
from transformers import AutoModelForCausalLM, AutoTokenizer
sdpo.start_process_group()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/toy/model", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] + "/toy/model")
optimizer = torch.optim.AdamW(model.parameters())
test_resume.step(model, optimizer)
args = test_resume.settings(sys.argv[2])
test_resume.save((model, tokenizer, optimizer), 1, args)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
test_resume.save((model, tokenizer, optimizer), 2, args)
"""


@pytest.mark.parametrize("limit", [100_000, 5_000_000])  # in the weights; in the trainer's state
def test_a_full_disk(tmp_path, limit):
    """The kernel refuses to let a file grow: one line, not 0, and the checkpoint before is whole."""
    done = subprocess.run([sys.executable, "-c", FULL, str(ROOT), str(tmp_path), str(limit)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "step_2.part" in said[0] and "what was finished is whole" in said[0]
    assert "Traceback" not in done.stderr
    assert [p.name for p in sdpo.checkpoints(tmp_path)] == ["step_1"]
    assert sdpo.damage(tmp_path / "checkpoints/step_1") is None


LINE = r"error: .*: cannot be written \({}.*what was finished is whole"


def test_a_folder_deleted_under_the_run(tmp_path):
    """Nothing begins anew in its place."""
    with pytest.raises(SystemExit, match=LINE.format("FileNotFoundError")):
        sdpo.append_line(tmp_path / "run/metrics.jsonl", dict(step=7))
    (tmp_path / "run").mkdir()  # an evaluation has made it again
    with pytest.raises(SystemExit, match=LINE.format("FileNotFoundError")):
        sdpo.append_line(tmp_path / "run/metrics.jsonl", dict(step=7))
    assert not (tmp_path / "run/metrics.jsonl").exists()


READ_ONLY = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import sdpo
run = Path(sys.argv[2])
step = {"append": lambda: sdpo.append_line(run / "metrics.jsonl", dict(step=1)),
        "write": lambda: sdpo.write_lines(run / "eval/step_1.json", [{}]),
        "begin": lambda: sdpo.check_run_dir(sdpo.parse_args(
            ["--model", "toy/model", "--run_dir", str(run / "new")]))}
step[sys.argv[3]]()
"""


@pytest.mark.parametrize("act", ["append", "write", "begin"])
def test_a_read_only_folder(tmp_path, act):
    """A read-only mount in a namespace of its own: its permissions hold for root as well."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    mount = f"mount -t tmpfs none {run} && echo {{}} > {run}/config.json && mount -o remount,ro {run}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", READ_ONLY,
         str(ROOT), str(run), act], capture_output=True, text=True, timeout=120)
    assert done.returncode == (2 if act == "begin" else 1)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot be written" in line and "Traceback" not in done.stderr


def test_another_number_of_ranks_goes_on(tmp_path, trained, capsys):
    """Two ranks' halves of the state, taken up by one."""
    model, tokenizer, optimizer = trained
    args = settings(tmp_path)
    save(trained, 1, args)
    folder = tmp_path / "checkpoints/step_1"
    state = list(torch.load(folder / "trainer_state_0.pt").items())
    for rank in (0, 1):
        torch.save(dict(state[rank::2]), folder / f"trainer_state_{rank}.pt")
    from transformers import AutoModelForCausalLM
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other = torch.optim.AdamW(again.parameters(), lr=1e-3)
    sdpo.load_trainer_state(folder, again, other)
    assert "written by 2 ranks and goes on with 1" in capsys.readouterr().out
    step(model, optimizer)
    step(again, other)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_flags_that_changed_are_named(tmp_path, capsys):
    argv = ["--model", "toy/model", "--run_dir", str(tmp_path), "--resume"]
    began = vars(sdpo.parse_args([*argv, "--lr", "1e-4", "--steps", "7"]))
    (tmp_path / "config.json").write_text(json.dumps(began))
    sdpo.check_args(sdpo.parse_args([*argv, "--lr", "1e-4", "--steps", "9"]), 1)  # longer: fine
    with pytest.raises(SystemExit) as end:
        sdpo.check_args(sdpo.parse_args([*argv, "--lr", "1e-5", "--steps", "9"]), 1)
    assert end.value.code == 2
    assert "--lr 1e-05 (was 0.0001)" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["sdpo.py", "sft_distill.py"])
def test_sigterm_saves_and_says_how_to_go_on(tmp_path, script):
    few = tmp_path / "few.jsonl"
    few.write_text("".join((ROOT / "toy/data/in.jsonl").read_text().splitlines(True)[:4]))
    argv = ["--model", "toy/model", "--eval_data", few, "--max_response_tokens", 300, "--save_every",
            100, "--run_dir", tmp_path / "run"]
    if script == "sdpo.py":
        argv += ["--data", "toy/data/train.jsonl", "--questions_per_step", 4, "--steps", 30,
                 "--minibatch_questions", 4, "--rollouts", 4]
        metrics, steps = tmp_path / "run/metrics.jsonl", 30
    else:
        from toy import problems
        rng, data = random.Random(0), tmp_path / "d.jsonl"
        data.write_text("".join(json.dumps(dict(
            prompt=problems.question(p) + problems.INSTRUCTION,
            response=problems.trace(rng, p, "unguided"))) + "\n"
            for p in rng.sample(problems.all_problems(4, 10), 100)))
        argv += ["--data", data, "--batch_size", 8, "--epochs", 20, "--eval_rollouts", 1]
        metrics, steps = tmp_path / "run/d/metrics.jsonl", 260
    command = [sys.executable, script, *map(str, argv)]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    job = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    until = time.time() + 240
    while not (metrics.exists() and metrics.read_text()) and time.time() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert "with --resume goes on" in said and "Traceback" not in said
    (folder,) = sdpo.checkpoints(metrics.parent)
    done = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert folder.name == f"step_{done[-1]}" and done == list(range(1, done[-1] + 1))
    assert 0 < done[-1] < steps and sdpo.damage(folder) is None


def test_undefined_gradients_are_kept_and_end_the_run(tmp_path, alone, capsys):
    rollouts = [sdpo.Rollout(0, [1], [2, 3], None, "text", True)]
    grpo.report_skipped(tmp_path, 7, rollouts, 2)
    kept = (tmp_path / "rollouts/step_7_skipped.jsonl").read_text()
    assert json.loads(kept)["response"] == "text"
    with pytest.raises(SystemExit, match="three steps in a row"):
        sft_distill.report_skipped(tmp_path, 8, rollouts, 3)


@pytest.mark.parametrize("harm", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_hangs_or_dies_ends_the_job(tmp_path, harm):
    few = tmp_path / "few.jsonl"
    few.write_text("".join((ROOT / "toy/data/in.jsonl").read_text().splitlines(True)[:4]))
    job = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "sdpo.py", "--model", "toy/model", "--data", "toy/data/train.jsonl", "--eval_data", few,
         "--questions_per_step", "4", "--minibatch_questions", "4", "--rollouts", "4",
         "--max_response_tokens", "300", "--steps", "1000", "--run_dir", tmp_path / "run"],
        cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    try:
        metrics, until = tmp_path / "run/metrics.jsonl", time.time() + 240
        while not metrics.exists() and time.time() < until:
            time.sleep(0.1)
        victim = next(pid for pid in kill.family(job.pid) if b"\0RANK=1\0" in Path(
            f"/proc/{pid}/environ").read_bytes() and b"sdpo.py" in Path(
            f"/proc/{pid}/cmdline").read_bytes())
        os.kill(victim, harm)
        began = time.monotonic()
        said, _ = job.communicate(timeout=120)
    finally:
        kill.kill_family(job.pid)
    assert job.returncode != 0 and time.monotonic() - began < 60
    if harm == signal.SIGSTOP:
        assert "error: rank 1 has shown no sign of life" in said
    assert not Path(f"/proc/{victim}/environ").exists() or not Path(
        f"/proc/{victim}/environ").read_bytes()  # it is gone, or a zombie
