"""SFT on the model's own answers, off-policy self-distillation: Sec. 4 and Table 2 of the paper.

Two sets of correct answers to the same questions, both written by the model itself and both under
the plain prompt: d_ug, written without help (long, full of doubt), and d_sg, written with a
solution in the prompt (short, sure). Fine-tuning on the first changes little; on the second it
costs a third to two thirds of the score, although every answer is right.

    M=deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
    for D in d_ug d_sg; do torchrun --nproc_per_node 8 sft_distill.py --model $M \\
        --data runs/conditions/$D.jsonl --run_dir runs/sft/$D; done
    torchrun --nproc_per_node 8 evaluate.py --model $M runs/sft/*/checkpoints/step_75     # Table 2
    make demo                                               # a small one, on two CPU cores

--data takes any JSON Lines file with `prompt` (messages, or the user's text) and `response`. The
loss is the cross-entropy of the response and the end token after it, a mean over all tokens of a
batch; prompt and padding never count.

Neither the paper nor the authors' code says how they trained. Ours is common practice for 800 long
answers and a 7B model: full fine-tuning, 3 epochs, 32 examples a step (75 steps), AdamW at 1e-5,
linear warm-up over the first tenth, then a cosine to 0, gradients clipped at 1.

Watch: `loss` starts low, since the model wrote the answers itself (d_ug lower than d_sg: without
the solution in the prompt a sure answer surprises it), and falls slowly. In evaluate.py's table
length and epistemic stay where they are on d_ug, and fall on d_sg.

The paper ends with main(). After it: logging, memory, checkpoints; read them when needed.
"""
import argparse
import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import epistemic

# --- arguments -----------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="SFT on the model's own answers (Sec. 4). The paper states no settings.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, switch = fail, argparse.BooleanOptionalAction
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, help="hub id or Hugging Face folder")
    add("--data", required=True, help=".jsonl file of prompt and response")
    add("--enable_thinking", action=switch, default=True, help="for Qwen3's chat template")
    add("--max_prompt_tokens", type=int, default=2048, help="longer prompts are left out")
    add("--max_response_tokens", type=int, default=32768, help="longer examples are left out")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=3, help="times that each example is seen")
    add("--batch_size", type=int, default=32, help="examples an update, over all ranks")
    add("--lr", type=float, default=1e-5, help="learning rate at its peak")
    add("--warmup_ratio", type=float, default=0.1, help="share of the updates; then cosine to 0")
    add = parser.add_argument_group("memory").add_argument
    add("--tokens_per_micro_batch", type=int, default=24576, help="padded; a longer one goes alone")
    add("--recompute_layers", action=switch, default=True, help="without: faster, more memory")
    add("--offload_optimizer", action=switch, default=True, help="AdamW's state in CPU memory")
    add = parser.add_argument_group("run").add_argument
    add("--run_dir", default="runs/sft", help="a new folder")
    add("--seed", type=int, default=0, help="of data order")
    add("--save_every", type=int, default=25, help="updates; also after the last")
    add("--resume", action="store_true", help="go on from --run_dir's newest checkpoint that loads")
    add("--wandb", action="store_true", help="the metrics to Weights & Biases, where installed")
    return with_flags_of_the_run(parser, argv)

def check_args(args):
    for name, value in vars(args).items():
        if type(value) is int and value < 1 and name != "seed":
            fail(f"--{name} {value} must be at least 1")
    if not 0 <= args.warmup_ratio <= 1:
        fail(f"--warmup_ratio {args.warmup_ratio} must lie between 0 and 1")

# --- data ----------------------------------------------------------------------------------------

def render(tokenizer, messages, enable_thinking):
    """Token ids of a chat up to where the model speaks (Table 12); the template writes any BOS."""
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

def load_examples(path, tokenizer, args):
    """[Example] of a .jsonl file with prompt and response; those that are too long left out.

    The response becomes tokens again and gets the end token that the template puts after it.
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
        examples.append(Example(prompt_ids, response_ids, response))
    kept = [r for r in examples if len(r.prompt_ids) <= args.max_prompt_tokens
            and len(r.response_ids) <= args.max_response_tokens]
    if not kept:
        fail(f"--data {path}: none of {len(examples)} examples within --max_prompt_tokens "
             f"{args.max_prompt_tokens} and --max_response_tokens {args.max_response_tokens}")
    if len(kept) < len(examples):
        say(f"{path}: {len(examples) - len(kept):,} of {len(examples):,} examples left out")
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
    """What DDP wraps: backbone and head in one forward, so that its hooks see them all."""

    def __init__(self, model, args, device):
        super().__init__()
        self.model, self.args, self.device = model, args, device

    def forward(self, micro_batch):
        """Log-probabilities of a micro-batch's response tokens, (N,)."""
        prompts, responses = zip(*((r.prompt_ids, r.response_ids) for r in micro_batch))
        targets = torch.tensor([t for y in responses for t in y], device=self.device)
        hidden = response_hidden(self.model, prompts, responses, self.device)
        return token_logprobs(hidden, self.model.get_output_embeddings(), targets, 1.0)

ROUND = 32  # micro-batches whose gradients are added up before an all-reduce: see MasterAdamW.fold

def backward(ddp, optimizer, micros):
    """Leaves the mini-batch's gradient, over all ranks, in the optimizer; returns its loss.

    `micros` are this rank's micro-batches.
    """
    total = 0.0
    for i, micro_batch in enumerate(micros, 1):
        weight = torch.tensor([r.weight for r in micro_batch for _ in r.response_ids],
                              device=ddp.module.device)
        last = i % ROUND == 0 or i == len(micros)
        with contextlib.nullcontext() if last else ddp.no_sync():
            loss = -(ddp(micro_batch) * weight).sum()
            (loss * dist.get_world_size()).backward()  # DDP takes the mean of what is a sum
        if last:
            optimizer.fold()
        total += loss.item()
    return sum(exchange([total]))

def update(ddp, optimizer, minibatch, lr):
    """One optimizer step; returns the metrics. Every rank holds the whole mini-batch."""
    tokens = sum(len(r.response_ids) for r in minibatch)
    for r in minibatch:
        r.weight = 1 / tokens
    optimizer.zero_grad()
    micros = my_micro_batches(minibatch, ddp.module.args.tokens_per_micro_batch)
    loss = backward(ddp, optimizer, micros)
    norm = optimizer.step(lr, max_norm=1.0)
    return dict(loss=loss, grad_norm=norm, updates=int(math.isfinite(norm)),
                skipped=int(not math.isfinite(norm)), trained_tokens=tokens)

# --- run -----------------------------------------------------------------------------------------

def main():
    args = parse_args()
    check_args(args)
    tokenizer, _ = load_tokenizer(args.model, args.max_prompt_tokens + args.max_response_tokens)
    examples = load_examples(args.data, tokenizer, args)
    rng, batches = random.Random(args.seed), []
    for _ in range(args.epochs):
        order = rng.sample(examples, len(examples))
        batches += [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    device = start_process_group()
    begin_run(args)
    say(f"{args.model} loads")
    model = load_model(args.model, device)
    compile_layers([model], device)
    if args.recompute_layers:
        model.train().gradient_checkpointing_enable(dict(use_reentrant=False))
    optimizer = MasterAdamW(model.named_parameters(), "cpu" if args.offload_optimizer else device,
                            lr=args.lr, weight_decay=0.01)
    ddp = DistributedDataParallel(Student(model, args, device), gradient_as_bucket_view=True,
                                  broadcast_buffers=False)
    state = optimizer.tensors()
    done = load_checkpoint(args.run_dir, state)
    optimizer.write_weights()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember_signal)
    say(f"{len(examples):,} examples, {len(batches)} updates; results in {args.run_dir}")
    for step, batch in enumerate(batches[done:], done + 1):
        start, lr = time.time(), learning_rate(step, len(batches), args)
        metrics = update(ddp, optimizer, batch, lr)
        if dist.get_rank() == 0:
            log(args, step, batch, dict(metrics, lr=lr), time.time() - start)
        asked = any(exchange([stop["asked"]]))  # a signal has reached some rank: all hear the same
        if asked or step % args.save_every == 0 or step == len(batches):
            save_checkpoint(model, tokenizer, step, state, args.run_dir)
        if asked and step < len(batches):
            say(f"stopped after step {step}: the same command with --resume goes on")
            break
    del ddp  # freed after the group is gone, it can hang (gloo, torch 2.13)
    dist.destroy_process_group()

# --- logging (from here on nothing of the paper: what a long run needs) --------------------------

def log(args, step, batch, metrics, seconds):
    """A line of metrics.jsonl and one on the screen; length and epistemic are the examples'.

    peak_memory_gb: the most that torch has taken so far.
    """
    memory = (torch.cuda.max_memory_reserved() if torch.cuda.is_available() else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    m = dict(step=step, length=metrics["trained_tokens"] / len(batch),
             epistemic=sum(epistemic.count(e.text) for e in batch) / len(batch), **metrics,
             seconds=dict(update=seconds), peak_memory_gb=memory / 1e9,
             tokens_per_second=metrics["trained_tokens"] / seconds)
    with open(Path(args.run_dir) / "metrics.jsonl", "a") as f:
        f.write(json.dumps(m) + "\n")
    if args.wandb:
        import wandb
        wandb.log(m, step=step)
    result = "  gradient not finite: update skipped" if m["skipped"] else ""
    say(f"step {step:3d}  loss {m['loss']:.3f}{result}  | update {seconds:.1f} s | "
        f"{m['tokens_per_second']:,.0f} tok/s")

# --- memory --------------------------------------------------------------------------------------

DTYPE = dict(cpu=torch.float32, cuda=torch.bfloat16)  # of weights, gradients, vLLM

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

stop = dict(asked=False)  # whether SIGTERM or Ctrl-C has come

def remember_signal(*_):
    """The update or evaluation that runs comes to its end."""
    stop["asked"] = True

if __name__ == "__main__":
    try:
        main()
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:  # a full disk, mostly
        sys.exit(f"error: {reason(error)}; checkpoints are whole: --resume goes on from the newest")
