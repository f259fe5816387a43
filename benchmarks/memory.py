"""What fits which GPU, and hours a step: computed, no GPU needed.

    python benchmarks/memory.py          # the tables of README.md

A rank's GPU holds, in turn (sdpo.py's main):
    sampling   the student's weights; vLLM: within --gpu_memory_utilization its weights, its largest
               forward (PROFILE) and the KV cache, beside it CUDA's context and graphs (GRAPHS)
    update     weights, gradients and (sdpo.py) the teacher; the activations of one micro-batch, or
               a second set of gradients while DDP makes its buckets, when there are no activations;
               what vLLM keeps while it sleeps (ASLEEP)
AdamW's state is in CPU memory (sdpo.MasterAdamW). GB are 1e9 bytes.
"""
GB = 1e9
SHAPES = {  # hidden, MLP, layers, heads, key-value heads, head size, vocabulary, tied
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
}
GPUS = {  # name's GB: memory, bytes a second, bfloat16 FLOP/s without sparsity, of the data sheets
    24: (25.7 * GB, 1.01e12, 165e12),  # RTX 4090
    48: (48.3 * GB, 0.86e12, 362e12),  # L40S
    80: (85.5 * GB, 3.35e12, 989e12),  # H100
    141: (150.7 * GB, 4.8e12, 989e12),  # H200
}
# From one run, Qwen3-8B at b6a9df5 on an H200 (README.md): of vLLM's 59.9 GB 16.4 were weights and
# 41.3 cache; while it sampled 78.5 GB were taken, 16.4 of them the student's; an update whose
# largest micro-batch had 16,400 tokens took 65.3.
PROFILE, GRAPHS, ASLEEP = 2.2 * GB, 2.2 * GB, 3.8 * GB
RESERVE = 1 * GB  # what torch's allocator cannot use, in pieces
UPDATE_EFFICIENCY = 0.295 * 761 / 989  # of the data sheet's FLOP/s, compilation inside
DECODE_EFFICIENCY = 16.4e9 / (3.1 / 512) / 4.8e12  # of its bytes a second: 512 steps in 3.1 s
CHUNK, RUNNING = 512, 256  # sdpo.CHUNK; answers that vLLM decodes at once (max_num_seqs)
PROMPT, BUDGET = 2048, 24576  # --max_prompt_tokens, --tokens_per_micro_batch

def config_of(name):
    """The configuration of a shape's name or of a model's folder."""
    from transformers import AutoConfig, Qwen3Config
    if name not in SHAPES:
        return AutoConfig.from_pretrained(name)
    hidden, mlp, layers, heads, kv, size, vocabulary, tied = SHAPES[name]
    return Qwen3Config(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, head_dim=size,
        num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocabulary,
        tie_word_embeddings=tied, max_position_embeddings=65536, bos_token_id=None,
        eos_token_id=2, pad_token_id=0, architectures=["Qwen3ForCausalLM"])  # ids: the toy's

def parameters(config):
    """(all but embeddings and head, head) of Qwen3's shape."""
    c, kv = config, config.num_key_value_heads * config.head_dim
    attention = 2 * c.hidden_size * (c.num_attention_heads * c.head_dim + kv) + 2 * c.head_dim
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    return layer * c.num_hidden_layers + c.hidden_size, c.vocab_size * c.hidden_size

def weights(config, tied=True):
    """Bytes in bfloat16; vLLM's embeddings are never tied (sdpo.make_engine)."""
    body, head = parameters(config)
    return 2 * (body + head * (1 if tied and config.tie_word_embeddings else 2))

def kv_bytes(config):
    """KV cache of a token in bfloat16."""
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim

def forward_flops(config, tokens, responses):
    """Of a sequence: 2 a weight and token, the head on response tokens only, causal attention."""
    c, (body, head) = config, parameters(config)
    attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * tokens**2
    return 2 * body * tokens + 2 * head * responses + attention

def flops(config, lengths):
    """Of an update; lengths: (prompt, response, teacher's prompt or 0) of each rollout.

    A backward costs two forwards. Recomputation and padding are not counted.
    """
    return sum(3 * forward_flops(config, prompt + response, response)
               + (forward_flops(config, shown + response, response) if shown else 0)
               for prompt, response, shown in lengths)

def activations(config, student, teacher):
    """Bytes of a micro-batch of so many tokens, with --recompute_layers.

    One hidden state a layer; one layer alive: in the student's backward its 10 tensors as wide as
    the model and 4 as the MLP, and half of their gradients, in the teacher's forward 6 and 3; a
    chunk's logits six times in float32, and the head's gradient.
    """
    c, (_, head) = config, parameters(config)
    layer = max(3 * student * (10 * c.hidden_size + 4 * c.intermediate_size),
                2 * teacher * (6 * c.hidden_size + 3 * c.intermediate_size))
    kept = 2 * student * c.hidden_size * c.num_hidden_layers
    return kept + layer + 6 * 4 * CHUNK * c.vocab_size + 2 * head

def update_bytes(config, algorithm, student, teacher):
    """Peak of the GPU in an update whose largest micro-batch has so many tokens."""
    copies = 3 if algorithm == "sdpo" else 2
    return (copies * weights(config) + ASLEEP
            + max(activations(config, student, teacher), weights(config)))

def largest_micro_batch(algorithm, length, budget):
    """(student's, teacher's) tokens; a rollout is never cut, a demonstration is as long."""
    shown = length if algorithm == "sdpo" else 0
    return max(budget, PROMPT + length), max(budget, PROMPT + shown + length)

def cache_bytes(config, size):
    """KV cache that vLLM has, with --gpu_memory_utilization 0.7."""
    return 0.7 * size - weights(config, tied=False) - PROFILE

def cpu_bytes(config, ranks, ema=False):
    """Of a node: AdamW's state, --ema's average; a rank's buffer, and 10 GB for Python and CUDA."""
    buffer = 4 * parameters(config)[1]
    return (18 if ema else 14) * weights(config) / 2 + ranks * (buffer + 10 * GB)

def fits(model, gpu, algorithm, length, budget=BUDGET):
    """Update and sampling fit, and the cache holds 8 of the longest answers."""
    config, size = config_of(model), GPUS[gpu][0]
    peak = max(update_bytes(config, algorithm, *largest_micro_batch(algorithm, length, budget)),
               weights(config) + 0.7 * size + GRAPHS)
    room = cache_bytes(config, size) / kv_bytes(config)
    return peak + RESERVE <= size and room >= 8 * (PROMPT + length)

def hours(model, gpu, algorithm, answers, length):
    """A step's, for so many answers a GPU, of so many tokens in the mean.

    Sampling: a decoding step reads the weights, and half an answer's cache for each that runs.
    Update: every answer is trained on, a demonstration is as long; half of them are read once more,
    for the second mini-batch's start. Not counted: prefill, answers that vLLM has to begin again,
    the wait for the longest, evaluation, optimizer, all-reduce.
    """
    config, (size, bandwidth, rate) = config_of(model), GPUS[gpu]
    filled = kv_bytes(config) * length / 2
    running = min(RUNNING, answers, cache_bytes(config, size) / filled)
    read = answers * length / running * (weights(config, tied=False) + running * filled)
    shown = 100 + length if algorithm == "sdpo" else 0
    work = flops(config, [(100, length, shown)]) + forward_flops(config, 100 + length, length) / 2
    sampling, update = read / (DECODE_EFFICIENCY * bandwidth), work / (UPDATE_EFFICIENCY * rate)
    return (sampling + answers * update) / 3600

def two_digits(number):
    """The rates are not known better."""
    return f"{float(f'{number:.2g}'):,g}"

def row(model, gpu, length, budget=BUDGET):
    """sdpo.py on one GPU: 64 questions x 8 answers, half as long as the longest in the mean."""
    config, size = config_of(model), GPUS[gpu][0]
    peak = update_bytes(config, "sdpo", *largest_micro_batch("sdpo", length, budget)) / GB
    cells = [model.title(), str(gpu), "does not fit", f"{budget:,}", f"{peak:.0f}", "", "", ""]
    if fits(model, gpu, "sdpo", length, budget):
        step = hours(model, gpu, "sdpo", 64 * 8, length / 2)
        cells[2:3] = [f"{length:,}"]
        cells[5:] = [f"{cache_bytes(config, size) / GB:.0f}",
                     f"{cpu_bytes(config, 1) / GB:.0f}", two_digits(step)]
    return f"| {' | '.join(cells)} |"

def one_gpu():
    """The longest answers that fit, of three lengths; the last row is README.md's recipe."""
    rows = []
    for model in SHAPES:
        for gpu in GPUS:
            fitting = (n for n in (20480, 8192, 4096) if fits(model, gpu, "sdpo", n))
            rows.append(row(model, gpu, next(fitting, 4096)))
    return [*rows, row("qwen3-1.7b", 24, 4096, 12288)]

def papers_run():
    """256 questions x 8 answers of about 10,000 tokens a step; 100 steps."""
    rows = []
    for model in ("qwen3-1.7b", "qwen3-8b"):
        for ranks, gpu in ((1, 80), (8, 80), (8, 141)):
            config = config_of(model)
            steps = [hours(model, gpu, algorithm, 256 * 8 / ranks, 10_000)
                     for algorithm in ("grpo", "sdpo")]
            cells = [model.title(), f"{ranks} x {gpu}", *map(two_digits, steps),
                     *(two_digits(100 * ranks * step) for step in steps),
                     *(f"{cpu_bytes(config, ranks, ema) / GB:.0f}" for ema in (False, True)),
                     f"{weights(config) / GB:.0f} + {6 * weights(config) / GB:.0f}"]
            rows.append(f"| {' | '.join(cells)} |")
    return rows

TABLES = {
    one_gpu: ["model", "GPU, GB", "longest answer", "tokens a micro-batch", "update's peak, GB",
              "KV cache, GB", "CPU memory, GB", "hours a step"],
    papers_run: ["model", "GPUs x GB", "hours a step: GRPO", "SDPO", "GPU hours: GRPO", "SDPO",
                 "CPU memory a node, GB", "with `--ema`", "checkpoint, GB: weights + state"],
}

def table(make_rows):
    columns = TABLES[make_rows]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *make_rows()])

if __name__ == "__main__":
    print("\n\n".join(map(table, TABLES)))
