"""SFT on the model's own answers, off-policy self-distillation: Sec. 4 and Table 2 of the paper.

Two sets of correct answers to the same questions, both written by the model itself and both under
the plain prompt: d_ug, written without help (long, full of doubt), and d_sg, written with a solution
in the prompt (short, sure). Fine-tuning on the first changes little; on the second it costs a
third to two thirds of the score, although every answer is right.

    torchrun --nproc_per_node 8 sft_distill.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B \\
        --data runs/conditions/d_ug.jsonl runs/conditions/d_sg.jsonl      # prints Table 2
    make demo                                                             # a small one, on two cores

--data takes any JSON Lines files with `prompt` (messages, or the user's text) and `response`, and
starts from --model again for each. The loss is the cross-entropy of the response and the end token
behind it, a mean over all tokens of a batch; prompt and padding never count.

Neither the paper nor the authors' code says how they trained. Ours is common practice for 800 long
answers and a 7B model: full fine-tuning, 3 epochs, 32 examples a step (75 steps), AdamW at 1e-5,
linear warm-up over the first tenth, then a cosine to 0, gradients clipped at 1.

Watch: `loss` starts low, since the model wrote the answers itself (d_ug lower than d_sg: without the
solution in the prompt a sure answer surprises it), and falls slowly. length and epistemic in eval/
stay where they are on d_ug, and fall at once on d_sg.

The paper ends with main(). Behind it: memory, checkpoints, signals; read them when you need them.
"""
import argparse
import contextlib
import hashlib
import copy
import itertools
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import epistemic
from verifier import Verifier, load_questions

# --- arguments -----------------------------------------------------------------------------------

def parse_args(argv=None):
    def positive(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} must be at least 1")
        return int(text)
    parser = argparse.ArgumentParser(
        description="SFT on the model's own answers (Sec. 4). The paper states no settings.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, help="hub id or Hugging Face folder")
    add("--data", nargs="+", required=True, help=".jsonl files of prompt and response, a run each")
    add("--enable_thinking", action=argparse.BooleanOptionalAction, default=True,
        help="the chat template's switch (Qwen3)")
    add("--max_prompt_tokens", type=positive, default=2048, help="longer ones are left out")
    add("--max_response_tokens", type=positive, default=32768,
        help="longer examples are left out, longer answers in the evaluation cut")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive, default=3)
    add("--batch_size", type=positive, default=32, help="examples an update, over all ranks")
    add("--lr", type=float, default=1e-5, help="its peak")
    add("--warmup_ratio", type=float, default=0.1, help="share of the updates; then cosine to 0")
    add("--tokens_per_micro_batch", type=positive, default=24576,
        help="padded tokens in one forward; a longer sequence goes alone")
    add("--offload_optimizer", action=argparse.BooleanOptionalAction, default=None,
        help="AdamW's state in CPU memory (default: if the GPU cannot hold it)")
    add = parser.add_argument_group("run").add_argument
    add("--run_dir", default="runs/sft", help="a new folder; one in it for each of --data")
    add("--seed", type=int, default=0, help="of data order and sampling")
    add("--eval_data", nargs="*", default=["aime24", "aime25", "amc23", "math500"],
        help="any of aime24 aime25 amc23 math500, hub ids, files")
    add("--eval_rollouts", type=positive, default=16, help="answers to a question: acc@n")
    add("--eval_every", type=positive, default=25, help="updates; also before the first")
    add("--save_every", type=positive, default=25, help="updates; also after the last")
    add("--keep_checkpoints", type=positive, default=2, help="the newest")
    add("--resume", action="store_true",
        help="go on from the newest whole checkpoints in --run_dir, with the same flags")
    return parser.parse_args(argv)

def fail(message):
    """Bad input: one line and exit code 2. Every rank gets here; the first one speaks."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def check_args(args):
    if not 0 <= args.warmup_ratio <= 1:
        fail(f"--warmup_ratio {args.warmup_ratio} must lie between 0 and 1")
    for flag, sources in (("--data", args.data), ("--eval_data", args.eval_data)):
        names = [Path(source).stem for source in sources]
        if len({*names, "base"}) <= len(names) if flag == "--data" else len({*names}) < len(names):
            fail(f"{flag}: two have one name ({' '.join(names)}); base is the untrained model's")
    check_run_dir(args)
    for path in args.data:
        check_run_dir(arguments_of(args, path))

def arguments_of(args, path):
    """Each data set's run has a folder of its own."""
    run = copy.copy(args)
    run.run_dir, run.data = str(Path(args.run_dir) / Path(path).stem), path
    return run

# --- prompts -------------------------------------------------------------------------------------

def render(tokenizer, messages, enable_thinking):
    """Token ids of a chat up to where the model speaks (Table 12).

    A template with a BOS writes it itself (DeepSeek), so that none is added here.
    """
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
    if len(kept) < len(questions) and int(os.environ.get("RANK", 0)) == 0:
        print(f"{source}: {len(questions) - len(kept):,} of {len(questions):,} prompts left out")
    return kept

def load_examples(path, tokenizer, args):
    """[Rollout] of a .jsonl file with prompt and response; those that are too long left out.

    The response becomes tokens again and gets the end token that the template puts behind it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--data {path}: cannot be read ({error})")
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, response = row["prompt"], row["response"]
            messages = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
            texts = [response, *(m[key] for m in messages for key in ("role", "content"))]
            if len(texts) < 3 or not all(isinstance(t, str) and t.strip() for t in texts):
                raise ValueError("empty, or no text")
            prompt_ids = render(tokenizer, messages, args.enable_thinking)
        except Exception as error:  # no JSON, no object, no such key, what a template objects to
            fail(f"--data {path}, line {number}: needs a prompt and a response ({error!r})")
        response_ids = [*tokenizer.encode(response, add_special_tokens=False),
                        tokenizer.eos_token_id]
        examples.append(Rollout(number, prompt_ids, response_ids, None, response, True))
    kept = [r for r in examples if len(r.prompt_ids) <= args.max_prompt_tokens
            and len(r.response_ids) <= args.max_response_tokens]
    if not kept:
        fail(f"--data {path}: none of {len(examples)} examples within --max_prompt_tokens "
             f"{args.max_prompt_tokens} and --max_response_tokens {args.max_response_tokens}")
    if len(kept) < len(examples) and int(os.environ.get("RANK", 0)) == 0:
        print(f"{path}: {len(examples) - len(kept):,} of {len(examples):,} examples left out")
    return kept

# --- loss ----------------------------------------------------------------------------------------

CHUNK = 512  # positions through the LM head at once: 512 x 151,936 float32 logits are 0.3 GB

def token_logprobs(hidden, head, targets, temperature):
    """log p(target) at each of N positions, (N,) float32, never holding (N, V).

    hidden (N, D) holds the states that predict targets (N,). The logits of a chunk live while it
    is computed, and are made again in backward.
    """
    def chunk(h, y):
        logits = head(h).float().div_(temperature)  # (C, V)
        return logits.gather(-1, y[:, None]).squeeze(-1) - logits.logsumexp(-1)
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK))
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])

def learning_rate(step, steps, args):
    """Of update 1..steps: linear over the first --warmup_ratio of them, then a cosine to 0."""
    warmup = math.ceil(args.warmup_ratio * steps)
    if step <= warmup:
        return args.lr * step / warmup
    return args.lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1))) / 2

# --- rollout (for the evaluation) ----------------------------------------------------------------

@dataclass
class Rollout:
    row: int  # line of the data file, or of the benchmark
    prompt_ids: list
    response_ids: list
    logprobs: np.ndarray | None  # (T,) vLLM's own; of no use here
    text: str
    finished: bool  # by itself, not cut at max_response_tokens
    reward: float = 0.0

    def tokens(self):
        return len(self.prompt_ids) + len(self.response_ids)

DTYPE = dict(cpu=torch.float32, cuda=torch.bfloat16)  # of weights, gradients, vLLM

def make_engine(args, device, share):
    """vLLM in this very process, one engine a rank: its weights are handed over in memory.

    So it reads none itself. On CPU it packs them, and handing over again would miss a head that is
    tied to the embeddings (0.2 off in log-probability, silently): there it gets a head of its own.
    On a GPU it may fill `share` of the memory, and sleeps but for sampling.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # of what it says before it reads that
    if device.type == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        # unless this is set vLLM leaves torch one thread, in the update too
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    from vllm import LLM
    cpu = device.type == "cpu"
    llm = LLM(args.model, dtype=DTYPE[device.type], seed=args.seed, enforce_eager=cpu,
              max_model_len=args.max_prompt_tokens + args.max_response_tokens,
              gpu_memory_utilization=share, distributed_executor_backend="external_launcher",
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

def generate(llm, questions, n, seed, max_tokens, **sampling):
    """n rollouts for each question: a list of groups, in the order of the questions."""
    from vllm import SamplingParams
    # One global seed, none a request: the latter crashes on CPU, the former repeats bit for bit.
    torch.manual_seed(seed)
    llm.reset_prefix_cache()  # nor may what was computed before show in the last bit (--resume)
    params = SamplingParams(n=n, max_tokens=max_tokens, logprobs=0, flat_logprobs=True, **sampling)
    prompts = [dict(prompt_token_ids=q["prompt_ids"]) for q in questions]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[Rollout(row, q["prompt_ids"], list(o.token_ids), np.float32(o.logprobs.logprobs),
                     o.text, o.finish_reason == "stop") for o in output.outputs]
            for row, (q, output) in enumerate(zip(questions, outputs))]

def mark(verifier, groups, questions, **how):
    """All rollouts of the groups, each with its reward: 1 correct, 0 not."""
    rollouts = [r for group in groups for r in group]
    golds = [q["answer"] for q, group in zip(questions, groups) for _ in group]
    for r, reward in zip(rollouts, verifier.verify([r.text for r in rollouts], golds, **how)):
        r.reward = reward
    return rollouts

def exchange(items):
    """Every rank's list, joined in the order of the ranks."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]

# --- update --------------------------------------------------------------------------------------

def deal(rollouts, world_size):
    """Longest first, each to the rank with the fewest tokens so far: one list a rank."""
    hands, load = [[] for _ in range(world_size)], [0] * world_size
    for r in sorted(rollouts, key=lambda r: -r.tokens()):
        rank = load.index(min(load))
        hands[rank].append(r)
        load[rank] += r.tokens()
    return hands

def micro_batches(rollouts, token_budget):
    """Neighbours in length together, as many as fit the budget once padded to the longest."""
    batches = []
    for r in sorted(rollouts, key=lambda r: r.tokens()):
        if batches and (len(batches[-1]) + 1) * r.tokens() <= token_budget:
            batches[-1].append(r)
        else:
            batches.append([r])
    return batches

def response_hidden(model, prompts, responses, device):
    """Last hidden states that predict the response tokens, (N, D), sequence by sequence.

    Padded on the right, and no attention mask: under causal attention no real token sees the
    padding behind it, so that the fast kernel applies.
    """
    width = max(len(p) + len(y) for p, y in zip(prompts, responses))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)  # (B, T)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for i, (p, y) in enumerate(zip(prompts, responses)):
        ids[i, : len(p) + len(y)] = torch.tensor([*p, *y])
        mask[i, len(p) - 1 : len(p) + len(y) - 1] = True  # position t predicts token t + 1
    hidden = model.get_decoder()(input_ids=ids.to(device), use_cache=False).last_hidden_state
    return hidden[mask.to(device)]

class Student(torch.nn.Module):
    """What DDP wraps: backbone and head in one forward, so that its hooks see them all."""

    def __init__(self, model, args, device):
        super().__init__()
        self.model, self.args, self.device = model, args, device

    def forward(self, micro):
        """Log-probabilities of a micro-batch's response tokens, (N,)."""
        prompts, responses = zip(*((r.prompt_ids, r.response_ids) for r in micro))
        targets = torch.tensor([t for y in responses for t in y], device=self.device)
        hidden = response_hidden(self.model, prompts, responses, self.device)
        return token_logprobs(hidden, self.model.get_output_embeddings(), targets, 1.0)

def backward(ddp, optimizer, minibatch, hand):
    """Leaves the mini-batch's gradient, over all ranks, in .grad; returns its loss, nats a token."""
    tokens = sum(len(r.response_ids) for r in minibatch)
    budget, total = ddp.module.args.tokens_per_micro_batch, 0.0
    for own, last in rounds(micro_batches(hand, budget), optimizer):
        with contextlib.nullcontext() if last else ddp.no_sync():
            # an empty one joins the all-reduce with a gradient of 0
            loss = -ddp(own or minibatch[:1]).sum() / tokens * bool(own)
            (loss * dist.get_world_size()).backward()  # DDP takes the mean of what is a sum
        if last and isinstance(optimizer, MasterAdamW):
            optimizer.fold()
        total += loss.item()
    return sum(exchange([total]))

def update(ddp, optimizer, minibatch):
    """One optimizer step; returns the metrics. Every rank holds the whole mini-batch."""
    hand = deal(minibatch, dist.get_world_size())[dist.get_rank()]
    optimizer.zero_grad(set_to_none=False)
    loss = backward(ddp, optimizer, minibatch, hand)
    norm = clip_gradient(ddp, optimizer)
    if math.isfinite(norm):
        optimizer.step()
    return dict(loss=loss, grad_norm=norm, updates=int(math.isfinite(norm)),
                skipped=int(not math.isfinite(norm)),
                trained_tokens=sum(len(r.response_ids) for r in minibatch))

# --- run -----------------------------------------------------------------------------------------

def averages(rollouts):
    """What people watch: score, length in tokens, epistemic markers, share of cut answers."""
    columns = [(r.reward, len(r.response_ids), epistemic.count(r.text), not r.finished)
               for r in rollouts]
    means = np.mean(columns, axis=0).tolist()
    return dict(zip(("score", "length", "epistemic", "truncated"), means))

def record(r, **more):
    """A rollout as a line of a file that epistemic.py and report.py read."""
    return dict(more, correct=r.reward, tokens=len(r.response_ids), finished=r.finished,
                epistemic=epistemic.count(r.text), response=r.text)

def evaluate(llm, verifier, benchmarks, step, args):
    """Averages on every benchmark, into eval/step_N.json, and every answer, into step_N.jsonl."""
    rank, world_size, summary, records = dist.get_rank(), dist.get_world_size(), {}, []
    for name, questions in benchmarks.items():
        mine = questions[rank::world_size]
        # the authors' sampling for this; Table 11 adds top-k 20 after training
        groups = generate(llm, mine, args.eval_rollouts, args.seed, args.max_response_tokens,
                          temperature=0.6, top_p=0.95)
        rollouts = mark(verifier, groups, mine, after_think=True)
        for r in rollouts:
            r.row = rank + world_size * r.row  # the question's place in the benchmark
        rollouts = sorted(exchange(rollouts), key=lambda r: r.row)
        summary[name] = averages(rollouts)
        records += [record(r, benchmark=name, index=r.row, answer=questions[r.row]["answer"])
                    for r in rollouts]
    if rank == 0:
        write_lines(Path(args.run_dir) / f"eval/step_{step}.jsonl", records)
        write_lines(Path(args.run_dir) / f"eval/step_{step}.json", [summary])
        for name, s in summary.items():
            tqdm.write(f"  eval {name:10s} score {s['score']:.3f}  len {s['length']:6,.0f}  "
                       f"epistemic {s['epistemic']:5.1f}")
    return summary

def log(run_dir, step, minibatch, metrics, lr, clock):
    """A line of metrics.jsonl: length and epistemic are those of the step's examples."""
    seconds = {phase: end - start for (_, start, _), (phase, end, _) in itertools.pairwise(clock)}
    memory = {phase: used / 1e9 for phase, _, used in clock[1:]}
    data = averages(minibatch)
    m = dict(step=step, length=data["length"], epistemic=data["epistemic"], **metrics, lr=lr,
             seconds=seconds, tokens_per_second=metrics["trained_tokens"] / seconds["update"],
             peak_memory_gb=memory)
    append_line(run_dir / "metrics.jsonl", m)

def train(examples, llm, verifier, tokenizer, benchmarks, device, offload, args):
    """From --model on one data set; returns the evaluation after the last update, or None where a
    signal has ended it before."""
    import transformers
    rank, run_dir = dist.get_rank(), Path(args.run_dir)
    rng, batches = random.Random(args.seed), []
    for _ in range(args.epochs):
        order = rng.sample(examples, len(examples))
        batches += [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    began, folder = resume_point(args)
    if began == len(batches):
        return json.loads((run_dir / f"eval/step_{began}.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder or args.model,
                                                              dtype=DTYPE[device.type]).to(device)
    if device.type == "cuda":
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.train()
    ddp = in_parallel(Student(model, args, device))
    how = dict(lr=args.lr, weight_decay=0.01)
    if device.type == "cuda":
        optimizer = MasterAdamW(model.parameters(), "cpu" if offload else device, **how)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **how)
    if folder:
        load_trainer_state(folder, model, optimizer)
    elif rank == 0:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                                capture_output=True, text=True).stdout.strip()
        write_lines(run_dir / "config.json", [dict(
            vars(args), script="sft_distill.py", commit=commit, world_size=dist.get_world_size(),
            versions=dict(torch=torch.__version__, transformers=transformers.__version__))])
        print(f"{args.data}: {len(examples):,} examples; results in {run_dir}", flush=True)
    skipped = 0
    bar = tqdm(batches[began:], initial=began, total=len(batches), disable=True if rank else None)
    for step, minibatch in enumerate(bar, began + 1):
        clock = []
        tick(clock, "start")
        lr = learning_rate(step, len(batches), args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        metrics = update(ddp, optimizer, minibatch)
        tick(clock, "update")
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")
        if step % args.eval_every == 0 or step == len(batches):
            sync_weights(llm, model)
            tick(clock, "sync")
            if rank == 0:
                tqdm.write(f"step {step:3d}  loss {metrics['loss']:.3f}")
            summary = evaluate(llm, verifier, benchmarks, step, args)
            sleep(llm)
            tick(clock, "eval")
        if rank == 0:
            log(run_dir, step, minibatch, metrics, lr, clock)
        skipped = skipped + 1 if metrics["skipped"] else 0
        if skipped:
            report_skipped(run_dir, step, minibatch, skipped)
        asked = step < len(batches) and stopped()
        if asked or step % args.save_every == 0 or step == len(batches):
            save_checkpoint(model, tokenizer, step, trainer_state(model, optimizer), args)
        if asked:
            if rank == 0:
                print(f"stopped behind step {step}: the same command with --resume goes on",
                      flush=True)
            return None
    return summary

def table(rows):
    """Table 2: {name: {benchmark: averages}} as a line a name; scores, then lengths and markers."""
    benchmarks = list(next(iter(rows.values())))
    lines = []
    for title, key, form in (("score", "score", ".3f"), ("response tokens", "length", ",.0f"),
                             ("epistemic tokens", "epistemic", ".1f")):
        lines.append(f"{title:20s}" + "".join(f"{name[:11]:>12s}" for name in benchmarks))
        for name, summary in rows.items():
            cells = "".join(f"{summary[b][key]:>12{form}}" for b in benchmarks)
            lines.append(f"  {name:18s}{cells}")
    return "\n".join(lines)

def main():
    args = parse_args()
    check_args(args)
    tokenizer, config = load_tokenizer(args)
    if args.max_prompt_tokens + args.max_response_tokens > config.max_position_embeddings:
        fail(f"--max_prompt_tokens + --max_response_tokens is more than the "
             f"{config.max_position_embeddings:,} positions of {args.model}")
    data = {path: load_examples(path, tokenizer, args) for path in args.data}
    benchmarks = {Path(s).stem: with_prompts(s, tokenizer, args) for s in args.eval_data}
    device = start_process_group()
    import transformers
    transformers.logging.disable_progress_bar()
    offload, vllm_share = memory_plan(args, config, copies=2)
    llm = make_engine(args, device, vllm_share)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    with Verifier() as verifier, watch_ranks():
        base = arguments_of(args, "base")
        summary = Path(base.run_dir) / "eval/step_0.json"
        if args.resume and summary.exists():
            rows = dict(base=json.loads(summary.read_text()))
        else:
            sync_weights(llm, transformers.AutoModelForCausalLM.from_pretrained(
                args.model, dtype=DTYPE[device.type]))
            rows = dict(base=evaluate(llm, verifier, benchmarks, 0, base))
            sleep(llm)
        for path, examples in data.items():
            row = train(examples, llm, verifier, tokenizer, benchmarks, device, offload,
                        arguments_of(args, path))
            if row is None:
                break
            rows[f"SFT on {Path(path).stem}"] = row
    if dist.get_rank() == 0 and len(rows) > len(data):
        write_lines(Path(args.run_dir) / "summary.json", [dict(vars(args), rows=rows)])
        print(f"\n{args.model}, {args.eval_rollouts} answers to a question\n\n{table(rows)}")
    llm.llm_engine.engine_core.shutdown()  # left open, it prints tracebacks at exit
    if dist.is_initialized():
        dist.destroy_process_group()

# --- memory (from here on nothing of the paper: what a long run needs) ---------------------------

def memory_needs(parameters, config, tokens, copies, ranks):
    """Bytes of a GPU: (always there, AdamW's state, a micro-batch of `tokens`, vLLM at the least).

    A parameter takes 2 bytes in each of `copies` (weights, gradient, SDPO's teacher) and 14 / ranks
    of AdamW. Every layer keeps its input for the backward and one is alive as a whole: 40 more of a
    hidden state's size (an MLP three times as wide: 12, with norms and attention about 20, twice for
    the gradients). 3 GB, a guess, are a chunk of logits and what else comes and goes. vLLM has
    weights of its own, 2 bytes, and needs 4 GB or more of KV cache. Not yet held against a GPU.
    """
    activations = 2 * tokens * config.hidden_size * (config.num_hidden_layers + 40) + 3e9
    return 2 * copies * parameters, 14 * parameters / ranks, activations, 2 * parameters + 4e9

def memory_plan(args, config, copies):
    """(AdamW's state in CPU memory?, vLLM's share of the GPU) from what is free on it."""
    if not torch.cuda.is_available():
        return False, 0.5  # which vLLM ignores on CPU: VLLM_CPU_KVCACHE_SPACE
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    free, total = torch.cuda.mem_get_info()
    tokens = max(args.tokens_per_micro_batch, args.max_prompt_tokens + args.max_response_tokens)
    always, state, activations, engine = memory_needs(parameters, config, tokens, copies,
                                                      dist.get_world_size())
    needed = always + max(activations, engine)  # one sleeps while the other works
    offload = needed + state > free if args.offload_optimizer is None else args.offload_optimizer
    always += 0 if offload else state
    if always + max(activations, engine) > free:
        needed = always + max(activations, engine)
        fail(f"--model {args.model}: needs about {needed / 1e9:.0f} GB of every GPU, "
             f"{free / 1e9:.0f} GB are free")
    return offload, (free - always - 2e9) / total

class MasterAdamW(torch.optim.AdamW):
    """AdamW of bfloat16 weights by way of float32 masters; every tensor has one rank as its owner.

    A step of 1e-6 is a hundredth of bfloat16's spacing at a weight of 0.02: by itself such a weight
    never moves. Its master does, and the weight follows as the master's rounding. Bytes a
    parameter: on every GPU 2 of weight and 2 of gradient; at the owner 4 of master, 8 of moments
    and 2 of gradient (ZeRO stage 1), on its GPU or in CPU memory. Qwen3-8B's 8.19e9 parameters on
    one GPU: 33 GB there and 115 GB in CPU memory; on eight, 14 GB each. `weights` are in the same
    order everywhere.
    """

    def __init__(self, weights, device, **how):
        self.weights, load, self.owner = list(weights), [0] * dist.get_world_size(), {}
        for i in sorted(range(len(self.weights)), key=lambda i: -self.weights[i].numel()):
            self.owner[i] = load.index(min(load))
            load[self.owner[i]] += self.weights[i].numel()
        self.mine = [w for i, w in enumerate(self.weights) if self.owner[i] == dist.get_rank()]
        masters = [w.detach().to(device, torch.float32, copy=True) for w in self.mine]
        self.sums, self.scale = [torch.zeros_like(w, device=device) for w in self.mine], 1.0
        super().__init__(masters, fused=True, **how)
        # One pinned tensor on the way: to pin all would round each one's size up to a power of two
        largest, off = max(w.numel() for w in self.mine), self.mine[0].device != masters[0].device
        self.way = torch.empty(largest, dtype=self.mine[0].dtype, device=device, pin_memory=off)
        self.grad = torch.empty(largest, device=device)

    def zero_grad(self, set_to_none=False):
        torch._foreach_zero_(self.sums)  # the weights' gradients are 0 since the last fold
        self.scale = 1.0

    @torch.no_grad()
    def fold(self):
        """Ends a round of micro-batches: their gradient goes from the weights to their owners.

        A sum of sums, because bfloat16 has 8 bits: a term below a 512th of what is there adds
        nothing. 683 added one by one came out 18% off, in rounds of 32 0.7% (benchmarks/NOTES.md).
        """
        for weight, total in zip(self.mine, self.sums):
            total += self.way[: weight.numel()].view_as(weight).copy_(weight.grad)
        torch._foreach_zero_([w.grad for w in self.weights])

    @torch.no_grad()
    def clip(self, limit):
        """Has step scale the gradient to a norm of at most `limit`; returns what it is."""
        square = sum(torch.linalg.vector_norm(s, dtype=torch.float32).square() for s in self.sums)
        dist.all_reduce(square)
        norm = square.sqrt().item()
        self.scale = min(1.0, limit / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self):
        """Tensor by tensor: the gradient is never whole in float32."""
        masters = self.param_groups[0]["params"]
        for weight, total, master in zip(self.mine, self.sums, masters):
            way, master.grad = (buffer[: weight.numel()].view_as(weight)
                                for buffer in (self.way, self.grad))
            master.grad.copy_(total).mul_(self.scale)
            super().step()
            master.grad = None
            weight.copy_(way.copy_(master))
        for i, weight in enumerate(self.weights):
            dist.broadcast(weight.detach(), self.owner[i])

ROUND = 32  # micro-batches whose gradients are added in bfloat16 before they are folded

def rounds(batches, optimizer):
    """A rank's micro-batches as (micro-batch, whether an all-reduce follows) pairs.

    In float32 one all-reduce comes at the end. MasterAdamW wants one every ROUND micro-batches, as
    many on every rank: a rank with fewer, or none, joins in with empty ones.
    """
    most = max(exchange([len(batches)]))
    number = -(-most // ROUND) if isinstance(optimizer, MasterAdamW) else 1
    batches = batches + [[]] * (number - len(batches))
    cuts = [len(batches) * i // number for i in range(1, number + 1)]
    return [(micro, i + 1 in cuts) for i, micro in enumerate(batches)]

def clip_gradient(model, optimizer):
    """Scales the gradient to a norm of at most 1 (Table 8); returns what it was."""
    if isinstance(optimizer, MasterAdamW):
        return optimizer.clip(1.0)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()

def in_parallel(student):
    """DDP, its buckets being the gradients themselves: they are there before it and stay for ever.

    Set to None in between, what no_sync adds up would lie beside the buckets, Qwen3-8B's in 16 GB.
    """
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    return DistributedDataParallel(student, gradient_as_bucket_view=True)

def tick(clock, phase):
    """Ends a phase of the step: adds its name, the time, and the memory it has come to, in bytes.

    On a GPU that is all that is taken, by vLLM as well: torch's allocator keeps its peak.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        memory = total - free
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the run so far
    clock.append((phase, time.time(), memory))

# --- checkpoints ---------------------------------------------------------------------------------

def check_run_dir(args):
    """A new run wants a new folder; a resumed one its own, and the flags it began with."""
    run_dir, config = Path(args.run_dir), Path(args.run_dir) / "config.json"
    if not args.resume and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        fail(f"--run_dir {run_dir} already holds results: name another folder, remove it, or go on "
             f"with --resume")
    whole = run_dir.absolute()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    if not os.access(there, os.W_OK):
        fail(f"--run_dir {run_dir}: {there} cannot be written to")
    if args.resume and config.exists():
        free = {"resume", "steps", "eval_data", "eval_rollouts", "eval_every", "save_every",
                "keep_checkpoints", "offload_optimizer"}
        try:
            began = json.loads(config.read_text())
        except (OSError, ValueError) as error:
            fail(f"{config}: cannot be read ({error})")
        changed = [f"--{name} {value} (was {began.get(name)})" for name, value in vars(args).items()
                   if name not in free and began.get(name) != value]
        if changed:
            fail(f"--resume wants the flags that {run_dir} began with: {', '.join(changed)}")

def cannot_write(path, error):
    """A full disk, a folder made read-only or deleted under the run: one line, exit code 1."""
    sys.exit(f"error: {path}: cannot be written ({error!r:.200}); what was finished is whole: put "
             f"that right and go on from there")

def write_lines(path, rows):
    """JSON Lines, written aside and renamed, so that a reader never finds half a file."""
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        aside.rename(path)
    except OSError as error:
        cannot_write(path, error)

def append_line(path, row):
    """A line more of a run's file. Where config.json is gone, so is the run: nothing begins anew."""
    try:
        path.with_name("config.json").stat()
        with open(path, "a") as f:
            f.write(json.dumps(row) + "\n")
    except OSError as error:
        cannot_write(path, error)

def save_checkpoint(model, tokenizer, step, state, args):
    """A Hugging Face folder with every rank's trainer state in it, whole or not there at all.

    Written aside, sealed with a manifest, renamed; then all but the newest --keep_checkpoints go.
    """
    folder = Path(args.run_dir) / f"checkpoints/step_{step}"
    aside, rank = folder.with_name(folder.name + ".part"), dist.get_rank()
    try:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)  # of a killed run
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        exchange([])  # the folder is there
        torch.save(state, aside / f"trainer_state_{rank}.pt")
        exchange([])  # all ranks have written
        if rank == 0:
            manifest = {path.name: seal(path) for path in sorted(aside.iterdir())}
            write_lines(aside / "manifest.json", [manifest])
            shutil.rmtree(folder, ignore_errors=True)  # damaged, or the run would not be here
            aside.rename(folder)
            for old in checkpoints(args.run_dir)[args.keep_checkpoints:]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # all three come of a full disk
        cannot_write(aside, error)

def seal(path):
    """(bytes, SHA-256) of a file, after it has reached the disk."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        return path.stat().st_size, hashlib.file_digest(f, "sha256").hexdigest()

def checkpoints(run_dir):
    """The run's checkpoint folders, newest first; .part ones are none."""
    found = [p for p in Path(run_dir).glob("checkpoints/step_*") if p.suffix != ".part"]
    return sorted(found, key=lambda p: -int(p.name[5:]))

def damage(folder):
    """What is wrong with a checkpoint, by its manifest; None if nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        wrong = [name for name, sealed in manifest.items() if [*seal(folder / name)] != sealed]
    except (OSError, ValueError) as error:
        return str(error)
    return f"{', '.join(wrong)}: not what was written" if wrong else None

def resume_point(args):
    """(step, folder) to go on from; (0, None) for a new run. Metrics behind it are taken away."""
    point = (0, None)
    if args.resume and dist.get_rank() == 0:
        for folder in checkpoints(args.run_dir):
            wrong = damage(folder)
            if wrong is None:
                point = (int(folder.name[5:]), folder)
                break
            print(f"{folder} is damaged ({wrong}): the one before it is used", file=sys.stderr)
        metrics = Path(args.run_dir) / "metrics.jsonl"
        if metrics.exists():
            lines = [json.loads(line) for line in metrics.read_text().splitlines(True)
                     if line.endswith("\n")]
            write_lines(metrics, [m for m in lines if m["step"] <= point[0]])
        print(f"{args.run_dir}: goes on behind step {point[0]}", flush=True)
    return exchange([point])[0]

def optimizer_parameters(model, optimizer):
    """{name: parameter as the optimizer has it}: all of them, or this rank's masters."""
    names = [name for name, _ in model.named_parameters()]
    if isinstance(optimizer, MasterAdamW):
        names = [n for i, n in enumerate(names) if optimizer.owner[i] == dist.get_rank()]
    return dict(zip(names, optimizer.param_groups[0]["params"], strict=True))

def trainer_state(model, optimizer):
    """{name: its tensors}, what this rank alone knows. No random numbers: all are drawn from
    (seed, step, row), and the data order from (seed, step)."""
    if dist.get_rank() and not isinstance(optimizer, MasterAdamW):
        return {}  # the same on every rank
    return {name: dict(optimizer.state[p], value=p.detach())
            for name, p in optimizer_parameters(model, optimizer).items()}

def load_trainer_state(folder, model, optimizer):
    """Gives the optimizer its tensors back, whichever rank has written them."""
    held, files = optimizer_parameters(model, optimizer), sorted(folder.glob("trainer_state_*.pt"))
    for path in files:
        for name, tensors in torch.load(path, "cpu", mmap=True, weights_only=True).items():
            if name in held:
                held[name].data.copy_(tensors.pop("value"))
                optimizer.state[held[name]] = {k: v.to(held[name].device, copy=True)
                                               for k, v in tensors.items()}
    if len(files) != dist.get_world_size() and dist.get_rank() == 0:
        print(f"{folder} was written by {len(files)} ranks and goes on with "
              f"{dist.get_world_size()}: the same weights, another sequence of random numbers")

# --- start, signals, ranks -----------------------------------------------------------------------

def load_tokenizer(args):
    """(tokenizer, config) of --model: what can be wrong with it shows before its weights load."""
    from transformers import AutoConfig, AutoTokenizer
    try:
        config = AutoConfig.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        fail(f"--model {args.model}: no model folder, and no model on the hub "
             f"({str(error).strip().splitlines()[0]})")
    if tokenizer.chat_template is None:
        fail(f"--model {args.model}: its tokenizer has no chat template")
    if len(tokenizer) > config.vocab_size:
        fail(f"--model {args.model}: the tokenizer has {len(tokenizer):,} tokens and the model "
             f"{config.vocab_size:,}: they do not belong together")
    if tokenizer.eos_token_id is None:
        fail(f"--model {args.model}: its tokenizer has no end token, so no answer would end")
    if int(os.environ.get("RANK", 0)) == 0:
        if args.enable_thinking and not any(word in str(tokenizer.chat_template)
                                            for word in ("enable_thinking", "<think>")):
            print(f"{args.model}: its chat template has no thinking to switch on")
        if not ends_answers(tokenizer, args.model):
            print(f"{args.model}: its chat template ends no answer with {tokenizer.eos_token}: most "
                  f"will run on to --max_response_tokens")
    return tokenizer, config

def ends_answers(tokenizer, model):
    """Whether an answer in the chat template is followed by a token that vLLM stops at."""
    from transformers import GenerationConfig
    ends = [tokenizer.eos_token_id]
    with contextlib.suppress(OSError):  # a folder without generation_config.json
        more = GenerationConfig.from_pretrained(model).eos_token_id
        ends += more if isinstance(more, list) else [more]
    chat = [dict(role="user", content="Question"), dict(role="assistant", content="Answer")]
    _, _, behind = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("Answer")
    return not set(ends).isdisjoint(tokenizer.encode(behind, add_special_tokens=False))

def start_process_group():
    """torchrun's group, or under plain python one of a single process; returns its device."""
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items():
        os.environ.setdefault(name, str(value))
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", **alone)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", **alone)
    return device

# What SIGTERM and Ctrl-C leave: when the first came, and whether one may break off the sampling.
stop = dict(asked=None, breaks=False)

def on_signal(number, _):
    """The first ends the run in good order; one more than a second later, at once."""
    if stop["asked"] and time.time() > stop["asked"] + 1:
        os._exit(128 + number)
    stop["asked"] = stop["asked"] or time.time()
    if stop["breaks"]:
        raise KeyboardInterrupt

def stopped():
    """Whether a signal has reached any rank: all of them hear the same."""
    return any(exchange([stop["asked"] is not None]))

@contextlib.contextmanager
def watch_ranks(limit=40):
    """Ends the job if a rank shows no sign of life for `limit` seconds: stopped, or unreachable.

    The others would wait for it in a collective for half an hour. A thread of every rank counts up
    in torchrun's store; who sees another's count stand still says so, kills it if it can (torchrun
    itself asks first, and waits 30 s), and leaves. The thread ends before the process does: caught
    inside the store by the interpreter's end, it aborts it.
    """
    rank, world_size, over = dist.get_rank(), dist.get_world_size(), threading.Event()
    if world_size == 1:
        yield
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False)

    def watch():
        last = {other: (None, time.monotonic()) for other in range(world_size)}
        for count in itertools.count():
            store.set(f"alive/{rank}", f"{count} {socket.gethostname()} {os.getpid()}")
            for other, (said, since) in last.items():
                key = f"alive/{other}"
                says = store.get(key).decode() if store.check([key]) else None
                if says != said:
                    last[other] = (says, time.monotonic())
                elif says != "ended" and time.monotonic() > since + limit:
                    print(f"error: rank {other} has shown no sign of life for {limit} s: the job "
                          f"ends; --resume goes on", file=sys.stderr, flush=True)
                    _, host, pid = said.split() if said else (None, None, None)
                    if host == socket.gethostname():
                        os.kill(int(pid), signal.SIGKILL)
                    os._exit(1)
            if over.wait(2):
                return store.set(f"alive/{rank}", "ended")

    def watch_or_end():
        try:
            watch()
        except dist.DistError:
            print(f"error: rank {rank} has lost torchrun: it ends", file=sys.stderr, flush=True)
            os._exit(1)
    thread = threading.Thread(target=watch_or_end, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

def report_skipped(run_dir, step, rollouts, in_a_row):
    """An update with an infinite or undefined gradient was not made: keeps all that it was made of.

    Ends the run at the third step in a row: what has gone wrong does not mend itself.
    """
    path = run_dir / f"rollouts/step_{step}_skipped.jsonl"
    if dist.get_rank() == 0:
        write_lines(path, [record(r, row=r.row) for r in rollouts])
        tqdm.write(f"step {step}: gradient infinite or undefined, update skipped; see {path}")
    if in_a_row == 3:
        sys.exit("error: three steps in a row without a usable gradient: lower --lr, or go on from "
                 "an earlier checkpoint with --resume")

if __name__ == "__main__":
    main()
