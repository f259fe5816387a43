"""MasterAdamW: bfloat16 weights that train as float32 ones do, on one rank and on two."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import sdpo

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(shapes, steps, seed=0):
    """A sequence like a training run's: a direction that stays, and noise."""
    generator = torch.Generator().manual_seed(seed)
    fixed = [torch.randn(s, generator=generator) for s in shapes]
    for _ in range(steps):
        yield [f + torch.randn(f.shape, generator=generator) for f in fixed]


def weights(dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * 0.02).bfloat16().to(dtype).requires_grad_()
            for s in ((64, 32), (32,), (100, 64))]


def train(parameters, optimizer, steps=200):
    for grads in gradients([p.shape for p in parameters], steps):
        optimizer.zero_grad()
        for p, g in zip(parameters, grads):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return torch.cat([p.detach().float().flatten() for p in parameters])


def test_lr_1e_6_moves_as_in_float32(alone):
    start = torch.cat([w.flatten() for w in weights(torch.float32)]).detach()
    exact, naive, ours = weights(torch.float32), weights(torch.bfloat16), weights(torch.bfloat16)
    how = dict(lr=1e-6, weight_decay=0.01)
    want = train(exact, torch.optim.AdamW(exact, **how)) - start
    master = sdpo.MasterAdamW(ours, "cpu", **how)
    got = train(ours, master)
    masters = torch.empty_like(start)
    for piece, i in zip(masters.split([w.numel() for w in ours]), range(3)):
        piece.copy_(master.param_groups[0]["params"][i].detach().flatten())
    assert (masters - start - want).norm() < 0.01 * want.norm()
    # the weights are their masters' rounding, and have moved by as much in the mean
    assert torch.equal(got, masters.bfloat16().float())
    along = ((got - start) @ want) / (want @ want)
    assert 0.99 < along < 1.01
    stuck = train(naive, torch.optim.AdamW(naive, **how)) - start
    assert abs((stuck @ want) / (want @ want) - 1) > 0.2  # AdamW on bfloat16 itself is far off


def test_is_adamw(alone):
    """On float32 weights it is torch's AdamW to the bit, tensor by tensor or not."""
    how = dict(lr=1e-3, weight_decay=0.1)
    ours, theirs = weights(torch.float32), weights(torch.float32)
    got = train(ours, sdpo.MasterAdamW(ours, "cpu", **how), 20)
    assert torch.equal(got, train(theirs, torch.optim.AdamW(theirs, fused=True, **how), 20))


TWO = """
import sys, json
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import torch, torch.distributed as dist
import sdpo, test_master
dist.init_process_group("gloo")
ours = test_master.weights(torch.bfloat16)
master = sdpo.MasterAdamW(ours, "cpu", lr=1e-4, weight_decay=0.01)
got = test_master.train(ours, master, 20)
held = sum(p.numel() for p in master.param_groups[0]["params"])
with open(f"{sys.argv[2]}/{dist.get_rank()}.json", "w") as f:  # two ranks' lines can mix on a pipe
    json.dump([held, got.tolist()], f)
dist.destroy_process_group()
"""


def test_two_ranks_hold_a_share_each_and_agree(tmp_path, alone):
    (tmp_path / "job.py").write_text(TWO)
    said = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(tmp_path / "job.py"), str(ROOT), str(tmp_path)], capture_output=True, text=True, timeout=300,
        # as many threads as here: where they cut a tensor shows in its last bit
        env=dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads())))
    assert said.returncode == 0, said.stdout + said.stderr
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    one = weights(torch.bfloat16)
    want = train(one, sdpo.MasterAdamW(one, "cpu", lr=1e-4, weight_decay=0.01), 20).tolist()
    total = sum(w.numel() for w in one)
    assert [r[1] for r in results] == [want, want]
    assert sum(r[0] for r in results) == total and max(r[0] for r in results) < 0.8 * total


def test_sum_of_bfloat16_gradients(alone):
    """64 micro-batches' gradients added in bfloat16 are within 2% of their float32 sum."""
    total, exact = weights(torch.bfloat16), weights(torch.float32)
    for w in total + exact:
        w.grad = torch.zeros_like(w)
    for grads in gradients([w.shape for w in total], 64):
        for t, e, g in zip(total, exact, grads):
            t.grad += g.bfloat16()
            e.grad += g.bfloat16().float()
    for t, e in zip(total, exact):
        assert (t.grad.float() - e.grad).norm() < 0.02 * e.grad.norm()
