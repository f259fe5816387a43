"""grpo.py: advantages, loss, batches, questions, against brute force. No vLLM, only the toy."""
import collections
import itertools
import math
import random
from argparse import Namespace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import grpo
from common import (ROOT, assert_same_gradient, gradients_of, learner, lines, on_ranks,
                    refusal_of_main, toy)
from test_sdpo import assert_same_on_two_ranks


def ppo(now, before, advantage):
    """(loss of one token, what holds it), case by case; a plain number has no gradient."""
    ratio = (now - before).exp()
    if advantage > 0 and ratio > 1.28:
        return -advantage * 1.28, "upper"
    if advantage < 0 and ratio < 0.8:
        return -advantage * 0.8, "lower"
    if advantage < 0 and ratio > 3:
        return -advantage * 3.0, "dual"
    return -advantage * ratio, None


def test_policy_loss_stays_finite_far_away():
    now = torch.tensor([500.0, -500.0, 500.0, -500.0], requires_grad=True)
    loss, _ = grpo.policy_loss(now, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2, 0.28)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-1.28, -math.exp(-20), 3.0, 0.8])
    assert now.grad.tolist() == [0, 0, 0, 0]


def test_advantages_are_the_distance_from_the_groups_mean():
    assert grpo.group_advantages([1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]
    one, four = (grpo.group_advantages([1.0] * k + [0.0] * (8 - k)) for k in (1, 4))
    assert one == [0.875] + [-0.125] * 7 and four == [0.5] * 4 + [-0.5] * 4  # no deviation divides
    # exactly 0, or the group would be computed: three of three and seven of seven too
    assert all(grpo.group_advantages([r] * n) == [0] * n for r in (0.0, 1.0) for n in (1, 3, 7, 8))


def rollout(row=0, advantage=0.0, prompt=(1, 2), response=(3,)):
    return grpo.Rollout(row, list(prompt), list(response), [-1.0] * len(response), "", True,
                        reward=float(advantage > 0), advantage=advantage)


def flags(questions, minibatch):
    return Namespace(temperature=0.7, clip_low=0.2, clip_high=0.28, tokens_per_micro_batch=200,
                     questions_per_step=questions, minibatch_questions=minibatch)


def make_batch(moved):
    """25 rollouts, 21 with an advantage; whether the weights have moved since the step's start."""
    rng = random.Random(moved)

    def draw(n):
        return [rng.randrange(5, 400) for _ in range(n)]

    def shake(logprobs, size):
        return logprobs + torch.tensor([rng.uniform(-size, size) for _ in logprobs])
    batch = [rollout(i, rng.choice([-0.875, -0.5, 0.5, 0.875]) if i < 21 else 0.0,
                     draw(rng.randint(2, 9)), draw(rng.randint(20, 60)))
             for i in range(25)]
    grpo.remember_logprobs(grpo.Student(toy(), flags(25, 25)), [[r] for r in batch])
    for r in batch:  # far enough for both clips, the dual one and the importance weight's cut
        start = shake(r.old_logprobs, 1.5) if moved else r.old_logprobs
        r.logprobs, r.old_logprobs = shake(start, 1.2).tolist(), start if moved else None
    return batch


def measure(moved):
    """This rank's share of the gradient, and the update's metrics."""
    with mock.patch.multiple(grpo, MISMATCH_LIMIT=math.inf, CHUNK=16):
        batch, args = make_batch(moved), flags(25, 25)
        ddp, optimizer = learner(grpo, args)
        gradient = gradients_of(optimizer)
        metrics = grpo.update(ddp, optimizer, batch, 1e-3)
        (micros,) = grpo.split_into_minibatches(batch, args)
        return dict(metrics, gradient=gradient, micros=len(micros),
                    fillers=sum(not r.weight for m in micros for r in m))


@pytest.mark.parametrize("moved", [False, True])
def test_one_rank_gives_the_gradient_of_brute_force(alone, moved):
    batch, model, total, tokens, gap = make_batch(moved), toy(), 0.0, 0, 0.0
    seen = collections.Counter()
    for r in batch:  # alone, all logits at once, a token at a time, zero advantages too
        logits = model(input_ids=torch.tensor([r.prompt_ids + r.response_ids])).logits[0]
        logprobs = (logits / 0.7).log_softmax(-1)
        for t, y in enumerate(r.response_ids):
            now = logprobs[len(r.prompt_ids) + t - 1, y]
            before = r.old_logprobs[t].item() if moved else now.item()
            loss, why = ppo(now, before, r.advantage)
            correction = min(math.exp(before - r.logprobs[t]), 2.0)
            total = total + loss * correction / len(batch) / len(r.response_ids)
            if r.advantage:
                tokens, gap = tokens + 1, gap + abs(before - r.logprobs[t])
                seen.update([why, "truncated" if correction == 2 else None])
                seen["either"] += why is not None or correction == 2
    total.backward()
    one = measure(moved)
    assert one["loss"] == pytest.approx(total.item(), rel=1e-4, abs=1e-6)
    assert one["trained_tokens"] == tokens and one["clipped"] == seen["either"] / tokens
    assert one["mismatch"] == pytest.approx(gap / tokens, rel=1e-4)
    assert_same_gradient(one["gradient"], {n: p.grad for n, p in model.named_parameters()})
    # whatever can hold a token back does so somewhere, by value and gradient
    assert seen["truncated"] and (not moved or seen["upper"] and seen["lower"] and seen["dual"])


@pytest.mark.slow
@pytest.mark.parametrize("moved", [False, True])
def test_two_ranks_give_the_gradient_of_one(tmp_path, alone, moved):
    assert_same_on_two_ranks(measure(moved), on_ranks(2, tmp_path, measure, moved))


def test_every_group_is_compared_with_itself(alone, monkeypatch):
    answers = [[SimpleNamespace(token_ids=(7,), logprobs=SimpleNamespace(logprobs=[-1.0]), text="",
                                finish_reason=reason, reward=reward) for reward in rewards]
               for rewards, reason in (([1.0, 0.0, 0.0, 0.0], "stop"), ([1.0] * 4, "length"))]
    monkeypatch.setattr(grpo, "generate", lambda *_, **__: answers)
    args = grpo.make_parser().parse_args(["--model", "m", "--rollouts", "4"])
    rollouts = grpo.sample_groups(None, None, [dict(prompt_ids=[1])] * 2, 1, args)
    assert [r.row for r in rollouts] == [0] * 4 + [1] * 4
    assert [r.advantage for r in rollouts] == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    # a cut answer earns nothing, whatever box it holds
    assert [r.reward for r in rollouts] == [1, 0, 0, 0, 0, 0, 0, 0]


STEP = flags(4, 2)


def sampled(ddp, advantages):
    """A group of two a question, with the trainer's own log-probabilities: the engine is fresh."""
    rng = random.Random(0)
    batch = [rollout(row, a, [5, 6, 7], [rng.randrange(5, 400) for _ in range(12)])
             for row, pair in enumerate(advantages) for a in pair]
    grpo.remember_logprobs(ddp.module, [[r] for r in batch])
    for r in batch:
        r.logprobs, r.old_logprobs = r.old_logprobs.tolist(), None
    return batch


def watched(ddp):
    """The list of the rollouts that the model is asked for from now on, in their order."""
    asked = []
    ddp.module.register_forward_pre_hook(lambda module, inputs: asked.extend(inputs[0]))
    return asked


def test_update_computes_only_groups_with_an_advantage(alone, tmp_path, capsys):
    ddp, optimizer = learner(grpo, STEP)
    batch, seconds = sampled(ddp, [(0.0, 0.0)] * 4), dict(rollout=1.0, update=2.0)
    before, asked = [p.detach().clone() for p in ddp.parameters()], watched(ddp)
    args = Namespace(run_dir=tmp_path, wandb=False, steps=2)
    grpo.log(args, 1, batch, grpo.update(ddp, optimizer, batch, 1e-2), seconds)
    assert not asked and all(map(torch.equal, before, ddp.parameters()))
    batch = sampled(ddp, [(0.0, 0.0), (0.0, 0.0), (0.5, -0.5), (0.0, 0.0)])
    asked.clear()
    grpo.log(args, 2, batch, grpo.update(ddp, optimizer, batch, 1e-2), seconds)
    assert sorted(map(id, asked)) == sorted(map(id, batch[4:6]))
    assert capsys.readouterr().out.count("no update: in each group all rewards are equal") == 1
    one, two = lines(tmp_path / "metrics.jsonl")
    assert not any(one[key] for key in ("updates", "loss", "mismatch", "clipped", "trained_tokens"))
    assert (one["trained"], two["trained"]) == (0, 0.25) and two["trained_tokens"] == 24
    assert two["updates"] == 1 and two["seconds"] == seconds
    assert two["tokens_per_second"] == 8 * 12 / 3
    assert len(lines(tmp_path / "rollouts/step_2.jsonl")) == 8


def test_second_mini_batch_remembers_the_steps_start(alone):
    ddp, optimizer = learner(grpo, STEP)
    batch = sampled(ddp, [(0.5, -0.5)] * 4)
    asked, row = watched(ddp), {id(r): r.row for r in batch}
    metrics = grpo.update(ddp, optimizer, batch, 1e-2)
    order = [row[id(r)] // 2 for r in asked]
    assert order == [1] * 4 + [0] * 4 + [1] * 4  # the second before anything moves, then as trained
    # the engine agrees with the start; with the weights after one update it would not, by far
    assert metrics["updates"] == 2 and metrics["mismatch"] < 1e-5 and metrics["clipped"] > 0.1
    grpo.remember_logprobs(ddp.module, [[r] for r in batch])
    assert max((r.old_logprobs - torch.tensor(r.logprobs)).abs().max() for r in batch) > 0.1


def test_a_gradient_that_is_not_finite_is_left_out(alone):
    ddp, optimizer = learner(grpo, STEP)
    batch = sampled(ddp, [(0.5, math.nan), (0.5, -0.5), (0.5, -0.5), (0.0, 0.0)])
    metrics = grpo.update(ddp, optimizer, batch, 1e-2)
    assert (metrics["updates"], metrics["skipped"]) == (1, 1)
    assert all(p.isfinite().all() for p in ddp.parameters())


def test_question_sets_are_nested_and_by_seed():
    questions = list(range(1000))

    def choose(n, seed=0):
        return grpo.choose_questions(questions, Namespace(num_questions=n, seed=seed))
    sets = [choose(n) for n in (1, 8, 64, 512, 1000)]
    assert [len(set(s)) for s in sets] == [1, 8, 64, 512, 1000]
    assert all(small == large[: len(small)] for small, large in itertools.pairwise(sets))
    assert choose(8) == sets[1] and choose(8, seed=1) != sets[1]
    assert sorted(choose(None)) == questions


def test_epochs_are_complete_and_differ():
    """So a small set repeats evenly within a step."""
    stream = grpo.question_stream(list(range(10)), seed=0)
    epochs = [list(itertools.islice(stream, 10)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    again, other = (list(itertools.islice(grpo.question_stream(list(range(10)), seed), 10))
                    for seed in (0, 1))
    assert again == epochs[0] != other


def test_defaults_are_the_papers():
    args = grpo.make_parser().parse_args(["--model", "x"])
    table_8_and_9 = dict(
        max_prompt_tokens=2048, max_response_tokens=20480, questions_per_step=256,
        minibatch_questions=128, rollouts=8, temperature=1.0, warmup_steps=10, lr=1e-6,
        clip_low=0.2, clip_high=0.28)
    assert {name: getattr(args, name) for name in table_8_and_9} == table_8_and_9


def test_bad_input_is_one_line_and_exit_code_2(monkeypatch):
    """What grpo.py reads as sdpo.py does is in test_sdpo.py."""
    flags = ["--model", ROOT / "toy/model", "--minibatch_questions", "100"]
    assert "256 is not divisible by 100" in refusal_of_main(grpo, monkeypatch, flags)
