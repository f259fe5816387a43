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
    "7-8B (Qwen3-8B)": (8.19e9, 4096, 36),
}
LONGEST = 2048 + 20480  # Table 8: a sequence that must fit by itself

def main():
    print(f"{'model':16s} {'GPUs':>10s}  {'script':5s} {'offload':>7s} {'tokens':>7s} {'KV, GB':>6s} "
          f"{'CPU GB a node':>13s}")
    for name, (parameters, hidden, layers) in MODELS.items():
        config = SimpleNamespace(hidden_size=hidden, num_hidden_layers=layers)
        for ranks, size in ((1, 80), (8, 80), (1, 141), (8, 141)):
            free = size * 1e9 - 1.5e9  # the driver's and NCCL's
            for script, copies in (("grpo", 2), ("sdpo", 3)):
                for offload in (False, True):
                    fitting = []
                    for tokens in (24576, 32768, 49152, 65536, 98304):
                        always, state, activations, engine = sdpo.memory_needs(
                            parameters, config, max(tokens, LONGEST), copies, ranks)
                        always += 0 if offload else state
                        if always + max(activations, engine) <= free:
                            fitting.append((tokens, free - always - 2e9 - 2 * parameters))
                    if fitting:
                        break
                if not fitting:
                    print(f"{name:16s} {ranks:3d} x {size:3d}  {script:5s} does not fit")
                    continue
                tokens, kv = fitting[-1]
                cpu = 12 * parameters / 1e9 if offload else 0
                print(f"{name:16s} {ranks:3d} x {size:3d}  {script:5s} {'yes' if offload else 'no':>7s} "
                      f"{tokens:7,d} {kv / 1e9:6.0f} {cpu:13.0f}")

if __name__ == "__main__":
    main()
