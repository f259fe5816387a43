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
  shield        w = 0 on the ten markers            a = 0
  shield_kl     w = 0 where KL(S || T) is largest   a = 0
  entropy_gate  w = 1 - l H_T / mean                a = 0
  rlcsd         w = 0                               a = A + l tanh(e), e: right against wrong c
  dasd          w = l where H_T is low, else -l     a = A

    torchrun --nproc_per_node 8 remedies.py --model Qwen/Qwen3-8B --remedy srpo

l is --strength, the one number of each remedy. A remedy is one class below: `settings` are its
paper's, where they are not SDPO's; `prepare` says what the rollouts of a group learn from; `weigh`
sets w and a. Common to all, so that they can be compared, and not so in every paper: SDPO's
demonstrations and importance weights, and the mean over sequences of each one's token mean. A token
with w = 0 still counts in that mean, so the others learn as they do in SDPO. Means, medians and
shares are of a whole step, over all ranks, under the weights at its start.

Watch: score and epistemic out of distribution (eval/) against length: GRPO and SDPO are the two
corners. `teacher_entropy` is the step's median H_T: where it falls fast, a run soon collapses.
"""
import bisect
import itertools
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributions import Categorical

import epistemic
import grpo
import sdpo
from sdpo import make_parser as sdpo_parser
from sdpo import set_teacher_prompts as sdpo_teacher_prompts
from sdpo import update as sdpo_update

# --- what remedies ask for -----------------------------------------------------------------------

@dataclass
class Rollout(sdpo.Rollout):
    advantage: float = 0.0  # A; 0: the rollout learns from its teacher only
    marked: list | None = None  # (T,) whether a token belongs to a marker (shield)
    wrong_prompts: list = ()  # the teacher's with a wrong demonstration each (rlcsd)
    # under the weights at the step's start, (T,) each; without a demonstration u is 0
    u: torch.Tensor | None = None
    entropy: torch.Tensor | None = None  # H_T, over the vocabulary
    kl: torch.Tensor | None = None  # KL(S || T), over the student's top k and the rest
    w: torch.Tensor | float = 1.0  # a number, or one for each token
    a: torch.Tensor | float = 0.0

    def tokens(self):
        longest = max(map(len, self.wrong_prompts), default=0)
        return max(super().tokens(), longest + len(self.response_ids))

def set_advantages(group, *_):
    """A of each rollout, as in grpo.py."""
    for r, advantage in zip(group, grpo.group_advantages([r.reward for r in group])):
        r.advantage = advantage

def taught(rollouts):
    return [r for r in rollouts if r.teacher_prompt_ids]

def on_all_ranks(values):
    """The values of all tokens of the step, (N,) float64, from a list of this rank's (T,)."""
    parts = sdpo.exchange([v.cpu() for v in values])
    return torch.cat(parts or [torch.zeros(1)]).double()

# --- remedies ------------------------------------------------------------------------------------

class demopsd:
    """DemoPSD, 2607.02502: the target is T^(1-b) S'^b, S' the teacher without demonstration.

    b = 2 l (sigmoid(50 JS(S', T)) - 1/2), l .15: the further a demonstration takes the teacher from
    S', the less the target follows it. Theirs for our 50 are 25 to 100.
    """
    settings = dict(strength=0.15, alpha=1.0, ema=0.05)

    @staticmethod
    def target(unaided, aided, strength):
        """Of the teacher's log-probabilities of the buckets, (..., k + 1) each."""
        b = 2 * strength * (torch.sigmoid(50 * sdpo.divergence(unaided, aided, 0.5)) - 0.5)
        return torch.lerp(aided, unaided, b[..., None]).log_softmax(-1)

class srpo:
    """SRPO, 2604.02288: a wrong rollout with a demonstration learns from it, the others from A.

    w = exp(-l H_T) / its mean over all tokens of such rollouts, l 1.
    """
    settings = dict(strength=1.0, lr=5e-6)

    @staticmethod
    def prepare(group, question, tokenizer, args):
        set_advantages(group)
        for r in group:
            if r.reward >= 0.5:
                r.teacher_prompt_ids = None

    @staticmethod
    def weigh(rollouts, args):
        for r in rollouts:
            r.w, r.a = (-args.strength * r.entropy).exp(), 0.0
            if not r.teacher_prompt_ids:
                r.w, r.a = 0.0, r.advantage
        mean = on_all_ranks([r.w for r in taught(rollouts)]).mean().item()
        for r in taught(rollouts):
            r.w = r.w / mean

class antisd:
    """AntiSD, 2605.11609: a = A / std - l g phi(u), phi(u) = (softplus(u) - log 2) / 2, l .5.

    Away from the teacher: a token that it doubts, u < 0, gains. phi is what the gradient of
    -JS(S, T) has for S(y); at most log(2) / 2 is gained.
    """
    settings = dict(strength=0.5, ema=1.0, lr=1e-6, clip_high=0.2)  # ema 1: the student's weights

    @staticmethod
    def prepare(group, question, tokenizer, args):
        set_advantages(group)
        deviation = statistics.pstdev(r.reward for r in group) or 1  # 0: so is each A
        for r in group:
            r.advantage /= deviation

    @staticmethod
    def weigh(rollouts, args):
        g = antisd.gate(median_entropy(rollouts), antisd.first_medians(args))
        for r in rollouts:
            phi = (torch.nn.functional.softplus(r.u) - math.log(2)) / 2
            r.w, r.a = 0.0, r.advantage - args.strength * g * phi
        return dict(gate=g)

    @staticmethod
    def gate(median, before):
        """g: 0 in five steps of warm-up; then 1 at their median H_T, and 0 at .93 of it.

        Ours: the mean of the five medians, and a line between the two.
        """
        return min(1, max(0, (median / (sum(before) / 5) - 0.93) / 0.07)) if len(before) == 5 else 0

    @staticmethod
    def first_medians(args):
        """Of the first five steps that had a teacher, from the log: a resumed run finds them."""
        path, lines = Path(args.run_dir, "metrics.jsonl"), []
        if dist.get_rank() == 0 and path.exists():
            lines = path.read_text().splitlines()
        medians = [json.loads(line)["teacher_entropy"] for line in sdpo.exchange(lines)]
        return [median for median in medians if median][:5]

class rlrt:
    """RLRT, 2605.10781: a = A [(1 - l) + l clip(S / T, 1 - e, 1 + e)] if A > 0, else A; l .5, e .2.

    What a right answer says although its teacher would not gains more. Their e: .2 for a thinking
    model, .5 for an instructed one, 1 for a base.
    """
    settings = dict(strength=0.5, ema=1.0, lr=1e-6)  # the rate is GRPO's

    @staticmethod
    def prepare(group, question, tokenizer, args):
        set_advantages(group)
        for r in group:
            if not r.advantage:
                r.teacher_prompt_ids = None

    @staticmethod
    def weigh(rollouts, args):
        for r in rollouts:
            factor = 1 - args.strength + args.strength * (-r.u).exp().clamp(0.8, 1.2)
            r.w, r.a = 0.0, r.advantage * (factor if r.advantage > 0 else 1)

class mixture:
    """SDPO's own, 2601.20802: w = 1 - l, a = l A, l .9 (meant for KL: JS pulls a quarter of it)."""
    settings = dict(strength=0.9, alpha=1.0)
    prepare = staticmethod(set_advantages)

    @staticmethod
    def weigh(rollouts, args):
        for r in rollouts:
            r.w = 1 - args.strength if r.teacher_prompt_ids else 0.0
            r.a = args.strength * r.advantage

class shield:
    """Ours: w = 1 - l where the student's token belongs to one of the ten markers, l 1."""
    settings = dict(strength=1.0)

    @staticmethod
    def prepare(group, question, tokenizer, args):
        for r in group:
            r.marked = shield.marked_tokens([tokenizer.decode([t]) for t in r.response_ids])

    @staticmethod
    def weigh(rollouts, args):
        for r in rollouts:
            r.w = 1 - args.strength * torch.tensor(r.marked, device=r.u.device)

    @staticmethod
    def marked_tokens(pieces):
        """[1.0 where a token, given as its text, holds a part of a marker, else 0.0]"""
        pieces = [piece.lower() for piece in pieces]
        ends, marked = [*itertools.accumulate(map(len, pieces))], [0.0] * len(pieces)
        for found in re.finditer("|".join(epistemic.MARKERS), "".join(pieces)):
            first = bisect.bisect_right(ends, found.start())
            for i in range(first, bisect.bisect_left(ends, found.end()) + 1):
                marked[i] = 1.0
        return marked

class shield_kl:
    """Ours: w = 0 on the share l of all tokens that have the largest KL(S || T), l .2."""
    settings = dict(strength=0.2)

    @staticmethod
    def weigh(rollouts, args):
        values = on_all_ranks([r.kl for r in rollouts]).numpy()
        bar = float(np.quantile(values, max(0, 1 - args.strength)))
        for r in rollouts:
            r.w = (r.kl <= bar).float()

class entropy_gate:
    """Ours: w = max(.1, 1 - l H_T / mean H_T), l .5. (EGRSD, 2605.13255, has a gate not public.)"""
    settings = dict(strength=0.5)

    @staticmethod
    def weigh(rollouts, args):
        mean = on_all_ranks([r.entropy for r in rollouts]).mean().item()
        for r in rollouts:
            r.w = (1 - args.strength * r.entropy / mean).clamp(min=0.1)

class rlcsd:
    """RLCSD, 2606.11709: a = A + l tanh(e) where |e| > .1, but never of the other sign than A.

    e = log T(y | c+) - log mean_k T(y | c-_k): c+ a right sibling, the c- wrong ones. What both
    change in y, the manner, is subtracted. Ours: l .5, the .1, at most two c-, the teacher of
    sdpo.py, and one mean over all tokens (theirs: one for those with e and one for the others).
    """
    settings = dict(strength=0.5, lr=1e-6)

    @staticmethod
    def prepare(group, question, tokenizer, args):
        set_advantages(group)
        for r in group:
            if not r.advantage:
                r.teacher_prompt_ids = None
            wrong = [o for o in group if o is not r and o.finished and o.reward < 0.5]
            r.wrong_prompts = [sdpo.render(tokenizer, sdpo.teacher_messages(
                question["messages"], o.text, args.demonstration), args.enable_thinking)
                for o in wrong[: 2 if r.teacher_prompt_ids else 0]]

    @staticmethod
    def measure(student, micro_batch, teacher):
        """Sets r.wrong, log T(y | c-_k) of each c-, (T,)."""
        for r in micro_batch:
            targets, r.wrong = student.read([r])[2], []
            for prompt in r.wrong_prompts:
                states = student.states(teacher, [r], [prompt])
                r.wrong.append(sdpo.token_losses(*states, targets, student.args.temperature)[1])

    @staticmethod
    def weigh(rollouts, args):
        for r in rollouts:
            r.w, r.a = 0.0, r.advantage
            if r.wrong:
                mean = torch.stack(r.wrong).logsumexp(0) - math.log(len(r.wrong))
                e = r.u + r.old_logprobs - mean
                a = r.advantage + args.strength * torch.tanh(e) * (e.abs() > 0.1)
                r.a = a.clamp(min=0.0) if r.advantage > 0 else a.clamp(max=0.0)

class dasd:
    """DASD, 2605.22263 (its abstract): away from the teacher where it is unsure, else towards it.

    Ours: w = l, but -l on the fifth of all tokens with the largest H_T; a = A; l .5.
    """
    settings = dict(strength=0.5, lr=1e-6)
    prepare = staticmethod(set_advantages)

    @staticmethod
    def weigh(rollouts, args):
        bar = float(np.quantile(on_all_ranks([r.entropy for r in taught(rollouts)]).numpy(), 0.8))
        for r in rollouts:
            sign = torch.where(r.entropy <= bar, 1.0, -1.0)
            r.w, r.a = args.strength * sign * bool(r.teacher_prompt_ids), r.advantage

REMEDIES = {remedy.__name__: remedy for remedy in (
    demopsd, srpo, antisd, rlrt, mixture, shield, shield_kl, entropy_gate, rlcsd, dasd)}

# --- what they replace in sdpo.py ----------------------------------------------------------------

def make_parser():
    parser = sdpo_parser()
    parser.description = "SDPO with a remedy. Unless its paper says otherwise, as sdpo.py."
    add, share = parser.add_argument, sdpo.number(float, 0, 1)
    add("--remedy", required=True, choices=REMEDIES, help="see the top of remedies.py")
    add("--strength", type=sdpo.number(float, 0), help="l of the remedy's equation")
    add("--clip_low", type=share, default=0.2, help="PPO's clip, as in grpo.py")
    add("--clip_high", type=share, default=0.28, help="PPO's clip, as in grpo.py")
    chosen, _ = parser.parse_known_args()
    parser.set_defaults(run_dir="runs/remedies", **REMEDIES[chosen.remedy].settings)
    return parser

def set_teacher_prompts(question, group, tokenizer, rng, args):
    sdpo_teacher_prompts(question, group, tokenizer, rng, args)
    if hasattr(REMEDIES[args.remedy], "prepare"):
        REMEDIES[args.remedy].prepare(group, question, tokenizer, args)

def set_loss_weights(minibatch):
    """As in sdpo.py and grpo.py; 0 with neither a demonstration nor an advantage."""
    for r in minibatch:
        learns = r.teacher_prompt_ids or r.advantage
        r.weight = 1 / (len(minibatch) * len(r.response_ids)) if learns else 0.0

class Student(sdpo.Student):

    def states(self, model, micro_batch, prompts):
        """(hidden states that predict the responses, LM head) of the student or the teacher."""
        hidden = sdpo.response_hidden(model, prompts, [r.response_ids for r in micro_batch])
        return hidden, model.get_output_embeddings()

    def read(self, micro_batch):
        """A micro-batch's prompts, its teacher's prompts, and all its response tokens."""
        plain = [r.prompt_ids for r in micro_batch]
        aided = [r.teacher_prompt_ids or r.prompt_ids for r in micro_batch]
        targets = [t for r in micro_batch for t in r.response_ids]
        return plain, aided, torch.tensor(targets, device=self.model.device)

    @torch.no_grad()
    def measure(self, micro_batch, teacher):
        """Sets on each rollout what is known of its tokens, under the weights as they are now."""
        args, (plain, aided, targets) = self.args, self.read(micro_batch)
        student = self.states(self.model, micro_batch, plain)
        hidden, head = self.states(teacher, micro_batch, aided)
        buckets = sdpo.teacher_buckets(student, (hidden, head), args.top_k, args.temperature)
        kl, logprobs = sdpo.token_losses(*student, targets, args.temperature, *buckets, alpha=1)
        u, entropy = [], []
        for chunk, target in zip(hidden.split(sdpo.CHUNK), targets.split(sdpo.CHUNK)):
            logits = head(chunk).float().div_(args.temperature)  # (C, V)
            says = Categorical(logits=logits, validate_args=False)
            u.append(says.log_prob(target))
            entropy.append(says.entropy())
        columns = logprobs, torch.cat(u) - logprobs, torch.cat(entropy), kl
        lengths = [len(r.response_ids) for r in micro_batch]
        for r, *parts in zip(micro_batch, *(column.split(lengths) for column in columns)):
            r.old_logprobs, r.u, r.entropy, r.kl = parts
            r.u = r.u * bool(r.teacher_prompt_ids)
        if hasattr(REMEDIES[args.remedy], "measure"):
            REMEDIES[args.remedy].measure(self, micro_batch, teacher)

    def forward(self, micro_batch, teacher):
        """(w x divergence + PPO's loss, log-probability) of the response tokens, (N,) each."""
        args, (plain, aided, targets), buckets = self.args, self.read(micro_batch), []
        w, a = (torch.cat([torch.as_tensor(getattr(r, name), device=targets.device).expand(
            len(r.response_ids)) for r in micro_batch]) for name in ("w", "a"))
        student = self.states(self.model, micro_batch, plain)
        if w.any():  # else what the teacher says is in the advantages
            with torch.no_grad():
                ids, target = sdpo.teacher_buckets(
                    student, self.states(teacher, micro_batch, aided), args.top_k, args.temperature)
                if hasattr(REMEDIES[args.remedy], "target"):
                    _, unaided = sdpo.teacher_buckets(
                        student, self.states(teacher, micro_batch, plain), args.top_k,
                        args.temperature)
                    target = REMEDIES[args.remedy].target(unaided, target, args.strength)
            buckets = ids, target
        distance, logprobs = sdpo.token_losses(
            *student, targets, args.temperature, *buckets, alpha=args.alpha)
        # the copies of weight 0, which give all ranks as many micro-batches, are not measured
        old = [r.old_logprobs for r in micro_batch]
        old = logprobs.detach() if old[0] is None else torch.cat(old)
        policy, clipped = grpo.policy_loss(logprobs, old, a, args.clip_low, args.clip_high)
        self.clipped += clipped.sum()
        # update() multiplies by the ratio, which PPO's loss has already
        return w * distance + policy / sdpo.importance_weight(logprobs, old), logprobs

def median_entropy(rollouts):
    return on_all_ranks([r.entropy for r in taught(rollouts)]).median().item()

def update(ddp, teacher, optimizer, rollouts, lr):
    """sdpo.py's, after a look at all tokens under the weights at the step's start."""
    student, args = ddp.module, ddp.module.args
    micros = [*itertools.chain(*sdpo.split_into_minibatches(rollouts, args))]  # this rank's
    for micro_batch in sdpo.progress(micros, desc="measure", unit="micro-batch"):
        student.measure(micro_batch, teacher)
    mine = [r for micro_batch in micros for r in micro_batch if r.weight]
    numbers = dict(teacher_entropy=median_entropy(mine))
    if hasattr(REMEDIES[args.remedy], "weigh"):
        numbers |= REMEDIES[args.remedy].weigh(mine, args) or {}
    student.clipped = torch.zeros((), device=student.model.device)  # tokens, by PPO
    metrics = sdpo_update(ddp, teacher, optimizer, rollouts, lr)
    dist.all_reduce(student.clipped)
    numbers["policy_clipped"] = student.clipped.item() / (metrics["trained_tokens"] or 1)
    return metrics | numbers

REPLACED = dict(
    make_parser=make_parser, Rollout=Rollout, set_teacher_prompts=set_teacher_prompts,
    set_loss_weights=set_loss_weights, Student=Student, update=update,
    remember_logprobs=lambda student, micros: None)  # measure() has set them

def main():
    vars(sdpo).update(REPLACED)
    sdpo.main()

if __name__ == "__main__":
    main()
