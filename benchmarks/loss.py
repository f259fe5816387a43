"""What the loss needs beyond the model's own memory: sdpo.teacher_buckets and sdpo.token_losses,
forward and backward.

    python benchmarks/loss.py                     # 22,528 tokens, V = 151,936, top-k 100
    python benchmarks/loss.py --full              # beside it: all logits at once (needs 80 GB)

The model's own: hidden states of student and teacher, both heads, their gradients. Random numbers.
"""
import argparse
import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sdpo
from update import peak, wait

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, default=22528)
    add("--vocabulary", type=int, default=151936)
    add("--hidden", type=int, default=256, help="Qwen3-8B: 4096, which costs CPU minutes")
    add("--top_k", type=int, default=100)
    add("--full", action="store_true", help="one chunk of all tokens")
    args = parser.parse_args()
    if args.full:
        sdpo.CHUNK = args.tokens
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with device:
        head = torch.nn.Linear(args.hidden, args.vocabulary, bias=False, dtype=torch.bfloat16)
        hidden, shown = torch.randn(2, args.tokens, args.hidden, dtype=torch.bfloat16)
        targets = torch.randint(args.vocabulary, (args.tokens,))
    teacher = copy.deepcopy(head).requires_grad_(False)
    hidden.requires_grad_().grad = torch.zeros_like(hidden)
    head.weight.grad = torch.zeros_like(head.weight)
    peak(device, reset=True)
    before = peak(device, reset=True)
    start = time.perf_counter()
    buckets = sdpo.teacher_buckets((hidden, head), (shown, teacher), args.top_k, 1.0)
    losses, _ = sdpo.token_losses(hidden, head, targets, 1.0, *buckets, alpha=0.5)
    losses.mean().backward()
    wait(device)
    seconds, extra = time.perf_counter() - start, peak(device) - before
    print(f"{args.tokens:,} tokens, V = {args.vocabulary:,}, hidden {args.hidden}, top-k "
          f"{args.top_k}, {device.type}: {extra / 2**30:.2f} GiB beyond the model's own, "
          f"{seconds:.1f} s")

if __name__ == "__main__":
    main()
