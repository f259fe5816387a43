"""The update alone, without vLLM: seconds by part, share of the matrix rate.

    python benchmarks/update.py                          # the toy, this machine
    python benchmarks/update.py --model qwen3-8b --sequences 16 --shortest 2048 --longest 8192 \
        --demonstration_tokens 4096 --tokens_per_micro_batch 24576                   # a GPU
    python benchmarks/update.py --optimizer 21           # MasterAdamW alone: 486 million parameters

Random weights, random token ids of the lengths asked for. The update is sdpo.update or grpo.update
itself; model FLOPs count no recomputation and no padding. PYTHONPATH=FOLDER takes the script of
another checkout, to compare.
"""
import argparse
import hashlib
import math
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "benchmarks")]  # PYTHONPATH's scripts come before ours

import numpy as np
import torch

import memory

def build(config, device, dtype):
    """The model with random weights, made where it stays."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)

def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

def matrix_rate(device, dtype):
    """FLOP/s of one large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        start = now(device)
        a @ b
        times.append(now(device) - start)
    return 2 * n**3 / sorted(times)[3]  # early ones warm up

def make_rollouts(script, args, vocabulary):
    """In the order of sampling, not of length."""
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.linspace(args.shortest, args.longest, args.sequences).astype(int))
    def ids(n):
        return rng.integers(5, vocabulary, n).tolist()
    rollouts = []
    for i, length in enumerate(lengths.tolist()):
        question = dict(prompt_ids=ids(60))
        r = script.Rollout(question, ids(length), [-math.log(vocabulary)] * length, "", True, 0.0)
        if args.algorithm == "sdpo":
            r.teacher_prompt_ids = question["prompt_ids"] + ids(args.demonstration_tokens)
        else:
            r.advantage = (-0.5, 0.5)[i % 2]
        rollouts.append(r)
    return rollouts

def lengths_of(rollouts):
    """For memory.flops."""
    return [(len(r.question["prompt_ids"]), len(r.response_ids),
             len(getattr(r, "teacher_prompt_ids", []))) for r in rollouts]

def time_update(script, args, device):
    from transformers import AutoModelForCausalLM
    config = memory.config_of(args.model)
    settings = script.make_parser().parse_args([
        "--model", args.model, "--minibatch_questions", "1", "--rollouts", str(args.sequences),
        "--tokens_per_micro_batch", str(args.tokens_per_micro_batch)])
    AutoModelForCausalLM.from_pretrained = lambda *_, **__: (  # load_model then compiles its layers
        build(config, device, script.DTYPE), dict(missing_keys=[]))
    model = script.load_model(args.model).train()
    models = [model]
    if args.algorithm == "sdpo":
        models.append(script.load_model(args.model))
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    optimizer = script.MasterAdamW(model, lr=1e-6, weight_decay=0.01)
    script.MISMATCH_LIMIT = math.inf  # no vLLM sampled these rollouts
    rollouts, seconds = make_rollouts(script, args, config.vocab_size), {}

    def timed(owner, name, label):
        function = getattr(owner, name)
        def call(*a, **k):
            start = now(device)
            result = function(*a, **k)
            seconds[label] = seconds.get(label, 0) + now(device) - start
            return result
        setattr(owner, name, call)
    timed(script.Student, "forward", "forward and loss")
    timed(torch.Tensor, "backward", "backward")
    timed(optimizer, "add_gradients", "gradients to their owners")
    timed(optimizer, "step", "optimizer")
    times = []
    for i in range(args.repeat + 1):
        if i == 1:
            seconds.clear()
        start, cpu = now(device), time.process_time()
        script.update(*models, optimizer, rollouts, 1e-6, settings)
        times.append((now(device) - start, time.process_time() - cpu))
    whole, cpu = sorted(times[1:])[args.repeat // 2]
    rate = matrix_rate(device, script.DTYPE)
    work = memory.flops(config, lengths_of(rollouts))
    share = f"{work / whole / rate:.1%} of {rate / 1e12:.3g} TFLOP/s"
    print(f"{whole:.2f} s ({cpu:.2f} of CPU), {share}")
    for label, s in seconds.items():
        print(f"  {label:26s} {s / args.repeat:8.3f} s")

def time_optimizer(script, args):
    """Every gradient is new; the digest is of weights and masters at the end."""
    config = memory.config_of("qwen3-0.6b")
    config.num_hidden_layers = args.optimizer
    model = build(config, torch.device("cpu"), torch.bfloat16)
    optimizer = script.MasterAdamW(model, lr=1e-5, weight_decay=0.01)
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    for step in range(args.repeat + 1):
        for w in model.parameters():
            w.grad = torch.empty_like(w) if w.grad is None else w.grad
            for part in w.grad.flatten().split(len(noise)):
                part.copy_(noise[: len(part)] * (step + 1))
        seen = [(time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF))]
        for act in (optimizer.add_gradients, lambda: optimizer.step(1e-5, 1.0)):
            act()
            seen.append((time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)))
        for name, (start, a), (end, b) in zip(("add_gradients", "step"), seen, seen[1:]):
            cpu = b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime
            print(f"{name:14s} {end - start:6.2f} s ({cpu:.2f} of CPU, of it "
                  f"{b.ru_stime - a.ru_stime:.2f} of the system), "
                  f"{b.ru_minflt - a.ru_minflt:,} page faults", flush=True)
    digest = hashlib.sha256()
    for w in [*model.parameters(), *optimizer.masters.values()]:
        digest.update(w.detach().flatten().view(torch.uint8).numpy())
    print(f"{model.num_parameters():,} parameters, weights and masters {digest.hexdigest()[:12]}")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ROOT / "toy/model"), help=f"{', '.join(memory.SHAPES)}, a folder")
    add("--algorithm", choices=["grpo", "sdpo"], default="sdpo")
    add("--sequences", type=int, default=128)
    add("--shortest", type=int, default=50, help="response tokens; the others lie evenly between")
    add("--longest", type=int, default=400)
    add("--demonstration_tokens", type=int, default=200, help="SDPO's teacher sees them as well")
    add("--tokens_per_micro_batch", type=int, default=8192)
    add("--repeat", type=int, default=3, help="updates or optimizer steps, after one to warm up")
    add("--optimizer", type=int, metavar="LAYERS", help="MasterAdamW alone, in CPU memory, on "
        "bfloat16 weights of Qwen3-0.6B's shape with so many of its 28 layers")
    args = parser.parse_args()
    script = __import__(args.algorithm)
    device = script.start_process_group()
    print(f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.optimizer:
        time_optimizer(script, args)
    else:
        time_update(script, args, device)

if __name__ == "__main__":
    main()
