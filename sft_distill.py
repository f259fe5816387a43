"""SFT on the model's own answers, off-policy self-distillation: Sec. 4 and Table 2 of the paper.

Two sets of correct answers to the same questions, both written by the model itself: d_ug, written
without help (long, with many epistemic words), and d_sg, written with a solution in the prompt
(short, with few). Both are trained under the plain prompt. Fine-tuning on the first changes little;
on the second it costs a third to two thirds of the score, although every answer is right.

    M=deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
    for D in d_ug d_sg; do torchrun --nproc_per_node 8 sft_distill.py --model $M \\
        --data runs/conditions/$D.jsonl --run_dir runs/sft/$D; done
    torchrun --nproc_per_node 8 evaluate.py --model $M runs/sft/*/checkpoints/step_75     # Table 2

--data is JSON Lines with `prompt` (messages, or the user's text) and `response` or `completion`, or
with `messages` of which the last is the assistant's. The loss is the cross-entropy of the response
and its end token, a mean over all tokens of a batch. The same command again resumes the run.

Neither the paper nor the authors' code says how they trained. Ours is common practice for 800 long
answers and a 7B model: full fine-tuning, 3 epochs, 32 examples a step (75 steps), AdamW at 1e-5,
linear warm-up over the first tenth, then a cosine to 0, gradients clipped at 1.

Watch: `loss` starts low, since the model wrote the answers itself (d_ug lower than d_sg: without
the solution in the prompt a short answer is less likely), and falls slowly. In evaluate.py's table
length and epistemic change little with d_ug, and fall with d_sg.
"""
import argparse
import fcntl
import itertools
import json
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
        description="SFT on the model's own answers (Sec. 4). The paper states no settings.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, usage=argparse.SUPPRESS)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    count, share = number(int, 1), number(float, 0, 1)
    add("--model", required=True, help="hub id or Hugging Face folder")
    add("--data", required=True, help=".jsonl file of prompts and responses")
    add("--enable_thinking", action=switch, default=True, help="for Qwen3's chat template")
    add("--max_prompt_tokens", type=count, default=2048, help="longer prompts are dropped")
    add("--max_response_tokens", type=count, default=32768, help="longer examples are dropped")
    add("--epochs", type=count, default=3, help="passes over the data")
    add("--batch_size", type=count, default=32, help="examples per optimizer step, of all ranks")
    add("--lr", type=share, default=1e-5, help="learning rate at its peak")
    add("--warmup_ratio", type=share, default=0.1, help="share of the steps; then cosine to 0")
    add("--tokens_per_micro_batch", type=count, default=24576, help="padding included")
    add("--recompute_layers", action=switch, default=True, help="without: faster, bigger")
    add("--run_dir", default="runs/sft", help="a new folder, or a run to resume")
    add("--seed", type=number(int, 0), default=0, help="of data order")
    add("--save_every", type=count, default=25, help="steps between checkpoints")
    add("--wandb", action="store_true", help="metrics to Weights & Biases, too")
    return parser

# --- data ----------------------------------------------------------------------------------------

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

@dataclass
class Example:
    prompt_ids: list
    response_ids: list  # with the end token
    text: str
    weight: float = 0.0  # of each of its tokens in the loss

    def tokens(self):
        return len(self.prompt_ids) + len(self.response_ids)

def messages_and_response(row):
    """([message] of the prompt, text of the response) of a line in any of the three forms."""
    def chat(role, text):
        return text if isinstance(text, list) else [dict(role=role, content=text)]
    *messages, last = row.get("messages") or [
        *chat("user", row.get("prompt")),
        *chat("assistant", row.get("response") or row.get("completion"))]
    texts = [m[key] for m in [*messages, last] for key in ("role", "content")]
    if not messages or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("a text is empty or missing")
    if last["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    return messages, last["content"]

def read_examples(path, tokenizer, args):
    """[Example] of a .jsonl file; drops those that are too long.

    The response becomes tokens again and gets the end token that the template writes after it.
    """
    examples = []
    for line, text in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            messages, response = messages_and_response(json.loads(text.decode("utf-8-sig")))
            prompt_ids = render(tokenizer, messages, args.enable_thinking)
            if tokenizer.decode(prompt_ids).endswith("<think>\n"):
                # DeepSeek-R1-Distill's template writes it: a second one would be trained
                response = re.sub(r"^\s*<think>\n?", "", response)
            response_ids = tokenizer.encode(response, add_special_tokens=False)
        except Exception as error:  # what JSON, a template and a tokenizer raise: no common class
            raise ValueError(f"--data {path}, line {line}: needs a prompt and a response "
                             f"({type(error).__name__}: {error})") from None
        examples.append(Example(prompt_ids, [*response_ids, tokenizer.eos_token_id], response))
    kept = [r for r in examples if len(r.prompt_ids) <= args.max_prompt_tokens
            and len(r.response_ids) <= args.max_response_tokens]
    say(f"{path}: {len(kept):,} of {len(examples):,} examples fit --max_prompt_tokens and "
        "--max_response_tokens")
    if not kept:
        raise ValueError(f"--data {path}: no example fits")
    return kept

def make_batches(examples, args):
    """The examples of each step: shuffled anew every epoch."""
    rng, batches = random.Random(args.seed), []
    for _ in range(args.epochs):
        order = rng.sample(examples, len(examples))
        batches += [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    return batches

# --- loss ----------------------------------------------------------------------------------------

CHUNK = 512  # positions at once in the LM head: 512 x 151,936 float32 logits are 0.3 GB

def logprobs_at(hidden, head, ids, temperature):
    """log p of token ids (C, k) after hidden states (C, D), of the full softmax: (C, k) float32."""
    logits = head(hidden).float().div_(temperature)  # (C, V)
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)

def token_logprobs(hidden, head, targets, temperature):
    """log p(target) at N positions, (N,) float32; hidden (N, D) predict targets (N,).

    (N, V) never exists: `checkpoint` drops a chunk's logits after its forward and computes them
    again in backward.
    """
    def chunk(hidden, target):
        return logprobs_at(hidden, head, target[:, None], temperature)[:, 0]
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK))
    return torch.cat([checkpoint(chunk, *parts, use_reentrant=False) for parts in chunks])

def learning_rate(step, steps, args):
    """Of step 1..steps: linear over the first --warmup_ratio of them, then a cosine to 0."""
    warmup = math.ceil(args.warmup_ratio * steps)
    if step <= warmup:
        return args.lr * step / warmup
    return args.lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1))) / 2

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
    """What DDP wraps: backbone and LM head in one forward, so that its hooks see them all."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, micro_batch):
        """Log-probabilities of a micro-batch's response tokens, (N,)."""
        responses = [r.response_ids for r in micro_batch]
        hidden = response_hidden(self.model, [r.prompt_ids for r in micro_batch], responses)
        targets = torch.tensor([t for y in responses for t in y], device=hidden.device)
        head = self.model.get_output_embeddings()
        return token_logprobs(hidden, head, targets, temperature=1.0)

# Micro-batches between two all-reduces. bfloat16 has 8 bits: the gradients of 683 micro-batches
# added one by one came out 18% wrong, in rounds of 32 0.7% (benchmarks/README.md).
ROUND = 32

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # weights and gradients

def update(ddp, optimizer, batch, lr):
    """One optimizer step; returns the metrics. Every rank holds the whole batch."""
    device, tokens = ddp.module.model.device, sum(len(r.response_ids) for r in batch)
    for r in batch:
        r.weight = 1 / tokens
    micros = my_micro_batches(batch, ddp.module.args.tokens_per_micro_batch)
    total = torch.zeros((), dtype=torch.float64, device=device)
    bar = progress(total=len(micros), desc="update", unit="micro-batch")
    for i, micro_batch in enumerate(micros, 1):
        weight = torch.tensor([r.weight for r in micro_batch for _ in r.response_ids]).to(device)
        ddp.require_backward_grad_sync = i % ROUND == 0 or i == len(micros)
        loss = -(ddp(micro_batch) * weight).sum()
        (loss * dist.get_world_size()).backward()  # DDP takes the mean over ranks, not the sum
        if ddp.require_backward_grad_sync:
            optimizer.add_gradients()
        total += loss.detach()
        bar.update()
    bar.close()
    dist.all_reduce(total)
    norm = optimizer.step(lr, max_norm=1.0)
    unused, memory = torch.cuda.mem_get_info() if device.type == "cuda" else (
        0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return dict(loss=total.item(), grad_norm=norm, updates=int(math.isfinite(norm)), lr=lr,
                skipped=int(not math.isfinite(norm)), trained_tokens=tokens,
                peak_memory_gb=(memory - unused) / 1e9)

# --- run -----------------------------------------------------------------------------------------

def main():
    parser = make_parser()
    args = parser.parse_args()
    try:  # bad input ends with one line and exit code 2, before a model is loaded
        path, tokenizer = load_tokenizer(
            args.model, args.max_prompt_tokens + args.max_response_tokens)
        examples = read_examples(args.data, tokenizer, args)
        batches = make_batches(examples, args)
        args.examples, args.steps = len(examples), len(batches)  # a run resumes with the same data
        begin_run(args, path)
    except Exception as error:  # what transformers raises has no common class
        parser.error(" ".join(str(error).split()))
    if args.steps in resumable(args.run_dir):
        return say(f"{args.run_dir} has finished its {args.steps} steps")
    device = start_process_group()
    say(f"{args.model} loads")
    model = load_model(path, device)
    compile_layers(model)
    if args.recompute_layers:
        model.train().gradient_checkpointing_enable(dict(use_reentrant=False))
    optimizer = MasterAdamW(model, lr=args.lr, weight_decay=0.01)
    done = load_checkpoint(args.run_dir, optimizer.tensors())  # steps
    write_weights(optimizer.masters, model)
    ddp = with_gradients(Student(model, args))
    for step, batch in enumerate(batches[done:], done + 1):
        start = time.time()
        metrics = update(ddp, optimizer, batch, learning_rate(step, args.steps, args))
        log(args, step, batch, metrics, time.time() - start)
        if step % args.save_every == 0 or step == args.steps:
            save_checkpoint(model, tokenizer, step, optimizer.tensors(), args.run_dir)
    say(f"results are in {args.run_dir}")
    del ddp  # before its process group: afterwards that may hang (gloo, torch 2.13)
    dist.destroy_process_group()

# --- logging (from here on nothing of the paper) -------------------------------------------------

def log(args, step, batch, metrics, seconds):
    """A line of metrics.jsonl and one on the screen; length and epistemic are the examples'."""
    if dist.get_rank():
        return
    m = dict(step=step, length=metrics["trained_tokens"] / len(batch),
             epistemic=sum(epistemic.count(r.text) for r in batch) / len(batch), **metrics,
             seconds=dict(update=seconds), tokens_per_second=metrics["trained_tokens"] / seconds)
    with open(Path(args.run_dir, "metrics.jsonl"), "a") as file:
        file.write(json.dumps(m) + "\n")
    if args.wandb:
        import wandb
        wandb.log(m, step=step)
    result = f"loss {m['loss']:.3f}" if m["updates"] else "skipped: gradient not finite"
    minutes = (args.steps - step) * seconds / 60
    left = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    say(f"step {step}/{args.steps}  {result}  {m['tokens_per_second']:,.0f} tokens/s  {left} left")

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
