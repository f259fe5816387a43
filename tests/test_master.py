"""MasterAdamW: bfloat16 weights that train as float32 ones do, on one rank and on two."""
from argparse import Namespace

import pytest
import torch

import sdpo
from common import learner, on_ranks

HOW = dict(lr=1e-6, weight_decay=0.01)
FAR = 1e9  # a norm that no gradient here reaches: nothing is clipped


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


def master(parameters, **how):
    """MasterAdamW of parameters named by their place."""
    return sdpo.MasterAdamW([(str(i), w) for i, w in enumerate(parameters)], "cpu", **how)


def flat(tensors):
    return torch.cat([t.detach().float().flatten() for t in tensors])


def train(parameters, optimizer, lr, steps):
    """The parameters after so many steps of the optimizer, ours or torch's."""
    ours = isinstance(optimizer, sdpo.MasterAdamW)
    for grads in gradients([p.shape for p in parameters], steps):
        if ours:
            optimizer.zero_grad()
            for p, g in zip(parameters, grads):
                p.grad += g.to(p.dtype)
            optimizer.fold()
            optimizer.step(lr, FAR)
        else:
            for p, g in zip(parameters, grads):
                p.grad = g.to(p.dtype)
            optimizer.step()
    return flat(parameters)


def test_lr_1e_6_moves_as_in_float32(alone):
    start = flat(weights(torch.float32))
    exact, naive, ours = weights(torch.float32), weights(torch.bfloat16), weights(torch.bfloat16)
    want = train(exact, torch.optim.AdamW(exact, **HOW), 1e-6, 200) - start
    optimizer = master(ours, **HOW)
    got = train(ours, optimizer, 1e-6, 200)
    masters = flat(optimizer.param_groups[0]["params"])
    assert (masters - start - want).norm() < 0.01 * want.norm()
    # the weights are their masters' rounding, and have moved by as much in the mean
    assert torch.equal(got, masters.bfloat16().float())
    along = ((got - start) @ want) / (want @ want)
    assert 0.99 < along < 1.01
    stuck = train(naive, torch.optim.AdamW(naive, **HOW), 1e-6, 200) - start
    assert abs((stuck @ want) / (want @ want) - 1) > 0.2  # AdamW on bfloat16 itself is far off


def test_is_adamw(alone):
    """On float32 weights it is torch's AdamW to the bit, whatever rate it was made with."""
    how = dict(lr=1e-3, weight_decay=0.1)
    ours, theirs = weights(torch.float32), weights(torch.float32)
    got = train(ours, master(ours, **dict(how, lr=7.0)), 1e-3, 20)
    assert torch.equal(got, train(theirs, torch.optim.AdamW(theirs, fused=True, **how), 1e-3, 20))


def two_ranks_training():
    ours = weights(torch.bfloat16)
    optimizer = master(ours, **HOW)
    got = train(ours, optimizer, 1e-4, 20)
    return sum(p.numel() for p in optimizer.param_groups[0]["params"]), got


def test_two_ranks_hold_a_share_each_and_agree(tmp_path, alone):
    two, (total, want) = on_ranks(2, tmp_path, two_ranks_training), two_ranks_training()
    assert all(torch.equal(got, want) for _, got in two)
    assert sum(held for held, _ in two) == total and max(held for held, _ in two) < 0.8 * total


def test_clips_by_the_norm_of_the_whole(alone):
    how = dict(lr=1e-3, weight_decay=0.1)
    ours, theirs = weights(torch.float32), weights(torch.float32)
    optimizer, exact = master(ours, **how), torch.optim.AdamW(theirs, **how)
    (grads,) = gradients([w.shape for w in ours], 1)
    optimizer.zero_grad()
    for p, q, g in zip(ours, theirs, grads):
        p.grad += g
        q.grad = g.clone()
    optimizer.fold()
    norm = optimizer.step(1e-3, 0.5)
    assert norm == pytest.approx(flat(grads).norm().item(), rel=1e-5)
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    exact.step()
    for state, wanted in zip(optimizer.state.values(), exact.state.values()):
        torch.testing.assert_close(state["exp_avg"], wanted["exp_avg"])
    torch.testing.assert_close(flat(ours), flat(theirs))


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(alone, odd):
    ours = weights(torch.float32)
    optimizer, before = master(ours, **HOW), flat(ours)
    optimizer.zero_grad()
    ours[1].grad[3] = odd
    optimizer.fold()
    assert not optimizer.step(1e-2, 1.0) < float("inf")
    assert torch.equal(flat(ours), before)
    assert not any(state["step"] or state["exp_avg"].any() for state in optimizer.state.values())


def error_of_sum(number, size):
    """Relative error of `number` bfloat16 gradients' sum, folded after every `size`."""
    ours, exact = weights(torch.bfloat16), weights(torch.float32)
    optimizer = master(ours)
    for e in exact:
        e.grad = torch.zeros_like(e)
    for i, grads in enumerate(gradients([w.shape for w in ours], number), 1):
        for w, e, g in zip(ours, exact, grads):
            w.grad += g.bfloat16()
            e.grad += g.bfloat16().float()
        if i % size == 0 or i == number:
            optimizer.fold()
    return max(((total.float() - e.grad).norm() / e.grad.norm()).item()
               for total, e in zip(optimizer.sums, exact))


def test_sum_of_bfloat16_gradients(alone):
    """As many micro-batches as one GPU adds up at the paper's batch size."""
    assert error_of_sum(683, sdpo.ROUND) < 0.01
    assert error_of_sum(683, 683) > 0.1  # what folding is for


ARGS = Namespace(temperature=1.0, top_k=20, alpha=0.5, tokens_per_micro_batch=200)


def four_steps(freed):
    """Weights after four steps, with the gradients freed before each or not.

    Also whether every storage was empty then, and how many storages hold them in the end.
    """
    import test_sdpo
    ddp, optimizer = learner(sdpo, ARGS, bucket_cap_mb=0.5)
    batch, teacher, empty = test_sdpo.make_batch(23), test_sdpo.toy(), []
    sdpo.set_loss_weights(batch)

    def held():
        return {w.grad.untyped_storage().data_ptr() for w in optimizer.weights}
    for _ in range(4):
        if freed:
            optimizer.free_gradients()
            empty.append(not any(w.grad.untyped_storage().nbytes() for w in optimizer.weights))
        optimizer.zero_grad()
        assert not any(w.grad.any() for w in optimizer.weights)
        before = held()
        micros = sdpo.my_micro_batches([r for r in batch if r.weight], 200)
        sdpo.backward(ddp, teacher, optimizer, micros)
        optimizer.step(1e-3, 1.0)
    return dict(weights=flat(optimizer.weights), empty=empty, buckets=len(held()),
                stayed=held() == before)


@pytest.mark.parametrize("ranks", [1, 2])
def test_freed_gradients_come_back_and_change_no_bit(tmp_path, ranks):
    kept, freed = (on_ranks(ranks, tmp_path, four_steps, free) for free in (False, True))
    for k, f in zip(kept, freed):
        assert f["empty"] == [True] * 4
        assert k["buckets"] == f["buckets"] > 2
        assert f["stayed"]  # added up inside DDP's buckets, none beside them
        assert torch.equal(k["weights"], f["weights"])
    assert torch.equal(freed[0]["weights"], freed[-1]["weights"])
