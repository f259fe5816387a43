"""Remedies: what others do, so that self-distillation keeps the doubt it takes away (sdpo.py).

sdpo.py with GRPO's advantage and one --remedy: `diff sdpo.py remedies.py` shows them. Of a token y
are known: S and T, the student's and the teacher's distributions; u = log T(y) - log S(y); H_T, the
teacher's entropy; A = reward - mean reward of the group. Each remedy gives every token two numbers,
w and a:

    loss = w x divergence(S, T)  +  PPO's clipped loss with advantage a          (per token)

  sdpo.py       w = 1                               a = 0
  grpo.py       w = 0                               a = A
  demopsd       w = 1, towards T^(1-b) S'^b         a = 0
  srpo          w = exp(-l H_T) / mean              a = 0, if wrong and with a demonstration;
                w = 0                               a = A, otherwise
  antisd        w = 0                               a = A / std - l g phi(u), away from the teacher
  rlrt          w = 0                               a = A, stretched by S / T where right
  mixture       w = 1 - l                           a = l A
  shield        w = 0 on the ten markers            a = 0
  shield_kl     w = 0 where KL(S || T) is largest   a = 0
  entropy_gate  w = 1 - l H_T / mean                a = 0

    torchrun --nproc_per_node 8 remedies.py --model Qwen/Qwen3-8B --remedy srpo

--strength is the one number of each, l; equations, references and defaults are in the functions of
the section "remedies". Common to all, so that they can be compared, and not as in every paper:
SDPO's demonstrations and importance weights, and the mean over sequences of each one's token mean.
A shielded token stays in that mean's denominator: the others learn as they do in SDPO. Means,
medians and shares are of a whole step, over all ranks, under the weights at its start.

Watch: score and epistemic out of distribution, in eval/, against length: GRPO and sdpo are the two
corners. `teacher_entropy` is the batch's median H_T; where it falls fast, a run is about to
collapse (AntiSD's gate closes then).

The paper ends with main(). After it: logging, vLLM, memory, checkpoints; read them when needed.
"""
import argparse
import bisect
import contextlib
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import epistemic
from verifier import Verifier, load_questions

# --- arguments -----------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="SDPO with a remedy. Defaults are SDPO's, except for PAPERS in this file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, switch = fail, argparse.BooleanOptionalAction
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, help="hub id or Hugging Face folder")
    add("--remedy", required=True, choices=PAPERS, help="see the top of this file")
    add("--data", default="dapo", help="dapo, a hub id, or a .parquet/.json/.jsonl file")
    add("--num_questions", type=int, help="|D| of Sec. 6.2, drawn by --seed (default: all)")
    add("--enable_thinking", action=switch, default=True, help="for Qwen3's chat template")
    add = parser.add_argument_group("rollout (Table 8)").add_argument
    add("--questions_per_step", type=int, default=256, help="Sec. 6.2: 64")
    add("--rollouts", type=int, default=8, help="answers to a question: its group")
    add("--temperature", type=float, default=1.0, help="of sampling; the loss uses the same")
    add("--max_prompt_tokens", type=int, default=2048, help="longer prompts are left out")
    add("--max_response_tokens", type=int, default=20480, help="longer answers are cut")
    add = parser.add_argument_group("loss (Table 10; clip: Table 9)").add_argument
    add("--strength", type=float, help="the remedy's one number (default: its paper's)")
    add("--clip_low", type=float, default=0.2, help="ratio's lower bound is 1 - this")
    add("--clip_high", type=float, default=0.28, help="ratio's upper bound is 1 + this")
    add("--context", choices=["sibling", "gold"], default="sibling",
        help="c: a correct sibling's answer, or the data's `solution` column (OPSD, App. E)")
    add("--alpha", type=float, default=0.5, help="0.5: Jensen-Shannon; 1: Eq. 1; 0: its reverse")
    add("--top_k", type=int, default=100, help="the student's likeliest tokens; App. G: 256")
    add("--demonstration", choices=["full", "without_think", "uncertain"], default="full",
        help="c is that answer s whole, s without its think part, or s with App. C's request for "
             "uncertainty")
    add("--teacher_thinking", action="store_true",
        help="the teacher's prompt has thinking on where --no-enable_thinking (App. E's hybrid)")
    add("--loss_tokens", type=int, help="loss on an answer's first tokens alone; App. E: 1024. "
        "OPSD's own code cuts the answers there: that is --max_response_tokens 1024")
    add("--ema", type=float, default=0.0, help="rate of a teacher that follows; 1: step by step")
    add = parser.add_argument_group("optimisation (Tables 8 and 10)").add_argument
    add("--steps", type=int, default=100, help="rounds of rollout and update (authors' code)")
    add("--minibatch_questions", type=int, default=128, help="questions an update")
    add("--lr", type=float, default=1e-5, help="learning rate after the warm-up, constant")
    add("--warmup_steps", type=int, default=10, help="steps in which the rate rises in a line")
    add = parser.add_argument_group("memory (ours)").add_argument
    add("--tokens_per_micro_batch", type=int, default=24576, help="padded; a longer one goes alone")
    add("--recompute_layers", action=switch, default=True, help="without: faster, more memory")
    add("--offload_optimizer", action=switch, default=True, help="AdamW's state in CPU memory")
    add("--gpu_memory_utilization", type=float, default=0.7, help="vLLM's share, while it samples")
    add = parser.add_argument_group("run").add_argument
    add("--run_dir", default="runs/remedies", help="a new folder")
    add("--seed", type=int, default=0, help="of data order, sampling and demonstrations")
    add("--eval_data", nargs="*", default=["aime24"], help="or aime25 amc23 math500, ids, files")
    add("--eval_rollouts", type=int, default=1, help="answers to a question (authors' code)")
    add("--eval_every", type=int, default=10, help="steps; also before the first, after the last")
    add("--save_every", type=int, default=10, help="steps; also after the last")
    add("--resume", action="store_true", help="go on from --run_dir's newest checkpoint that loads")
    add("--wandb", action="store_true", help="the metrics to Weights & Biases, where installed")
    chosen, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PAPERS[chosen.remedy])
    return with_flags_of_the_run(parser, argv)

def check_args(args):
    for name, value in vars(args).items():
        if type(value) is int and value < 1 and name not in ("seed", "warmup_steps"):
            fail(f"--{name} {value} must be at least 1")
    most = math.inf if args.remedy in ("srpo", "antisd", "entropy_gate") else 1  # else a share
    if not 0 <= args.strength <= most:
        fail(f"--strength {args.strength} must lie between 0 and {most} for {args.remedy}")
    for name in ("alpha", "ema", "lr", "clip_low", "clip_high", "gpu_memory_utilization"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name} {getattr(args, name)} must lie between 0 and 1")
    if args.temperature <= 0:
        fail(f"--temperature {args.temperature} must be above 0: a group needs varied rollouts")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    for divisor, of in ((args.minibatch_questions, "--minibatch_questions"), (ranks, "the ranks")):
        if args.questions_per_step % divisor:
            fail(f"{of}, {divisor}, must divide --questions_per_step {args.questions_per_step}")
    names = [Path(source).stem for source in args.eval_data]
    if len(set(names)) < len(names):
        fail(f"--eval_data: two benchmarks have one name ({' '.join(names)})")

# --- prompts -------------------------------------------------------------------------------------

def render(tokenizer, messages, enable_thinking):
    """Token ids of a chat up to where the model speaks (Table 12); the template writes any BOS."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                         enable_thinking=enable_thinking)
    return tokenizer.encode(text, add_special_tokens=False)

def with_prompts(source, tokenizer, args):
    """load_questions, each with its prompt_ids; those over --max_prompt_tokens left out."""
    try:
        questions = load_questions(source)
    except ValueError as error:
        fail(error)
    for q in questions:
        q["prompt_ids"] = render(tokenizer, q["messages"], args.enable_thinking)
    kept = [q for q in questions if len(q["prompt_ids"]) <= args.max_prompt_tokens]
    if not kept:
        fail(f"{source}: all {len(questions)} prompts are longer than --max_prompt_tokens "
             f"{args.max_prompt_tokens}")
    if len(kept) < len(questions):
        say(f"{source}: {len(questions) - len(kept):,} of {len(questions):,} prompts left out")
    return kept

def choose_questions(questions, num_questions, seed):
    """Sec. 6.2's question set of size |D|; by one seed, a smaller set lies within a larger."""
    if num_questions and num_questions > len(questions):
        fail(f"--num_questions {num_questions}: the data has {len(questions):,}")
    return random.Random(seed).sample(questions, len(questions))[:num_questions]

def question_stream(questions, seed):
    """Shuffled epoch after epoch, without end; a small set repeats within a step (Sec. 6.2)."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(questions, len(questions))

def demonstration_text(response, form):
    """What the teacher is shown of a correct response: s ("full"), or s without its think part.

    An answer of DeepSeek-R1-Distill has no opening <think>: the template wrote it.
    """
    if form == "without_think":
        response = re.sub(r"<think>.*?</think>\s*", "", response, flags=re.S)
        response = re.sub(r"^.*?</think>\s*", "", response, flags=re.S)
    return response

CLOSE = "Correctly solve the original question."
CLOSE_UNCERTAIN = (  # App. C, Figure 14
    "Solve the original question from scratch with a full, detailed reasoning trace, without "
    "skipping any steps, and include as much uncertainty or ambiguity in the explanation.")

def teacher_messages(messages, response, form):
    """The chat with the demonstration after the question, in one user message (authors' code)."""
    *before, last = messages
    close = CLOSE_UNCERTAIN if form == "uncertain" else CLOSE
    shown = demonstration_text(response, form)
    text = f"{last['content']}\nCorrect solution:\n\n{shown}\n\n{close}"
    return [*before, {**last, "content": text}]

def choose_demonstration(group, i, rng):
    """A correct sibling of rollout i, at random; None if it has none.

    Never i itself: the only success of a group has nobody to learn from. Nor one that was cut: a
    box may stand early in a think part that never closes, and c = s without think would show it.
    """
    siblings = [r for j, r in enumerate(group) if r.reward >= 0.5 and r.finished and j != i]
    return rng.choice(siblings) if siblings else None

def check_teacher(questions, tokenizer, args):
    """The teacher's prompt needs what its flags ask for, of the data and of the chat template."""
    without, first = sum("solution" not in q for q in questions), questions[0]
    if args.context == "gold" and without:
        fail(f"--context gold: {without:,} of {len(questions):,} questions in {args.data} have no "
             f"`solution` text beside their answer")
    if args.teacher_thinking and render(tokenizer, first["messages"], True) == first["prompt_ids"]:
        fail(f"--teacher_thinking: the student thinks too (see --no-enable_thinking), or the chat "
             f"template of {args.model} cannot switch it off")

# --- loss ----------------------------------------------------------------------------------------

def with_tail(topk_logprobs):
    """(..., k) log-probabilities -> (..., k + 1): the last bucket holds all other tokens."""
    inside = topk_logprobs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([topk_logprobs, torch.log(-torch.expm1(inside))], dim=-1)

def divergence(student, teacher, alpha):
    """Generalised Jensen-Shannon of two log-distributions, (..., k + 1) -> (...), in nats.

    mixture m = (1 - alpha) student + alpha teacher
    loss      = (1 - alpha) KL(student || m) + alpha KL(teacher || m)

    The gradient goes through the student, in m too. The ends, where that would be 0, are defined:
    alpha 0 is KL(teacher || student), alpha 1 is KL(student || teacher), Eq. 1.
    """
    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)
    if alpha == 0:
        return kl(teacher, student)
    if alpha == 1:
        return kl(student, teacher)
    mixture = torch.logaddexp(student + math.log(1 - alpha), teacher + math.log(alpha))
    return (1 - alpha) * kl(student, mixture) + alpha * kl(teacher, mixture)

def group_advantages(rewards):
    """Reward minus the group's mean, (n,) -> (n,); 0 throughout if all are right, or all wrong.

    Not divided by the standard deviation (authors' code): that would weigh a group with one
    success of eight as much as one with four.
    """
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]

def policy_loss(logprobs, old_logprobs, advantages, clip_low, clip_high):
    """PPO's loss and whether its clip holds back the gradient, (N,) each.

    max( -A ratio, -A clip(ratio, 1 - low, 1 + high) ), and for A < 0 at most 3 |A|: a wrong token
    that has become much likelier would otherwise outweigh the batch (dual clip, c = 3).
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    free = -advantages * ratio
    loss = torch.maximum(free, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    loss = torch.where(advantages < 0, torch.minimum(loss, -3.0 * advantages), loss)
    return loss, loss != free

CHUNK = 512  # positions through the LM head at once: 512 x 151,936 float32 logits are 0.3 GB

def token_losses(hidden, head, targets, temperature, teacher=None, top_k=None, alpha=None,
                 strength=None):
    """(divergence, log p(target), seen) at each of N positions, (N,), never holding (N, V).

    hidden (N, D) holds the states that predict targets (N,); teacher is (hidden, head) of the
    teacher, and without one the divergence is 0. The buckets are the student's top k of the full
    softmax and the rest; the teacher is read at the same ids. For demopsd, teacher has a third
    part, its hidden states without the demonstration. seen (N, 3), detached: log T(target), the
    entropy of T over the vocabulary, and KL(student || T) over the buckets.

    Each chunk runs twice: `checkpoint` drops its logits after the forward and calls `chunk` again
    in backward. The top-k ids and the teacher's buckets carry no gradient and are small, (C, k).
    So the first run keeps them in `kept`, and the second looks them up.
    """
    kept = {}  # {number of the chunk: (the student's top-k ids, the target's buckets, seen)}

    def buckets(logits, ids):
        return with_tail(logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True))

    def chunk(i, h, y, teacher_h=None, plain_h=None):
        logits = head(h).float().div_(temperature)  # (C, V)
        ids = y[:, None]
        if teacher_h is not None:
            if i not in kept:
                with torch.no_grad():
                    top = logits.topk(min(top_k, logits.shape[-1]), dim=-1).indices  # (C, k)
                    shown = teacher[1](teacher_h).float().div_(temperature).log_softmax(-1)
                    target = buckets(shown, top)
                    kl = divergence(buckets(logits, top), target, alpha=1)
                    entropy = -(shown.exp() * shown).sum(-1)  # of (C, V)
                    seen = torch.stack([shown.gather(-1, ids)[:, 0], entropy, kl], dim=-1)
                    if plain_h is not None:
                        plain = teacher[1](plain_h).float().div_(temperature)  # (C, V)
                        target = demopsd(buckets(plain, top), target, strength)
                        del plain
                    kept[i] = top, target, seen
                    del shown
            ids = torch.cat([ids, kept[i][0]], dim=-1)
        # one gather for both, since the backward of each would make a (C, V) of its own
        logprobs = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)  # (C, 1 + k)
        if teacher_h is None:
            none = torch.zeros_like(logprobs[:, 0])
            return none, logprobs[:, 0], none
        return divergence(with_tail(logprobs[:, 1:]), kept[i][1], alpha), logprobs[:, 0], kept[i][2]
    columns = [hidden, targets] + ([teacher[0], *teacher[2:]] if teacher else [])
    parts = zip(itertools.count(), *(column.split(CHUNK) for column in columns))
    results = (checkpoint(chunk, *part, use_reentrant=False) for part in parts)
    return tuple(map(torch.cat, zip(*results)))

def importance_weight(logprobs, old_logprobs):
    """min(p / p_old, 2) per token, detached: truncated importance sampling (Table 9: clip 2)."""
    return (logprobs - old_logprobs).clamp(-20, 20).exp().clamp(max=2.0).detach()

def set_loss_weights(minibatch, remedy, loss_tokens=None):
    """Weight of each token in the loss: 1 / (sequences x its sequence's tokens); 0 without signal.

    With --loss_tokens a sequence is its first ones. The whole mini-batch counts, over all ranks:
    two ranks give the gradient of one.
    """
    for r in minibatch:
        tokens = len(r.response_ids[:loss_tokens])
        learns = is_taught(r, remedy) or remedy in REWARDED and r.advantage
        r.weight = 1 / (len(minibatch) * tokens) if learns else 0.0

# --- remedies ------------------------------------------------------------------------------------

PAPERS = {  # what each has otherwise than SDPO; strength is the l of its equation, below
    "demopsd": dict(strength=0.15, alpha=1.0, ema=0.05),
    "srpo": dict(strength=1.0, lr=5e-6),
    "antisd": dict(strength=0.5, ema=1.0, lr=1e-6, clip_high=0.2),  # ema 1: the student's weights
    "rlrt": dict(strength=0.5, ema=1.0, lr=1e-6),  # the rate is GRPO's
    "mixture": dict(strength=0.9, alpha=1.0),
    "shield": dict(strength=1.0),
    "shield_kl": dict(strength=0.2),
    "entropy_gate": dict(strength=0.5),
}
REWARDED = ("srpo", "antisd", "rlrt", "mixture")  # these learn from A too

def is_taught(r, remedy):
    """Whether a rollout learns from the teacher, be its reward what it may."""
    return bool(r.teacher_prompt_ids) and remedy != "rlrt" and (remedy != "srpo" or r.reward < 0.5)

def demopsd(plain, shown, strength):
    """DemoPSD, 2607.02502: the target T^(1-b) S'^b of the teacher's buckets, (..., k + 1).

    b = 2 l (sigmoid(50 JS(S', T)) - 1/2), l .15: the further a demonstration takes the teacher from
    what it says without, S', the less of it is believed. Theirs for our 50 are 25 to 100.
    """
    b = 2 * strength * (torch.sigmoid(50 * divergence(plain, shown, 0.5)) - 0.5)
    return torch.lerp(shown, plain, b[..., None]).log_softmax(-1)

def srpo(entropy, mean, strength):
    """SRPO, 2604.02288: w = exp(-l H_T) / its mean over all tokens of such rollouts, l 1."""
    return (-strength * entropy).exp() / mean

def antisd(advantage, u, strength):
    """AntiSD, 2605.11609: a = A / std - l g phi(u), phi(u) = (softplus(u) - log 2) / 2, l .5.

    Away from the teacher: a token that it doubts, u < 0, is worth more. phi is what the gradient of
    -JS(S, T) has for S(y), and at most log(2) / 2 is gained. strength is l g.
    """
    return advantage - strength * (torch.nn.functional.softplus(u) - math.log(2)) / 2

def antisd_gate(median, before):
    """AntiSD's g: 0 in five steps of warm-up; then 1 at their H_T, and 0 at .93 of it.

    Ours: the mean of the five medians, and a line between the two.
    """
    return min(1, max(0, (median / (sum(before) / 5) - 0.93) / 0.07)) if len(before) == 5 else 0

def rlrt(advantage, u, strength):
    """RLRT, 2605.10781: a = A [(1 - l) + l clip(S / T, 1 - e, 1 + e)] if A > 0, else A; l .5, e .2.

    What a right answer says, and its teacher would not, is worth more. Their e: .2 for a thinking
    model, .5 for an instructed one, 1 for a base.
    """
    stretch = 1 - strength + strength * (-u).exp().clamp(0.8, 1.2)
    return advantage * (stretch if advantage > 0 else 1)

def mixture(advantage, strength):
    """SDPO's own, 2601.20802: w = 1 - l, a = l A, l .9 (meant for KL: JS pulls a quarter of it)."""
    return 1 - strength, strength * advantage

def shield(marked, strength):
    """Ours: w = 1 - l where the student's token belongs to one of the ten markers, l 1."""
    return 1 - strength * marked

def shield_kl(kl, bar):
    """Ours: w = 0 above the bar, on the share l of tokens with the largest KL(S || T); l .2."""
    return (kl <= bar).float()

def entropy_gate(entropy, mean, strength):
    """Ours: w = max(.1, 1 - l H_T / mean H_T), l .5. (EGRSD, 2605.13255, has a gate not public.)"""
    return (1 - strength * entropy / mean).clamp(min=0.1)

def marked_tokens(pieces):
    """(T,) 1 where a token, given as its text, holds a part of one of epistemic.py's markers."""
    pieces = [piece.lower() for piece in pieces]
    ends, marked = list(itertools.accumulate(map(len, pieces))), np.zeros(len(pieces), np.float32)
    for found in re.finditer("|".join(epistemic.MARKERS), "".join(pieces)):
        first, end = found.span()
        marked[bisect.bisect_right(ends, first) : bisect.bisect_left(ends, end) + 1] = 1
    return marked

def batch_numbers(taught, medians, strength):
    """What remedies ask of the batch's tokens; taught: what is `seen` of this rank's rollouts."""
    seen = torch.cat(exchange(taught) or [torch.zeros(1, 3)]).double()
    _, entropy, kl = seen.T
    median = entropy.median().item()
    return dict(median=median, gate=antisd_gate(median, medians), entropy=entropy.mean().item(),
                srpo=srpo(entropy, 1, strength).mean().item(),
                bar=float(np.quantile(kl.numpy(), max(0, 1 - strength))))

def token_terms(r, batch, args):
    """(2, T): w and a of a rollout's tokens."""
    (t, entropy, kl), A, l = r.seen.T, r.advantage, args.strength
    u, w, a = (t - r.old_logprobs) * bool(r.teacher_prompt_ids), 1, 0
    match args.remedy:  # demopsd's 1 and 0 have another target: see token_losses
        case "srpo":
            w, a = (srpo(entropy, batch["srpo"], l), 0) if is_taught(r, args.remedy) else (0, A)
        case "antisd":
            w, a = 0, antisd(A, u, l * batch["gate"])
        case "rlrt":
            w, a = 0, rlrt(A, u, l)
        case "mixture":
            w, a = mixture(A, l)
            w *= is_taught(r, args.remedy)
        case "shield":
            w = shield(torch.tensor(r.marked[: len(u)], device=u.device), l)
        case "shield_kl":
            w = shield_kl(kl, batch["bar"])
        case "entropy_gate":
            w = entropy_gate(entropy, batch["entropy"], l)
    return torch.stack([torch.zeros_like(u) + w, torch.zeros_like(u) + a])

# --- rollout -------------------------------------------------------------------------------------

@dataclass
class Rollout:
    row: int  # of the step's batch: the rollouts of one row are a group
    prompt_ids: list
    response_ids: list  # as vLLM sampled them: text is never encoded again
    logprobs: np.ndarray  # (T,) vLLM's own, temperature included
    text: str
    finished: bool  # by itself, not cut at max_response_tokens
    reward: float = 0.0
    teacher_prompt_ids: list | None = None  # None: no correct sibling, nothing to learn from
    advantage: float = 0.0  # 0: its group is all right or all wrong
    marked: np.ndarray | None = None  # (T,) 1 where a token belongs to a marker (shield)
    weight: float = 0.0  # of each of its tokens in the loss; 0: it does not count
    old_logprobs: torch.Tensor | None = None  # (T,) the trainer's at the step's start
    seen: torch.Tensor | None = None  # (T, 3) at the step's start: see token_losses
    terms: torch.Tensor | None = None  # (2, T) w and a

    def tokens(self):
        """Length of the longest sequence that is computed for it."""
        prompt = max(len(self.prompt_ids), len(self.teacher_prompt_ids or []))
        return prompt + len(self.response_ids)

def generate(llm, questions, n, seed, max_tokens, **sampling):
    """n rollouts for each question: a list of groups, in the order of the questions."""
    from transformers import set_seed
    from vllm import SamplingParams
    # No seed a request: that crashes on CPU. The global ones repeat bit for bit: vLLM's older model
    # runner draws from torch's, the newer one (on GPUs) from NumPy's, and this sets both.
    set_seed(seed)
    llm.reset_prefix_cache()  # nor may what was computed before show in the last bit (--resume)
    params = SamplingParams(n=n, max_tokens=max_tokens, logprobs=0, flat_logprobs=True, **sampling)
    prompts = [dict(prompt_token_ids=q["prompt_ids"]) for q in questions]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[Rollout(row, q["prompt_ids"], list(o.token_ids), np.float32(o.logprobs.logprobs),
                     o.text, o.finish_reason == "stop") for o in output.outputs]
            for row, (q, output) in enumerate(zip(questions, outputs))]

def grade(verifier, groups, questions, **how):
    """All rollouts of the groups, each with its reward: 1 correct, 0 not."""
    rollouts = [r for group in groups for r in group]
    golds = [q["answer"] for q, group in zip(questions, groups) for _ in group]
    for r, reward in zip(rollouts, verifier.verify([r.text for r in rollouts], golds, **how)):
        r.reward = reward
    return rollouts

def sample_groups(llm, verifier, tokenizer, questions, first_row, step, args):
    """This rank's rollouts of a step: graded, with advantage and teacher's prompt."""
    groups = generate(llm, questions, args.rollouts, hash((args.seed, step, first_row)) % 2**31,
                      args.max_response_tokens, temperature=args.temperature)
    rollouts = grade(verifier, groups, questions)
    for row, (question, group) in enumerate(zip(questions, groups), first_row):
        rng = random.Random(f"{args.seed}/{step}/{row}")  # whatever the number of ranks
        rewards = [r.reward for r in group]
        # AntiSD alone divides by it; an all right or all wrong group's A is 0 all the same
        deviation = (statistics.pstdev(rewards) or 1) if args.remedy == "antisd" else 1
        for i, (r, advantage) in enumerate(zip(group, group_advantages(rewards))):
            r.advantage = advantage / deviation
            if args.remedy == "shield":
                r.marked = marked_tokens([tokenizer.decode([token]) for token in r.response_ids])
            r.row, sibling = row, choose_demonstration(group, i, rng)
            shown = question["solution"] if args.context == "gold" else sibling and sibling.text
            if shown:
                messages = teacher_messages(question["messages"], shown, args.demonstration)
                r.teacher_prompt_ids = render(tokenizer, messages,
                                              args.enable_thinking or args.teacher_thinking)
    return rollouts

# --- update --------------------------------------------------------------------------------------

def micro_batches(rollouts, token_budget):
    """Neighbours in length together, as many as fit the budget once padded to the longest."""
    batches = []
    for r in sorted(rollouts, key=lambda r: r.tokens()):
        if batches and (len(batches[-1]) + 1) * r.tokens() <= token_budget:
            batches[-1].append(r)
        else:
            batches.append([r])
    return batches

def my_micro_batches(rollouts, token_budget):
    """This rank's micro-batches: every world_size-th, so that all ranks have the same lengths.

    Where the number does not divide, the last ranks get a rollout of weight 0.
    """
    batches = micro_batches(rollouts, token_budget)
    batches += [[replace(batches[0][0], weight=0.0)]] * (-len(batches) % dist.get_world_size())
    return batches[dist.get_rank() :: dist.get_world_size()]

def response_hidden(model, prompts, responses, device):
    """Last hidden states that predict the response tokens, (N, D), sequence by sequence.

    Padded on the right, and no attention mask: under causal attention no real token sees the
    padding after it, so that the fast kernel applies.
    """
    sequences = [torch.tensor([*p, *y]) for p, y in zip(prompts, responses)]
    ids = pad_sequence(sequences, batch_first=True).to(device)  # (B, T)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    return torch.cat([h[len(p) - 1 : len(p) + len(y) - 1]  # position t predicts token t + 1
                      for h, p, y in zip(hidden, prompts, responses)])

class Student(torch.nn.Module):
    """What DDP wraps: backbone, head and loss in one forward, so that its hooks see them all."""

    def __init__(self, model, args, device):
        super().__init__()
        self.model, self.args, self.device = model, args, device
        # the teacher's median entropy in each of the first five steps, 0 until then (AntiSD)
        self.medians = torch.zeros(5, dtype=torch.float64)

    def forward(self, micro_batch, teacher=None):
        """(divergence, log-probability, seen) of a micro-batch's response tokens, (N,) each."""
        prompts, responses = zip(*((r.prompt_ids, r.response_ids) for r in micro_batch))
        targets = torch.tensor([t for y in responses for t in y], device=self.device)
        if teacher is not None:
            with torch.no_grad():
                shown = [r.teacher_prompt_ids or r.prompt_ids for r in micro_batch]
                shown = [shown, prompts] if self.args.remedy == "demopsd" else [shown]
                hidden = [response_hidden(teacher, p, responses, self.device) for p in shown]
                teacher = (hidden[0], teacher.get_output_embeddings(), *hidden[1:])
        hidden = response_hidden(self.model, prompts, responses, self.device)
        return token_losses(hidden, self.model.get_output_embeddings(), targets,
                            self.args.temperature, teacher, self.args.top_k, self.args.alpha,
                            self.args.strength)

def remember(student, teacher, micros):
    """Sets old_logprobs, seen and terms of the micro-batches' rollouts, under the weights as now.

    Returns the numbers of the batch.
    """
    for micro_batch in micros:
        with torch.no_grad():
            _, logprobs, seen = student(micro_batch, teacher)
        lengths = [len(r.response_ids) for r in micro_batch]
        for r, old, part in zip(micro_batch, logprobs.split(lengths), seen.split(lengths)):
            r.old_logprobs, r.seen = old, part
    rollouts, args = [r for micro_batch in micros for r in micro_batch], student.args
    taught = [r.seen.cpu() for r in rollouts if r.weight and is_taught(r, args.remedy)]
    batch = batch_numbers(taught, [m for m in student.medians.tolist() if m], args.strength)
    for r in rollouts:
        r.terms = token_terms(r, batch, args)
    return batch

ROUND = 32  # micro-batches whose gradients are added up before an all-reduce: see MasterAdamW.fold

def backward(ddp, teacher, optimizer, micros):
    """Leaves the mini-batch's gradient, over all ranks, in the optimizer.

    `micros` are this rank's micro-batches; returns the statistics of every rank's. Each token has
    three log-probabilities: vLLM's, when it was sampled; `old`, the trainer's at the step's start,
    under the same weights; and the trainer's now.
    """
    args, device, stats = ddp.module.args, ddp.module.device, []
    if args.remedy in ("antisd", "rlrt"):  # what they want of the teacher is in the advantages
        teacher = None
    for i, micro_batch in enumerate(micros, 1):
        vllm = torch.tensor(np.concatenate([r.logprobs for r in micro_batch]), device=device)
        weight = torch.tensor([r.weight for r in micro_batch for _ in r.logprobs], device=device)
        last = i % ROUND == 0 or i == len(micros)
        with contextlib.nullcontext() if last else ddp.no_sync():
            distance, logprobs, _ = ddp(micro_batch, teacher)  # (N,) each
            old = torch.cat([r.old_logprobs for r in micro_batch])
            share, advantage = torch.cat([r.terms for r in micro_batch], dim=-1)
            policy, held = policy_loss(logprobs, old, advantage, args.clip_low, args.clip_high)
            ratio, correction = importance_weight(logprobs, old), importance_weight(old, vllm)
            loss = ((share * distance * ratio + policy) * correction * weight).sum()
            (loss * dist.get_world_size()).backward()  # DDP takes the mean of what is a sum
        if last:
            optimizer.fold()
        counts = weight > 0
        gap, clipped = counts * (old - vllm).abs(), torch.maximum(ratio, correction) >= 2
        clipped = counts & (clipped | held)
        stats.append(dict(loss=loss.item(), tokens=counts.sum().item(), gap=gap.sum().item(),
                          gap_max=gap.max().item(), clipped=clipped.sum().item()))
    return exchange(stats)

def update(ddp, teacher, optimizer, rollouts, lr):
    """One optimizer step a mini-batch; returns the metrics. Every rank holds all the rollouts."""
    student, args, minibatches = ddp.module, ddp.module.args, []
    for first in range(0, args.questions_per_step, args.minibatch_questions):
        rows = range(first, first + args.minibatch_questions)
        minibatch = [r for r in rollouts if r.row in rows]
        set_loss_weights(minibatch, args.remedy, args.loss_tokens)
        trained = [replace(r, response_ids=r.response_ids[: args.loss_tokens],
                           logprobs=r.logprobs[: args.loss_tokens]) for r in minibatch if r.weight]
        if trained:  # else nothing to learn, no time spent
            minibatches.append(my_micro_batches(trained, args.tokens_per_micro_batch))
    batch = remember(student, teacher, list(itertools.chain(*minibatches)))
    if batch["median"] and not student.medians.all():
        student.medians[student.medians.count_nonzero()] = batch["median"]
    stats, norms = [], []
    for micros in minibatches:
        optimizer.zero_grad()
        stats += backward(ddp, teacher, optimizer, micros)
        check_engine(stats, student.device)
        norms.append(optimizer.step(lr, max_norm=1.0))  # Table 8
    total = {key: sum(s[key] for s in stats) for key in ("loss", "tokens", "gap", "clipped")}
    updates, tokens = sum(map(math.isfinite, norms)), max(1, total["tokens"])
    return dict(loss=total["loss"] / max(1, len(norms)), grad_norm=sum(norms) / max(1, len(norms)),
                teacher_entropy=batch["median"], gate=batch["gate"],
                mismatch=total["gap"] / tokens, clipped=total["clipped"] / tokens,
                mismatch_max=max((s["gap_max"] for s in stats), default=0.0),
                updates=updates, skipped=len(norms) - updates, trained_tokens=total["tokens"])

# --- run -----------------------------------------------------------------------------------------

def main():
    args = parse_args()
    check_args(args)
    tokenizer, _ = load_tokenizer(args.model, args.max_prompt_tokens + args.max_response_tokens)
    questions = choose_questions(with_prompts(args.data, tokenizer, args), args.num_questions,
                                 args.seed)
    check_teacher(questions, tokenizer, args)
    benchmarks = {Path(s).stem: with_prompts(s, tokenizer, args) for s in args.eval_data}
    device = start_process_group()
    begin_run(args)
    llm = make_engine(args, device)
    say(f"{args.model} loads")
    model, teacher = load_model(args.model, device), load_model(args.model, device)
    compile_layers([model, teacher], device)
    if args.recompute_layers:
        model.train().gradient_checkpointing_enable(dict(use_reentrant=False))
    optimizer = MasterAdamW(model.named_parameters(), "cpu" if args.offload_optimizer else device,
                            lr=args.lr, weight_decay=0.01)  # Table 8
    ddp = DistributedDataParallel(Student(model, args, device), gradient_as_bucket_view=True,
                                  broadcast_buffers=False)
    averaged = [t.detach().to("cpu", torch.float32, copy=True) for t in teacher.parameters()
                if args.ema]
    state = {**optimizer.tensors(), **{f"teacher.{i}": mean for i, mean in enumerate(averaged)},
             "medians": ddp.module.medians}
    done = load_checkpoint(args.run_dir, state)  # steps that are done
    optimizer.write_weights()
    rank, share = dist.get_rank(), args.questions_per_step // dist.get_world_size()
    stream = question_stream(questions, args.seed)
    stream = itertools.islice(stream, done * args.questions_per_step, None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    with Verifier() as verifier:
        for step in range(done + 1, args.steps + 2):  # in the last turn nothing but an evaluation
            times = [("start", time.time())]
            # vLLM gets the weights, and the memory that only an update needs
            optimizer.free_gradients()
            for t in teacher.parameters():
                t.data = t.data.new_empty(0)
            sync_weights(llm, model)
            times.append(("sync", time.time()))
            if done % args.eval_every == 0 or done == args.steps:
                evaluate(llm, verifier, benchmarks, done, args)
                times.append(("eval", time.time()))
            if done == args.steps:
                break
            # rollouts, rewards, demonstrations: each rank its questions, then all rollouts to all
            batch = list(itertools.islice(stream, args.questions_per_step))
            mine = batch[rank * share : (rank + 1) * share]
            rollouts = exchange(until_stopped(
                sample_groups, llm, verifier, tokenizer, mine, rank * share, step, args))
            if any(exchange([stop["asked"]])):  # a signal has reached some rank: all hear the same
                if done:
                    save_checkpoint(model, tokenizer, done, state, args.run_dir)
                say(f"stopped after step {done}: the same command with --resume goes on")
                break
            times.append(("rollout", time.time()))
            # the loss, AdamW, the teacher
            sleep(llm)
            load_teacher(teacher, averaged, args, device)
            lr = args.lr * min(1, step / max(1, args.warmup_steps))
            metrics = update(ddp, teacher, optimizer, rollouts, lr)
            follow(averaged, model, args.ema)  # once a step, after all its updates
            times.append(("update", time.time()))
            if rank == 0:
                log(args, step, rollouts, dict(metrics, lr=lr), times)
            done = step
            if step % args.save_every == 0 or step == args.steps:
                save_checkpoint(model, tokenizer, step, state, args.run_dir)
    del ddp  # freed after the group is gone, it can hang (gloo, torch 2.13)
    llm.llm_engine.engine_core.shutdown()  # left open, it prints tracebacks at exit
    if dist.is_initialized():
        dist.destroy_process_group()

# --- evaluation and logging (from here on nothing of the paper: what a long run needs) ------------

def record(r, **more):
    """A rollout as a line of a file that epistemic.py and report.py read."""
    return epistemic.record(r.text, r.reward, len(r.response_ids), r.finished, **more)

def evaluate(llm, verifier, benchmarks, step, args):
    """Averages on every benchmark, into eval/step_N.json, and every answer, into step_N.jsonl."""
    rank, folder = dist.get_rank(), Path(args.run_dir) / "eval"
    asked = [dict(q, benchmark=name, index=i)
             for name, questions in benchmarks.items() for i, q in enumerate(questions)]
    mine = asked[rank :: dist.get_world_size()]
    # the authors' sampling for this; Table 11 adds top-k 20 after training
    groups = generate(llm, mine, args.eval_rollouts, args.seed + rank, args.max_response_tokens,
                      temperature=0.6, top_p=0.95)
    rollouts = grade(verifier, groups, mine, after_think=True)
    records = exchange([record(r, benchmark=mine[r.row]["benchmark"], index=mine[r.row]["index"],
                               answer=mine[r.row]["answer"]) for r in rollouts])
    summary = {name: epistemic.averages([r for r in records if r["benchmark"] == name])
               for name in benchmarks}
    for name, means in summary.items():
        say(f"  eval {name:10s} {epistemic.line(means)}")
    if rank == 0:
        records.sort(key=lambda r: (r["benchmark"], r["index"]))
        write_lines(folder / f"step_{step}.jsonl", records)
        write_lines(folder / f"step_{step}.json", [summary])
    return summary

def log(args, step, rollouts, metrics, times):
    """A line of metrics.jsonl, one on the screen, and the step's first 64 texts.

    times: [(phase, when it ended)]. peak_memory_gb: the most that torch has taken so far.
    """
    run_dir, records = Path(args.run_dir), [record(r, row=r.row) for r in rollouts]
    seconds = {phase: end - start for (_, start), (phase, end) in itertools.pairwise(times)}
    speed = sum(r["tokens"] for r in records) / (seconds["rollout"] + seconds["update"])
    memory = (torch.cuda.max_memory_reserved() if torch.cuda.is_available() else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    m = dict(step=step, **epistemic.averages(records), **metrics, seconds=seconds,
             trained=sum(r.weight > 0 for r in rollouts) / len(rollouts),
             tokens_per_second=speed, peak_memory_gb=memory / 1e9)
    with open(run_dir / "metrics.jsonl", "a") as f:
        f.write(json.dumps(m) + "\n")
    if args.wandb:
        import wandb
        wandb.log(m, step=step)
    write_lines(run_dir / f"rollouts/step_{step}.jsonl", records[:64])
    result = f"loss {m['loss']:.4f}" if m["trained"] else "nothing to learn from"
    result += "  gradient not finite: update skipped" if m["skipped"] else ""
    phases = "  ".join(f"{phase} {s:.1f} s" for phase, s in seconds.items())
    say(f"step {step:3d}  {epistemic.line(m)}  {result}  | {phases} | {speed:,.0f} tok/s")

# --- vLLM ----------------------------------------------------------------------------------------

DTYPE = dict(cpu=torch.float32, cuda=torch.bfloat16)  # of weights, gradients, vLLM

def make_engine(args, device):
    """vLLM in this very process, one engine a rank: its weights are handed over in memory.

    So it reads none itself. On CPU it packs them, and handing over again would miss a head that is
    tied to the embeddings (0.2 off in log-probability, silently): there it gets a head of its own.
    """
    cpu = device.type == "cpu"
    say("vLLM starts" + ("" if cpu else ": it measures its memory and captures CUDA graphs, 2 min"))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # of what it says before it reads that
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else vLLM leaves one
    from vllm import LLM
    llm = LLM(args.model, dtype=DTYPE[device.type], seed=args.seed, enforce_eager=cpu,
              max_model_len=args.max_prompt_tokens + args.max_response_tokens,
              max_num_seqs=256,  # 1,024 by default: GPU memory for nothing
              gpu_memory_utilization=args.gpu_memory_utilization,
              kv_cache_memory_bytes=2 * 2**30 if cpu else None,
              distributed_executor_backend="external_launcher",
              logprobs_mode="processed_logprobs",  # of what is sampled from: after temperature
              load_format="dummy", use_tqdm_on_load=False, enable_sleep_mode=not cpu,
              hf_overrides=dict(tie_word_embeddings=False) if cpu else None)
    sleep(llm)
    return llm

def sleep(llm):
    """vLLM's memory for the trainer: the KV cache freed, the weights dropped, not copied."""
    if torch.cuda.is_available():
        llm.sleep(level=2)

def sync_weights(llm, model):
    """Wakes vLLM with the trainer's weights, in place. Cached prefixes belong to the old ones."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the update's tensors left with torch's allocator
        llm.wake_up(tags=["weights"])
    weights = ((name, p.detach()) for name, p in model.named_parameters(remove_duplicate=False))
    llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
    if torch.cuda.is_available():
        llm.wake_up(tags=["kv_cache"])
    llm.reset_prefix_cache()

def check_engine(stats, device):
    """Ends the run if vLLM samples from other weights than the trainer's: they are stale.

    Measured means of |log p_vllm - log p_trainer|: 1e-6 in float32, 0.2 where the engine kept a
    stale head (tied embeddings on CPU). bfloat16 rounds to about 1e-2, random weights to 0.06.
    """
    limit = 1e-3 if device.type == "cpu" else 0.1
    mismatch = sum(s["gap"] for s in stats) / sum(s["tokens"] for s in stats)
    if mismatch > limit:  # a NaN is not vLLM's fault: that update is skipped
        sys.exit(f"error: vLLM's log-probabilities are {mismatch:.3g} a token away from the "
                 f"trainer's (limit {limit}): its weights are stale. This update was not made.")

# --- memory --------------------------------------------------------------------------------------

def load_model(name, device):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(name, dtype=DTYPE[device.type]).to(device)

def compile_layers(models, device):
    """On a GPU: an update takes 1.3 to 1.55 times less."""
    if device.type == "cuda":
        say("the first update compiles the layers, 1 to 2 min")
        # one code for all layers: student's and teacher's are eight graphs, and eight are the limit
        torch._dynamo.config.recompile_limit = 64
        for layer in (layer for model in models for layer in model.get_decoder().layers):
            layer.compile(dynamic=True)

def load_teacher(teacher, averaged, args, device):
    """The teacher's weights: the initial ones, for ever (Sec. 5.4), or with --ema their average.

    They are there during the update alone: while vLLM samples, the KV cache wants the memory.
    """
    for t, w in zip(teacher.parameters(), averaged or load_model(args.model, device).parameters()):
        t.data = w.detach().to(device, t.dtype)

def follow(averaged, student, ema):
    """Moves the teacher's average by `ema` towards the student, in float32 and in CPU memory."""
    for mean, s in zip(averaged, student.parameters()):
        mean.lerp_(s.detach().to(mean), ema)

class MasterAdamW(torch.optim.AdamW):
    """AdamW of bfloat16 weights by way of float32 masters; every tensor has one rank as its owner.

    A step of 1e-6 is a hundredth of bfloat16's spacing at a weight of 0.02: by itself such a weight
    never moves. Its master does, and the weight is the master's rounding. Bytes a parameter: on
    every GPU 2 of weight and 2 of gradient; at the owner, on its GPU or in CPU memory, 4 of master,
    8 of moments and 2 of gradient (ZeRO stage 1). Qwen3-8B: 33 GB on every GPU and 115 GB in all.
    """

    def __init__(self, named_weights, device, **settings):
        names, self.weights = zip(*named_weights)
        load, self.owner = [0] * dist.get_world_size(), {}
        for i in sorted(range(len(names)), key=lambda i: -self.weights[i].numel()):
            self.owner[i] = load.index(min(load))
            load[self.owner[i]] += self.weights[i].numel()
        owned = [i for i in range(len(names)) if self.owner[i] == dist.get_rank()]
        self.names, self.owned = [names[i] for i in owned], [self.weights[i] for i in owned]
        masters = [w.detach().to(device, torch.float32, copy=True) for w in self.owned]
        self.sums = [torch.zeros_like(w, device=device) for w in self.owned]
        super().__init__(masters, fused=True, **settings)
        for m in masters:  # as AdamW would in its first step; a checkpoint loads into them
            self.state[m] = dict(step=torch.zeros((), device=m.device),
                                 exp_avg=torch.zeros_like(m), exp_avg_sq=torch.zeros_like(m))
        # one tensor's: in float32, and, pinned, between GPU and CPU
        size, dtype = max(m.numel() for m in masters), self.weights[0].dtype
        self.gradient = torch.empty(size, device=device)
        self.staging = torch.empty(size, dtype=dtype, device=device, pin_memory=(
            self.weights[0].is_cuda and not masters[0].is_cuda))
        # Gradients are there before DDP, which makes them views of its buckets, and stay. Set to
        # None, what no_sync adds up would lie beside the buckets, Qwen3-8B's in 16 GB.
        for w in self.weights:
            w.grad = torch.zeros_like(w)
        self.freed = []

    def tensors(self):
        """{name: tensor} of what this rank alone holds, for a checkpoint."""
        return {f"{name}.{key}": tensor
                for name, m in zip(self.names, self.param_groups[0]["params"], strict=True)
                for key, tensor in dict(self.state[m], master=m.detach()).items()}

    def free_gradients(self):
        """For vLLM's KV cache: DDP's buckets, whose views they are, lose their bytes."""
        for storage in (w.grad.untyped_storage() for w in self.weights):
            if storage.nbytes():
                self.freed.append((storage, storage.nbytes()))
                storage.resize_(0)

    def zero_grad(self):
        """Gradients and sums of 0; what free_gradients gave away comes back."""
        while self.freed:
            storage, size = self.freed.pop()
            storage.resize_(size)
        torch._foreach_zero_([*self.sums, *(w.grad for w in self.weights)])

    @torch.no_grad()
    def fold(self):
        """Ends a round of micro-batches: their gradient goes from the weights to their owners.

        A sum of sums, because bfloat16 has 8 bits: a term below a 512th of what is there adds
        nothing. 683 added one by one came out 18% off, in rounds of 32 0.7% (benchmarks/NOTES.md).
        """
        for weight, total in zip(self.owned, self.sums):
            total += self.staging[: weight.numel()].view_as(weight).copy_(weight.grad)
        torch._foreach_zero_([w.grad for w in self.weights])

    @torch.no_grad()
    def step(self, lr, max_norm):
        """Clips the gradient and steps, unless it is infinite or undefined; returns its norm.

        Tensor by tensor: the gradient is never whole in float32. Its norm in pieces: on CPU the
        norm of 3e8 float32 in one comes out 4% low (benchmarks/NOTES.md).
        """
        pieces = [piece for total in self.sums for piece in total.flatten().split(2**18)]
        square = torch.stack(torch._foreach_norm(pieces, dtype=torch.float32)).square().sum()
        dist.all_reduce(square)
        norm = square.sqrt().item()
        self.param_groups[0]["lr"] = lr
        for total, master in zip(self.sums, self.param_groups[0]["params"]):
            if math.isfinite(norm):
                master.grad = self.gradient[: total.numel()].view_as(total).copy_(total)
                master.grad *= min(1.0, max_norm / (norm + 1e-6))
                super().step()
                master.grad = None
        self.write_weights()
        return norm

    @torch.no_grad()
    def write_weights(self):
        """The masters' rounding into the weights, on every rank."""
        for weight, master in zip(self.owned, self.param_groups[0]["params"]):
            weight.copy_(self.staging[: weight.numel()].view_as(weight).copy_(master))
        for i, weight in enumerate(self.weights):
            dist.broadcast(weight.detach(), self.owner[i])

# --- checkpoints ---------------------------------------------------------------------------------

def with_flags_of_the_run(parser, argv):
    """The flags. Those of a resumed run come from its config.json, unless given differently."""
    args = parser.parse_args(argv)
    config = Path(args.run_dir) / "config.json"
    if args.resume and config.exists():
        began = json.loads(config.read_text())
        parser.set_defaults(**{name: began[name] for name in vars(args) if name in began})
        args = parser.parse_args(argv)
        for name, value in vars(args).items():
            if name != "resume" and began.get(name, value) != value:
                say(f"--{name} {value}: the run began with {began[name]}")
    return args

def begin_run(args):
    """A new run's new folder, with its config.json: every flag, versions, commit."""
    import transformers
    transformers.logging.disable_progress_bar()
    run_dir = Path(args.run_dir)
    if dist.get_rank() == 0:
        if not args.resume and run_dir.exists() and (run_dir.is_file() or any(run_dir.iterdir())):
            fail(f"--run_dir {run_dir} already holds results: name another folder, remove it, or "
                 f"go on with --resume")
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                                capture_output=True, text=True).stdout.strip()
        versions = dict(torch=torch.__version__, transformers=transformers.__version__)
        if args.wandb:
            try:
                import wandb
                wandb.init(name=args.run_dir, config=vars(args))
            except Exception as error:  # not installed, not logged in: no common class
                fail(f"--wandb: {reason(error)}")
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_lines(run_dir / "config.json", [dict(
                vars(args), script=Path(__file__).name, commit=commit, versions=versions,
                world_size=dist.get_world_size())])
        except OSError as error:
            fail(f"--run_dir {run_dir}: {error}")
    dist.barrier()

def write_lines(path, rows):
    """JSON Lines, written aside and renamed, so that a reader never finds half a file."""
    path.parent.mkdir(exist_ok=True)  # of a run whose folder is gone, nothing is begun anew
    aside = path.with_name(path.name + ".part")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.rename(path)

def save_checkpoint(model, tokenizer, step, state, run_dir):
    """A Hugging Face folder with the trainer's state in it, whole or not there at all.

    The weights of every checkpoint stay, for evaluate.py; of the state, seven times as large, two.
    """
    folder = Path(run_dir) / f"checkpoints/step_{step}"
    aside = folder.with_name(folder.name + ".part")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)  # of a killed run
        model.save_pretrained(aside, max_shard_size="4GB")  # a shard goes through CPU memory
        tokenizer.save_pretrained(aside)
        shutil.copy(folder.parents[1] / "metrics.jsonl", aside)
    dist.barrier()
    dcp.save(state, checkpoint_id=aside / "trainer_state")
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # one that did not load
        aside.rename(folder)
        for old in resumable(run_dir)[2:]:
            shutil.rmtree(old / "trainer_state")

def resumable(run_dir):
    """The checkpoints that hold the trainer's state, newest first."""
    found = [p.parents[1] for p in Path(run_dir).glob("checkpoints/step_*/trainer_state/.metadata")]
    return sorted((p for p in found if p.suffix != ".part"), key=lambda p: -int(p.name[5:]))

def load_checkpoint(run_dir, state):
    """Fills the tensors of `state` from the newest checkpoint that loads; its step, 0 for none.

    Whatever the number of ranks that wrote it: torch finds each tensor by its name. No random
    numbers are kept: all are drawn from (seed, step, row), and the data order from (seed, step).
    """
    metrics, folders = Path(run_dir) / "metrics.jsonl", exchange([resumable(run_dir)])[0]
    for folder in folders:
        try:
            dcp.load(state, checkpoint_id=folder / "trainer_state")
        except dcp.api.CheckpointException as error:
            say(f"{folder} does not load ({reason(error)}): the one before it is used")
            continue
        if dist.get_rank() == 0:
            shutil.copy(folder / metrics.name, metrics)  # what came after it comes again
        say(f"{run_dir}: goes on after {folder.name}")
        return int(folder.name[5:])
    if folders:
        sys.exit(f"error: no checkpoint in {run_dir} loads: begin anew in another folder")
    metrics.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
    return 0

def reason(error):
    """What went wrong in reading or writing, as one line."""
    if isinstance(error, dcp.api.CheckpointException):  # {rank: (its error, traceback)}
        error = next(iter(error.failures.values()))[0]
    return " ".join(f"{error!r}".split())[:300]

# --- processes -----------------------------------------------------------------------------------

def say(message):
    """A line on the screen, from the first rank alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, flush=True)

def fail(message):
    """Bad input: one line and exit code 2. From the first rank at once, and torchrun ends the
    others; where only another rank fails, it is heard two seconds later."""
    if int(os.environ.get("RANK", 0)):
        time.sleep(2)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def load_tokenizer(model, longest):
    """(tokenizer, config) of a model: what can be wrong with it shows before any weights load."""
    from transformers import AutoConfig, AutoTokenizer
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # missing, or a config.json that contradicts itself: no common class
        fail(f"--model {model}: no model folder, and no model on the hub "
             f"({str(error).strip().splitlines()[0]})")
    if tokenizer.chat_template is None:
        fail(f"--model {model}: its tokenizer has no chat template")
    if len(tokenizer) > config.vocab_size:
        fail(f"--model {model}: the tokenizer has {len(tokenizer):,} tokens and the model "
             f"{config.vocab_size:,}: they do not belong together")
    if longest > config.max_position_embeddings:
        fail(f"--max_prompt_tokens and --max_response_tokens: together {longest:,}, more than the "
             f"{config.max_position_embeddings:,} positions of {model}")
    return tokenizer, config

def start_process_group():
    """torchrun's group, or under plain python one of a single process; returns its device."""
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items():
        os.environ.setdefault(name, str(value))
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # AdamW in CPU memory wants its share of the cores, of which torchrun leaves it one
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    # a rank may wait for another's rollouts of 20,000 tokens longer than the usual half hour
    dist.init_process_group(backend, timeout=timedelta(hours=6), **alone)
    return device

def exchange(items):
    """Every rank's list, joined in the order of the ranks."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]

stop = dict(asked=False, sampling=False)  # has SIGTERM or Ctrl-C come; may it break off what runs?

def on_signal(*_):
    """The first signal breaks off the sampling; any other phase comes to its end."""
    first, stop["asked"] = not stop["asked"], True
    if first and stop["sampling"]:
        raise KeyboardInterrupt

def until_stopped(sample, *args):
    """sample(*args), or nothing if a signal comes first; only where no rank waits for another."""
    try:
        stop["sampling"] = True
        return [] if stop["asked"] else sample(*args)
    except KeyboardInterrupt:
        return []
    finally:
        stop["sampling"] = False

if __name__ == "__main__":
    try:
        main()
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:  # a full disk, mostly
        sys.exit(f"error: {reason(error)}; checkpoints are whole: --resume goes on from the newest")
