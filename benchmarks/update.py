"""The update phase alone: tokens/s, share of the matrix rate, peak memory, seconds by part.

    python benchmarks/update.py                                  # the toy's shape, this machine
    python benchmarks/update.py --model qwen3-8b --algorithm sdpo --arms ours naive    # a GPU
    pip install -r benchmarks/requirements.txt                   # then --arms may name trl

Random weights, random token ids of the lengths asked for, no vLLM. Every arm gets the same rollouts
and a process of its own, so that its peak memory is its own:
    ours    grpo.update or sdpo.update, as the scripts call it, on a GPU with compiled layers
    naive   the textbook: padded to the longest, an attention mask, logits of the whole micro-batch,
            no recomputation, AdamW on the spot
    trl     TRL 1.16's GRPOTrainer or SDPOTrainer: its compute_loss on the batch that it would make
Model FLOPs count no recomputation and no padding. Each arm's process measures the matrix rate.
"""
import argparse
import contextlib
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.distributed as dist

TOY = str(ROOT / "toy/model")
SHAPES = {  # hidden, MLP, layers, heads, key-value heads, head size, vocabulary, tied
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "tiny": (256, 768, 4, 4, 2, 64, 151936, False),  # the real vocabulary on a small body
}

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default=TOY, help=f"{', '.join(SHAPES)}, or a model's folder")
    add("--algorithm", choices=["grpo", "sdpo"], default="sdpo")
    add("--arms", nargs="+", choices=["ours", "naive", "trl"], default=["ours", "naive"])
    add("--sequences", type=int, default=128)
    add("--shortest", type=int, default=50, help="response tokens; the others lie evenly between")
    add("--longest", type=int, default=400)
    add("--prompt_tokens", type=int, default=60)
    add("--demonstration_tokens", type=int, default=200, help="SDPO's teacher sees them as well")
    add("--tokens_per_micro_batch", type=int, default=8192)
    switch = argparse.BooleanOptionalAction
    add("--recompute_layers", action=switch, default=True, help="ours: else activations stay")
    add("--compile", action=switch, default=True, help="ours: the layers, on a GPU")
    add("--repeat", type=int, default=3, help="updates; the median counts, after one to warm up")
    add("--arm", help=argparse.SUPPRESS)  # set in the process of one arm
    return parser.parse_args()

def config_of(name):
    """The configuration of a shape's name or of a model's folder."""
    from transformers import AutoConfig, Qwen3Config
    if name not in SHAPES:
        return AutoConfig.from_pretrained(name)
    hidden, mlp, layers, heads, kv, size, vocabulary, tied = SHAPES[name]
    return Qwen3Config(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, head_dim=size,
        num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocabulary,
        tie_word_embeddings=tied, max_position_embeddings=40960, bos_token_id=None,
        eos_token_id=2, pad_token_id=0, architectures=["Qwen3ForCausalLM"])  # ids: the toy's

def build(config, device, dtype):
    """The model with random weights, made where it stays."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)

def make_rollouts(script, args, vocabulary):
    """Groups of 8 in the order of sampling, not of length: half of each right."""
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.linspace(args.shortest, args.longest, args.sequences).astype(int))
    def ids(n):
        return rng.integers(5, vocabulary, n).tolist()
    rollouts = []
    for i, length in enumerate(lengths):
        r = script.Rollout(i // 8, ids(args.prompt_tokens), ids(length),
                           [float(-np.log(vocabulary))] * int(length), "", True, 0.0)
        if args.algorithm == "sdpo":
            r.teacher_prompt_ids = r.prompt_ids + ids(args.demonstration_tokens)
        else:
            r.advantage = (-0.5, 0.5)[i % 2]
        rollouts.append(r)
    return rollouts

def parameters(config):
    """(all but embeddings and head, head) of Qwen3's shape."""
    c, kv = config, config.num_key_value_heads * config.head_dim
    attention = 2 * c.hidden_size * (c.num_attention_heads * c.head_dim + kv) + 2 * c.head_dim
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    return layer * c.num_hidden_layers + c.hidden_size, c.vocab_size * c.hidden_size

def forward_flops(config, tokens, responses):
    """Of a sequence: 2 a weight and token, the head on response tokens only, causal attention."""
    c, (body, head) = config, parameters(config)
    attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * tokens**2
    return 2 * body * tokens + 2 * head * responses + attention

def flops(config, lengths):
    """Model FLOPs of an update; lengths: (prompt, response, teacher's prompt or 0) of each rollout.

    A backward costs two forwards. Recomputation and padding are not counted.
    """
    total = 0
    for prompt, response, shown in lengths:
        total += 3 * forward_flops(config, prompt + response, response)
        if shown:
            total += forward_flops(config, shown + response, response)
    return total

def lengths_of(rollouts):
    return [(len(r.prompt_ids), len(r.response_ids), len(getattr(r, "teacher_prompt_ids", [])))
            for r in rollouts]

def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()

def matrix_rate(device, dtype):
    """FLOP/s of one large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / sorted(times)[3]  # early ones warm up

class Parts:
    """Seconds by part: wraps functions so that each call adds to its name's sum."""

    def __init__(self, device):
        self.seconds, self.device = {}, device

    def timed(self, name, function):
        def call(*args, **kwargs):
            wait(self.device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait(self.device)
            part = name(*args) if callable(name) else name
            self.seconds[part] = self.seconds.get(part, 0) + time.perf_counter() - start
            return result
        return call

def ours(script, model, rollouts, args, device, parts):
    """The script's own update, and what it is made of."""
    questions = str(rollouts[-1].row + 1)
    settings = script.make_parser().parse_args([
        "--model", "x", "--questions_per_step", questions, "--minibatch_questions", questions,
        "--tokens_per_micro_batch", str(args.tokens_per_micro_batch)])
    teacher = copy.deepcopy(model) if args.algorithm == "sdpo" else None
    if args.compile:
        script.compile_layers(*filter(None, (model, teacher)))
    model.train()
    if args.recompute_layers:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    optimizer = script.MasterAdamW(model, lr=1e-6, weight_decay=0.01)
    script.MISMATCH_LIMIT = float("inf")  # no vLLM sampled these rollouts
    script.response_hidden = parts.timed(
        lambda m, *_: "teacher forward" if m is teacher else "student forward",
        script.response_hidden)
    name = "token_losses" if args.algorithm == "sdpo" else "token_logprobs"
    setattr(script, name, parts.timed("head and loss, forward", getattr(script, name)))
    torch.Tensor.backward = parts.timed("backward", torch.Tensor.backward)
    optimizer.add_gradients = parts.timed("gradients to their owners", optimizer.add_gradients)
    optimizer.step = parts.timed("optimizer", optimizer.step)

    def update():
        for r in rollouts:
            r.old_logprobs = None
        ddp = parts.timed("DDP made", script.with_gradients)(script.Student(model, settings))
        script.update(ddp, *([teacher] if teacher else []), optimizer, rollouts, 1e-6)
        model.zero_grad(set_to_none=True)
    return update

def padded(sequences, side, device):
    """(B, T) ids and mask, padded to the longest."""
    width = max(map(len, sequences))
    ids, mask = (torch.zeros(len(sequences), width, dtype=torch.long) for _ in range(2))
    for i, s in enumerate(sequences):
        at = slice(width - len(s), width) if side == "left" else slice(len(s))
        ids[i, at], mask[i, at] = torch.tensor(s), 1
    return ids.to(device), mask.to(device)

def naive(script, model, rollouts, args, device, parts):
    """What a first version looks like."""
    teacher = copy.deepcopy(model).requires_grad_(False) if args.algorithm == "sdpo" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01)
    y, y_mask = padded([r.response_ids for r in rollouts], "right", device)
    x, x_mask = padded([r.prompt_ids for r in rollouts], "left", device)
    width = y.shape[1]
    if teacher:
        shown, shown_mask = padded([r.teacher_prompt_ids for r in rollouts], "left", device)
    size = max(1, args.tokens_per_micro_batch // ((shown if teacher else x).shape[1] + width))

    def logprobs(m, prompt, prompt_mask, at):
        logits = m(input_ids=torch.cat([prompt[at], y[at]], 1), use_cache=False,
                   attention_mask=torch.cat([prompt_mask[at], y_mask[at]], 1)).logits
        return logits[:, -width - 1 : -1].float().log_softmax(-1)  # (B, T, V)

    def update():
        optimizer.zero_grad()
        for first in range(0, len(rollouts), size):
            at = slice(first, first + size)
            student = parts.timed("student forward", logprobs)(model, x, x_mask, at)
            if teacher:
                with torch.no_grad():
                    target = parts.timed("teacher forward", logprobs)(
                        teacher, shown, shown_mask, at)
                top, ids = student.topk(min(100, student.shape[-1] - 1), -1)
                loss = script.divergence(script.with_tail(top),
                                         script.with_tail(target.gather(-1, ids)), 0.5)
            else:
                chosen = student.gather(-1, y[at][..., None]).squeeze(-1)
                advantages = torch.tensor([[r.advantage] for r in rollouts[at]], device=device)
                loss, _ = script.policy_loss(chosen, chosen.detach(), advantages, 0.2, 0.28)
            mask = y_mask[at]
            ((loss * mask).sum(-1) / mask.sum(-1)).sum().div(len(rollouts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.Tensor.backward = parts.timed("backward", torch.Tensor.backward)
    optimizer.step = parts.timed("optimizer", optimizer.step)
    return update

def trl(script, model, rollouts, args, device, parts):
    """TRL's trainer on the batch it would have made of these rollouts: padded as a whole, split."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/model")
    y, y_mask = padded([r.response_ids for r in rollouts], "right", device)
    x, x_mask = padded([r.prompt_ids for r in rollouts], "left", device)
    batch = dict(prompt_ids=x, prompt_mask=x_mask, completion_ids=y, completion_mask=y_mask)
    widest = x.shape[1] + y.shape[1]
    if args.algorithm == "sdpo":
        from trl.experimental.sdpo import SDPOConfig as Config, SDPOTrainer as Trainer
        ids, mask = padded([r.teacher_prompt_ids for r in rollouts], "left", device)
        batch.update(teacher_input_ids=torch.cat([ids, y], 1), teacher_attention_mask=torch.cat(
            [mask, y_mask], 1), self_distillation_mask=torch.ones(len(rollouts), device=device))
        widest = ids.shape[1] + y.shape[1]
        more = dict(distillation_mode="topk_logits", distillation_topk=100, distillation_alpha=0.5,
                    distillation_add_tail=True, teacher_model_kind="base")
    else:
        from trl import GRPOConfig as Config, GRPOTrainer as Trainer
        batch.update(advantages=torch.tensor([r.advantage for r in rollouts], device=device))
        more = dict(beta=0.0, epsilon=0.2, epsilon_high=0.28, loss_type="grpo")
    size = next(n for n in (64, 32, 16, 8, 4, 2, 1) if n * widest <= args.tokens_per_micro_batch
                or n == 1)
    cpu = device.type == "cpu"
    config = Config(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size,
                    gradient_accumulation_steps=len(rollouts) // size, num_generations=8,
                    learning_rate=1e-6, weight_decay=0.01, report_to=[], use_cpu=cpu, bf16=not cpu,
                    gradient_checkpointing=not cpu, max_completion_length=y.shape[1], **more)
    data = Dataset.from_dict(dict(prompt=["x"] * len(rollouts)))
    folder = tempfile.mkdtemp()  # SDPO's teacher is loaded from where the model says it is from
    model.save_pretrained(folder)
    model.config._name_or_path = model.name_or_path = folder
    trainer = Trainer(model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions),
                      args=config, train_dataset=data, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = len(rollouts) // size
    trainer.create_optimizer()
    model.train()
    if not cpu:  # only trainer.train() does so
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    optimizer = trainer.accelerator.prepare(trainer.optimizer)
    total = torch.tensor(float(y_mask.sum()), device=device)

    def update():
        optimizer.zero_grad()
        for first in range(0, len(rollouts), size):
            part = {key: value[first : first + size] for key, value in batch.items()}
            if args.algorithm == "grpo":
                part["num_items_in_batch"] = total
            with trainer.accelerator.autocast():  # SDPOTrainer leaves it to trainer.train()
                loss = parts.timed("forward and loss", trainer.compute_loss)(trainer.model, part)
            parts.timed("backward", trainer.accelerator.backward)(loss)
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        parts.timed("optimizer", optimizer.step)()
    return update

def peak(device, reset=False):
    """Peak memory in bytes since the last reset: allocated on a GPU, resident on CPU."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return used
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

def run_arm(args):
    script = __import__(args.algorithm)
    device = script.start_process_group()
    import transformers
    transformers.logging.set_verbosity_error()
    # the naive arm and TRL train float32 weights under autocast, as they would without masters
    dtype = script.DTYPE if args.arm == "ours" else torch.float32
    config = config_of(args.model)
    model = build(config, device, dtype)
    rollouts, parts = make_rollouts(script, args, config.vocab_size), Parts(device)
    rate, work = matrix_rate(device, script.DTYPE), flops(config, lengths_of(rollouts))
    update = globals()[args.arm](script, model, rollouts, args, device, parts)
    cast = (torch.autocast("cuda", torch.bfloat16) if args.arm == "naive" and device.type == "cuda"
            else contextlib.nullcontext())
    peak(device, reset=True)
    before, times, cpu = peak(device), [], []  # after the reset: what is allocated now
    with cast:
        for i in range(args.repeat + 1):
            if i == 1:
                parts.seconds.clear()
            wait(device)
            start, used = time.perf_counter(), time.process_time()
            update()
            wait(device)
            times.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)  # what counts beside other work
    memory = peak(device)
    seconds = sorted(times[1:])[args.repeat // 2]
    tokens = sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
    print("RESULT", json.dumps(dict(
        seconds=seconds, cpu_seconds=sorted(cpu[1:])[args.repeat // 2],
        tokens_per_second=tokens / seconds, utilisation=work / seconds / rate, matrix_rate=rate,
        peak=memory, before=before,
        parts={name: s / args.repeat for name, s in parts.seconds.items()})))
    dist.destroy_process_group()

def in_subprocess(command, timeout=None):
    """(what python's `command` printed after RESULT, None), or (None, why there is nothing)."""
    try:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT,
                              env=dict(os.environ, TQDM_DISABLE="1"), timeout=timeout)
    except subprocess.TimeoutExpired:
        return None, f"stopped after {timeout:.0f} s"
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:]), None
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    said = [line for line in said if re.match(r"(\[rank0\]: )?[\w.]*[Ee]rror", line)] or said
    return None, said[-1][:200]

def main():
    args = parse_args()
    if args.arm:
        return run_arm(args)
    if args.sequences % 8:
        sys.exit(f"error: --sequences {args.sequences} must be groups of 8")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else (
        f"CPU, {torch.get_num_threads()} threads")
    print(f"{args.algorithm}, {args.model}, {args.sequences} responses of {args.shortest} to "
          f"{args.longest} tokens, {where}, torch {torch.__version__}\n")
    results = {}
    for arm in args.arms:
        r, said = in_subprocess([__file__, *sys.argv[1:], "--arm", arm])
        if r is None:
            print(f"{arm}: no result ({said})")
            continue
        results[arm] = r
        print(f"{arm:6s} {r['seconds']:8.2f} s ({r['cpu_seconds']:.2f} of CPU)  "
              f"{r['tokens_per_second']:9,.0f} tokens/s  "
              f"{r['utilisation']:6.1%} of {r['matrix_rate'] / 1e12:.3g} TFLOP/s  peak "
              f"{r['peak'] / 2**30:.2f} GiB, {(r['peak'] - r['before']) / 2**30:.2f} of the update")
        for name, seconds in r["parts"].items():
            print(f"         {name:32s} {seconds:8.3f} s")
    for arm in results.keys() - {"ours"}:
        if "ours" in results:
            a, b = results["ours"], results[arm]
            print(f"\nours against {arm}: {b['seconds'] / a['seconds']:.2f} times as fast, "
                  f"{a['peak'] / b['peak']:.2f} of its peak memory, "
                  f"{(a['peak'] - a['before']) / (b['peak'] - b['before']):.2f} of the update's")

if __name__ == "__main__":
    main()
