"""SDPO, on-policy self-distillation: Sec. 5, Eq. 1 and Table 10 of the paper.

The model teaches itself. One step:
  1. the student answers each question x with a group of n rollouts y (vLLM)
  2. the verifier grades every rollout: reward 1 if correct, else 0
  3. a correct sibling of y is its demonstration c; the teacher (the initial weights, with c in the
     prompt) scores the same tokens y
  4. loss per token: JS( student(. | x, y_<t)  ||  teacher(. | x, c, y_<t) )
  5. AdamW; vLLM gets the new weights

    torchrun --nproc_per_node 8 sdpo.py --model Qwen/Qwen3-8B       # the paper's run, Figure 4

The same command again resumes the run in --run_dir from its newest checkpoint.

What Eq. 1 does not show, all as in the authors' code (5c51051 of
github.com/beanie00/self-distillation-analysis):
  - the divergence is Jensen-Shannon (alpha 0.5) over the student's top 100 tokens and one bucket
    for all others, not KL over the vocabulary
  - c is another rollout of the same group, never the data's solution; the reward only decides which
    rollouts may be demonstrations
  - the loss is the mean over sequences of each one's mean over tokens; a rollout without a correct
    sibling adds 0 to it and counts
  - two importance weights, each at most 2: p of the trainer / p of vLLM, p now / p at step's start
Unlike their code: c is a random one of the correct siblings that finished (theirs: the next in
order), and warm-up starts at a tenth of the rate (theirs: 0).

Watch: length and epistemic fall early; score drops and recovers in part; the damage shows in the
out-of-distribution evaluation (eval/). `trained` is the share of rollouts with a demonstration;
`mismatch`, trainer against vLLM, stays flat: 1e-6 in float32, 1e-2 in bfloat16.
"""
import argparse
import fcntl
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
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import epistemic
from verifier import Verifier, load_questions

# --- arguments -----------------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """A type for argparse: an int or a float from low to high."""
    def number(text):
        if not low <= kind(text) <= high:  # refuses nan, too
            raise argparse.ArgumentTypeError(f"{text} does not lie between {low} and {high}")
        return kind(text)
    return number

def make_parser():
    parser = argparse.ArgumentParser(
        description="SDPO (Sec. 5). The defaults are the paper's run; (ours) marks the others.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, usage=argparse.SUPPRESS)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    count, share = number(int, 1), number(float, 0, 1)
    add("--model", required=True, help="hub id or Hugging Face folder")
    add("--data", default="dapo", help="dapo, a hub id, or a .parquet, .json or .jsonl file")
    add("--num_questions", type=count, help="|D| of Sec. 6.2, drawn by --seed; default: all")
    add("--enable_thinking", action=switch, default=True, help="for Qwen3's chat template")
    add("--questions_per_step", type=count, default=256, help="Table 8; Sec. 6.2: 64")
    add("--rollouts", type=number(int, 2), default=8, help="answers to each question: a group")
    add("--temperature", type=number(float, 0.01), default=1.0, help="of sampling and of the loss")
    add("--max_prompt_tokens", type=count, default=2048, help="longer prompts are dropped")
    add("--max_response_tokens", type=count, default=20480, help="longer answers are cut")
    add("--alpha", type=share, default=0.5, help="0.5: Jensen-Shannon; 1: Eq. 1; 0: its reverse")
    add("--top_k", type=count, default=100, help="the student's most likely tokens; App. G: 256")
    add("--demonstration", choices=["full", "without_think", "uncertain"], default="full",
        help="c: the answer s; s without its think part; s and App. C's request for uncertainty")
    add("--ema", type=share, default=0.0, help="rate of a moving-average teacher; Sec. 5.4: 0.05")
    add("--steps", type=count, default=100, help="of rollout and update (authors' code)")
    add("--minibatch_questions", type=count, default=128, help="per optimizer step; Sec. 6.2: 32")
    add("--lr", type=share, default=1e-5, help="learning rate, constant after the warm-up")
    add("--warmup_steps", type=number(int, 0), default=10, help="steps of linear warm-up")
    add("--tokens_per_micro_batch", type=count, default=24576, help="(ours) padding included")
    add("--recompute_layers", action=switch, default=True, help="(ours) without: faster, bigger")
    add("--gpu_memory_utilization", type=number(float, 0.01, 1), default=0.7,
        help="(ours) vLLM's while it samples")
    add("--run_dir", default="runs/sdpo", help="a new folder, or a run to resume")
    add("--seed", type=number(int, 0), default=0, help="of data order, rollouts, demonstrations")
    add("--eval_data", nargs="*", default=["aime24"], help="or aime25 amc23 math500, ids, files")
    add("--save_every", type=count, default=10, help="steps between checkpoints with evaluation")
    add("--wandb", action="store_true", help="metrics to Weights & Biases, too")
    return parser

def check_args(args):
    for parts in (args.minibatch_questions, int(os.environ.get("WORLD_SIZE", 1))):
        if args.questions_per_step % parts:
            raise ValueError(f"--questions_per_step {args.questions_per_step} is not divisible by "
                             f"{parts} (it must be by --minibatch_questions and by the ranks)")
    if len({Path(source).stem for source in args.eval_data}) < len(args.eval_data):
        raise ValueError(f"--eval_data: two benchmarks have one name ({' '.join(args.eval_data)})")

# --- prompts -------------------------------------------------------------------------------------

def render(tokenizer, messages, enable_thinking):
    """Token ids of a chat up to where the answer begins (Table 12); the template writes any BOS.

    A control token in a message, such as <|im_end|>, is broken by a space, so that it stays text.
    Not <think>: a demonstration needs it.
    """
    control = "|".join(re.escape(t.content) for t in tokenizer.added_tokens_decoder.values()
                       if t.special or re.search("[|｜]", t.content))
    messages = [dict(m, content=re.sub(control or "(?!)", lambda t: f"{t[0][0]} {t[0][1:]}",
                                       m["content"])) for m in messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                         enable_thinking=enable_thinking)
    return tokenizer.encode(text, add_special_tokens=False)

def read_questions(source, tokenizer, args):
    """load_questions, each with its prompt_ids; drops prompts over --max_prompt_tokens."""
    questions = load_questions(source)
    for q in questions:
        q["prompt_ids"] = render(tokenizer, q["messages"], args.enable_thinking)
    kept = [q for q in questions if len(q["prompt_ids"]) <= args.max_prompt_tokens]
    say(f"{source}: {len(kept):,} of {len(questions):,} prompts fit --max_prompt_tokens")
    if not kept:
        raise ValueError(f"{source}: no prompt fits --max_prompt_tokens {args.max_prompt_tokens}")
    return kept

def choose_questions(questions, args):
    """Sec. 6.2's question set of size |D|: with one seed, a smaller set is part of a larger."""
    if (args.num_questions or 0) > len(questions):
        raise ValueError(f"--num_questions {args.num_questions}: the data has {len(questions):,}")
    return random.Random(args.seed).sample(questions, len(questions))[: args.num_questions]

def question_stream(questions, seed):
    """Endless: shuffled anew every epoch. A small set repeats within a step (Sec. 6.2)."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(questions, len(questions))

CLOSING = "Correctly solve the original question."
CLOSING_UNCERTAIN = (  # App. C, Figure 14
    "Solve the original question from scratch with a full, detailed reasoning trace, without "
    "skipping any steps, and include as much uncertainty or ambiguity in the explanation.")

def teacher_messages(messages, solution, form, heading="\nCorrect solution:\n\n"):
    """The chat with a solution after the question, in the same user message (authors' code).

    form: the "full" solution, "without_think", or full with App. C's "uncertain" closing sentence.
    """
    if form == "without_think":
        solution = re.sub(r"<think>.*?</think>\s*", "", solution, flags=re.S)
        # an answer of DeepSeek-R1-Distill has no <think>: its prompt ends with it
        solution = re.sub(r"^.*?</think>\s*", "", solution, flags=re.S)
    closing = CLOSING_UNCERTAIN if form == "uncertain" else CLOSING
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']}{heading}{solution}\n\n{closing}"}]

# --- loss ----------------------------------------------------------------------------------------

def with_tail(topk_logprobs):
    """(..., k) log-probabilities -> (..., k + 1): the last bucket holds all other tokens."""
    inside = topk_logprobs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)  # else log(0)
    return torch.cat([topk_logprobs, torch.log(-torch.expm1(inside))], dim=-1)

def divergence(student, teacher, alpha):
    """Generalised Jensen-Shannon of two log-distributions, (..., k + 1) -> (...), in nats.

    mixture m = (1 - alpha) student + alpha teacher
    loss      = (1 - alpha) KL(student || m) + alpha KL(teacher || m)

    That is 0 at both ends, so they are defined apart: alpha 0 is KL(teacher || student), alpha 1 is
    KL(student || teacher), Eq. 1. The gradient goes through the student, in m too.
    """
    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)
    if alpha == 0:
        return kl(teacher, student)
    if alpha == 1:
        return kl(student, teacher)
    mixture = torch.logaddexp(student + math.log(1 - alpha), teacher + math.log(alpha))
    return (1 - alpha) * kl(student, mixture) + alpha * kl(teacher, mixture)

CHUNK = 512  # positions at once in the LM head: 512 x 151,936 float32 logits are 0.3 GB

def logprobs_at(hidden, head, ids, temperature):
    """log p of token ids (C, k) after hidden states (C, D), of the full softmax: (C, k) float32."""
    logits = head(hidden).float().div_(temperature)  # (C, V)
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)

@torch.no_grad()
def teacher_buckets(student, teacher, top_k, temperature):
    """The student's top k token ids (N, k); the teacher's log-probabilities of them and of all
    others (N, k + 1). student, teacher: (hidden states (N, D), LM head)."""
    results = []
    for hidden, teacher_hidden in zip(student[0].split(CHUNK), teacher[0].split(CHUNK)):
        logits = student[1](hidden)  # (C, V)
        ids = logits.topk(min(top_k, logits.shape[-1])).indices
        results.append((ids, with_tail(logprobs_at(teacher_hidden, teacher[1], ids, temperature))))
    return tuple(map(torch.cat, zip(*results)))

def token_losses(hidden, head, targets, temperature, ids=None, buckets=None, alpha=None):
    """(divergence, log p(target)) at N positions, (N,) float32 each.

    hidden (N, D) predict targets (N,); ids and buckets are teacher_buckets'. Without them the
    divergence is 0. (N, V) never exists: `checkpoint` drops a chunk's logits after its forward and
    computes them again in backward.
    """
    def chunk(hidden, target, ids=None, buckets=None):
        # one gather for target and top k: the backward of each would hold a (C, V) of its own
        ids = target[:, None] if ids is None else torch.cat([target[:, None], ids], dim=-1)
        logprobs = logprobs_at(hidden, head, ids, temperature)  # (C, 1 + k)
        if buckets is None:
            return torch.zeros_like(logprobs[:, 0]), logprobs[:, 0]
        return divergence(with_tail(logprobs[:, 1:]), buckets, alpha), logprobs[:, 0]
    columns = [column.split(CHUNK) for column in (hidden, targets, ids, buckets)
               if column is not None]
    results = [checkpoint(chunk, *parts, use_reentrant=False) for parts in zip(*columns)]
    return tuple(map(torch.cat, zip(*results)))

def importance_weight(logprobs, old_logprobs):
    """min(p / p_old, 2) per token, detached: truncated importance sampling (Table 9: clip 2)."""
    return (logprobs - old_logprobs).clamp(-20, 20).exp().clamp(max=2.0).detach()

def set_loss_weights(minibatch):
    """Weight of each token: 1 / (sequences x tokens of its sequence); 0 without demonstration."""
    for r in minibatch:
        r.weight = 1 / (len(minibatch) * len(r.response_ids)) if r.teacher_prompt_ids else 0.0

# --- rollout -------------------------------------------------------------------------------------

@dataclass
class Rollout:
    row: int  # of the step's batch: the rollouts of one row are a group
    prompt_ids: list
    response_ids: list  # as vLLM sampled them: text is never encoded again
    logprobs: list  # (T,) vLLM's own, temperature included
    text: str
    finished: bool  # False: cut at --max_response_tokens
    reward: float  # 1 correct, 0 not
    teacher_prompt_ids: list | None = None  # None: no correct sibling, so no teacher
    weight: float = 0.0  # of each of its tokens in the loss
    old_logprobs: torch.Tensor | None = None  # (T,) the trainer's at the step's start

    def tokens(self):
        """Length of the longest sequence that is computed for it."""
        prompt = max(len(self.prompt_ids), len(self.teacher_prompt_ids or []))
        return prompt + len(self.response_ids)

def choose_demonstration(group, i, rng):
    """A correct sibling of rollout i, never i itself, at random; None if there is none."""
    siblings = [r for j, r in enumerate(group) if r.reward >= 0.5 and j != i]
    return rng.choice(siblings) if siblings else None

def set_teacher_prompts(question, group, tokenizer, rng, args):
    """The prompt of each rollout's teacher: the question with the demonstration."""
    for i, r in enumerate(group):
        sibling = choose_demonstration(group, i, rng)
        if sibling:
            messages = teacher_messages(question["messages"], sibling.text, args.demonstration)
            r.teacher_prompt_ids = render(tokenizer, messages, args.enable_thinking)

def sample_groups(llm, verifier, tokenizer, questions, step, args):
    """The step's graded rollouts, each with its teacher's prompt. Each rank samples its share."""
    share = len(questions) // dist.get_world_size()
    first_row, rollouts = dist.get_rank() * share, []
    mine = questions[first_row : first_row + share]
    groups = generate(llm, verifier, mine, hash((args.seed, step, first_row)) % 2**31,
                      n=args.rollouts, temperature=args.temperature,
                      max_tokens=args.max_response_tokens, logprobs=0, flat_logprobs=True)
    for row, (question, outputs) in enumerate(zip(mine, groups), first_row):
        group = [Rollout(row, question["prompt_ids"], list(o.token_ids), o.logprobs.logprobs,
                         o.text, o.finish_reason == "stop", o.reward) for o in outputs]
        for r in group:
            r.reward *= r.finished  # a cut answer earns nothing, whatever it has boxed
        rng = random.Random(f"{args.seed}/{step}/{row}")  # the same draws with any number of ranks
        set_teacher_prompts(question, group, tokenizer, rng, args)
        rollouts += group
    return exchange(rollouts)

# --- update --------------------------------------------------------------------------------------

def my_micro_batches(rollouts, token_budget):
    """This rank's micro-batches: similar lengths together, as many as fit the budget once padded.

    A rank takes every world_size-th, so that all have similar lengths. DDP needs the same number on
    each: the last ranks may get a copy with weight 0.
    """
    batches, ranks = [], dist.get_world_size()
    for r in sorted(rollouts, key=lambda r: r.tokens()):
        if batches and (len(batches[-1]) + 1) * r.tokens() <= token_budget:
            batches[-1].append(r)
        else:
            batches.append([r])
    batches += [[replace(batches[0][0], weight=0.0)]] * (-len(batches) % ranks)
    return batches[dist.get_rank() :: ranks]

def split_into_minibatches(rollouts, args):
    """This rank's micro-batches of each mini-batch; rollouts without a loss are left out."""
    minibatches = []
    for first in range(0, args.questions_per_step, args.minibatch_questions):
        minibatch = [r for r in rollouts if first <= r.row < first + args.minibatch_questions]
        set_loss_weights(minibatch)
        trained = [r for r in minibatch if r.weight]
        if trained:
            minibatches.append(my_micro_batches(trained, args.tokens_per_micro_batch))
    return minibatches

def response_hidden(model, prompts, responses):
    """Last hidden states that predict the response tokens, (N, D), sequence by sequence.

    Padded on the right, without an attention mask: causal attention keeps real tokens from seeing
    the padding after them, and the fast kernel applies.
    """
    sequences = [torch.tensor([*p, *y]) for p, y in zip(prompts, responses)]
    ids = pad_sequence(sequences, batch_first=True).to(model.device)  # (B, T)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    return torch.cat([h[len(p) - 1 : len(p) + len(y) - 1]  # position t predicts token t + 1
                      for h, p, y in zip(hidden, prompts, responses)])

class Student(torch.nn.Module):
    """What DDP wraps: backbone, LM head and loss in one forward, so that its hooks see them all."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, micro_batch, teacher=None):
        """(divergence, log-probability) of a micro-batch's response tokens, (N,) each."""
        args, responses, buckets = self.args, [r.response_ids for r in micro_batch], []
        if teacher is not None:
            with torch.no_grad():
                prompts = [r.teacher_prompt_ids for r in micro_batch]
                teacher_hidden = response_hidden(teacher, prompts, responses)
        hidden = response_hidden(self.model, [r.prompt_ids for r in micro_batch], responses)
        head = self.model.get_output_embeddings()
        if teacher is not None:
            teacher = (teacher_hidden, teacher.get_output_embeddings())
            buckets = teacher_buckets((hidden, head), teacher, args.top_k, args.temperature)
        targets = torch.tensor([t for y in responses for t in y], device=hidden.device)
        return token_losses(hidden, head, targets, args.temperature, *buckets, alpha=args.alpha)

def remember_logprobs(student, micros):
    """Sets old_logprobs: the trainer's log-probabilities under the weights as they are now."""
    for micro_batch in micros:
        with torch.no_grad():
            _, logprobs = student(micro_batch)
        for r, part in zip(micro_batch, logprobs.split([len(r.response_ids) for r in micro_batch])):
            r.old_logprobs = part

# Micro-batches between two all-reduces. bfloat16 has 8 bits: the gradients of 683 micro-batches
# added one by one came out 18% wrong, in rounds of 32 0.7% (benchmarks/README.md).
ROUND = 32

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # weights, gradients, vLLM
# Mean |log p_vllm - log p_trainer| a token, measured: 1e-6 in float32; 1e-2 in bfloat16, there with
# random weights 0.06; where vLLM kept an old LM head 0.2.
MISMATCH_LIMIT = 1e-3 if DTYPE == torch.float32 else 0.1

def update(ddp, teacher, optimizer, rollouts, lr):
    """One optimizer step a mini-batch; returns the metrics. Every rank holds all rollouts.

    A token has three log-probabilities: vLLM's, when it sampled; `old`, the trainer's at the step's
    start, under the same weights; and the trainer's now.
    """
    args, device = ddp.module.args, ddp.module.model.device
    minibatches = split_into_minibatches(rollouts, args)
    # the first update starts from the step's own weights; for later ones its log-probabilities stay
    remember_logprobs(ddp.module, itertools.chain(*minibatches[1:]))
    norms, mismatch_max = [], torch.zeros((), device=device)
    sums = torch.zeros(4, dtype=torch.float64)  # of all ranks: loss, tokens, mismatch, clipped
    bar = progress(total=sum(map(len, minibatches)), desc="update", unit="micro-batch")
    for micros in minibatches:
        mine = torch.zeros_like(sums, device=device)
        for i, micro_batch in enumerate(micros, 1):
            vllm = torch.tensor([p for r in micro_batch for p in r.logprobs], device=device)
            weight = torch.tensor([r.weight for r in micro_batch for _ in r.logprobs]).to(device)
            ddp.require_backward_grad_sync = i % ROUND == 0 or i == len(micros)
            loss, logprobs = ddp(micro_batch, teacher)  # (N,) each
            old = [r.old_logprobs for r in micro_batch]
            old = logprobs.detach() if old[0] is None else torch.cat(old)
            ratio, correction = importance_weight(logprobs, old), importance_weight(old, vllm)
            loss = (loss * ratio * correction * weight).sum()
            (loss * dist.get_world_size()).backward()  # DDP takes the mean over ranks, not the sum
            if ddp.require_backward_grad_sync:
                optimizer.add_gradients()
            counts, gap = weight > 0, (old - vllm).abs() * (weight > 0)
            clipped = counts & (torch.maximum(ratio, correction) >= 2)
            mine += torch.stack([loss.detach().double(), counts.sum(), gap.sum(), clipped.sum()])
            mismatch_max = torch.maximum(mismatch_max, gap.max())
            bar.update()
        dist.all_reduce(mine)
        sums += mine.cpu()
        if sums[2] > MISMATCH_LIMIT * sums[1]:
            sys.exit(f"error: vLLM's log-probabilities are {sums[2] / sums[1]:.3g} a token off the "
                     "trainer's: has it old weights? This update was not made.")
        norms.append(optimizer.step(lr, max_norm=1.0))  # Table 8
    bar.close()
    dist.all_reduce(mismatch_max, dist.ReduceOp.MAX)
    (loss, tokens, mismatch, clipped), n = sums.tolist(), len(norms) or 1
    # torch's own peak on a GPU would count the memory that vLLM has given back
    unused, memory = torch.cuda.mem_get_info() if device.type == "cuda" else (
        0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return dict(loss=loss / n, grad_norm=sum(norms) / n, updates=sum(map(math.isfinite, norms)),
                skipped=sum(not math.isfinite(norm) for norm in norms), trained_tokens=int(tokens),
                mismatch=mismatch / (tokens or 1), mismatch_max=mismatch_max.item(),
                clipped=clipped / (tokens or 1), peak_memory_gb=(memory - unused) / 1e9,
                # teacher's sequences longer than the model's positions, as in the authors' code
                beyond=sum(r.tokens() > ddp.module.model.config.max_position_embeddings
                           for r in rollouts),
                trained=sum(r.weight > 0 for r in rollouts) / len(rollouts))

# --- run -----------------------------------------------------------------------------------------

def main():
    parser = make_parser()
    args = parser.parse_args()
    try:  # bad input ends with one line and exit code 2, before a model is loaded
        check_args(args)
        positions = args.max_prompt_tokens + args.max_response_tokens
        path, tokenizer = load_tokenizer(args.model, positions)
        questions = choose_questions(read_questions(args.data, tokenizer, args), args)
        benchmarks = {Path(s).stem: read_questions(s, tokenizer, args) for s in args.eval_data}
        begin_run(args, path)
    except Exception as error:  # what transformers, datasets and Jinja raise has no common class
        parser.error(" ".join(str(error).split()))
    if Path(args.run_dir, f"eval/step_{args.steps}.json").exists():
        return say(f"{args.run_dir} has finished its {args.steps} steps; more --steps continue it")
    device = start_process_group()
    llm = make_engine(path, positions, args, device)
    say(f"{args.model} loads")
    model, teacher = load_model(path, device), load_model(path, device)
    if positions + args.max_response_tokens > (limit := model.config.max_position_embeddings):
        say(f"`beyond` counts the teacher's sequences longer than the model's {limit:,} positions")
    compile_layers(model, teacher)
    if args.recompute_layers:
        model.train().gradient_checkpointing_enable(dict(use_reentrant=False))
    optimizer = MasterAdamW(model, lr=args.lr, weight_decay=0.01)  # Table 8
    averages = {f"{n}.average": m.clone() for n, m in optimizer.masters.items() if args.ema}
    state = {**optimizer.tensors(), **averages}
    done = load_checkpoint(args.run_dir, state)  # steps
    write_weights(optimizer.masters, model)
    stream = question_stream(questions, args.seed)
    stream = itertools.islice(stream, done * args.questions_per_step, None)
    with Verifier() as verifier:
        free(teacher)
        sync_weights(llm, model)
        evaluate(llm, verifier, benchmarks, done, args)
        for step in range(done + 1, args.steps + 1):
            start = time.time()
            # 1. to 3. rollouts, rewards, demonstrations
            batch = list(itertools.islice(stream, args.questions_per_step))
            rollouts = sample_groups(llm, verifier, tokenizer, batch, step, args)
            sampled = time.time()
            # 4. and 5. the loss, AdamW; gradients and teacher take memory only while vLLM sleeps
            sleep(llm)
            ddp = with_gradients(Student(model, args))
            load_teacher(teacher, averages, model, path)
            lr = args.lr * min(1, step / max(1, args.warmup_steps))
            metrics = update(ddp, teacher, optimizer, rollouts, lr)
            for average, master in zip(averages.values(), optimizer.masters.values()):
                average.lerp_(master, args.ema)  # Sec. 5.4: once a step
            del ddp
            free(teacher)
            sync_weights(llm, model)
            log(args, step, rollouts, dict(metrics, lr=lr), dict(
                rollout=sampled - start, update=time.time() - sampled))
            if step % args.save_every == 0 or step == args.steps:
                save_checkpoint(model, tokenizer, step, state, args.run_dir)
                evaluate(llm, verifier, benchmarks, step, args)
    say(f"results are in {args.run_dir}")
    llm.llm_engine.engine_core.shutdown()  # left open, it prints tracebacks at exit
    if dist.is_initialized():
        dist.destroy_process_group()

# --- vLLM (from here on nothing of the paper) ----------------------------------------------------

def make_engine(path, max_model_len, args, device):
    """vLLM in this process, one engine a rank, asleep, without weights: sync_weights brings them.

    On CPU it packs its weights, and a second sync would miss an LM head that is tied to the
    embeddings (log-probabilities wrong by 0.2, no error): there the head is a tensor of its own.
    """
    cpu = device.type == "cpu"
    say("vLLM starts" + ("" if cpu else ": it measures memory and captures CUDA graphs, minutes"))
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # what it logs before it reads that
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else vLLM takes one
    from vllm import LLM
    llm = LLM(path, dtype=DTYPE, seed=args.seed, enforce_eager=cpu, max_model_len=max_model_len,
              max_num_seqs=256,  # its default of 1,024 takes GPU memory and is never reached
              gpu_memory_utilization=args.gpu_memory_utilization,
              kv_cache_memory_bytes=2 * 2**30 if cpu else None,
              distributed_executor_backend="external_launcher",
              logprobs_mode="processed_logprobs",  # after temperature: what is sampled from
              load_format="dummy", use_tqdm_on_load=False, enable_sleep_mode=not cpu,
              hf_overrides=dict(tie_word_embeddings=False) if cpu else None)
    sleep(llm)
    return llm

def sleep(llm):
    """Frees vLLM's KV cache and weights on the GPU, for the trainer."""
    if torch.cuda.is_available():
        llm.sleep(level=2)

def sync_weights(llm, model):
    """Wakes vLLM with the model's weights, written in place; frees gradients for its cache."""
    model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what torch's allocator still holds
        llm.wake_up(tags=["weights"])
    weights = ((name, p.detach()) for name, p in model.named_parameters(remove_duplicate=False))
    llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
    if torch.cuda.is_available():
        llm.wake_up(tags=["kv_cache"])

def generate(llm, verifier, questions, seed, after_think=False, **sampling):
    """vLLM's n answers to each question, with text and reward: groups in the questions' order."""
    from transformers import set_seed
    from vllm import SamplingParams
    # A seed per request crashes on CPU. The global ones repeat bit for bit: vLLM's older model
    # runner draws from torch's, the newer one from NumPy's. Cached prefixes change the last bit.
    set_seed(seed)
    llm.reset_prefix_cache()
    outputs = llm.generate([dict(prompt_token_ids=q["prompt_ids"]) for q in questions],
                           SamplingParams(detokenize=False, **sampling),
                           use_tqdm=dist.get_rank() == 0 and progress)
    answers, decode = [o for output in outputs for o in output.outputs], llm.get_tokenizer().decode
    texts = [decode(o.token_ids, skip_special_tokens=True) for o in answers]
    golds = [q["answer"] for q, output in zip(questions, outputs) for _ in output.outputs]
    rewards = verifier.verify(texts, golds, after_think=after_think)  # 1 correct, 0 not
    for o, text, reward in zip(answers, texts, rewards):
        o.text, o.reward = text, reward
    return [output.outputs for output in outputs]

# --- evaluation and logging ----------------------------------------------------------------------

def evaluate(llm, verifier, benchmarks, step, args):
    """One answer to every question, into eval/step_N.jsonl; their means into eval/step_N.json."""
    rank, path = dist.get_rank(), Path(args.run_dir, f"eval/step_{step}.jsonl")
    asked = [dict(q, benchmark=name, index=i)
             for name, questions in benchmarks.items() for i, q in enumerate(questions)]
    mine = asked[rank :: dist.get_world_size()]
    # the authors' sampling while training; Table 11 adds top-k 20 (evaluate.py)
    groups = generate(llm, verifier, mine, args.seed + rank, after_think=True, temperature=0.6,
                      top_p=0.95, max_tokens=args.max_response_tokens)
    records = exchange([
        epistemic.record(o.text, o.reward, len(o.token_ids), o.finish_reason == "stop",
                         question=q["messages"][-1]["content"],
                         **{key: q[key] for key in ("benchmark", "index", "answer")})
        for q, (o,) in zip(mine, groups)])
    means = {name: epistemic.averages([r for r in records if r["benchmark"] == name])
             for name in benchmarks}
    for name in benchmarks:
        say(f"  eval {name}  {epistemic.line(means[name])}")
    if rank == 0:
        write_lines(path, sorted(records, key=lambda r: (r["benchmark"], r["index"])))
        write_lines(path.with_suffix(".json"), [means])
        if args.wandb:
            import wandb
            wandb.log({f"eval/{name}": m for name, m in means.items()}, step=step)

def log(args, step, rollouts, metrics, seconds):
    """A line of metrics.jsonl, one on the screen, and the first 64 texts of the step."""
    path = Path(args.run_dir, "metrics.jsonl")
    if dist.get_rank():
        return
    records = [epistemic.record(r.text, r.reward, len(r.response_ids), r.finished, row=r.row)
               for r in rollouts]
    m = dict(step=step, **epistemic.averages(records), **metrics, seconds=seconds,
             tokens_per_second=sum(r["tokens"] for r in records) / sum(seconds.values()))
    with open(path, "a") as file:
        file.write(json.dumps(m) + "\n")
    write_lines(Path(args.run_dir, f"rollouts/step_{step}.jsonl"), records[:64])
    if args.wandb:
        import wandb
        wandb.log(m, step=step)
    minutes = (args.steps - step) * sum(seconds.values()) / 60
    left = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    say(f"step {step}/{args.steps}  {epistemic.line(m)}  loss {m['loss']:.3f}  {left} left")
    if m["skipped"]:
        say(f"  {m['skipped']} updates skipped: the gradient was not finite")
    if not m["trained"]:
        say("  no update: no rollout of this step is correct")
        last = [json.loads(line)["trained"] for line in path.read_text().splitlines()[-10:]]
        if len(last) == 10 and not any(last):
            say("  no correct rollout in ten steps: is the answer column right?")

class progress(tqdm):
    """A bar that leaves no line on a terminal; elsewhere it writes once a minute at most."""

    def __init__(self, *args, **kwargs):
        wait = 0.1 if sys.stderr.isatty() else 60
        super().__init__(*args, **kwargs, leave=False, mininterval=wait, maxinterval=wait,
                         delay=wait, disable=dist.get_rank() != 0)

    def refresh(self, *args, **kwargs):  # vLLM calls it at the end, whatever the delay
        if time.time() > self.start_t + self.delay:
            super().refresh(*args, **kwargs)

def say(message):
    """A line on the screen, from the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)

# --- memory --------------------------------------------------------------------------------------

def load_model(path, device):
    from transformers import AutoModelForCausalLM, logging as transformers_logging
    transformers_logging.disable_progress_bar()
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE, output_loading_info=True)
    if found["missing_keys"]:  # transformers only warns, and draws them at random
        sys.exit(f"error: weights are missing in {path}: {sorted(found['missing_keys'])[:3]} ...")
    model.generation_config.do_sample = True  # transformers saves no temperature without it
    return model.to(device)

def compile_layers(*models):
    """On a GPU an update takes 1.3 to 1.55 times less time; small ones like the toy gain none."""
    if models[0].device.type == "cuda" and models[0].num_parameters() > 1e8:
        say("the first update compiles the layers: minutes")
        torch._dynamo.config.recompile_limit = 64  # one code object for all layers, 8 graphs of it
        torch._dynamo.config.optimize_ddp = False  # else DDP cuts the graphs up: 11 instead of 7
        for layer in itertools.chain(*(model.get_decoder().layers for model in models)):
            layer.compile(dynamic=True)

def with_gradients(student):
    """DDP of the student, with gradients of 0 that are views of its buckets."""
    for p in student.parameters():
        p.grad = torch.zeros_like(p)  # else micro-batches add up in memory beside the buckets
    return DistributedDataParallel(student, gradient_as_bucket_view=True, init_sync=False,
                                   forward_sync_buffers=False)

def free(model):
    """Empties a model's weights: while vLLM samples, its KV cache takes their memory."""
    for w in model.parameters():
        w.data = w.data.new_empty(0)

def load_teacher(teacher, averages, model, path):
    """Gives the teacher the initial weights (Sec. 5.4), or with --ema the student's average, of
    which each rank keeps its share."""
    weights = model if averages else load_model(path, model.device)
    for t, w in zip(teacher.parameters(), weights.parameters()):
        t.data = torch.empty_like(w) if averages else w.detach()
    if averages:
        write_weights(averages, teacher)

@torch.no_grad()
def write_weights(owned, model):
    """Every rank's float32 tensors, {name: tensor} of each world_size-th weight, into the model."""
    rank, ranks, weights = dist.get_rank(), dist.get_world_size(), list(model.parameters())
    for weight, tensor in zip(weights[rank::ranks], owned.values()):
        weight.copy_(tensor)
    for i, weight in enumerate(weights):
        dist.broadcast(weight.detach(), i % ranks)

class MasterAdamW:
    """AdamW on float32 copies (masters) of bfloat16 weights; tensor i belongs to rank i % ranks.

    A step of 1e-6 is a hundredth of bfloat16's spacing at a weight of 0.02: such a weight would
    never move. Its master does, and the weight is the rounded master. Bytes a parameter: on every
    GPU 2 of weight and 2 of gradient; in CPU memory, divided among the ranks (ZeRO stage 1), 4 of
    master, 8 of moments, 2 for the sum of gradients. Qwen3-8B: 33 GB and 115 GB.
    """

    def __init__(self, model, **settings):
        self.model, named = model, list(model.named_parameters())
        self.mine = dict(named[dist.get_rank() :: dist.get_world_size()])
        self.sums = [torch.zeros_like(w, device="cpu") for w in self.mine.values()]
        self.masters = {name: w.detach().to("cpu", torch.float32, copy=True)
                        for name, w in self.mine.items()}
        self.adamw = torch.optim.AdamW(self.masters.values(), fused=True, **settings)
        for m in self.masters.values():  # as AdamW does in its first step: checkpoints load into it
            self.adamw.state[m] = dict(step=torch.zeros(()), exp_avg=torch.zeros_like(m),
                                       exp_avg_sq=torch.zeros_like(m))

    def tensors(self):
        """{name: tensor} of what this rank holds, for a checkpoint."""
        return {f"{name}.{key}": tensor for name, m in self.masters.items()
                for key, tensor in dict(self.adamw.state[m], master=m).items()}

    @torch.no_grad()
    def add_gradients(self):
        """Adds the weights' gradients to their owners' sums, and sets them to 0."""
        for weight, total in zip(self.mine.values(), self.sums):
            total += weight.grad.to("cpu")
        torch._foreach_zero_([w.grad for w in self.model.parameters()])

    @torch.no_grad()
    def step(self, lr, max_norm):
        """Clips the gradient and steps, if it is finite; returns its norm."""
        # in pieces: on CPU the norm of 3e8 float32 in one comes out 4% low (benchmarks/README.md)
        pieces = [piece for total in self.sums for piece in total.flatten().split(2**18)]
        square = torch.stack(torch._foreach_norm(pieces, dtype=torch.float32)).square().sum()
        dist.all_reduce(square)
        norm = square.sqrt().item()
        self.adamw.param_groups[0]["lr"] = lr
        for master, total in zip(self.masters.values(), self.sums):
            if math.isfinite(norm):  # tensor by tensor: the gradient is never whole in float32
                master.grad = total.float() * min(1.0, max_norm / (norm + 1e-6))
                self.adamw.step()
                master.grad = None
            total.zero_()
        write_weights(self.masters, self.model)
        return norm

# --- files ---------------------------------------------------------------------------------------

def load_tokenizer(name, positions):
    """(folder, tokenizer) of a model. A hub id is resolved here, once: its branch may move."""
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoTokenizer
    try:
        path = name if Path(name).is_dir() else snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"])
    except Exception as error:  # no such id, no network, no access: no common class
        raise ValueError(f"--model {name}: no folder, and not on the hub ({error})") from None
    config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        raise ValueError(f"--model {name}: its tokenizer has no chat template")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"--model {name}: its tokenizer has {len(tokenizer):,} tokens, the model "
                         f"only {config.vocab_size:,}")
    if positions > config.max_position_embeddings:
        raise ValueError(f"--max_prompt_tokens and --max_response_tokens: {positions:,} together, "
                         f"but {name} has {config.max_position_embeddings:,} positions")
    return path, tokenizer

def begin_run(args, path):
    """Locks --run_dir, writes config.json. ValueError if it is another run's; --steps may grow."""
    import transformers
    file, script = Path(args.run_dir, "config.json"), Path(sys.argv[0]).name
    if os.environ.get("RANK", "0") != "0":
        return
    if args.wandb:
        import wandb  # before anything is written
    config = dict(vars(args), files=fingerprint(path, args.data))
    began = json.loads(file.read_text()) if file.exists() else {}
    there = [p for p in file.parent.glob("*") if p.suffix not in (".part", ".lock")]
    if there and began.get("script") != script:
        raise ValueError(f"--run_dir {args.run_dir} holds something else: name a new folder")
    if not resumable(args.run_dir):
        commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD")
        versions = dict(torch=torch.__version__, transformers=transformers.__version__)
        began = dict(config, script=script, id=began.get("id") or f"{time.time_ns():x}",
                     commit=commit, versions=versions,
                     world_size=int(os.environ.get("WORLD_SIZE", 1)))
    changed = [f"--{name} was {began.get(name)}" for name, value in vars(args).items()
               if began.get(name) != value and name != "run_dir"  # it may have been moved
               and (name != "steps" or value < began["steps"])]
    changed += sorted({*began.get("files", [])} ^ {*config["files"]})
    if changed:
        raise ValueError(f"--run_dir {args.run_dir} began with other flags or files: "
                         f"{', '.join(changed)}; repeat them, or name a new folder")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:  # held until this process ends, however it ends
        lock = os.open(file.with_name("run.lock"), os.O_RDWR | os.O_CREAT)
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--run_dir {args.run_dir}: another process trains in it") from None
    write_lines(file, [began | config])
    if args.wandb:  # its own WANDB_PROJECT, WANDB_NAME, ... apply
        name = os.environ.get("WANDB_NAME", args.run_dir)
        wandb.init(id=began["id"], name=name, resume="allow", config=vars(args))

def fingerprint(*sources):
    """Name, size and modification time of the files: data, and weights in a model's folder."""
    files = [file for source in map(Path, sources)
             for file in (sorted(source.glob("*.safetensors")) if source.is_dir() else [source])]
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
            for file in files if file.is_file()]

def write_lines(path, rows):
    """JSON Lines, written aside and renamed: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.rename(path)

def save_checkpoint(model, tokenizer, step, state, run_dir):
    """A Hugging Face folder with the trainer's state in it, renamed when it is whole.

    The weights of all checkpoints stay, for evaluate.py; of the state, 6 times as large, two.
    """
    folder = Path(run_dir, f"checkpoints/step_{step}")
    aside = folder.with_name(folder.name + ".part")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed run
        model.save_pretrained(aside, max_shard_size="4GB")  # a shard goes through CPU memory
        tokenizer.save_pretrained(aside)
    dist.barrier()
    dcp.save(state, checkpoint_id=aside / "trainer_state")
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # weights alone: their state was removed
        aside.rename(folder)
        for old in resumable(run_dir)[:-2]:
            shutil.rmtree(Path(run_dir, f"checkpoints/step_{old}/trainer_state"))

def resumable(run_dir):
    """The steps whose checkpoints hold the trainer's state, in order."""
    found = Path(run_dir).glob("checkpoints/step_*[0-9]/trainer_state/.metadata")
    return sorted(int(path.parents[1].name[5:]) for path in found)

def load_checkpoint(run_dir, state):
    """Fills the tensors of `state` from the newest checkpoint; returns its step, 0 without one.

    No random state is kept: every draw is seeded with (seed, step, row).
    """
    done = exchange([max(resumable(run_dir), default=0)])[0]
    folder, metrics = Path(run_dir, f"checkpoints/step_{done}"), Path(run_dir, "metrics.jsonl")
    if done:
        say(f"{run_dir} resumes after step {done}")
        try:
            dcp.load(state, checkpoint_id=folder / "trainer_state")
        except dcp.api.CheckpointException:
            sys.exit(f"error: {folder} does not load: remove it, and the same command resumes from "
                     "the one before")
    if dist.get_rank() == 0 and metrics.exists():  # steps after the checkpoint come again
        write_lines(metrics, map(json.loads, metrics.read_text().splitlines()[:done]))
    return done

# --- processes -----------------------------------------------------------------------------------

def start_process_group():
    """torchrun's group, or under plain python a group of one; returns this rank's device."""
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items():
        os.environ.setdefault(name, str(value))  # vLLM reads them
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # a rank may wait longer than the usual half hour for another's rollouts of 20,000 tokens
    dist.init_process_group(backend, timeout=timedelta(hours=6), **alone)
    return device

def exchange(items):
    """Every rank's list, joined in the order of the ranks."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without tracebacks
    warnings.simplefilter("ignore", FutureWarning)  # the libraries', for their authors
    main()
