"""SDPO, on-policy self-distillation: Sec. 5, Eq. 1 and Table 10 of the paper.

The model teaches itself. One step:
  1. the student answers each question x with a group of rollouts y (vLLM)
  2. the verifier grades every rollout: reward 1 if correct, else 0
  3. a correct sibling of y, another rollout to x, is its demonstration c; the teacher (the initial
     weights, with c in the prompt) scores the same tokens y
  4. loss per token: JS( student(. | x, y_<t)  ||  teacher(. | x, c, y_<t) )
  5. AdamW; vLLM gets the new weights

    torchrun --nproc_per_node 8 sdpo.py --model Qwen/Qwen3-8B       # the paper's run, Figure 4

The same command again resumes --run_dir; on another number of GPUs its rollouts will be others.

Unlike Eq. 1, as in the authors' code (5c51051 of beanie00/self-distillation-analysis):
  - Jensen-Shannon, over the student's top 100 tokens (Table 10) and one bucket for all others
  - c is another rollout of the same group, never the data's solution; the reward only decides which
    rollouts may be demonstrations
  - a mean over sequences of each one's mean over tokens, not a sum over tokens; a rollout without a
    correct sibling has loss 0 and still counts as a sequence
  - two weights, each at most 2: p at step's start / p of vLLM, and p now / p at step's start
Unlike their code: c is a random correct sibling (theirs: the batch's first), a rollout cut at the
limit has reward 0, and warm-up starts at a tenth of the rate (theirs: 0).

Watch (Sec. 5): score, length and epistemic fall early, and recover in part; the damage shows out of
distribution (RUN_DIR/eval/). `mismatch`, |log p of vLLM - of the trainer|, stays flat.
"""
import argparse
import gc
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import epistemic
from verifier import Verifier, load_questions

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # of model, gradients, vLLM
TQDM = dict(leave=False, disable=not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0")

# --- arguments -----------------------------------------------------------------------------------

def make_parser():
    parser = argparse.ArgumentParser(
        description="SDPO (Sec. 5). The defaults are the paper's run; (ours) marks the others.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, usage=argparse.SUPPRESS)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", required=True, help="hub id or Hugging Face folder")
    add("--data", default="dapo", help="dapo, a hub id, or a .parquet, .json or .jsonl file")
    add("--num_questions", type=int, help="|D| of Sec. 6.2, drawn by --seed; None: all")
    add("--enable_thinking", action=switch, default=True, help="for Qwen3's chat template")
    add("--questions_per_step", type=int, default=256, help="Table 8; Sec. 6.2: 64")
    add("--rollouts", type=int, default=8, help="responses to each question: a group")
    add("--temperature", type=float, default=1.0, help="of sampling and of the loss")
    add("--max_prompt_tokens", type=int, default=2048, help="longer prompts are dropped")
    add("--max_response_tokens", type=int, default=20480, help="longer responses are cut")
    add("--alpha", type=float, default=0.5, help="0.5: Jensen-Shannon; 1: Eq. 1; 0: its reverse")
    add("--top_k", type=int, default=100, help="the student's most likely tokens; App. G: 256")
    add("--demonstration", choices=["full", "without_think", "uncertain"], default="full",
        help="c: the response s; without its think part; s and App. C's request for uncertainty")
    add("--ema", type=float, default=0.0, help="rate of a moving-average teacher; Sec. 5.4: 0.05")
    add("--steps", type=int, default=100, help="of rollout and update (Sec. 6.1)")
    add("--minibatch_questions", type=int, default=128, help="Table 8: 64 or 128; for Sec. 6.2: 32")
    add("--lr", type=float, default=1e-5, help="learning rate, constant after the warm-up")
    add("--warmup_steps", type=int, default=10, help="steps of linear warm-up")
    add("--tokens_per_micro_batch", type=int, default=24576, help="(ours) padding included")
    add("--recompute_layers", action=switch, default=True, help="(ours) --no-: faster, more memory")
    add("--adamw_device", choices=["cpu", "cuda"], default="cpu", help="(ours) cuda: faster")
    add("--gpu_memory_utilization", type=float, default=0.7, help="(ours) for vLLM in sampling")
    add("--run_dir", default="runs/sdpo", help="a new folder, or a run to resume")
    add("--seed", type=int, default=0, help="of data order and sampling")
    add("--eval_data", nargs="*", default=["aime24"], help="or aime25 amc23 math500, ids, files")
    add("--save_every", type=int, default=10, help="steps between checkpoints with evaluation")
    add("--wandb", action="store_true", help="metrics to Weights & Biases, too")
    return parser

# --- rollouts: 1. to 3. --------------------------------------------------------------------------

def render(tokenizer, messages, enable_thinking):
    """Token ids of a chat up to where the answer begins (Table 12)."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False,
                                         enable_thinking=enable_thinking)

def read_questions(source, tokenizer, args, draw=False):
    """[{messages, answer, prompt_ids}], prompts within --max_prompt_tokens; raises ValueError."""
    questions, number = load_questions(source), None
    if draw:  # --num_questions; a smaller set is part of a larger one
        questions = random.Random(args.seed).sample(questions, len(questions))
        number = args.num_questions
    prompts = (render(tokenizer, q["messages"], args.enable_thinking) for q in questions)
    fitting = (dict(q, prompt_ids=prompt) for q, prompt in zip(questions, prompts)
               if len(prompt) <= args.max_prompt_tokens)
    chosen = list(itertools.islice(fitting, number))
    if len(chosen) < (number or 1):
        raise ValueError(f"{source}: only {len(chosen)} of {number or 1} fit --max_prompt_tokens")
    say(f"{source}: {len(chosen):,} of {len(questions):,} questions")
    return chosen

def question_stream(questions, seed):
    """Endless: shuffled anew every epoch. A small set repeats within a step (Sec. 6.2)."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(questions, len(questions))

UNCERTAIN = ("Solve the original question from scratch with a full, detailed reasoning trace, "
             "without skipping any steps, and include as much uncertainty or ambiguity in the "
             "explanation.")  # App. C, Figure 14

def teacher_messages(messages, solution, form, heading="\nCorrect solution:\n\n"):
    """The chat with a solution after the question, in the same user message (authors' code)."""
    if form == "without_think":
        solution = solution.rpartition("</think>")[2].lstrip()
    closing = UNCERTAIN if form == "uncertain" else "Correctly solve the original question."
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']}{heading}{solution}\n\n{closing}"}]

@dataclass
class Rollout:
    question: dict  # messages, answer, prompt_ids; in training `row`, its place in the step's batch
    response_ids: list  # as vLLM sampled them: text is never encoded again
    logprobs: list  # (T,) vLLM's, of these tokens at --temperature; None in evaluation
    text: str
    finished: bool  # False: cut at --max_response_tokens
    reward: float  # 1 correct, 0 not
    teacher_prompt_ids: list | None = None  # None: no correct sibling, so no teacher
    weight: float = 0.0  # of each of its tokens in the loss

    def tokens(self):
        """Length of the teacher's sequence, the longer of its two."""
        return len(self.teacher_prompt_ids) + len(self.response_ids)

def set_teacher_prompts(group, tokenizer, rng, args):
    """The demonstration of each rollout: a correct sibling at random, never the rollout itself."""
    for rollout in group:
        siblings = [r for r in group if r.reward == 1 and r is not rollout]
        if siblings:
            solution = rng.choice(siblings).text
            messages = teacher_messages(rollout.question["messages"], solution, args.demonstration)
            rollout.teacher_prompt_ids = render(tokenizer, messages, args.enable_thinking)

def sample_groups(llm, verifier, tokenizer, questions, step, args):
    """The step's graded rollouts, each with its teacher's prompt. Each rank samples a part."""
    size = len(questions) // dist.get_world_size()
    first_row = dist.get_rank() * size
    own = [dict(questions[row], row=row) for row in range(first_row, first_row + size)]
    rollouts = generate(llm, verifier, own, hash((args.seed, step, first_row)) % 2**31,
                        n=args.rollouts, temperature=args.temperature,
                        max_tokens=args.max_response_tokens, logprobs=0, flat_logprobs=True)
    for r in rollouts:
        r.reward *= r.finished  # a cut answer earns nothing, whatever it has boxed
    for i in range(0, len(rollouts), args.rollouts):
        rng = random.Random(f"{args.seed}/{step}/{rollouts[i].question['row']}")
        set_teacher_prompts(rollouts[i : i + args.rollouts], tokenizer, rng, args)
    return all_gather(rollouts)

# --- loss: 4. ------------------------------------------------------------------------------------

CHUNK = 512  # positions at once in the LM head: 512 x 151,936 float32 logits are 0.3 GB

def with_tail(topk_logprobs):
    """(..., k) log-probabilities -> (..., k + 1): the last bucket holds all other tokens."""
    inside = topk_logprobs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)  # else log(0)
    return torch.cat([topk_logprobs, torch.log(-torch.expm1(inside))], dim=-1)

def divergence(student, teacher, alpha):
    """Generalised Jensen-Shannon of two log-distributions, (..., k + 1) -> (...), in nats.

    mixture m = (1 - alpha) student + alpha teacher
    loss      = (1 - alpha) KL(student || m) + alpha KL(teacher || m)
    """
    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)
    if alpha in (0, 1):  # the formula gives 0. 1: KL(student || teacher), Eq. 1; 0: its reverse
        return kl(student, teacher) if alpha else kl(teacher, student)
    mixture = torch.logaddexp(student + math.log(1 - alpha), teacher + math.log(alpha))
    return (1 - alpha) * kl(student, mixture) + alpha * kl(teacher, mixture)

def importance_weight(logprobs, old_logprobs):
    """min(p / p_old, 2) per token, detached (Table 9: rollout IS clip 2; SDPO takes it, too)."""
    return (logprobs - old_logprobs).exp().clamp(max=2.0).detach()

def logprobs_at(logits, ids, temperature):
    """log p of token ids (C, k) under logits (C, V), of the full softmax: (C, k) float32."""
    logits = logits.float().div_(temperature)  # in place: nobody reads them again
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)

def token_losses(student, teacher, targets, args):
    """(divergence, log p(target)) at N positions, (N,) float32 each.

    Logits (N, V) never exist: `checkpoint` computes those of a chunk again in backward.
    """
    (states, head), (teacher_states, teacher_head) = student, teacher  # (N, D) and the LM head each
    def chunk_losses(hidden, teacher_hidden, target):
        logits = head(hidden)  # (C, V)
        top = logits.topk(min(args.top_k, logits.shape[-1])).indices  # (C, k)
        with torch.no_grad():
            buckets = with_tail(logprobs_at(teacher_head(teacher_hidden), top, args.temperature))
        # one gather for target and top k: the backward of each would hold a (C, V) of its own
        logprobs = logprobs_at(logits, torch.cat([target[:, None], top], -1), args.temperature)
        return divergence(with_tail(logprobs[:, 1:]), buckets, args.alpha), logprobs[:, 0]
    chunks = zip(states.split(CHUNK), teacher_states.split(CHUNK), targets.split(CHUNK))
    results = [checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(torch.cat(parts) for parts in zip(*results))

def response_states(model, prompts, responses):
    """(last hidden states (N, D) that predict the response tokens, LM head)."""
    sequences = [torch.tensor([*p, *y]) for p, y in zip(prompts, responses)]
    ids = pad_sequence(sequences, batch_first=True).to(model.device)  # (B, T)
    # no attention mask: no token sees the padding after it, and the fast kernel applies
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    hidden = torch.cat([h[len(p) - 1 : len(p) + len(y) - 1]  # position t predicts token t + 1
                        for h, p, y in zip(hidden, prompts, responses)])
    return hidden, model.get_output_embeddings()

class Student(torch.nn.Module):
    """What DDP wraps: all that has gradients in one forward, so that its hooks see it."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, micro_batch, teacher=None):
        """token_losses of a micro-batch's responses; without a teacher the divergence is 0."""
        prompts = [r.question["prompt_ids"] for r in micro_batch]
        responses = [r.response_ids for r in micro_batch]
        student = response_states(self.model, prompts, responses)
        with torch.no_grad():
            teacher = student if teacher is None else response_states(
                teacher, [r.teacher_prompt_ids for r in micro_batch], responses)
        targets = torch.tensor([t for y in responses for t in y], device=self.model.device)  # (N,)
        return token_losses(student, teacher, targets, self.args)

# --- update: 5. ----------------------------------------------------------------------------------

def micro_batches_of_rank(rollouts, token_budget):
    """Similar lengths together, up to token_budget with padding; what is longer stands alone."""
    batches, ranks = [], dist.get_world_size()
    for r in sorted((r for r in rollouts if r.weight), key=lambda r: r.tokens()):
        if batches and (len(batches[-1]) + 1) * r.tokens() <= token_budget:
            batches[-1].append(r)
        else:
            batches.append([r])
    while len(batches) % ranks:  # DDP needs the same number on each rank
        batches.append([replace(batches[0][0], weight=0.0)])
    return batches[dist.get_rank() :: ranks]

ROUND = 32  # micro-batches summed in bfloat16: error 0.7%; 683 of them: 18% (tests/test_master.py)
# mean |log p_vllm - log p_train|: 1e-6 in float32, 1e-2 in bfloat16; with a stale LM head 0.2
MISMATCH_LIMIT = 1e-3 if DTYPE == torch.float32 else 0.1

def update(model, teacher, optimizer, rollouts, lr, args):
    """One optimizer step a mini-batch; returns the metrics. Every rank holds all rollouts."""
    for w in model.parameters():  # made before DDP, they move into its buckets: no second copy
        w.grad = torch.zeros_like(w)
    student, device = Student(model, args), model.device
    ddp = DistributedDataParallel(student, gradient_as_bucket_view=True, init_sync=False)
    size = args.minibatch_questions * args.rollouts
    for r in rollouts:  # the mean over sequences of each one's mean over tokens
        r.weight = bool(r.teacher_prompt_ids) / (size * len(r.response_ids))
    minibatches = [micro_batches_of_rank(rollouts[i : i + size], args.tokens_per_micro_batch)
                   for i in range(0, len(rollouts), size)]
    with torch.no_grad():  # the first mini-batch still meets the weights of the step's start
        start_logprobs = {id(m): student(m)[1] for m in itertools.chain(*minibatches[1:])}

    norms, totals = [], torch.zeros(4, dtype=torch.float64, device=device)
    for micro_batches in filter(None, minibatches):  # one without demonstrations makes no step
        sums = torch.zeros_like(totals)  # loss, tokens, mismatch, clipped
        for i, micro_batch in enumerate(tqdm(micro_batches, "update", **TQDM), 1):
            vllm = torch.tensor([p for r in micro_batch for p in r.logprobs], device=device)  # (N,)
            weight = torch.tensor([r.weight for r in micro_batch for _ in r.logprobs]).to(device)
            ddp.require_backward_grad_sync = i % ROUND == 0 or i == len(micro_batches)
            losses, logprobs = ddp(micro_batch, teacher)  # (N,) each
            # three log-probabilities of a token: vLLM's, the trainer's at the step's start, and now
            start = start_logprobs.get(id(micro_batch), logprobs.detach())
            ratio, correction = importance_weight(logprobs, start), importance_weight(start, vllm)
            loss = (losses * ratio * correction * weight).sum()
            (loss * dist.get_world_size()).backward()  # DDP takes the mean over ranks, not the sum
            if ddp.require_backward_grad_sync:
                optimizer.add_gradients()
            mask = weight > 0  # False in the copies that fill up the ranks
            mismatch = ((start - vllm).abs() * mask).sum()
            clipped = (mask & (torch.maximum(ratio, correction) >= 2)).sum()
            sums += torch.stack([loss.detach().double(), mask.sum(), mismatch, clipped])
        dist.all_reduce(sums)
        totals += sums
        if not totals[2] <= MISMATCH_LIMIT * totals[1]:  # also if it is NaN
            sys.exit(f"error: vLLM's log-probabilities are {totals[2] / totals[1]:.3g} a token off "
                     "the trainer's: has it old weights? This step was not saved.")
        norms.append(optimizer.step(lr, max_norm=1.0))  # Table 8
    model.zero_grad(set_to_none=True)
    (loss, tokens, mismatch, clipped), n = totals.tolist(), len(norms) or 1
    return dict(loss=loss / len(minibatches), grad_norm=sum(norms) / n, lr=lr,
                trained=sum(r.weight > 0 for r in rollouts) / len(rollouts), trained_tokens=tokens,
                mismatch=mismatch / (tokens or 1), clipped=clipped / (tokens or 1),
                skipped=sum(not math.isfinite(norm) for norm in norms))

# --- run -----------------------------------------------------------------------------------------

def main():
    parser = make_parser()
    args = parser.parse_args()
    device = start_process_group()
    if args.questions_per_step % math.lcm(args.minibatch_questions, dist.get_world_size()):
        parser.error("--questions_per_step: not divisible by --minibatch_questions and the GPUs")
    if len({Path(source).stem for source in args.eval_data}) < len(args.eval_data):
        parser.error(f"--eval_data: two benchmarks have one name: {' '.join(args.eval_data)}")
    try:  # bad input ends with one line (a rank) and exit code 2, before vLLM starts
        from transformers import AutoTokenizer  # takes seconds, --help waits for none
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        path = args.model if Path(args.model).is_dir() else snapshot_download(
            args.model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"])
        questions = read_questions(args.data, tokenizer, args, draw=True)
        benchmarks = [dict(q, benchmark=Path(source).stem, index=i) for source in args.eval_data
                      for i, q in enumerate(read_questions(source, tokenizer, args))]
        model = load_model(path)
        begin_run(args)
    except Exception as error:  # what transformers, datasets and Jinja raise has no common class
        parser.error(" ".join(f"{error} (--model {args.model})".split()))
    llm = make_engine(path, args)
    model.to(device).train()
    if args.recompute_layers:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    optimizer = MasterAdamW(model, args.adamw_device, lr=args.lr, weight_decay=0.01)  # Table 8
    averages = {n: m.clone() for n, m in optimizer.masters.items() if args.ema}  # the teacher
    state = dict(masters=optimizer.masters, moments=optimizer.moments, averages=averages)
    done = load_checkpoint(args.run_dir, state)  # steps
    optimizer.write_weights(optimizer.masters, model)  # a resumed run's are the checkpoint's
    stream = question_stream(questions, args.seed)
    stream = itertools.islice(stream, done * args.questions_per_step, None)
    verifier = Verifier()
    sync_weights(llm, model)
    evaluate(llm, verifier, benchmarks, done, args)  # also on resume: a kill may have cut it
    for step in range(done + 1, args.steps + 1):
        start = time.time()
        # 1. to 3. rollouts, rewards, demonstrations
        batch = list(itertools.islice(stream, args.questions_per_step))
        rollouts = sample_groups(llm, verifier, tokenizer, batch, step, args)
        sampled = time.time()
        # 4. and 5. the loss, AdamW; what they need takes memory only while vLLM sleeps
        if device.type == "cuda":
            llm.sleep(level=2)  # drops its weights; sync_weights brings the new ones
        teacher = load_model(path).to(device)
        if args.ema:
            optimizer.write_weights(averages, teacher)
        lr = args.lr * min(1, step / max(1, args.warmup_steps))
        metrics = update(model, teacher, optimizer, rollouts, lr, args)
        for name, average in averages.items():
            average.lerp_(optimizer.masters[name], args.ema)  # once a step (authors' code)
        del teacher
        sync_weights(llm, model)
        metrics["seconds"] = dict(rollout=sampled - start, update=time.time() - sampled)
        log(args, step, rollouts, metrics)
        if step % args.save_every == 0 or step == args.steps:
            save_checkpoint(model, tokenizer, step, state, args.run_dir)
            evaluate(llm, verifier, benchmarks, step, args)
    llm.llm_engine.engine_core.shutdown()  # left open, it prints tracebacks at exit

# --- a reader of the paper may stop here: vLLM, evaluation, log, weights, files, processes -------

def make_engine(path, args):
    """vLLM in this process, one engine a rank; sync_weights brings its weights."""
    say("vLLM starts; on a GPU this and the first update, which compiles the layers, take minutes")
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else vLLM takes one
    from vllm import LLM
    cpu = not torch.cuda.is_available()
    return LLM(path, dtype=DTYPE, seed=args.seed, load_format="dummy", use_tqdm_on_load=False,
               max_model_len=args.max_prompt_tokens + args.max_response_tokens,
               max_num_seqs=256,  # as many as a rank of eight has; its 1,024 take more memory
               gpu_memory_utilization=args.gpu_memory_utilization,
               kv_cache_memory_bytes=2 * 2**30 if cpu else None, enforce_eager=cpu,
               enable_sleep_mode=not cpu, distributed_executor_backend="external_launcher",
               logprobs_mode="processed_logprobs",  # after temperature: what is sampled from
               # a tied LM head would keep its first weights on CPU, without an error
               hf_overrides=dict(tie_word_embeddings=False))

def sync_weights(llm, model):
    """Wakes vLLM with the model's weights, written in place; then its KV cache, in what is left."""
    if torch.cuda.is_available():
        gc.collect()  # a compiled teacher is a cycle of references
        torch.cuda.empty_cache()
        llm.wake_up(tags=["weights"])
    weights = ((name, w.detach()) for name, w in model.named_parameters(remove_duplicate=False))
    llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
    if torch.cuda.is_available():
        llm.wake_up(tags=["kv_cache"])

def generate(llm, verifier, questions, seed, **sampling):
    """Graded rollouts, those of one question together, in the questions' order."""
    from transformers import set_seed
    from vllm import SamplingParams
    # A seed per request crashes on CPU; the global ones repeat bit for bit, torch's and NumPy's
    # (vLLM draws from one or the other). Cached prefixes change the last bit.
    set_seed(seed)
    llm.reset_prefix_cache()
    outputs = llm.generate([dict(prompt_token_ids=q["prompt_ids"]) for q in questions],
                           SamplingParams(detokenize=False, **sampling),  # token by token: slow
                           use_tqdm=not TQDM["disable"] and (lambda **bar: tqdm(**bar, **TQDM)))
    answers = [(q, answer) for q, output in zip(questions, outputs) for answer in output.outputs]
    decode = llm.get_tokenizer().decode  # batch_decode makes one text of no answers at all
    texts = [decode(answer.token_ids, skip_special_tokens=True) for _, answer in answers]
    rewards = verifier.verify(texts, [q["answer"] for q, _ in answers])
    return [Rollout(q, list(a.token_ids), a.logprobs and a.logprobs.logprobs, text,
                    a.finish_reason == "stop", reward)
            for (q, a), text, reward in zip(answers, texts, rewards)]

def evaluate(llm, verifier, questions, step, args):
    """One answer to every question, into eval/step_N.jsonl; their means into eval/step_N.json."""
    path = Path(args.run_dir, f"eval/step_{step}.jsonl")
    own = questions[dist.get_rank() :: dist.get_world_size()]
    # the authors' sampling while training; Table 11 adds top-k 20 (evaluate.py)
    rollouts = generate(llm, verifier, own, args.seed + dist.get_rank(), temperature=0.6,
                        top_p=0.95, max_tokens=args.max_response_tokens)
    records = [epistemic.record(r, question=r.question["messages"][-1]["content"], **{
        field: r.question[field] for field in ("benchmark", "index", "answer")}) for r in rollouts]
    records = sorted(all_gather(records), key=lambda r: (r["benchmark"], r["index"]))
    means = {name: epistemic.averages(list(group))
             for name, group in itertools.groupby(records, lambda r: r["benchmark"])}
    for name in means:
        say(f"  eval {name}  {epistemic.line(means[name])}")
    if dist.get_rank() == 0:
        write_lines(path, records)
        write_lines(path.with_suffix(".json"), [means])

def log(args, step, rollouts, metrics):
    """A line of metrics.jsonl, one on the screen, and the first 64 texts of the step."""
    if dist.get_rank():
        return
    records = [epistemic.record(r, row=r.question["row"]) for r in rollouts]
    m = dict(step=step, **epistemic.averages(records), **metrics)
    with open(Path(args.run_dir, "metrics.jsonl"), "a") as file:
        file.write(json.dumps(m) + "\n")
    write_lines(Path(args.run_dir, f"rollouts/step_{step}.jsonl"), records[:64])
    if args.wandb:
        sys.modules["wandb"].log(m, step=step)  # begin_run has imported it
    left = timedelta(seconds=round((args.steps - step) * sum(m["seconds"].values())))
    say(f"step {step}/{args.steps}  {epistemic.line(m)}  loss {m['loss']:.3f}  {left} left")

def say(message):
    """A line on the screen, from the first rank only."""
    if dist.get_rank() == 0:
        print(message, flush=True)

# --- weights -------------------------------------------------------------------------------------

def load_model(path):
    """A model in CPU memory. Compiled layers make an update on a GPU 1.3 to 1.55 times as fast."""
    from transformers import AutoModelForCausalLM, logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # no table of missing weights above the line that says so
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE, output_loading_info=True)
    if found["missing_keys"]:  # transformers only warns, and draws them at random
        raise ValueError(f"{path}: weights are missing: {sorted(found['missing_keys'])[:3]} ...")
    model.generation_config.do_sample = True  # transformers saves no temperature without it
    if torch.cuda.is_available() and model.num_parameters() > 1e8:  # small ones gain nothing
        torch._dynamo.config.recompile_limit = 64  # one code object for all layers, 8 graphs of it
        torch._dynamo.config.optimize_ddp = False  # else DDP cuts the graphs up: 11 instead of 7
        for layer in model.get_decoder().layers:
            layer.compile(dynamic=True)
    return model

class MasterAdamW:
    """AdamW on float32 copies (masters) of bfloat16 weights; tensor i belongs to rank i % ranks.

    At a rate of 1e-6 a step is a hundredth of bfloat16's spacing at a weight of 0.02, which would
    never move. Its master does; the weight is the rounded master. Bytes a parameter, of all ranks:
    4 of master, 8 of moments, 2 of summed gradients. Qwen3-8B: 115 GB.
    """

    def __init__(self, model, device="cpu", **settings):
        self.model, named = model, list(model.named_parameters())
        self.owned = dict(named[dist.get_rank() :: dist.get_world_size()])
        self.sums = [torch.zeros_like(w, device=device) for w in self.owned.values()]
        self.masters = {name: w.detach().to(device, torch.float32, copy=True)
                        for name, w in self.owned.items()}
        self.buffer = torch.empty(max(w.numel() for w in self.owned.values()), device=device,
                                  pin_memory=torch.cuda.is_available() and device == "cpu")
        self.adamw = torch.optim.AdamW(self.masters.values(), fused=True, **settings)
        self.moments = {name: dict(step=m.new_zeros(()), exp_avg=torch.zeros_like(m),
                                   exp_avg_sq=torch.zeros_like(m))
                        for name, m in self.masters.items()}  # checkpoints load into them
        self.adamw.state.update(zip(self.masters.values(), self.moments.values()))

    def copy(self, tensor, dtype):
        """A copy in the one buffer, until the next: new memory costs a page fault every 4 KB."""
        return self.buffer.view(dtype)[: tensor.numel()].view_as(tensor).copy_(tensor)

    @torch.no_grad()
    def add_gradients(self):
        """Adds the weights' gradients to their owners' sums, and sets them to 0."""
        for weight, total in zip(self.owned.values(), self.sums):
            total += self.copy(weight.grad, total.dtype)
        self.model.zero_grad(set_to_none=False)

    @torch.no_grad()
    def step(self, lr, max_norm):
        """Clips the gradient and steps, if it is finite; returns its norm."""
        # in pieces: on CPU the norm of 3e8 float32 in one comes out 4% low (benchmarks/README.md)
        pieces = [piece for total in self.sums for piece in total.flatten().split(2**18)]
        square = torch.stack(torch._foreach_norm(pieces, dtype=torch.float32)).square().sum()
        dist.all_reduce(square)
        norm = square.sqrt().item()
        scale = min(1.0, max_norm / (norm + 1e-6))
        self.adamw.param_groups[0]["lr"] = lr
        for master, total in zip(self.masters.values(), self.sums):  # never all in float32
            if math.isfinite(norm):
                master.grad = self.copy(total, torch.float32).mul_(scale)
                self.adamw.step()
                master.grad = None
            total.zero_()
        self.write_weights(self.masters, self.model)
        return norm

    @torch.no_grad()
    def write_weights(self, tensors, model):
        """Every owner's tensors, {name: tensor}, into the model on all ranks."""
        for i, (name, weight) in enumerate(model.named_parameters()):
            if name in tensors:
                weight.copy_(self.copy(tensors[name], weight.dtype))
            dist.broadcast(weight.detach(), i % dist.get_world_size())

# --- files and processes -------------------------------------------------------------------------

MAY_CHANGE = ("run_dir", "steps", "save_every", "eval_data", "wandb", "tokens_per_micro_batch",
              "recompute_layers", "adamw_device", "gpu_memory_utilization")

def begin_run(args):
    """Writes config.json. ValueError if the run had other flags, but for those that MAY_CHANGE."""
    import transformers
    file = Path(args.run_dir, "config.json")
    config = dict(vars(args), script=Path(sys.argv[0]).name)
    if resumable(args.run_dir):
        before = json.loads(file.read_text())
        changed = [f"--{name} was {before.get(name)}" for name, value in config.items()
                   if name not in MAY_CHANGE and before.get(name) != value]
        if changed:
            raise ValueError(f"--run_dir {args.run_dir} holds another run: {', '.join(changed)}")
    if dist.get_rank() == 0:
        commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD")
        versions = dict(torch=torch.__version__, transformers=transformers.__version__)
        write_lines(file, [dict(config, commit=commit, versions=versions)])
        if args.wandb:
            import wandb
            wandb.init(name=args.run_dir, config=config)

def write_lines(path, rows):
    """JSON Lines, renamed when complete: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unfinished.rename(path)

def save_checkpoint(model, tokenizer, step, state, run_dir):
    """A Hugging Face folder and the trainer's state, renamed when whole; only two states stay."""
    folder = Path(run_dir, f"checkpoints/step_{step}")
    unfinished = folder.with_suffix(".part")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed run
        model.save_pretrained(unfinished, max_shard_size="4GB")  # a shard goes through CPU memory
        tokenizer.save_pretrained(unfinished)
    dist.barrier()
    dcp.save(state, checkpoint_id=unfinished / "trainer_state")
    if dist.get_rank() == 0:
        unfinished.rename(folder)
        for old in resumable(run_dir)[:-2]:
            shutil.rmtree(Path(run_dir, f"checkpoints/step_{old}/trainer_state"))

def resumable(run_dir):
    """The steps whose checkpoints hold the trainer's state, in order."""
    found = Path(run_dir).glob("checkpoints/step_*[0-9]/trainer_state/.metadata")
    return sorted(int(path.parents[1].name[5:]) for path in found)

def load_checkpoint(run_dir, state):
    """Fills the tensors of `state` from the newest checkpoint; returns its step, 0 without one."""
    done, metrics = max(resumable(run_dir), default=0), Path(run_dir, "metrics.jsonl")
    if done:
        say(f"{run_dir} resumes after step {done}")
        dcp.load(state, checkpoint_id=Path(run_dir, f"checkpoints/step_{done}/trainer_state"))
    if dist.get_rank() == 0 and metrics.exists():  # steps after the checkpoint come again
        write_lines(metrics, map(json.loads, metrics.read_text().splitlines()[:done]))
    return done

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

def all_gather(items):
    """Every rank's list, joined in the order of the ranks."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]

if __name__ == "__main__":
    main()
