"""What fits which GPUs, and hours a step: the arithmetic, and how far the measurements are from it.

    python benchmarks/memory.py          # README.md's hardware table: computed, no GPU needed

A rank's GPU holds, in turn (sdpo.py: sleep, with_gradients, load_teacher, free):
    sampling   the student's weights, and vLLM within its --gpu_memory_utilization: weights, KV
               cache, and OVERHEAD for CUDA graphs and the room that its profile keeps free
    update     weights, gradients and (sdpo) the teacher; the activations of one micro-batch, or the
               second set of gradients while DDP builds its buckets anew (after its first
               all-reduce, no activations then); what vLLM keeps while it sleeps
AdamW's state is in CPU memory, 14 bytes a parameter divided among the ranks of all nodes; --ema
adds 4. GB are 1e9 bytes. A "GPU of 80 GB" has 85: its name counts GiB.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from update import config_of, flops, forward_flops, parameters

GB = 1e9
GPUS = {80: (85.0 * GB, 3.35e12), 141: (150.0 * GB, 4.8e12)}  # name: bytes, and bytes a second
OVERHEAD = 4 * GB  # of vLLM, beyond weights and KV cache: 3 to 4 measured
ASLEEP = 4 * GB  # while vLLM sleeps: CUDA context, graphs, NCCL; so that 68 GB come out
RESERVE = 2 * GB  # what torch's allocator cannot use, in pieces
CHUNK = 512  # positions through the head at once (sdpo.CHUNK)

# What the hours are computed from. Measured at commit f0305a4 on one H100 (README.md): an 8B update
# runs at 51.6% of 771 TFLOP/s, and one decoding step of 32 short answers takes 8.2 ms: 16.4 GB of
# weights at 2.0 TB/s, 60% of the memory's rate. Nobody has timed rollouts of 10,000 tokens.
UPDATE_RATE = 0.516 * 771e12
DECODE_SHARE = 0.60
QUESTIONS, ROLLOUTS, LENGTH = 256, 8, 10_000  # Table 8's batch, at answers of about 10,000 tokens

def total(config):
    """Parameters; tied embeddings count once."""
    body, head = parameters(config)
    return body + head * (1 if config.tie_word_embeddings else 2)

def kv_bytes(config):
    """KV cache of a token in bfloat16."""
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim

def activations(config, tokens):
    """Bytes of a micro-batch's forward and backward, with --recompute_layers.

    One hidden state a layer; one layer alive, its 10 tensors as wide as the model and 4 as the MLP,
    and half of their gradients beside them; a chunk's logits six times in float32, and the head's
    gradient.
    """
    c, (_, head) = config, parameters(config)
    kept = 2 * c.hidden_size * c.num_hidden_layers
    layer = 2 * 1.5 * (10 * c.hidden_size + 4 * c.intermediate_size)
    return tokens * (kept + layer) + 6 * 4 * CHUNK * c.vocab_size + 2 * head

def update_bytes(config, algorithm, tokens):
    """Peak of an update, without what vLLM keeps: weights, gradients, teacher, and activations or
    a second set of gradients."""
    copies = 3 if algorithm == "sdpo" else 2
    return copies * 2 * total(config) + max(activations(config, tokens), 2 * total(config))

def kv_cache(config, size, utilization):
    """Bytes of KV cache that vLLM has with --gpu_memory_utilization."""
    return utilization * size - 2 * total(config) - OVERHEAD

def sampling_bytes(config, size, utilization):
    """All that is taken while vLLM samples."""
    return 2 * total(config) + utilization * size

def generation_hours(config, cache, bandwidth, ranks=1):
    """Of a step's answers: each decoding step reads the weights and the cache of all that run.

    An answer takes half its length of cache, on average; at most 256 run at a time. Not counted:
    prefill, answers that vLLM has to begin again, and the wait for the longest at the end.
    """
    running = min(256, QUESTIONS * ROLLOUTS / ranks, cache / (kv_bytes(config) * LENGTH / 2))
    step = (2 * total(config) + running * kv_bytes(config) * LENGTH / 2) / bandwidth
    return QUESTIONS * ROLLOUTS / ranks * LENGTH / running * step / 3600

def update_hours(config, algorithm, rate, ranks=1):
    """Of a step's two updates, every rollout trained on; the second one's log-probabilities first.

    The teacher sees a demonstration as long as an answer. Not counted: optimizer and all-reduce.
    """
    shown = 100 + LENGTH if algorithm == "sdpo" else 0
    work = flops(config, [(100, LENGTH, shown)]) + forward_flops(config, 100 + LENGTH, LENGTH) / 2
    return QUESTIONS * ROLLOUTS * work / rate / ranks / 3600

def cpu_bytes(config, ranks, ema=False):
    """Of a node: AdamW's state, --ema's average, and 10 GB a rank for python, CUDA, vLLM."""
    return (18 if ema else 14) * total(config) + ranks * 10 * GB

def disk_bytes(config):
    """(weights, trainer's state) of a checkpoint: 2 bytes a parameter; master and moments, 12."""
    return 2 * total(config), 12 * total(config)

def utilization_that_fits(config, size):
    """The largest --gpu_memory_utilization in steps of 0.05 up to 0.85, 0 for none."""
    for hundredths in range(85, 0, -5):
        if sampling_bytes(config, size, hundredths / 100) + RESERVE <= size:
            return hundredths / 100
    return 0.0

MEASURED = [  # at f0305a4: what, GB measured, GB computed
    ("8B SDPO update, micro-batches of 24,576 tokens, offloaded (torch)", 61.1 * 2**30,
     lambda: update_bytes(config_of("qwen3-8b"), "sdpo", 24576)),
    ("8B SDPO update, 20,480 tokens an answer (whole GPU)", 68 * GB,
     lambda: update_bytes(config_of("qwen3-8b"), "sdpo", 20560) + ASLEEP),
    ("8B SDPO, CPU memory of one rank", 116 * 2**30,
     lambda: cpu_bytes(config_of("qwen3-8b"), 1)),
]

def row(model, ranks, gpu, algorithm, utilization=0.7):
    """A line of the table."""
    config, (size, rate) = config_of(model.lower()), GPUS[gpu]
    peak = update_bytes(config, algorithm, 24576) + ASLEEP
    best = utilization_that_fits(config, size)
    fits = "yes" if best >= utilization else f"with {best}"
    if peak + RESERVE > size or kv_cache(config, size, best) <= 0:
        fits = "no"
    cache = kv_cache(config, size, utilization)
    hours = (generation_hours(config, cache, DECODE_SHARE * rate, ranks)
             + update_hours(config, algorithm, UPDATE_RATE, ranks))
    weights, state = disk_bytes(config)
    cells = [model, f"{ranks} x {gpu}", f"`{algorithm}.py`", fits,
             f"{peak / GB:.0f}", f"{cache / GB:.0f}", f"{cache / kv_bytes(config) / LENGTH:.0f}",
             f"{cpu_bytes(config, ranks) / GB:.0f} ({cpu_bytes(config, ranks, True) / GB:.0f})",
             f"{hours:.2g}", f"{100 * ranks * hours:,.0f}",
             f"{weights / GB:.0f} + {state / GB:.0f}"]
    return f"| {' | '.join(cells)} |"

def main():
    print("Computed, for --gpu_memory_utilization 0.7 and --tokens_per_micro_batch 24576.\n")
    columns = ["model", "GPUs x GB", "script", "fits", "peak of the update, GB", "KV cache, GB",
               "answers of 10,000 tokens in it", "CPU memory a node, GB (with --ema)",
               "hours a step", "GPU hours for 100 steps",
               "disk a checkpoint, GB: weights + state"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for model in ("Qwen3-1.7B", "Qwen3-8B"):
        for ranks, gpu in ((1, 80), (8, 80), (1, 141), (8, 141)):
            for algorithm in ("grpo", "sdpo"):
                print(row(model, ranks, gpu, algorithm))
    print("\n| measured at f0305a4 | GB measured | GB computed |\n|---|---|---|")
    for what, measured, computed in MEASURED:
        print(f"| {what} | {measured / GB:.1f} | {computed() / GB:.1f} |")

if __name__ == "__main__":
    main()
