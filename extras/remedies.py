"""Remedies: what others do so that self-distillation keeps the doubt that it takes away.

On top of sdpo.py and grpo.py. Of a token y are known: S and T, the student's and the teacher's
distributions; u = log T(y) - log S(y); H_T, the teacher's entropy; A = reward - mean reward of the
group. Each remedy gives every token two numbers, w and a:

    loss = w x divergence(S, T)  +  PPO's clipped loss with advantage a          (per token)

  sdpo.py       w = 1                               a = 0
  grpo.py       w = 0                               a = A
  demopsd       w = 1, towards T^(1-b) S'^b         a = 0
  srpo          w = exp(-l H_T) / mean              a = 0, if wrong and with a demonstration;
                w = 0                               a = A, otherwise
  antisd        w = 0                               a = A / std - l g phi(u), away from the teacher
  rlrt          w = 0                               a = A, times about S / T where right
  mixture       w = 1 - l                           a = l A
  shield        w = 1 - l on the ten markers        a = 0
  rlcsd         w = 0                               a = A + l tanh(e), e: right against wrong c

    torchrun --nproc_per_node 8 -m extras.remedies --model Qwen/Qwen3-8B --remedy srpo

l is --strength, the one number of each remedy. A remedy is one function below, which sets w and a.
Common to all, so that they can be compared, and not so in every paper: SDPO's demonstrations and
importance weights, and the mean over sequences of each one's token mean. A token with w = 0 still
counts in that mean, so the others learn as they do in SDPO. Means and medians are of a whole step,
over all ranks, under the weights at its start.

Watch: score and epistemic out of distribution (eval/) against length: GRPO and SDPO are the two
corners. `teacher_entropy` is the step's median H_T: where it falls fast, a run soon collapses.
"""
import argparse
import bisect
import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributions import Categorical
from tqdm import tqdm

import epistemic
import grpo
import sdpo
from sdpo import make_parser as sdpo_parser
from sdpo import set_teacher_prompts as sdpo_teacher_prompts
from sdpo import update as sdpo_update

# --- what is known of a rollout ------------------------------------------------------------------

@dataclass
class Rollout(sdpo.Rollout):
    taught: bool = False  # has a demonstration
    advantage: float = 0.0  # A; 0: the rollout learns from its teacher only
    marked: list = ()  # (T,) 1.0 where a token belongs to a marker, else 0.0 (shield)
    wrong_prompts: list = ()  # the teacher's with a wrong demonstration each (rlcsd)
    # under the weights at the step's start, (T,) each
    start: torch.Tensor | None = None  # log S(y)
    u: torch.Tensor | None = None  # 0 without a demonstration
    entropy: torch.Tensor | None = None  # H_T, over the vocabulary
    wrong: list = ()  # log T(y) with each of wrong_prompts
    w: torch.Tensor | None = None  # 1 until the remedy sets it
    a: torch.Tensor | None = None  # 0 until the remedy sets it

def of_all_ranks(values):
    """The values of all tokens of the step, (N,) float64, from a list of this rank's (T,)."""
    parts = sdpo.all_gather([v.cpu() for v in values])
    return torch.cat(parts or [torch.zeros(1)]).double()

def median_entropy(rollouts):
    """Of H_T over the tokens that have a teacher; 0 if none has."""
    return of_all_ranks([r.entropy for r in rollouts if r.taught]).median().item()

# --- remedies ------------------------------------------------------------------------------------

def demopsd(rollouts, args):
    """DemoPSD, 2607.02502: w = 1, a = 0; the target is T^(1-b) S'^b, S' the teacher unaided.

    b = 2 l (sigmoid(50 JS(S', T)) - 1/2), l .15: the further a demonstration takes the teacher from
    S', the less the target follows it. Theirs for our 50 are 25 to 100. Ours: JS and the target are
    of the whole vocabulary (theirs: of its 100 most likely tokens).
    """

def demopsd_target(aided, unaided, strength):
    """The target's log-probabilities (C, V), from those of T and of S'."""
    b = 2 * strength * (torch.sigmoid(50 * sdpo.divergence(unaided, aided, 0.5)) - 0.5)
    return torch.lerp(aided, unaided, b[:, None]).log_softmax(-1)

def srpo(rollouts, args):
    """SRPO, 2604.02288: a wrong rollout with a demonstration learns from it, the others from A.

    w = exp(-l H_T) / its mean over all tokens of such rollouts, l 1.
    """
    gates = [(-args.strength * r.entropy).exp() for r in rollouts]
    mean = of_all_ranks([gate for r, gate in zip(rollouts, gates) if r.taught]).mean().item()
    for r, gate in zip(rollouts, gates):
        r.w[:] = gate / mean if r.taught else 0
        r.a[:] = 0 if r.taught else r.advantage

def antisd(rollouts, args):
    """AntiSD, 2605.11609: a = A / std - l g phi(u), phi(u) = (softplus(u) - log 2) / 2, l .5.

    Away from the teacher: a token that it doubts, u < 0, gains. phi is what the gradient of
    -JS(S, T) has for S(y); at most log(2) / 2 is gained.
    """
    g = antisd_gate(median_entropy(rollouts), antisd_first_medians(args))
    for r in rollouts:
        std = (abs(r.advantage) * (1 - abs(r.advantage))) ** 0.5  # of its group's 0s and 1s
        phi = (torch.nn.functional.softplus(r.u) - math.log(2)) / 2
        r.w[:] = 0
        r.a[:] = r.advantage / (std or 1) - args.strength * g * phi
    return dict(gate=g)

def antisd_gate(median, before):
    """g: 0 in five steps of warm-up; then 1 at their median H_T, and 0 at .93 of it.

    Ours: the mean of the five medians, and a line between the two.
    """
    return min(1, max(0, (median / (sum(before) / 5) - 0.93) / 0.07)) if len(before) == 5 else 0

def antisd_first_medians(args):
    """Of the first five steps that had a teacher, from the log: a resumed run finds them."""
    path, lines = Path(args.run_dir, "metrics.jsonl"), []
    if dist.get_rank() == 0 and path.exists():
        lines = path.read_text().splitlines()
    medians = [json.loads(line)["teacher_entropy"] for line in sdpo.all_gather(lines)]
    return [median for median in medians if median][:5]

def rlrt(rollouts, args):
    """RLRT, 2605.10781: a = A [(1 - l) + l clip(S / T, 1 - e, 1 + e)] if A > 0, else A; l .5, e .2.

    What a right answer says although its teacher would not gains more. Their e: .2 for a thinking
    model, .5 for an instructed one, 1 for a base.
    """
    for r in rollouts:
        factor = 1 - args.strength + args.strength * (-r.u).exp().clamp(0.8, 1.2)
        r.w[:] = 0
        r.a[:] = r.advantage * (factor if r.advantage > 0 else 1)

def mixture(rollouts, args):
    """SDPO's own, 2601.20802: w = 1 - l, a = l A, l .9 (meant for KL: JS pulls a quarter of it)."""
    for r in rollouts:
        r.w[:] = (1 - args.strength) * r.taught
        r.a[:] = args.strength * r.advantage

def shield(rollouts, args):
    """Ours: w = 1 - l where the student's token belongs to one of the ten markers, l 1."""
    for r in rollouts:
        r.w -= args.strength * torch.tensor(r.marked, device=r.w.device)

def marked_tokens(pieces):
    """[1.0 where a token, given as its text, holds a part of a marker, else 0.0]"""
    pieces = [piece.lower() for piece in pieces]
    ends, marked = [*itertools.accumulate(map(len, pieces))], [0.0] * len(pieces)
    for found in re.finditer("|".join(epistemic.MARKERS), "".join(pieces)):
        first = bisect.bisect_right(ends, found.start())
        for i in range(first, bisect.bisect_left(ends, found.end()) + 1):
            marked[i] = 1.0
    return marked

def rlcsd(rollouts, args):
    """RLCSD, 2606.11709: a = A + l tanh(e) where |e| > .1, but never of the other sign than A.

    e = log T(y | c+) - log mean_k T(y | c-_k): c+ a right sibling, the c- wrong ones. What both
    change in y, the manner, is subtracted. Ours: l .5, the .1, at most two c-, the teacher of
    sdpo.py, and one mean over all tokens (theirs: one for those with e and one for the others).
    """
    for r in rollouts:
        r.w[:] = 0
        r.a[:] = r.advantage
        if r.wrong:
            mean = torch.stack(r.wrong).logsumexp(0) - math.log(len(r.wrong))
            e = r.u + r.start - mean
            a = r.advantage + args.strength * torch.tanh(e) * (e.abs() > 0.1)
            r.a = a.clamp(min=0.0) if r.advantage > 0 else a.clamp(max=0.0)

def wrong_prompts(r, group, tokenizer, args):
    """The teacher's prompts for r with each c-: RLCSD."""
    wrong = [o for o in group if o is not r and o.finished and o.reward == 0][:2]
    chats = [sdpo.teacher_messages(r.question["messages"], o.text, args.demonstration)
             for o in wrong]
    return [sdpo.render(tokenizer, chat, args.enable_thinking) for chat in chats]

REMEDIES = {  # with the settings of their papers, where they are not SDPO's
    "demopsd": (demopsd, dict(strength=0.15, alpha=1.0, ema=0.05)),
    "srpo": (srpo, dict(strength=1.0, lr=5e-6)),
    "antisd": (antisd, dict(strength=0.5, ema=1.0, lr=1e-6, clip_high=0.2)),  # ema 1: T is S,
    "rlrt": (rlrt, dict(strength=0.5, ema=1.0, lr=1e-6)),  # but for the demonstration
    "mixture": (mixture, dict(strength=0.9, alpha=1.0)),
    "shield": (shield, dict(strength=1.0)),
    "rlcsd": (rlcsd, dict(strength=0.5, lr=1e-6)),
}

# --- what they replace in sdpo.py ----------------------------------------------------------------

def make_parser():
    parser = sdpo_parser()
    parser.description = "SDPO with a remedy. Unless its paper says otherwise, as sdpo.py."
    add = parser.add_argument
    add("--remedy", required=True, choices=REMEDIES, help="see the top of remedies.py")
    add("--strength", type=float, help="l of the remedy's equation")
    add("--clip_low", type=float, default=0.2, help="PPO's clip, as in grpo.py")
    add("--clip_high", type=float, default=0.28, help="PPO's clip, as in grpo.py")
    first = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    first.add_argument("--remedy")  # read before the others: --help shows its settings
    _, settings = REMEDIES.get(first.parse_known_args()[0].remedy, (None, {}))
    parser.set_defaults(run_dir="runs/remedies", **settings)
    return parser

def set_teacher_prompts(group, tokenizer, rng, args):
    """What each rollout learns from: sdpo.py's demonstration, grpo.py's advantage, both or none.

    sdpo.py trains what has a teacher's prompt: without a demonstration that is its own prompt.
    """
    sdpo_teacher_prompts(group, tokenizer, rng, args)
    if args.remedy not in ("demopsd", "shield"):  # these do not learn from the reward
        grpo.set_advantages(group)
    for r in group:
        if (args.remedy == "srpo" and r.reward == 1
                or args.remedy in ("rlrt", "rlcsd") and not r.advantage):
            r.teacher_prompt_ids = None
        r.taught = bool(r.teacher_prompt_ids)
        if r.advantage and not r.taught:
            r.teacher_prompt_ids = r.question["prompt_ids"]
        if args.remedy == "rlcsd" and r.taught:
            r.wrong_prompts = wrong_prompts(r, group, tokenizer, args)
        if args.remedy == "shield":
            r.marked = marked_tokens([tokenizer.decode([t]) for t in r.response_ids])

def read_teacher(teacher, prompts, responses, args):
    """(log T(y), H_T) of the response tokens, (N,) each."""
    hidden, head = sdpo.response_states(teacher, prompts, responses)
    targets = torch.tensor([t for y in responses for t in y], device=hidden.device)
    results = []
    for chunk, target in zip(hidden.split(sdpo.CHUNK), targets.split(sdpo.CHUNK)):
        logits = head(chunk).float().div_(args.temperature)  # (C, V)
        says = Categorical(logits=logits, validate_args=False)
        results.append((says.log_prob(target), says.entropy()))
    return tuple(map(torch.cat, zip(*results)))

@torch.no_grad()
def measure(student, teacher, micro_batch, args):
    """Sets what is known of the tokens of its rollouts, under the weights as they are now."""
    responses = [r.response_ids for r in micro_batch]
    _, start = student(micro_batch)
    logprobs, entropy = read_teacher(
        teacher, [r.teacher_prompt_ids for r in micro_batch], responses, args)
    lengths = [len(y) for y in responses]
    columns = (column.split(lengths) for column in (start, logprobs - start, entropy))
    for r, start, u, entropy in zip(micro_batch, *columns):
        r.start, r.u, r.entropy = start, u * r.taught, entropy
        r.w, r.a = torch.ones_like(u), torch.zeros_like(u)
        r.wrong = [read_teacher(teacher, [prompt], [r.response_ids], args)[0]
                   for prompt in r.wrong_prompts]

class Student(sdpo.Student):

    def forward(self, micro_batch, teacher=None):
        """(w x divergence + PPO's loss, log-probability) of the response tokens, (N,) each."""
        if micro_batch[0].start is None:  # measure() asks; or it is a copy of weight 0
            return super().forward(micro_batch)
        args = self.args
        w, a, start = (torch.cat([getattr(r, column) for r in micro_batch])
                       for column in ("w", "a", "start"))
        if teacher is None:  # update() asks for the log-probabilities at the step's start
            return None, start
        if args.remedy == "demopsd":
            distance, logprobs = self.demopsd_losses(micro_batch, teacher)
        else:  # with w = 0 what the teacher says is in a
            distance, logprobs = super().forward(micro_batch, teacher if w.any() else None)
        policy, _ = grpo.policy_loss(logprobs, start, a, args.clip_low, args.clip_high)
        # update() multiplies by the ratio, which PPO's loss has already
        return w * distance + policy / sdpo.importance_weight(logprobs, start), logprobs

    def demopsd_losses(self, micro_batch, teacher):
        """token_losses towards DemoPSD's target."""
        args, responses = self.args, [r.response_ids for r in micro_batch]
        plain = [r.question["prompt_ids"] for r in micro_batch]
        student = sdpo.response_states(self.model, plain, responses)
        with torch.no_grad():
            aided, head = sdpo.response_states(
                teacher, [r.teacher_prompt_ids for r in micro_batch], responses)
            unaided, _ = sdpo.response_states(teacher, plain, responses)

        def target(hidden):  # (C, 2, D) -> logits (C, V)
            logprobs = head(hidden).float().div_(args.temperature).log_softmax(-1)  # (C, 2, V)
            return args.temperature * demopsd_target(*logprobs.unbind(1), args.strength)
        targets = torch.tensor([t for y in responses for t in y], device=aided.device)
        return sdpo.token_losses(student, (torch.stack([aided, unaided], 1), target), targets, args)

def update(model, teacher, optimizer, rollouts, lr, args):
    """sdpo.py's, after a look at all tokens under the weights at the step's start."""
    student, size = Student(model, args), args.minibatch_questions * args.rollouts
    for r in rollouts:
        r.weight = float(bool(r.teacher_prompt_ids))
    micro_batches = [m for i in range(0, len(rollouts), size) for m in sdpo.micro_batches_of_rank(
        rollouts[i : i + size], args.tokens_per_micro_batch)]
    for micro_batch in tqdm(micro_batches, "measure", **sdpo.TQDM):
        measure(student, teacher, micro_batch, args)
    own = [r for micro_batch in micro_batches for r in micro_batch if r.weight]
    remedy, _ = REMEDIES[args.remedy]
    numbers = dict(teacher_entropy=median_entropy(own), **remedy(own, args) or {})
    return sdpo_update(model, teacher, optimizer, rollouts, lr, args) | numbers

def main():
    sdpo.make_parser = make_parser
    sdpo.Rollout = Rollout
    sdpo.set_teacher_prompts = set_teacher_prompts
    sdpo.Student = Student
    sdpo.update = update
    sdpo.main()

if __name__ == "__main__":
    main()
