"""remedies.py: each remedy against numbers worked out by hand; two ranks; what reduces to what."""
import json
import math
import random
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import grpo
import remedies
import sdpo
from common import assert_same_gradient, gradients_of, learner, on_ranks, toy

LOG2, LN3 = math.log(2), math.log(3)
DEMO, WRONG = [1], [9]


def args_of(remedy, *flags, **more):
    argv = ["remedies.py", "--model", "m", "--remedy", remedy, "--questions_per_step", "8",
            "--minibatch_questions", "8", "--top_k", "20", "--tokens_per_micro_batch", "200"]
    with mock.patch.object(sys, "argv", [*argv, *flags]):
        args = remedies.make_parser().parse_args()
    vars(args).update(more)
    return args


def on_top():
    """sdpo.py as remedies.main() leaves it; the rollouts were not sampled by any engine."""
    return mock.patch.multiple(sdpo, **remedies.REPLACED, MISMATCH_LIMIT=math.inf)


def tokens(teacher=DEMO, advantage=0.0, **columns):
    """A rollout of which u, entropy, kl, ... are known, a number a token."""
    columns = {name: values if name == "marked" else torch.tensor(values)
               for name, values in columns.items()}
    length = len(next(iter(columns.values())))
    columns = dict(dict(u=torch.zeros(length)), **columns)
    return remedies.Rollout(0, [1], [0] * length, [0.0] * length, "", True, 0.0, teacher,
                            advantage=advantage, **columns)


def weighed(remedy, rollouts, **more):
    """[(w, a)] of the rollouts, as lists."""
    remedies.REMEDIES[remedy].weigh(rollouts, args_of(remedy, **more))
    return [tuple(x.tolist() if torch.is_tensor(x) else x for x in (r.w, r.a)) for r in rollouts]


def near(*values):
    return pytest.approx(values[0] if len(values) == 1 else [*values], abs=1e-6)


def test_demopsd_mixes_towards_what_the_teacher_says_unaided():
    plain, aided = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.1, 0.7]]).log()
    # JS of these two is 0.132918 (test_sdpo.py): b = 2 x .15 (sigmoid(6.6459) - .5) = .149611
    b = 0.149611
    mixed = [0.2 ** (1 - b) * 0.5**b, 0.1 ** (1 - b) * 0.3**b, 0.7 ** (1 - b) * 0.2**b]
    target = remedies.demopsd.target
    assert target(plain, aided, 0.15).exp()[0].tolist() == near(*(m / sum(mixed) for m in mixed))
    torch.testing.assert_close(target(aided, aided, 0.15), aided)  # where they agree: no change
    torch.testing.assert_close(target(plain, aided, 0.0), aided)


def test_antisd_turns_the_teacher_round(alone, tmp_path):
    def antisd(advantage, u, **more):
        return weighed("antisd", [tokens(advantage=advantage, u=u, entropy=[1.0] * len(u))],
                       run_dir=tmp_path, **more)[0]
    (tmp_path / "metrics.jsonl").write_text('{"teacher_entropy": 1.0}\n' * 5)
    w, a = antisd(0.5, [0.0, LN3, -LN3])  # softplus: log 2, log 4, log 4/3
    assert w == 0 and a == near(0.5, 0.5 - 0.25 * LOG2, 0.5 - 0.25 * math.log(2 / 3))
    # nothing that the teacher doubts gains more than log(2) / 2 x strength
    assert antisd(0.0, [-1e4], strength=1.0)[1] == [near(LOG2 / 2)]


def test_antisd_gate(alone, tmp_path):
    gate = remedies.antisd.gate
    assert gate(1.0, [1.0] * 4) == 0  # the fifth step of warm-up
    before = [0.8, 0.9, 1.0, 1.1, 1.2]
    gates = [gate(median, before) for median in (1.5, 1.0, 0.965, 0.93, 0.5)]
    assert gates == near(1, 1, 0.5, 0, 0)
    args = args_of("antisd", run_dir=tmp_path)
    assert remedies.antisd.first_medians(args) == []  # the first step: no log
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for median in (0.0, *before, 7.0):  # 0: no rollout had a teacher
            file.write(json.dumps(dict(teacher_entropy=median)) + "\n")
    assert remedies.antisd.first_medians(args) == before


def test_rlrt_favours_tokens_of_right_answers_only(alone):
    u = [0.0, -1.0, 1.0, math.log(1 / 1.1)]  # S / T: 1, e -> 1.2, 1/e -> .8, 1.1
    (w, right), (_, wrong) = weighed("rlrt", [tokens(advantage=a, u=u) for a in (0.5, -0.5)])
    assert w == 0 and right == near(0.5, 0.55, 0.45, 0.525) and wrong == -0.5


def test_shields_and_gate(alone):
    assert weighed("shield", [tokens(u=[0.0, 0.0], marked=[0.0, 1.0])]) == [([1, 0], 0)]
    # of five tokens the share of .2 is one; the bar lies between the two largest
    first, second = tokens(kl=[0.1, 0.5]), tokens(kl=[0.4, 0.3, 0.2])
    assert weighed("shield_kl", [first, second]) == [([1, 0], 0), ([1, 1, 1], 0)]
    (w, a), = weighed("entropy_gate", [tokens(entropy=[0.0, 1.0, 5.0])])  # their mean is 2
    assert w == near(1, 0.75, 0.1) and a == 0  # 1 - .5 x 5 / 2 < 0: the floor


def test_rlcsd_subtracts_what_a_wrong_demonstration_does_too(alone):
    """log T(y): -1 with the right one; in probability, the two wrong ones .1 and .3 on average."""
    def one(advantage, wrong, **more):
        r = tokens(advantage=advantage, u=[-1.0 + 2.0])
        r.old_logprobs, r.wrong = torch.tensor([-2.0]), [torch.tensor([math.log(p)]) for p in wrong]
        return weighed("rlcsd", [r], **more)[0]
    e = -1 - math.log(0.2)
    assert one(0.5, [0.1, 0.3]) == (0, [near(0.5 + 0.5 * math.tanh(e))])
    assert one(0.5, [math.exp(-1.09)]) == (0, [0.5])  # |e| = .09: no more than noise
    # A = -.5 stays negative, whatever e
    assert one(-0.5, [1e-9], strength=3.0) == (0, [0]) and one(0.5, [1.0], strength=3.0) == (0, [0])
    assert one(-0.5, []) == (0, -0.5)


def test_dasd_leaves_the_teacher_where_it_is_uncertain(alone):
    taught = tokens(advantage=0.25, entropy=[0.0, 1.0, 2.0, 3.0, 4.0])
    unaided = tokens(None, advantage=0.5, entropy=[9.0])
    (w, a), other = weighed("dasd", [taught, unaided])
    assert w == near(0.5, 0.5, 0.5, 0.5, -0.5) and a == 0.25 and other == ([0], 0.5)


@pytest.mark.parametrize("pieces, marked", [
    (["W", "ait", ",", " un", "likely"], [1, 1, 0, 0, 1]),  # as the authors count: substrings
    (["So", " Perhaps", "", " che", "cking"], [0, 1, 0, 1, 1]),
    (["a", "", "maybe", "", "b"], [0, 0, 1, 0, 0]),
    (["İ", "wait", "x"], [0, 1, 0]),  # longer in lower case
    (["wai", "x"], [0, 0]), ([], []),
])
def test_marked_tokens(pieces, marked):
    assert remedies.shield.marked_tokens(pieces) == marked


def test_what_the_rollouts_of_a_group_learn_from(tokenizer):
    text = "Hmm, wait. 4"
    ids = tokenizer.encode(text, add_special_tokens=False)
    question = dict(messages=[dict(role="user", content="2+2?")], answer="4")

    def prepared(remedy, rewards=(1, 0, 0, 0), **more):
        group = [remedies.Rollout(0, [1], ids, None, text, True, float(r)) for r in rewards]
        args = args_of(remedy, **more)
        remedies.set_teacher_prompts(question, group, tokenizer, random.Random(0), args)
        remedies.set_loss_weights(group)
        return group

    def summary(*args):
        return [(bool(r.teacher_prompt_ids), r.advantage, bool(r.weight)) for r in prepared(*args)]
    right, wrong = (False, 0.75, True), (True, -0.25, True)  # its group's only success has no c
    assert summary("mixture") == summary("rlrt") == summary("dasd") == [right, *[wrong] * 3]
    assert summary("srpo", (1, 1, 0, 0)) == [(False, 0.5, True)] * 2 + [(True, -0.5, True)] * 2
    for remedy in ("demopsd", "shield", "shield_kl", "entropy_gate"):  # of the reward nothing
        assert summary(remedy) == [(False, 0, False), *[(True, 0, True)] * 3]
    # without an advantage there is nothing to modulate
    assert summary("rlrt", (1, 1)) == summary("rlcsd", (1, 1)) == [(False, 0, False)] * 2
    assert summary("antisd", (1, 1)) == [(True, 0, True)] * 2
    assert [r.advantage for r in prepared("antisd")] == near(3**0.5, *[-(3**-0.5)] * 3)
    assert [len(r.wrong_prompts) for r in prepared("rlcsd", (1, 1, 0, 0, 0))] == [2] * 5
    assert [len(r.wrong_prompts) for r in prepared("rlcsd", (1, 1, 0))] == [1, 1, 0]
    assert [len(r.wrong_prompts) for r in prepared("rlcsd")] == [0, 2, 2, 2]
    marked = prepared("shield")[0].marked
    said = "".join(tokenizer.decode([i]) for i, m in zip(ids, marked) if m).lower()
    assert "hmm" in said and "wait" in said and "4" not in said


# At the one position the student would say "wait" (token 0) with .6; the teacher, who has seen an
# answer, with .1. It is not quite sure what to say instead: .5 and .4.
STUDENT, TEACHER, PLAIN, MISLED = [0.6, 0.3, 0.1], [0.1, 0.5, 0.4], [0.6, 0.2, 0.2], [0.2, 0.4, 0.4]


class OneToken(remedies.Student):
    """Hidden states are log-probabilities, of the student's and of the teacher's three prompts."""

    def __init__(self, args):
        super().__init__(SimpleNamespace(device=torch.device("cpu")), args)
        self.logits, self.clipped = torch.tensor([STUDENT]).log().requires_grad_(), 0
        self.head = torch.nn.Linear(3, 3, bias=False)
        torch.nn.init.eye_(self.head.weight)

    def states(self, model, micro_batch, prompts):
        if model is self.model:
            return self.logits, self.head
        says = {str(DEMO): TEACHER, str(WRONG): MISLED}.get(str(prompts[0]), PLAIN)
        return torch.tensor([says]).log(), self.head


def push(folder, remedy, reward, demonstration=DEMO, **more):
    """Minus the derivative of the loss in the logit of "wait", where it was said by one of a group
    that is half right: above 0, the step makes it more likely."""
    args = args_of(remedy, **{**dict(run_dir=folder, top_k=2), **more})
    student, tokenizer = OneToken(args), SimpleNamespace(decode=lambda ids: "wait")
    r, sibling = (remedies.Rollout(0, [5], [0], [math.log(0.6)], "wait", finished, value, prompt)
                  for finished, value, prompt in ((True, reward, demonstration),
                                                  (False, 1 - reward, None)))
    if hasattr(remedies.REMEDIES[remedy], "prepare"):
        remedies.REMEDIES[remedy].prepare([r, sibling], None, tokenizer, args)
    if remedy == "rlcsd" and demonstration:
        r.wrong_prompts = [WRONG]
    student.measure([r], "teacher")
    # the step's other token: the mean of exp(-H) is twice this one's, or that of H is 1 / .8 of it
    sibling.u, sibling.kl, sibling.marked = r.u, torch.zeros(1), r.marked
    sibling.teacher_prompt_ids, sibling.wrong = DEMO, []
    other = dict(srpo=r.entropy - LN3, entropy_gate=r.entropy * 1.5)
    sibling.entropy = other.get(remedy, r.entropy / 2)
    if hasattr(remedies.REMEDIES[remedy], "weigh"):
        remedies.REMEDIES[remedy].weigh([r, sibling], args)
    remedies.set_loss_weights([r])
    loss, _ = student([r], "teacher")
    (gradient,) = torch.autograd.grad((r.weight * loss).sum(), student.logits)
    return -gradient[0, 0].item()


def test_signs_on_an_epistemic_token(alone, tmp_path):
    """SDPO pushes it down in right and wrong answers alike; what each remedy makes of that."""
    (tmp_path / "metrics.jsonl").write_text('{"teacher_entropy": 1e-9}\n' * 5)  # AntiSD: g = 1

    def of(*args, **more):
        return push(tmp_path, *args, **more)

    def near(value):
        return pytest.approx(value, rel=1e-4)
    sdpo_js, sdpo_kl = of("shield", 1.0, strength=0.0), of("demopsd", 1.0, strength=0.0)
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
    # not at all; or, where it doubts, less
    assert of("shield", 1.0) == of("shield", 0.0) == of("shield_kl", 1.0) == 0
    assert of("shield", 1.0, strength=0.25) == near(0.75 * sdpo_js)
    assert of("entropy_gate", 1.0) == near((1 - 0.5 * 0.8) * sdpo_js)
    # a wrong demonstration makes it half as unlikely: e = log(.1 / .2)
    assert of("rlcsd", 1.0) == near((0.5 + 0.5 * math.tanh(math.log(0.5))) * 0.4)
    assert of("rlcsd", 1.0, None) == near(reward)
    # the teacher is less sure here than elsewhere: away from it, so up
    assert of("dasd", 1.0) == near(reward - 0.5 * sdpo_js) and of("dasd", 1.0) > reward


def make_batch(script, remedy, args):
    """Eight groups of three, in every process the same: all wrong, one right, two or all right."""
    rng = random.Random(1)

    def draw(n):
        return [rng.randrange(5, 400) for _ in range(n)]
    batch, tokenizer = [], SimpleNamespace(  # every fifth token belongs to a marker
        decode=lambda ids: "wait" if ids[0] % 5 == 0 else "x",
        apply_chat_template=lambda *_, **__: "", encode=lambda *_, **__: [7] * 20,
        added_tokens_decoder={})
    question = dict(messages=[dict(content="?")])
    for row in range(8):
        right, group = row % 4, []
        for i in range(3):
            r = script.Rollout(row, draw(4), draw(rng.randint(1, 60)), None, "", True,
                               float(i < right))
            r.logprobs = [-3.0 + rng.random() for _ in r.response_ids]
            prompt = draw(30)
            if script is not grpo and right - (i < right) > 0:
                r.teacher_prompt_ids = prompt
            if script is grpo:
                r.advantage = (i < right) - right / 3
            group.append(r)
        if hasattr(remedies.REMEDIES.get(remedy), "prepare"):
            remedies.REMEDIES[remedy].prepare(group, question, tokenizer, args)
        batch += group
    return batch


def gradient_of(script, args, teacher=None, moved=0.0):
    """{name: this rank's share of the gradient} of one update, and its metrics."""
    below = sdpo if script is remedies else script
    with on_top() if script is remedies else mock.patch.object(script, "MISMATCH_LIMIT", math.inf):
        ddp, optimizer = learner(below, args)
        gradient = gradients_of(optimizer)
        with torch.no_grad():
            for p in teacher.parameters() if teacher else ():
                p.add_(moved * torch.randn(p.shape, generator=torch.manual_seed(3)))
        remedy = args.remedy if script is remedies else None
        metrics = below.update(ddp, *[teacher] * (script is not grpo), optimizer,
                               make_batch(script, remedy, args), 1e-3)
    return gradient, metrics


def measure(remedy, folder):
    return gradient_of(remedies, args_of(remedy, run_dir=folder), toy(), moved=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("remedy", remedies.REMEDIES)
def test_two_ranks_give_the_gradient_of_one(tmp_path, alone, remedy):
    (tmp_path / "metrics.jsonl").write_text('{"teacher_entropy": 1e-3}\n' * 5)  # AntiSD: g = 1
    one, two = measure(remedy, tmp_path), on_ranks(2, tmp_path, measure, remedy, tmp_path)
    assert_same_gradient(two[0][0] | two[1][0], one[0])
    for name in ("loss", "teacher_entropy", "trained_tokens", "policy_clipped"):
        assert [m[name] for _, m in two] == pytest.approx([one[1][name]] * 2, rel=1e-4)
    assert one[1]["teacher_entropy"] > 0 and one[1]["loss"] != 0
    assert one[1].get("gate") == (1 if remedy == "antisd" else None)


@pytest.mark.slow
def test_at_the_ends_of_the_strength_it_is_sdpo_or_grpo(alone, tmp_path):
    def of(remedy, strength, **more):
        flags = dict(alpha=0.5, clip_high=0.28, run_dir=tmp_path, strength=strength)
        return gradient_of(remedies, args_of(remedy, **{**flags, **more}), toy(), moved=0.02)[0]
    plain = args_of("shield", alpha=0.5)
    wanted, _ = gradient_of(sdpo, plain, toy(), moved=0.02)
    for remedy in ("demopsd", "shield", "mixture", "entropy_gate"):
        assert_same_gradient(of(remedy, 0.0), wanted)
    wanted, _ = gradient_of(grpo, plain)
    for remedy, strength in (("rlrt", 0.0), ("mixture", 1.0), ("rlcsd", 0.0), ("dasd", 0.0)):
        assert_same_gradient(of(remedy, strength), wanted)
    # the deviation of one or two right ones of three
    got = {name: g * 2**0.5 / 3 for name, g in of("antisd", 0.0).items()}
    assert_same_gradient(got, wanted)


def test_later_mini_batches_are_compared_with_the_steps_start(alone, tmp_path):
    """PPO's clip has something to hold back only if `old` is not what the weights are by then."""
    args = args_of("rlrt", minibatch_questions=2, run_dir=tmp_path)
    with on_top():
        ddp, optimizer = learner(sdpo, args, lr=1e-2)
        batch = make_batch(remedies, "rlrt", args)
        metrics = sdpo.update(ddp, toy(), optimizer, batch, 1e-2)
    assert metrics["policy_clipped"] > 0.1 and metrics["updates"] > 2


@pytest.mark.parametrize("remedy", remedies.REMEDIES)
def test_a_step_without_signal_changes_nothing(alone, tmp_path, remedy):
    args = args_of(remedy, run_dir=tmp_path)
    with on_top():
        ddp, optimizer = learner(sdpo, args)
        before = [p.detach().clone() for p in ddp.parameters()]
        batch = make_batch(remedies, remedy, args)
        for r in batch:
            r.teacher_prompt_ids, r.advantage = None, 0.0
        nothing = sdpo.update(ddp, toy(), optimizer, batch, 1e-3)
    assert nothing["updates"] == nothing["loss"] == nothing["trained_tokens"] == 0
    assert all(map(torch.equal, before, ddp.parameters()))


def test_each_remedy_brings_its_papers_settings():
    def flags(*argv):
        args = args_of(*argv)
        return args.strength, args.alpha, args.ema, args.lr
    assert flags("demopsd") == (0.15, 1.0, 0.05, 1e-5)
    assert flags("srpo") == (1.0, 0.5, 0.0, 5e-6)
    assert flags("antisd") == (0.5, 0.5, 1.0, 1e-6)
    assert flags("antisd", "--strength", "0.1", "--lr", "1e-4") == (0.1, 0.5, 1.0, 1e-4)
