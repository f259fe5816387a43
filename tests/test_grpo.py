"""grpo.py: advantages, loss and update, against brute force. No vLLM, only the toy. What it has in
common with sdpo.py to the letter (test_house.py) is in test_sdpo.py."""
import collections
import math
import random
from unittest import mock

import pytest
import torch

import grpo
from common import ROOT, assert_same_gradient, learner, on_ranks, toy
from test_sdpo import assert_same_on_two_ranks, update_of

def flags(*more):
    """Those of the toy's updates: mini-batches of 20 rollouts."""
    return grpo.make_parser().parse_args([
        "--model", str(ROOT / "toy/model"), "--rollouts", "1", "--minibatch_questions", "20",
        "--temperature", "0.7", "--tokens_per_micro_batch", "200", *more])

def rollout(row=0, advantage=0.0, prompt=(1, 2), response=(3,), reward=0.0, finished=True):
    return grpo.Rollout(dict(prompt_ids=list(prompt), row=row), list(response),
                        [-1.0] * len(response), "", finished, reward, advantage)

def test_an_advantage_is_the_distance_from_the_groups_mean(alone, monkeypatch):
    """Not divided by the deviation; exactly 0 where all are equal, or the group would be computed;
    a cut answer earns nothing, whatever it has boxed."""
    def advantages(*rewards, finished=True):
        sampled = [rollout(reward=float(r), finished=finished) for r in rewards]
        monkeypatch.setattr(grpo, "generate", lambda *_, **__: sampled)
        args = flags("--rollouts", str(len(rewards)))
        return [r.advantage for r in grpo.sample_groups(None, None, [{}], 1, args)]
    assert advantages(1, 0, 0, 0) == [0.75, -0.25, -0.25, -0.25]
    assert advantages(1, 1, 1, 1, 0, 0, 0, 0) == [0.5] * 4 + [-0.5] * 4
    assert all(advantages(*[r] * n) == [0] * n for r in (0, 1) for n in (1, 3, 7, 8))
    assert advantages(1, 0, finished=False) == [0, 0]

def test_policy_loss_stays_finite_far_away():
    now = torch.tensor([500.0, -500.0, 500.0, -500.0], requires_grad=True)
    loss, _ = grpo.policy_loss(now, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2, 0.28)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-1.28, -math.exp(-20), 3.0, 0.8])
    assert now.grad.tolist() == [0, 0, 0, 0]

def make_batch(size, shift=1.2):
    """Rollouts of which five in six have an advantage, the same in every process. vLLM's
    log-probabilities are up to `shift` from the trainer's: far enough for the importance weight."""
    batch, student = [], grpo.Student(toy(), flags())
    for row in range(size):
        rng = random.Random(row)
        prompt, response = ([rng.randrange(5, 400) for _ in range(rng.randint(*lengths))]
                            for lengths in ((2, 9), (20, 60)))
        advantage = rng.choice([-0.875, -0.5, 0.5, 0.875]) if row % 6 else 0.0
        batch.append(rollout(row, advantage, prompt, response))
        with torch.no_grad():
            logprobs = student(batch[-1:]).tolist()
        batch[-1].logprobs = [p + rng.uniform(-shift, shift) for p in logprobs]
    return batch

def measure(size, lr=1e-6):
    with mock.patch.object(grpo, "CHUNK", 16):
        return update_of(grpo, make_batch(size), flags(), lr)

def ppo(now, start, advantage):
    """(loss of one token, what holds it), case by case; a plain number has no gradient."""
    ratio = (now - start).exp()
    if advantage > 0 and ratio > 1.28:
        return -advantage * 1.28, "upper"
    if advantage < 0 and ratio < 0.8:
        return -advantage * 0.8, "lower"
    if advantage < 0 and ratio > 3:
        return -advantage * 3.0, "dual"
    return -advantage * ratio, None

def brute_force(model, batch, seen):
    """Loss of a mini-batch: each rollout alone, a token at a time, zero advantages too; counts in
    `seen` what holds its tokens back."""
    first, total = toy(), 0.0
    for r in batch:
        prompt = r.question["prompt_ids"]
        ids, places = torch.tensor([prompt + r.response_ids]), range(len(prompt) - 1, 999)
        now, start = ((asked(input_ids=ids).logits[0] / 0.7).log_softmax(-1)
                      for asked in (model, first))
        for t, token, p_vllm in zip(places, r.response_ids, r.logprobs):
            p_start = start[t, token].item()
            loss, why = ppo(now[t, token], p_start, r.advantage)
            correction = min(math.exp(p_start - p_vllm), 2.0)
            total = total + loss * correction / len(batch) / len(r.response_ids)
            if r.advantage:
                seen.update([why, "truncated" if correction == 2 else None])
                seen["tokens"] += 1
                seen["clipped"] += why is not None or correction == 2
                seen["gap"] += abs(p_start - p_vllm)
    return total

@pytest.mark.parametrize("minibatches", [1, 2])  # at the second the weights have moved
def test_one_rank_gives_the_gradient_of_brute_force(alone, minibatches):
    model, batch, lr, seen = toy(), make_batch(20 * minibatches), 3e-3, collections.Counter()
    losses = [brute_force(model, batch[:20], seen)]
    if minibatches == 2:
        for w, moved in zip(model.parameters(), measure(20, lr)["weights"]):
            w.data.copy_(moved)
        losses.append(brute_force(model, batch[20:], seen))
    losses[-1].backward()
    got = measure(20 * minibatches, lr)
    assert got["loss"] == pytest.approx(sum(losses).item() / minibatches, rel=1e-4, abs=1e-6)
    assert got["trained_tokens"] == seen["tokens"]
    assert got["clipped"] == seen["clipped"] / seen["tokens"]
    assert got["mismatch"] == pytest.approx(seen["gap"] / seen["tokens"], rel=1e-4)
    assert_same_gradient(got["gradient"], {n: p.grad for n, p in model.named_parameters()}, 1e-4)
    # whatever can hold a token back does so somewhere, by value and gradient
    assert seen["truncated"]
    assert minibatches == 1 or seen["upper"] and seen["lower"] and seen["dual"]

@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_one(tmp_path, alone):
    assert_same_on_two_ranks(measure(40), on_ranks(2, tmp_path, measure, 40))

def test_update_computes_only_groups_with_an_advantage(alone):
    (model, optimizer), batch, asked = learner(grpo), make_batch(20, shift=0.0), []
    before, advantage = [w.detach().clone() for w in model.parameters()], batch[7].advantage
    model.get_decoder().register_forward_pre_hook(lambda *_: asked.append(1))
    for r in batch:
        r.advantage = 0.0
    metrics = grpo.update(model, optimizer, batch, 1e-2, flags())
    assert not asked and all(map(torch.equal, before, model.parameters()))
    assert not any(metrics[key] for key in ("loss", "grad_norm", "trained", "trained_tokens"))
    batch[7].advantage = advantage
    metrics = grpo.update(model, optimizer, batch, 1e-2, flags())
    assert len(asked) == 1 and metrics["trained"] == 1 / 20
    assert metrics["trained_tokens"] == len(batch[7].response_ids) and metrics["mismatch"] < 1e-5
