"""MasterAdamW: bfloat16 weights that train as float32 ones do. On two ranks: test_sdpo.py."""
import pytest
import torch

import sdpo

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
    return [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.02).bfloat16().to(dtype))
            for s in ((64, 32), (32,), (100, 64))]


def master(parameters, **how):
    """MasterAdamW of a model of these parameters."""
    model = torch.nn.Module()
    model.weights = torch.nn.ParameterList(parameters)
    return sdpo.MasterAdamW(model, **how)


def flat(tensors):
    return torch.cat([t.detach().float().flatten() for t in tensors])


def train(parameters, optimizer, lr, steps):
    """The parameters after so many steps of the optimizer, ours or torch's."""
    for grads in gradients([p.shape for p in parameters], steps):
        for p, g in zip(parameters, grads):
            p.grad = g.to(p.dtype)
        if isinstance(optimizer, sdpo.MasterAdamW):
            optimizer.add_gradients()
            optimizer.step(lr, FAR)
        else:
            optimizer.step()
    return flat(parameters)


def test_lr_1e_6_moves_as_in_float32(alone):
    start = flat(weights(torch.float32))
    exact, naive, ours = weights(torch.float32), weights(torch.bfloat16), weights(torch.bfloat16)
    want = train(exact, torch.optim.AdamW(exact, **HOW), 1e-6, 200) - start
    optimizer = master(ours, **HOW)
    got = train(ours, optimizer, 1e-6, 200)
    masters = flat(optimizer.masters.values())
    assert (masters - start - want).norm() < 0.01 * want.norm()
    # the weights are their masters' rounding, and have moved by as much in the mean
    assert torch.equal(got, masters.bfloat16().float())
    along = ((got - start) @ want) / (want @ want)
    assert 0.99 < along < 1.01
    stuck = train(naive, torch.optim.AdamW(naive, **HOW), 1e-6, 200) - start
    assert abs((stuck @ want) / (want @ want) - 1) > 0.2  # AdamW on bfloat16 itself is far off


def test_is_adamw(alone):
    """On float32 weights it is torch's AdamW to the bit, whatever rate it was made with."""
    ours, theirs = weights(torch.float32), weights(torch.float32)
    got = train(ours, master(ours, lr=7.0, weight_decay=0.1), 1e-3, 20)
    exact = torch.optim.AdamW(theirs, fused=True, lr=1e-3, weight_decay=0.1)
    assert torch.equal(got, train(theirs, exact, 1e-3, 20))


def test_clips_by_the_norm_of_the_whole(alone):
    ours = weights(torch.float32)
    optimizer, (grads,) = master(ours, **HOW), gradients([w.shape for w in ours], 1)
    for p, g in zip(ours, grads):
        p.grad = g.clone()
    optimizer.add_gradients()
    assert not any(p.grad.any() for p in ours)
    norm = flat(grads).norm()
    assert optimizer.step(1e-3, 0.5) == pytest.approx(norm.item(), rel=1e-5)
    first_moments = flat(moments["exp_avg"] for moments in optimizer.moments.values())
    torch.testing.assert_close(first_moments, 0.1 * flat(grads) * 0.5 / norm)


def test_a_gradient_that_is_not_finite_moves_nothing(alone):
    ours = weights(torch.float32)
    optimizer, before = master(ours, **HOW), flat(ours)
    for w in ours:
        w.grad = torch.zeros_like(w)
    ours[1].grad[3] = float("nan")
    optimizer.add_gradients()
    assert not optimizer.step(1e-2, 1.0) < float("inf")
    assert torch.equal(flat(ours), before)
    assert not any(t.any() for moments in optimizer.moments.values() for t in moments.values())
    assert not any(total.any() for total in optimizer.sums)  # nor anything after it


def test_a_step_takes_no_large_new_memory(alone):
    """Fresh CPU memory is slow: of 8 GB a step, page faults took most of AdamW's time (8B)."""
    weight = torch.nn.Parameter(torch.ones(2**23, dtype=torch.bfloat16))
    optimizer = master([weight], **HOW)
    weight.grad = torch.ones_like(weight)
    with torch.profiler.profile(profile_memory=True) as profiler:
        optimizer.add_gradients()
        optimizer.step(1e-3, FAR)
    taken = [event.self_cpu_memory_usage for event in profiler.events()]
    assert 0 < max(taken) <= 2**20  # a piece of the norm; the gradient in float32 is 2**25 bytes


def error_of_sum(number, size):
    """Relative error of `number` bfloat16 gradients' sum, in rounds of `size`."""
    ours, exact = weights(torch.bfloat16), weights(torch.float32)
    optimizer = master(ours, **HOW)
    for w in ours + exact:
        w.grad = torch.zeros_like(w)
    for i, grads in enumerate(gradients([w.shape for w in ours], number), 1):
        for w, e, g in zip(ours, exact, grads):
            w.grad += g.bfloat16()
            e.grad += g.bfloat16().float()
        if i % size == 0 or i == number:
            optimizer.add_gradients()
    return max(((total.float() - e.grad).norm() / e.grad.norm()).item()
               for total, e in zip(optimizer.sums, exact))


def test_sum_of_bfloat16_gradients(alone):
    """As many micro-batches as one GPU adds up at the paper's batch size."""
    assert error_of_sum(683, sdpo.ROUND) < 0.01
    assert error_of_sum(683, 683) > 0.1  # what rounds are for
