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
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for grads in gradients([p.shape for p in parameters], steps):
        optimizer.zero_grad(set_to_none=False)
        for p, g in zip(parameters, grads):
            p.grad += g.to(p.dtype)
        if isinstance(optimizer, sdpo.MasterAdamW):
            optimizer.fold()
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


def error_of_sum(number, size):
    """Relative error of `number` bfloat16 gradients' sum, folded after every `size`."""
    ours, exact = weights(torch.bfloat16), weights(torch.float32)
    master = sdpo.MasterAdamW(ours, "cpu")
    for w in ours + exact:
        w.grad = torch.zeros_like(w)
    for i, grads in enumerate(gradients([w.shape for w in ours], number), 1):
        for w, e, g in zip(ours, exact, grads):
            w.grad += g.bfloat16()
            e.grad += g.bfloat16().float()
        if i % size == 0 or i == number:
            master.fold()
    return max(((total.float() - e.grad).norm() / e.grad.norm()).item()
               for total, e in zip(master.sums, exact))


def test_sum_of_bfloat16_gradients(alone):
    """As many micro-batches as one GPU adds up at the paper's batch size."""
    assert error_of_sum(683, sdpo.ROUND) < 0.01
    assert error_of_sum(683, 683) > 0.1  # what folding is for


ROUNDS = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import copy, random
from argparse import Namespace
import numpy as np, torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
import sdpo
device = sdpo.start_process_group()
rank, world_size = dist.get_rank(), dist.get_world_size()
args = Namespace(temperature=1.0, top_k=20, alpha=0.5, loss_mean="sequence",
                 tokens_per_micro_batch=200)
teacher = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/toy/model", dtype=torch.float32)
student = copy.deepcopy(teacher)
sdpo.ROUND, results = 2, []
rng = random.Random(1)
draw = lambda n: [rng.randrange(5, 400) for _ in range(n)]
ddp = sdpo.in_parallel(sdpo.Student(student, args, device))
held = lambda: [p.grad.data_ptr() for p in ddp.parameters()]
before, idle = held(), [sdpo.Rollout(0, [5, 6], [7, 8], np.zeros(2, np.float32), "", True)]
with ddp.no_sync():
    ddp(idle, teacher)[1].sum().backward()
assert held() == before  # added up inside the buckets, from the first time on
master = sdpo.MasterAdamW(student.parameters(), "cpu")
for size in (23, 2):  # of the 2, one has a teacher: the second rank's hand is empty
    batch = [sdpo.Rollout(i, draw(4), y := draw(rng.randint(1, 60)),
                          np.array([-3.0 + rng.random() for _ in y], np.float32), "", True, 0.0,
                          draw(30) if i % 3 else None) for i in range(size)]
    hand = sdpo.deal([r for r in batch if r.teacher_prompt_ids], world_size)[rank]
    ddp.zero_grad(set_to_none=False)
    sdpo.backward(ddp, teacher, torch.optim.AdamW(student.parameters()), batch, hand, None)
    whole = [p.grad.clone() for p in student.parameters()]
    want = torch.nn.utils.get_total_norm(whole).item()
    ddp.zero_grad(set_to_none=False)
    master.zero_grad()
    sdpo.backward(ddp, teacher, master, batch, hand, None)
    mine = [g for i, g in enumerate(whole) if master.owner[i] == rank]
    assert all(torch.allclose(s, g, rtol=1e-4, atol=1e-6) for s, g in zip(master.sums, mine, strict=True))
    norm = sdpo.clip_gradient(ddp, master)
    assert abs(norm - want) < 1e-4 * want, (norm, want)
    assert abs(master.scale - min(1, 1 / want)) < 1e-3
    assert not any(p.grad.any() for p in student.parameters())
    results.append(len(sdpo.micro_batches(hand, 200)))
assert results[0] > 2 and results[1] == (rank == 0), results  # several rounds; an empty hand
before = held()  # DDP has made its buckets anew behind its first backward
with ddp.no_sync():
    ddp(idle, teacher)[1].sum().backward()
assert held() == before
del ddp  # freed after the group is gone, it can hang (gloo, torch 2.13)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_rounds_give_the_gradient_of_one(tmp_path, ranks):
    """backward with MasterAdamW, folding every other micro-batch, against backward with AdamW."""
    (tmp_path / "job.py").write_text(ROUNDS)
    said = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
         str(ranks), str(tmp_path / "job.py"), str(ROOT)], capture_output=True, text=True,
        timeout=300)
    assert said.returncode == 0, said.stdout + said.stderr


def qwen3(layers, hidden, mlp, heads, tied):
    from transformers import Qwen3Config
    return Qwen3Config(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, head_dim=128,
                       num_attention_heads=heads, num_key_value_heads=8, vocab_size=151936,
                       tie_word_embeddings=tied)


QWEN3_8B, QWEN3_1_7B = qwen3(36, 4096, 12288, 32, False), qwen3(28, 2048, 6144, 16, True)


@pytest.mark.parametrize("config, gigabytes, ranks, flags, offload", [
    (QWEN3_8B, 79, 1, [], True),
    (QWEN3_8B, 140, 8, [], False),
    (QWEN3_8B, 140, 8, ["--offload_optimizer"], True),
    (QWEN3_1_7B, 79, 1, [], False),
    (QWEN3_8B, 79, 8, ["--no-offload_optimizer"], None),  # asked for what does not fit
    (QWEN3_8B, 40, 8, [], None)])
def test_memory_plan(monkeypatch, capsys, config, gigabytes, ranks, flags, offload):
    """On GPUs that are not here: what is free on them is made up, the rest is the scripts' own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gigabytes * 1e9, gigabytes * 1.02e9))
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    args = sdpo.parse_args(["--model", "x", *flags])
    if offload is None:
        with pytest.raises(SystemExit) as end:
            sdpo.memory_plan(args, config, copies=3)
        assert end.value.code == 2 and f"{gigabytes} GB are free" in capsys.readouterr().err
        return
    got, share = sdpo.memory_plan(args, config, copies=3)
    assert got is offload
    always, state, _, engine = sdpo.memory_needs(8.19e9 if config is QWEN3_8B else 1.72e9, config, 24576, 3, ranks)
    kept = always + (0 if offload else state)  # what vLLM must leave alone, and what it needs itself
    assert engine < share * gigabytes * 1.02e9 < gigabytes * 1e9 - kept
