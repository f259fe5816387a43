"""The README's hardware table: what fits which GPUs, by the scripts' own arithmetic. Computed.

    python benchmarks/memory.py
"""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sdpo

MODELS = {  # parameters, hidden size, layers
    "Qwen3-1.7B": (1.72e9, 2048, 28),
    "Qwen3-8B": (8.19e9, 4096, 36),
}
LONGEST = 2048 + 20480  # Table 8: a sequence that must fit by itself

def row(parameters, config, ranks, size, copies, offload):
    """(most tokens a micro-batch, GB of KV cache) that fit with the longest sequence, or None."""
    free = size * 1e9 - 1.5e9  # the driver's and NCCL's
    for tokens in (98304, 65536, 49152, 32768, 24576):
        always, state, activations, engine = sdpo.memory_needs(
            parameters, config, max(tokens, LONGEST), copies, ranks)
        always += 0 if offload else state
        if always + max(activations, engine) <= free:
            return tokens, (free - always - 2e9 - 2 * parameters) / 1e9
    return None

def main():
    print("| model | GPUs x GB | script | offload | `--tokens_per_micro_batch` up to | KV cache, GB | "
          "CPU memory a node, GB |\n|---|---|---|---|---|---|---|")
    for name, (parameters, hidden, layers) in MODELS.items():
        config = SimpleNamespace(hidden_size=hidden, num_hidden_layers=layers)
        for ranks, size in ((1, 80), (8, 80), (1, 141), (8, 141)):
            for script, copies in (("grpo.py", 2), ("sdpo.py", 3)):
                for offload in (False, True):
                    fits = row(parameters, config, ranks, size, copies, offload)
                    if fits:
                        break
                tokens, cache = fits or ("does not fit", 0)
                print(f"| {name} | {ranks} x {size} | `{script}` | {'yes' if offload else 'no'} | "
                      f"{tokens:,} | {cache:.0f} | {14 * parameters / 1e9 * offload:.0f} |")

if __name__ == "__main__":
    main()
