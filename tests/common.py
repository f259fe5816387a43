"""What several test files do."""
import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import runpy
import socket
import sys
import time
import uuid
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import kill

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "toy/data"
TOKENIZERS = ROOT.parent / "shared/data/tokenizers"
needs_tokenizers = pytest.mark.skipif(
    not TOKENIZERS.exists(), reason="needs the real tokenizers beside the project")
# Ranks come from a server that has imported once: torch forbids backward in forks of this process.
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["torch", "torch.distributed.checkpoint", "transformers.models.qwen3.modeling_qwen3"]
FORKS.set_forkserver_preload(PRELOADED)

def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

def few(path, n, folder):
    """The first n questions of a file, as a file in the folder."""
    small = folder / f"few_{path.stem}.jsonl"
    small.write_text("".join(path.read_text().splitlines(True)[:n]))
    return small

@functools.cache
def tokenizer_of(name):
    """The tokenizer of one of the paper's models, or the toy's."""
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(
        ROOT / "toy/model" if name == "toy" else TOKENIZERS / name)

def toy(dtype=torch.float32):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(ROOT / "toy/model", dtype=dtype)

def learner(script, lr=1e-3):
    """(model, optimizer) of the toy, as the script's main() makes them; needs a process group."""
    model = toy().train()
    return model, script.MasterAdamW(model, lr=lr, weight_decay=0.01)

def gradients_of(optimizer):
    """A dict that each step of the optimizer fills: this rank's {name: gradient}."""
    step, taken = optimizer.step, {}

    def record(*args, **how):
        taken.update({n: total.clone() for n, total in zip(optimizer.owned, optimizer.sums)})
        return step(*args, **how)
    optimizer.step = record
    return taken

def assert_same_gradient(got, wanted, tolerance=2e-5):
    """Of {name: gradient}, up to the order in which float32 numbers were added."""
    scale = max(g.abs().max() for g in wanted.values())
    assert scale > 0 and got.keys() == wanted.keys()
    for name, g in wanted.items():
        error = (got[name] - g).abs().max() / scale
        assert error <= tolerance, f"{name}: {error:.2g}"

# --- several ranks, whole scripts ----------------------------------------------------------------

@contextlib.contextmanager
def on_top(extra, **more):
    """sdpo.py as the main() of a script on top of it leaves it, and as it was again after that."""
    import sdpo
    with mock.patch.dict(vars(sdpo), main=lambda: None):
        extra.main()
        vars(sdpo).update(more)
        yield


def on_ranks(world_size, folder, job, *args):
    """[what job(*args) returns on each rank], in processes of their own."""
    meet = folder / uuid.uuid4().hex
    ranks = [FORKS.Process(target=be_rank, args=(rank, world_size, meet, job, args), daemon=True)
             for rank in range(world_size)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(timeout=300)
    assert [p.exitcode for p in ranks] == [0] * world_size
    return [torch.load(f"{meet}_{rank}.pt", weights_only=False) for rank in range(world_size)]

def be_rank(rank, world_size, meet, job, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world_size)
    # a job's DDP goes before the group: else it holds Python and waits for gloo, which waits for it
    torch.save(job(*args), f"{meet}_{rank}.pt")
    if dist.is_initialized():  # vLLM's shutdown ends it, too
        dist.destroy_process_group()

class Job:
    """A script on so many ranks, each a fork of what has imported vLLM: that takes 10 s of CPU."""

    def __init__(self, log, script, ranks, *argv):
        self.log, self.processes = log, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meet = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free.getsockname()[1])
        for rank in range(ranks):
            env = dict(meet, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks) if ranks > 1 else {}
            process = FORKS.Process(target=play, args=(log, script, list(map(str, argv)), env))
            process.start()
            self.processes.append(process)

    def wait_for(self, condition):
        """Until the condition holds, or a process has ended."""
        while not condition() and all(process.is_alive() for process in self.processes):
            time.sleep(0.05)

    def kill(self):
        """SIGKILL for all of them and what they have started."""
        for process in self.processes:
            kill.kill_family(process.pid)

    def end(self, code=0):
        """What it says up to its end, which has to come with this exit code."""
        try:
            for process in self.processes:
                process.join(timeout=600)
        finally:
            self.kill()
        said = self.log.read_text()
        assert {process.exitcode for process in self.processes} == {code}, said
        return said

def play(log, script, argv, env):
    os.chdir(ROOT)
    os.environ.update({name: str(value) for name, value in env.items()})
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")

# --- bad input -----------------------------------------------------------------------------------

def refusal(act, *args):
    """The one line with which act(*args) ends, its exit code 2."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        act(*args)
    (line,) = said.getvalue().splitlines()
    assert end.value.code == 2 and re.match(r"([\w.]+: )?error: ", line)
    return line

def refusal_of_main(script, monkeypatch, argv):
    """The one line with which the script's command ends; pytest.fail.Exception if it does not
    before vLLM starts or, in a script without vLLM, the optimizer is made.
    """
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
    monkeypatch.setattr(script, "start_process_group", lambda: torch.device("cpu"))
    start = "make_engine" if hasattr(script, "make_engine") else "MasterAdamW"
    monkeypatch.setattr(script, start, lambda *_, **__: pytest.fail("it was accepted"))
    group = not dist.is_initialized()
    if group:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return refusal(script.main)
    finally:
        if group:
            dist.destroy_process_group()
