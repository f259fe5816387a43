"""remedies.py: each remedy against numbers worked out by hand; two ranks; what reduces to what."""
import itertools
import json
import math
import random
from argparse import Namespace

import numpy as np
import pytest
import torch

import grpo
import remedies
import sdpo
from common import ROOT, assert_same_gradient, learner, on_ranks, refusal_of_main, toy

LOG2 = math.log(2)
LN3 = math.log(3)


# ----------------------------------------------------------------- each one's numbers, by hand


def test_demopsd_mixes_towards_what_the_teacher_says_unaided():
    plain, shown = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.1, 0.7]]).log()
    # JS of these two is 0.132918 (paper/semantics): b = 2 x .15 (sigmoid(6.6459) - .5) = .149611
    b = 0.149611
    mixed = [0.2 ** (1 - b) * 0.5**b, 0.1 ** (1 - b) * 0.3**b, 0.7 ** (1 - b) * 0.2**b]
    got = remedies.demopsd(plain, shown, 0.15).exp()[0]
    assert got.tolist() == pytest.approx([m / sum(mixed) for m in mixed], abs=1e-6)
    assert torch.equal(remedies.demopsd(shown, shown, 0.15).exp().round(decimals=5),
                       shown.exp().round(decimals=5))  # where they agree nothing changes
    torch.testing.assert_close(remedies.demopsd(plain, shown, 0.0), shown)


def test_srpo_weighs_by_the_teachers_certainty():
    entropy = torch.tensor([0.0, LOG2, LN3])
    mean = remedies.srpo(entropy, 1, 1.0).mean()
    assert mean.item() == pytest.approx(11 / 18)  # (1 + 1/2 + 1/3) / 3
    assert remedies.srpo(entropy, mean, 1.0).tolist() == pytest.approx([18 / 11, 9 / 11, 6 / 11])


def test_antisd_is_the_divergences_gradient_turned_round():
    u = torch.tensor([0.0, LN3, -LN3])  # softplus: log 2, log 4, log 4/3
    got = remedies.antisd(0.5, u, 0.5)
    assert got.tolist() == pytest.approx(
        [0.5, 0.5 - 0.25 * math.log(2), 0.5 - 0.25 * math.log(2 / 3)])
    # nothing that the teacher doubts is worth more than log(2) / 2 x strength
    assert remedies.antisd(0.0, torch.tensor(-1e4), 1.0).item() == pytest.approx(LOG2 / 2)
    # phi(u) = - d JS / d S(v), as it stands in AntiSD
    student = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([0.2, 0.1, 0.7], dtype=torch.float64)
    sdpo.divergence(student.log(), teacher.log(), 0.5).backward()
    phi = -remedies.antisd(0.0, (teacher / student).log(), 1.0)
    constant = student.grad + phi  # up to a constant, which cancels in a softmax
    assert (constant - constant[0]).abs().max() < 1e-12


def test_antisd_gate():
    assert remedies.antisd_gate(1.0, [1.0] * 4) == 0  # the fifth step of warm-up
    before = [0.8, 0.9, 1.0, 1.1, 1.2]
    got = [remedies.antisd_gate(median, before) for median in (1.5, 1.0, 0.965, 0.93, 0.5)]
    assert got == pytest.approx([1, 1, 0.5, 0, 0], abs=1e-9)


def test_rlrt_stretches_right_answers_alone():
    u = torch.tensor([0.0, -1.0, 1.0, math.log(1 / 1.1)])  # S / T: 1, e -> 1.2, 1/e -> .8, 1.1
    assert remedies.rlrt(0.5, u, 0.5).tolist() == pytest.approx([0.5, 0.55, 0.45, 0.525])
    assert remedies.rlrt(-0.5, u, 0.5) == -0.5 and remedies.rlrt(0.0, u, 0.5) == 0


def test_mixture_shields_and_gate():
    assert remedies.mixture(0.5, 0.9) == pytest.approx((0.1, 0.45))
    assert remedies.shield(torch.tensor([0.0, 1.0]), 1.0).tolist() == [1, 0]
    assert remedies.shield(torch.tensor([0.0, 1.0]), 0.25).tolist() == [1, 0.75]
    assert remedies.shield_kl(torch.tensor([0.1, 0.3, 0.2]), 0.2).tolist() == [1, 0, 1]
    entropy = torch.tensor([0.0, 1.0, 3.0])
    assert remedies.entropy_gate(entropy, 1.0, 0.5).tolist() == pytest.approx([1, 0.5, 0.1])


@pytest.mark.parametrize("pieces, marked", [
    (["W", "ait", ",", " un", "likely"], [1, 1, 0, 0, 1]),  # as the authors count: substrings
    (["So", " Perhaps", "", " che", "cking"], [0, 1, 0, 1, 1]),
    (["a", "", "maybe", "", "b"], [0, 0, 1, 0, 0]),
    (["İ", "wait", "x"], [0, 1, 0]),  # longer in lower case
    (["wai", "x"], [0, 0]), ([], []),
])
def test_marked_tokens(pieces, marked):
    assert remedies.marked_tokens(pieces).tolist() == marked


def test_batch_numbers(alone):
    """Tokens of two rollouts, (log T(y), entropy, KL) each."""
    taught = [torch.tensor([[-1.0, 0.0, 0.1], [-1.0, LOG2, 0.2]]),
              torch.tensor([[-1.0, LN3, 0.3], [-1.0, LN3, 0.4], [-1.0, LN3, 0.5]])]
    got = remedies.batch_numbers(taught, [], 1.0)
    assert got["median"] == pytest.approx(LN3) and got["gate"] == 0
    assert got["entropy"] == pytest.approx((LOG2 + 3 * LN3) / 5)
    assert got["srpo"] == pytest.approx((1 + 1 / 2 + 1) / 5)
    bar = remedies.batch_numbers(taught, [], 0.2)["bar"]
    assert 0.4 < bar < 0.5  # one token of five is above
    assert remedies.batch_numbers([], [], 0.5)["median"] == 0  # nothing taught, nothing breaks


# -------------------------------------------- the gradient on an epistemic token, and on other ones

# At the one position the student would say "wait" (token 0) with .6; the teacher, who has seen an
# answer, with .1. It is not quite sure what to say instead: .5 and .4.
STUDENT, TEACHER, PLAIN = [0.6, 0.3, 0.1], [0.1, 0.5, 0.4], [0.6, 0.2, 0.2]
DEMO, NONE = [1], None


def push(remedy, reward, demonstration=DEMO, **flags):
    """Minus the derivative of the loss in the logit of "wait", where it was said in a group half
    right: above 0, the step makes it likelier."""
    args = Namespace(remedy=remedy, alpha=0.5, top_k=2, clip_low=0.2, clip_high=0.28)
    vars(args).update({**remedies.PAPERS[remedy], **flags})
    r = remedies.Rollout(0, [1], [0], np.log([0.6]), "wait", True, reward, demonstration,
                         advantage=reward - 0.5, marked=np.ones(1, np.float32))
    head = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.eye_(head.weight)
    logits = torch.tensor([STUDENT]).log().requires_grad_()
    shown = [torch.tensor([TEACHER]).log(), head, torch.tensor([PLAIN]).log()]
    distance, logprobs, seen = remedies.token_losses(
        logits, head, torch.tensor([0]), 1.0, shown[: 3 if remedy == "demopsd" else 2], args.top_k,
        args.alpha, args.strength)
    r.old_logprobs, r.seen = logprobs.detach(), seen
    w, a = remedies.token_terms(r, BATCH, args)
    policy, _ = remedies.policy_loss(logprobs, r.old_logprobs, a, args.clip_low, args.clip_high)
    remedies.set_loss_weights([r], remedy)
    (gradient,) = torch.autograd.grad((r.weight * (w * distance + policy)).sum(), logits)
    return -gradient[0, 0].item()


H_T = -sum(p * math.log(p) for p in TEACHER)
BATCH = dict(gate=1.0, entropy=H_T / 0.8, srpo=math.exp(-H_T) * 2, bar=0.1)  # this token: KL > .1


def test_signs_on_an_epistemic_token():
    """SDPO pushes it down in right and wrong answers alike; what each remedy makes of that."""
    sdpo_js, sdpo_kl = push("shield", 1.0, strength=0.0), push("demopsd", 1.0, strength=0.0)
    assert sdpo_js < 0 and sdpo_kl < 0
    # KL(S || T) by hand: d/dlogit_i = S_i (log S_i/T_i - KL), over the buckets 0, 1 and the rest
    kl = 0.6 * math.log(6) + 0.3 * math.log(0.6) + 0.1 * math.log(0.25)
    assert sdpo_kl == pytest.approx(-0.6 * (math.log(6) - kl), rel=1e-4)
    reward = 0.5 * (1 - 0.6)  # GRPO's: A (1 - S)
    # still down, but less: the target is nearer to what the teacher says unaided
    assert sdpo_kl < push("demopsd", 1.0) < 0
    # the teacher's share, then the reward's
    assert push("mixture", 1.0) == pytest.approx(0.1 * sdpo_kl + 0.9 * reward, rel=1e-4) and (
        push("mixture", 1.0) > 0)
    assert push("mixture", 0.0) == pytest.approx(0.1 * sdpo_kl - 0.9 * reward, rel=1e-4)
    # right: rewarded. Wrong: distilled, half as much, since the teacher is half as sure as others
    assert push("srpo", 1.0) == pytest.approx(reward, rel=1e-4)
    assert push("srpo", 0.0) == pytest.approx(0.5 * sdpo_js, rel=1e-4) and push("srpo", 0.0) < 0
    assert push("srpo", 0.0, demonstration=NONE) == pytest.approx(-reward, rel=1e-4)
    # up, beyond the reward, and for a wrong answer less far down: it is what the teacher doubts
    bonus = 0.5 * (LOG2 - math.log(1 + 1 / 6)) / 2 * 0.4  # softplus(u) = log(1 + T / S)
    assert push("antisd", 1.0) == pytest.approx(reward + bonus, rel=1e-4)
    assert push("antisd", 0.0) == pytest.approx(bonus - reward, rel=1e-4)
    assert push("antisd", 1.0, demonstration=NONE) == pytest.approx(reward, rel=1e-4)
    assert push("rlrt", 1.0) == pytest.approx(1.1 * reward, rel=1e-4)  # S / T is 6, cut at 1.2
    assert push("rlrt", 0.0) == pytest.approx(-reward, rel=1e-4)
    assert push("rlrt", 1.0, demonstration=NONE) == pytest.approx(reward, rel=1e-4)
    # not at all; or, where it doubts, less
    assert push("shield", 1.0) == push("shield", 0.0) == push("shield_kl", 1.0) == 0
    assert push("shield", 1.0, strength=0.25) == pytest.approx(0.75 * sdpo_js, rel=1e-4)
    assert push("entropy_gate", 1.0) == pytest.approx((1 - 0.5 * 0.8) * sdpo_js, rel=1e-4)
    # without a demonstration there is nothing to distil
    for remedy in ("demopsd", "shield", "shield_kl", "entropy_gate"):
        assert push(remedy, 1.0, demonstration=NONE) == 0


def test_seen_is_log_t_its_entropy_and_the_kl():
    torch.manual_seed(0)
    head, teacher_head = (torch.nn.Linear(16, 50, bias=False) for _ in range(2))
    hidden, shown, targets = torch.randn(37, 16), torch.randn(37, 16), torch.randint(50, (37,))
    *_, seen = remedies.token_losses(hidden, head, targets, 0.7, (shown, teacher_head), 50, 0.5)
    s, t = ((h(x) / 0.7).log_softmax(-1).double()
            for h, x in ((head, hidden), (teacher_head, shown)))
    wanted = torch.stack([t[range(37), targets], -(t.exp() * t).sum(-1),
                          (s.exp() * (s - t)).sum(-1)], -1)
    torch.testing.assert_close(seen.double(), wanted, atol=5e-6, rtol=1e-5)
    assert not seen.requires_grad


# ------------------------------------------------------------------------------------- the update


def args_of(remedy, **flags):
    argv = ["--model", "m", "--remedy", remedy, "--questions_per_step", "8",
            "--minibatch_questions", "8", "--top_k", "20", "--tokens_per_micro_batch", "200"]
    args = remedies.parse_args(argv)
    vars(args).update(flags)
    return args


def make_batch(script, args):
    """Eight groups of three, in every process the same: all wrong, one right, two or all right."""
    rng = random.Random(1)

    def draw(n):
        return [rng.randrange(5, 400) for _ in range(n)]
    batch = []
    for row, i in itertools.product(range(8), range(3)):
        right = row % 4
        r = script.Rollout(row, draw(4), draw(rng.randint(1, 60)), None, "", True, float(i < right))
        r.logprobs = np.array([-3.0 + rng.random() for _ in r.response_ids], np.float32)
        shown, marked = draw(30), np.float32([rng.random() < 0.2 for _ in r.response_ids])
        if script is not grpo and right - (i < right) > 0:
            r.teacher_prompt_ids = shown
        if script is not sdpo:
            r.advantage = (i < right) - right / 3
        if script is remedies:
            r.marked = marked
        batch.append(r)
    return batch


def gradient_of(script, args, teacher=None, moved=0.0):
    """{name: this rank's share of the gradient} of one update, and its metrics."""
    ddp, optimizer = learner(script, args)
    optimizer.step = lambda lr, max_norm: 0.0
    script.check_engine = lambda *_: None  # the rollouts are nobody's
    if script is remedies:
        ddp.module.medians += 1e-3  # AntiSD's warm-up is over
    with torch.no_grad():
        for p in (teacher or ddp.module.model).parameters():
            p.add_(moved * torch.randn(p.shape, generator=torch.manual_seed(3)))
    more = [] if script is grpo else [teacher]
    metrics = script.update(ddp, *more, optimizer, make_batch(script, args), 1e-3)
    gradient = dict(zip(optimizer.names, (s.clone() for s in optimizer.sums)))
    return gradient, metrics


def measure(remedy):
    return gradient_of(remedies, args_of(remedy), toy(), moved=0.02)


@pytest.mark.parametrize("remedy", remedies.PAPERS)
def test_two_ranks_give_the_gradient_of_one(tmp_path, alone, monkeypatch, remedy):
    monkeypatch.setattr(remedies, "check_engine", remedies.check_engine)
    one, two = measure(remedy), on_ranks(2, tmp_path, measure, remedy)
    assert_same_gradient({**two[0][0], **two[1][0]}, one[0])
    for name in ("loss", "teacher_entropy", "trained_tokens", "gate"):
        assert [m[name] for _, m in two] == pytest.approx([one[1][name]] * 2, rel=1e-4)
    assert one[1]["teacher_entropy"] > 0 or remedy == "rlrt"


def test_at_the_ends_of_the_strength_it_is_sdpo_or_grpo(alone, monkeypatch):
    for script in (sdpo, grpo, remedies):
        monkeypatch.setattr(script, "check_engine", script.check_engine)
    plain = dict(alpha=0.5, clip_high=0.28, loss_tokens=None)
    wanted, _ = gradient_of(sdpo, args_of("shield", **plain), toy(), moved=0.02)
    for remedy in ("shield", "mixture", "entropy_gate"):
        got, _ = gradient_of(remedies, args_of(remedy, **plain, strength=0.0), toy(), moved=0.02)
        assert_same_gradient(got, wanted)
    assert_same_gradient(gradient_of(
        remedies, args_of("demopsd", **plain, strength=0.0), toy(), moved=0.02)[0], wanted)
    wanted, _ = gradient_of(grpo, args_of("rlrt", **plain))
    for remedy, strength in (("rlrt", 0.0), ("antisd", 0.0), ("mixture", 1.0)):
        flags = dict(plain, strength=strength)
        got, _ = gradient_of(remedies, args_of(remedy, **flags), toy())
        assert_same_gradient(got, wanted)


def test_medians_of_the_first_five_steps_are_kept(alone, monkeypatch):
    monkeypatch.setattr(remedies, "check_engine", lambda *_: None)
    args = args_of("antisd")
    ddp, optimizer = learner(remedies, args)
    teacher, gates, medians = toy(), [], []
    for step in range(6):
        metrics = remedies.update(ddp, teacher, optimizer, make_batch(remedies, args), 0.0)
        gates.append(metrics["gate"])
        medians.append(metrics["teacher_entropy"])
    assert gates == pytest.approx([0, 0, 0, 0, 0, 1])  # the teacher has not changed
    assert ddp.module.medians.tolist() == medians[:5]
    for r in (batch := make_batch(remedies, args)):
        r.teacher_prompt_ids, r.advantage = None, 0.0
    nothing = remedies.update(ddp, teacher, optimizer, batch, 1e-3)
    assert nothing["updates"] == nothing["loss"] == nothing["trained_tokens"] == 0


def test_sampling_sets_advantage_teacher_and_markers(monkeypatch, tokenizer):
    text = "Hmm, wait. 4"
    ids = tokenizer.encode(text, add_special_tokens=False)
    group = [remedies.Rollout(0, [1], ids, None, text, True, float(i == 0)) for i in range(4)]
    monkeypatch.setattr(remedies, "generate", lambda *_, **__: [group])
    monkeypatch.setattr(remedies, "grade", lambda *_: group)
    question = dict(messages=[dict(role="user", content="2+2?")], answer="4")

    def sample(remedy):
        remedies.sample_groups(None, None, tokenizer, [question], 0, 1, args_of(remedy))
        return [r.advantage for r in group]
    assert sample("rlrt") == [0.75, -0.25, -0.25, -0.25]
    assert sample("antisd") == pytest.approx([3**0.5, *[-(3**-0.5)] * 3])  # deviation: sqrt(3) / 4
    sample("shield")
    shown = "".join(tokenizer.decode([i]) for i, m in zip(ids, group[0].marked) if m).lower()
    assert "hmm" in shown and "wait" in shown and "4" not in shown
    assert group[0].teacher_prompt_ids is None and group[1].teacher_prompt_ids


# ---------------------------------------------------------------------------------------- command


def test_each_remedy_brings_its_papers_settings():
    def flags(*argv):
        args = remedies.parse_args(["--model", "x", "--remedy", *argv])
        return args.strength, args.alpha, args.ema, args.lr
    assert flags("demopsd") == (0.15, 1.0, 0.05, 1e-5)
    assert flags("srpo") == (1.0, 0.5, 0.0, 5e-6)
    assert flags("antisd") == (0.5, 0.5, 1.0, 1e-6)
    assert flags("antisd", "--strength", "0.1", "--lr", "1e-4") == (0.1, 0.5, 1.0, 1e-4)


@pytest.mark.parametrize("flags, said", [
    ([], "--remedy"), (["--remedy", "prayer"], "--remedy"),
    (["--remedy", "shield", "--strength", "2"], "--strength 2.0 must lie between 0 and 1"),
    (["--remedy", "srpo", "--strength", "-1"], "--strength -1.0"),
    (["--remedy", "srpo", "--clip_low", "3"], "--clip_low 3.0"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, flags, said):
    question = dict(problem="1+1?", answer="2")
    (tmp_path / "good.jsonl").write_text(json.dumps(question))
    monkeypatch.chdir(tmp_path)
    argv = ["--model", ROOT / "toy/model", "--data", "good.jsonl", "--eval_data", "good.jsonl"]
    assert said in refusal_of_main(remedies, monkeypatch, [*argv, *flags])
