"""extras/remedies.py: each remedy against numbers worked out by hand; two ranks; what reduces to
what. No vLLM."""
import contextlib
import json
import math
import random
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import grpo
import sdpo
from common import assert_same_gradient, gradients_of, on_ranks, on_top, tokenizer_of, toy
from extras import remedies

LOG2, LN3 = math.log(2), math.log(3)
DEMO, WRONG = [1], [9]


def args_of(remedy, **more):
    argv = ["remedies.py", "--model", "m", "--remedy", remedy, "--rollouts", "3", "--top_k", "20",
            "--minibatch_questions", "8", "--tokens_per_micro_batch", "600"]
    with mock.patch.object(sys, "argv", argv):
        args = remedies.make_parser().parse_args()
    vars(args).update(more)
    return args


def test_demopsd_mixes_towards_what_the_teacher_says_unaided():
    plain, aided = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.1, 0.7]]).log()
    # JS of these two is 0.132918 (test_sdpo.py): b = 2 x .15 (sigmoid(6.6459) - .5) = .149611
    b = 0.149611
    mixed = [0.2 ** (1 - b) * 0.5**b, 0.1 ** (1 - b) * 0.3**b, 0.7 ** (1 - b) * 0.2**b]
    target = remedies.demopsd_target
    torch.testing.assert_close(target(aided, plain, 0.15).exp(),
                               torch.tensor([mixed]) / sum(mixed), atol=1e-6, rtol=0)
    torch.testing.assert_close(target(aided, aided, 0.15), aided)  # where they agree: no change
    torch.testing.assert_close(target(aided, plain, 0.0), aided)


def test_antisd_gate(alone, tmp_path):
    assert remedies.antisd_gate(1.0, [1.0] * 4) == 0  # the fifth step of warm-up
    before = [0.8, 0.9, 1.0, 1.1, 1.2]
    gates = [remedies.antisd_gate(median, before) for median in (1.5, 1.0, 0.965, 0.93, 0.5)]
    assert gates == pytest.approx([1, 1, 0.5, 0, 0])
    args = args_of("antisd", run_dir=tmp_path)
    assert remedies.antisd_first_medians(args) == []  # the first step: no log
    (tmp_path / "metrics.jsonl").write_text("".join(
        json.dumps(dict(teacher_entropy=m)) + "\n" for m in (0.0, *before, 7.0)))  # 0: no teacher
    assert remedies.antisd_first_medians(args) == before


def test_what_the_rollouts_of_a_group_learn_from(tokenizer):
    text = "Hmm, wait. 4"
    ids = tokenizer.encode(text, add_special_tokens=False)
    question = dict(messages=[dict(role="user", content="2+2?")], prompt_ids=[7])

    def group_of(remedy, *rewards):
        group = [remedies.Rollout(question, ids, [], text, True, float(r)) for r in rewards]
        remedies.set_teacher_prompts(group, tokenizer, random.Random(0), args_of(remedy))
        for r in group:  # sdpo.py trains what has a teacher's prompt: its own, untaught
            assert r.taught == ((r.teacher_prompt_ids or [7]) != [7])
        return group

    def summary(*args):
        return [(r.taught, r.advantage, bool(r.teacher_prompt_ids)) for r in group_of(*args)]
    right, wrong = (False, 0.75, True), (True, -0.25, True)  # its group's only success has no c
    for remedy in ("mixture", "rlrt", "antisd", "rlcsd"):
        assert summary(remedy, 1, 0, 0, 0) == [right, *[wrong] * 3]
    assert summary("srpo", 1, 1, 0, 0) == [(False, 0.5, True)] * 2 + [(True, -0.5, True)] * 2
    for remedy in ("demopsd", "shield"):  # of the reward nothing
        assert summary(remedy, 1, 0, 0, 0) == [(False, 0, False), *[(True, 0, True)] * 3]
    # without an advantage there is nothing to modulate
    for remedy in ("rlrt", "rlcsd", "srpo"):
        assert summary(remedy, 1, 1) == [(False, 0, False)] * 2
    assert summary("antisd", 1, 1) == summary("mixture", 1, 1) == [(True, 0, True)] * 2
    for rewards, wrong in ((1, 1, 0, 0, 0), [2] * 5), ((1, 1, 0), [1, 1, 0]), ((1, 0), [0, 0]):
        assert [len(r.wrong_prompts) for r in group_of("rlcsd", *rewards)] == wrong
    marked = group_of("shield", 1, 0)[0].marked
    said = "".join(tokenizer.decode([i]) for i, m in zip(ids, marked) if m).lower()
    assert "hmm" in said and "wait" in said and "4" not in said


# At the one position the student would say "wait" (token 0) with .6; the teacher, who has seen an
# answer, with .1. It is not quite sure what to say instead: .5 and .4.
STUDENT, TEACHER, PLAIN, MISLED = [0.6, 0.3, 0.1], [0.1, 0.5, 0.4], [0.6, 0.2, 0.2], [0.2, 0.4, 0.4]


def push(folder, remedy, reward, demonstration=DEMO, **more):
    """Minus the derivative of the loss in the logit of "wait", where it was said by one of a group
    that is half right: above 0, the step makes it more likely."""
    args = args_of(remedy, **{**dict(run_dir=folder, top_k=2), **more})
    student = remedies.Student(SimpleNamespace(device=torch.device("cpu")), args)
    logits = torch.tensor([STUDENT]).log().requires_grad_()

    def states(model, prompts, responses):  # hidden states are log-probabilities
        says = {str(DEMO): TEACHER, str(WRONG): MISLED}.get(str(prompts[0]), PLAIN)
        return logits if model is student.model else torch.tensor([says]).log(), lambda x: x * 1.0
    r, sibling = (remedies.Rollout(dict(prompt_ids=[5]), [0], [], "wait", True, value, prompt)
                  for value, prompt in ((reward, demonstration), (1 - reward, None)))
    with mock.patch.object(sdpo, "response_states", states), mock.patch.multiple(
            remedies, sdpo_teacher_prompts=lambda *_: None, wrong_prompts=lambda *_: [WRONG]):
        tokenizer = SimpleNamespace(decode=lambda _: "wait")
        remedies.set_teacher_prompts([r, sibling], tokenizer, None, args)
        remedies.measure(student, "teacher", [r], args)
        remedies.measure(student, "teacher", [sibling], args)
        # SRPO: the step's other token has exp(-H) three times, so that the mean is twice this one's
        sibling.taught, sibling.entropy = True, r.entropy - LN3 * (remedy == "srpo")
        remedies.REMEDIES[remedy][0]([r, sibling], args)
        loss, _ = student([r], "teacher")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return -gradient[0, 0].item()


def test_signs_on_an_epistemic_token(alone, tmp_path):
    """SDPO pushes it down in right and wrong answers alike; what each remedy makes of that."""
    (tmp_path / "metrics.jsonl").write_text('{"teacher_entropy": 1e-9}\n' * 5)  # AntiSD: g = 1

    def of(*args, **more):
        return push(tmp_path, *args, **more)

    def near(value):
        return pytest.approx(value, rel=1e-4)
    sdpo_js, sdpo_kl = of("shield", 0.0, strength=0.0), of("demopsd", 1.0, strength=0.0)
    assert sdpo_js < 0 and sdpo_kl < 0
    # KL(S || T) by hand: d/dlogit_i = S_i (log S_i/T_i - KL), over the buckets 0, 1 and the rest
    kl = 0.6 * math.log(6) + 0.3 * math.log(0.6) + 0.1 * math.log(0.25)
    assert sdpo_kl == near(-0.6 * (math.log(6) - kl))
    reward = 0.5 * (1 - 0.6)  # GRPO's: A (1 - S)
    # still down, but less: the target is nearer to what the teacher says unaided
    assert sdpo_kl < of("demopsd", 1.0) < 0
    # the teacher's share, then the reward's
    assert of("mixture", 1.0) == near(0.1 * sdpo_kl + 0.9 * reward) and of("mixture", 1.0) > 0
    assert of("mixture", 0.0) == near(0.1 * sdpo_kl - 0.9 * reward)
    # right: rewarded. Wrong: distilled, half as much, since the teacher is half as sure as others
    assert of("srpo", 1.0) == near(reward)
    assert of("srpo", 0.0) == near(0.5 * sdpo_js) and of("srpo", 0.0) < 0
    assert of("srpo", 0.0, None) == near(-reward)
    # up, beyond the reward (A / std: 1), and for a wrong answer less far down
    bonus = 0.5 * (LOG2 - math.log(1 + 1 / 6)) / 2 * 0.4  # softplus(u) = log(1 + T / S)
    assert of("antisd", 1.0) == near(2 * reward + bonus)
    assert of("antisd", 0.0) == near(bonus - 2 * reward)
    assert of("antisd", 1.0, None) == near(2 * reward)
    assert of("rlrt", 1.0) == near(1.1 * reward)  # S / T is 6, cut at 1.2
    assert of("rlrt", 0.0) == near(-reward)
    # not at all
    assert of("shield", 1.0) == of("shield", 0.0) == 0
    assert of("shield", 1.0, strength=0.25) == near(0.75 * sdpo_js)
    # a wrong demonstration makes it half as unlikely: e = log(.1 / .2)
    assert of("rlcsd", 1.0) == near((0.5 + 0.5 * math.tanh(math.log(0.5))) * 0.4)
    assert of("rlcsd", 1.0, None) == near(reward)
    assert of("rlcsd", 1.0, strength=3.0) == 0  # A keeps its sign
    with mock.patch(f"{__name__}.MISLED", TEACHER):  # no more than noise
        assert of("rlcsd", 1.0) == near(reward)


def batch_of(script, args):
    """Eight groups of three, in every process the same: all wrong, one right, two or all right."""
    rng, tokenizer, batch = random.Random(1), tokenizer_of("toy"), []
    for row in range(8):
        question = dict(row=row, prompt_ids=[rng.randrange(5, 400) for _ in range(4)],
                        messages=[dict(role="user", content=f"{row} + {row}?")])
        group = []
        for i in range(3):
            ids = [rng.randrange(5, 400) for _ in range(rng.randint(1, 60))]
            group.append(script.Rollout(question, ids, [-3.0 + rng.random() for _ in ids],
                                        tokenizer.decode(ids), True, float(i < row % 4)))
        if script is grpo:
            grpo.set_advantages(group)
        else:
            script.set_teacher_prompts(group, tokenizer, random.Random(row), args)
        batch += group
    return batch


def moved_toy():
    """A teacher that is not the student."""
    teacher = toy()
    with torch.no_grad():
        for w in teacher.parameters():
            w.add_(0.02 * torch.randn(w.shape, generator=torch.manual_seed(3)))
    return teacher


def gradient_of(script, args, batch=None, lr=1e-3):
    """{name: this rank's part of the gradient} of the last mini-batch of an update; its metrics."""
    below, model, teacher = grpo if script is grpo else sdpo, toy(), moved_toy()
    with contextlib.ExitStack() as stack:  # the rollouts were not sampled by any engine
        stack.enter_context(mock.patch.dict(vars(below)))
        if script is remedies:
            stack.enter_context(on_top(remedies))
        below.MISMATCH_LIMIT = math.inf
        optimizer = below.MasterAdamW(model, lr=lr, weight_decay=0.01)
        gradient = gradients_of(optimizer)
        metrics = below.update(model, *[teacher] * (script is not grpo), optimizer,
                               batch or batch_of(script, args), lr, args)
    return gradient, metrics


def of_remedy(remedy, folder):
    return gradient_of(remedies, args_of(remedy, run_dir=folder))


@pytest.mark.slow
@pytest.mark.parametrize("remedy", remedies.REMEDIES)
def test_two_ranks_give_the_gradient_of_one(tmp_path, alone, remedy):
    (tmp_path / "metrics.jsonl").write_text('{"teacher_entropy": 1e-3}\n' * 5)  # AntiSD: g = 1
    one, two = of_remedy(remedy, tmp_path), on_ranks(2, tmp_path, of_remedy, remedy, tmp_path)
    assert_same_gradient(two[0][0] | two[1][0], one[0])
    for name in ("loss", "teacher_entropy", "trained_tokens"):
        assert [m[name] for _, m in two] == pytest.approx([one[1][name]] * 2, rel=1e-4)
    assert one[1]["teacher_entropy"] > 0 and one[1]["loss"] != 0
    assert one[1].get("gate") == (1 if remedy == "antisd" else None)


@pytest.mark.slow
def test_at_the_ends_of_the_strength_it_is_sdpo_or_grpo(alone, tmp_path):
    def of(remedy, strength):
        return gradient_of(remedies, args_of(remedy, alpha=0.5, clip_high=0.28, run_dir=tmp_path,
                                             strength=strength))[0]
    wanted, _ = gradient_of(sdpo, args_of("shield"))
    for remedy in ("demopsd", "shield", "mixture"):
        assert_same_gradient(of(remedy, 0.0), wanted)
    wanted, _ = gradient_of(grpo, args_of("rlrt"))
    for remedy, strength in (("rlrt", 0.0), ("mixture", 1.0), ("rlcsd", 0.0)):
        assert_same_gradient(of(remedy, strength), wanted)
    # the deviation of one or two right ones of three
    got = {name: g * 2**0.5 / 3 for name, g in of("antisd", 0.0).items()}
    assert_same_gradient(got, wanted)


def test_what_is_known_of_a_token_is_of_the_steps_start(alone):
    """Against all logits at once, also for later mini-batches: PPO compares with these."""
    args = args_of("rlcsd", minibatch_questions=2)
    batch = batch_of(remedies, args)
    gradient_of(remedies, args, batch, lr=1e-2)

    def logs(model, prompt, r):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + r.response_ids])).logits
        return logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)  # (T, V)
    student, teacher, trained = toy(), moved_toy(), [r for r in batch if r.teacher_prompt_ids]
    for r in trained:
        own, aided = logs(student, [*r.question["prompt_ids"]], r), logs(
            teacher, r.teacher_prompt_ids, r)
        s, t = (log[range(len(r.response_ids)), r.response_ids] for log in (own, aided))
        wrong = [logs(teacher, p, r)[range(len(s)), r.response_ids] for p in r.wrong_prompts]
        for got, wanted in ((r.start, s), (r.u, (t - s) * r.taught), *zip(r.wrong, wrong),
                            (r.entropy, -(aided.exp() * aided).sum(-1))):
            torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=0)
    assert 0 < sum(r.taught for r in trained) < len(trained) and sum(len(r.wrong) for r in trained)
