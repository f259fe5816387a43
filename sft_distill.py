"""SFT on the model's own responses, off-policy self-distillation: Sec. 4 and Table 2 of the paper.

Two sets of correct responses to the same questions, both written by the model itself: d_ug, written
without help (long, with many epistemic words), and d_sg, written with a solution in the prompt
(short, with few). Both are trained under the plain prompt. Fine-tuning on the first changes little;
on the second it costs a third to two thirds of the score, although every response is right.

    M=deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
    for D in d_ug d_sg; do torchrun --nproc_per_node 8 sft_distill.py --model $M \\
        --data runs/conditions/$D.jsonl --run_dir runs/sft/$D; done
    torchrun --nproc_per_node 8 evaluate.py --model $M runs/sft/*/checkpoints/step_75     # Table 2

--data is JSON Lines with `prompt` (messages, or the user's text) and `response` or `completion`, or
with `messages` of which the last is the assistant's; reasoning beside that text is joined to it.
The loss is the cross-entropy of the response and its end token, a mean over all tokens of a batch.
The same command again resumes --run_dir, on any number of GPUs.

Neither the paper nor the authors' code says how they trained. Ours is common practice for 800 long
responses and a 7B model: full fine-tuning, 3 epochs, 32 examples a step (75 steps), AdamW at 1e-5,
linear warm-up over the first tenth, then a cosine to 0, gradients clipped at 1.

Watch: `loss` starts low, since the model wrote the responses itself (d_ug lower than d_sg: without
the solution in the prompt a short one is less likely), and falls slowly. In evaluate.py's table
length and epistemic change little with d_ug, and fall with d_sg.
"""
import argparse
import json
import math
import os
import random
import re
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
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import epistemic

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # of model and gradients
TQDM = dict(leave=False, disable=not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0")

# --- arguments -----------------------------------------------------------------------------------

def make_parser():
    parser = argparse.ArgumentParser(
        description="SFT on the model's own responses (Sec. 4). The paper states no settings.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, usage=argparse.SUPPRESS)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", required=True, help="hub id or Hugging Face folder")
    add("--data", required=True, help=".jsonl file of prompts and responses")
    add("--enable_thinking", action=switch, default=True, help="for Qwen3's chat template")
    add("--max_prompt_tokens", type=int, default=2048, help="longer prompts are dropped")
    add("--max_response_tokens", type=int, default=32768, help="longer responses are dropped")
    add("--epochs", type=int, default=3, help="passes over the data")
    add("--batch_size", type=int, default=32, help="examples per optimizer step, of all ranks")
    add("--lr", type=float, default=1e-5, help="learning rate at its peak")
    add("--warmup_ratio", type=float, default=0.1, help="part of the steps; then a cosine to 0")
    add("--tokens_per_micro_batch", type=int, default=24576, help="padding included")
    add("--recompute_layers", action=switch, default=True, help="--no-: faster, more memory")
    add("--run_dir", default="runs/sft", help="a new folder, or a run to resume")
    add("--seed", type=int, default=0, help="of data order")
    add("--save_every", type=int, default=25, help="steps between checkpoints")
    add("--wandb", action="store_true", help="metrics to Weights & Biases, too")
    return parser

# --- data ----------------------------------------------------------------------------------------

def render(tokenizer, messages, enable_thinking):
    """Token ids of a chat up to where the answer begins (Table 12)."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False,
                                         enable_thinking=enable_thinking)

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
    texts = [m.get(key) for m in [*messages, last] for key in ("role", "content")]
    if not messages or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("a text is empty or missing")
    if last["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    return messages, epistemic.with_trace(last["content"], epistemic.trace_of(last, row))

def end_token(tokenizer):
    """The id that the chat template writes after a response; the tokenizer's own end may differ."""
    chat = [dict(role="user", content="Question"), dict(role="assistant", content="Response")]
    after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("Response")[2].strip()
    return [*tokenizer.encode(after, add_special_tokens=False), tokenizer.eos_token_id][0]

def response_tokens(response, prompt_ids, end, tokenizer):
    """Token ids that are trained: what the prompt already holds goes, one end token comes."""
    thinking = re.search(r"<think>\s*(</think>\s*)?$", tokenizer.decode(prompt_ids))
    if thinking:  # opened by DeepSeek-R1-Distill's template, opened and closed by Qwen3's
        response = re.sub(r"^\s*" + re.sub(r"\s+", r"\\s*", thinking[0]), "", response)
    response = re.sub(rf"{re.escape(tokenizer.decode(end))}\s*$", "", response)
    return [*tokenizer.encode(response, add_special_tokens=False), end]

def read_examples(path, tokenizer, args):
    """[Example] of a .jsonl file; drops those that are too long. ValueError names a bad line."""
    end = end_token(tokenizer)
    def example(row):
        messages, response = messages_and_response(row)
        prompt_ids = render(tokenizer, messages, args.enable_thinking)
        return Example(prompt_ids, response_tokens(response, prompt_ids, end, tokenizer), response)
    examples = list(epistemic.read_lines(path, example))
    fitting = [r for r in examples if len(r.prompt_ids) <= args.max_prompt_tokens
               and len(r.response_ids) <= args.max_response_tokens]
    say(f"{path}: {len(fitting):,} of {len(examples):,} examples fit")
    if not fitting:
        raise ValueError(f"--data {path}: no example fits")
    return fitting

def make_batches(examples, args):
    """The examples of each step: shuffled anew every epoch."""
    rng, batches = random.Random(args.seed), []
    for _ in range(args.epochs):
        order = rng.sample(examples, len(examples))
        batches += [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    return batches

# --- loss ----------------------------------------------------------------------------------------

CHUNK = 512  # positions at once in the LM head: 512 x 151,936 float32 logits are 0.3 GB

def token_logprobs(hidden, head, targets, temperature):
    """log p(target) at N positions, (N,) float32; hidden (N, D) predict targets (N,).

    Logits (N, V) never exist: `checkpoint` computes those of a chunk again in backward.
    """
    def chunk_logprobs(hidden, target):
        logits = head(hidden).float().div_(temperature)  # (C, V)
        return logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK))
    return torch.cat([checkpoint(chunk_logprobs, *chunk, use_reentrant=False) for chunk in chunks])

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

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, micro_batch):
        """Log-probabilities of a micro-batch's response tokens, (N,)."""
        responses = [r.response_ids for r in micro_batch]
        hidden, head = response_states(self.model, [r.prompt_ids for r in micro_batch], responses)
        targets = torch.tensor([t for y in responses for t in y], device=self.model.device)  # (N,)
        return token_logprobs(hidden, head, targets, temperature=1.0)

# --- update --------------------------------------------------------------------------------------

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

def update(model, optimizer, batch, lr, args):
    """One optimizer step; returns the metrics. Every rank holds the whole batch."""
    for w in model.parameters():  # made before DDP, they move into its buckets: no second copy
        w.grad = torch.zeros_like(w)
    ddp = DistributedDataParallel(Student(model), gradient_as_bucket_view=True, init_sync=False)
    tokens = sum(len(r.response_ids) for r in batch)
    for r in batch:  # the mean over all tokens of the batch
        r.weight = 1 / tokens
    micro_batches = micro_batches_of_rank(batch, args.tokens_per_micro_batch)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for i, micro_batch in enumerate(tqdm(micro_batches, "update", **TQDM), 1):
        weight = torch.tensor([r.weight for r in micro_batch for _ in r.response_ids])
        ddp.require_backward_grad_sync = i % ROUND == 0 or i == len(micro_batches)
        loss = -(ddp(micro_batch) * weight.to(model.device)).sum()
        (loss * dist.get_world_size()).backward()  # DDP takes the mean over ranks, not the sum
        if ddp.require_backward_grad_sync:
            optimizer.add_gradients()
        total += loss.detach()
    dist.all_reduce(total)
    norm = optimizer.step(lr, max_norm=1.0)
    return dict(loss=total.item(), grad_norm=norm, lr=lr, trained_tokens=tokens,
                skipped=int(not math.isfinite(norm)))

def learning_rate(step, steps, args):
    """Of step 1..steps: linear over the first --warmup_ratio of them, then a cosine to 0."""
    warmup = math.ceil(args.warmup_ratio * steps)
    if step <= warmup:
        return args.lr * step / warmup
    return args.lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1))) / 2

# --- run -----------------------------------------------------------------------------------------

def main():
    parser = make_parser()
    args = parser.parse_args()
    device = start_process_group()
    try:  # bad input ends with one line (a rank) and exit code 2
        from transformers import AutoTokenizer  # takes seconds, --help waits for none
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        examples = read_examples(args.data, tokenizer, args)
        batches = make_batches(examples, args)
        args.examples, args.steps = len(examples), len(batches)  # a run resumes with as many
        model = load_model(args.model)
        begin_run(args)
    except Exception as error:  # what transformers and Jinja raise has no common class
        parser.error(" ".join(f"{error} (--model {args.model})".split()))
    model.to(device).train()
    if args.recompute_layers:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    optimizer = MasterAdamW(model, lr=args.lr, weight_decay=0.01)
    state = dict(masters=optimizer.masters, moments=optimizer.moments)
    done = load_checkpoint(args.run_dir, state)  # steps
    optimizer.write_weights(optimizer.masters, model)  # a resumed run's are the checkpoint's
    say("on a GPU the first update compiles the layers, minutes")
    for step, batch in enumerate(batches[done:], done + 1):
        start = time.time()
        metrics = update(model, optimizer, batch, learning_rate(step, args.steps, args), args)
        metrics["seconds"] = dict(update=time.time() - start)
        log(args, step, batch, metrics)
        if step % args.save_every == 0 or step == args.steps:
            save_checkpoint(model, tokenizer, step, state, args.run_dir)
    say(f"results are in {args.run_dir}")
    dist.destroy_process_group()

# --- a reader of the paper may stop here: log, weights, files, processes -------------------------

def log(args, step, batch, metrics):
    """A line of metrics.jsonl, one on the screen; length and epistemic are the examples'."""
    if dist.get_rank():
        return
    m = dict(step=step, length=metrics["trained_tokens"] / len(batch),
             epistemic=sum(epistemic.count(r.text) for r in batch) / len(batch), **metrics)
    with open(Path(args.run_dir, "metrics.jsonl"), "a") as file:
        file.write(json.dumps(m) + "\n")
    if args.wandb:
        sys.modules["wandb"].log(m, step=step)  # begin_run has imported it
    left = timedelta(seconds=round((args.steps - step) * m["seconds"]["update"]))
    say(f"step {step}/{args.steps}  loss {m['loss']:.3f}  {left} left")

def say(message):
    """A line on the screen, from the first rank only."""
    if dist.get_rank() == 0:
        print(message, flush=True)

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

MAY_CHANGE = ("run_dir", "save_every", "wandb", "tokens_per_micro_batch", "recompute_layers")

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
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, **alone)
    return device

if __name__ == "__main__":
    main()
