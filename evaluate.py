"""Evaluation: Sec. 5-6, Table 11 and App. F.4.

n answers to every question of a benchmark, sampled as Table 11 says for the model's family:
score (the paper's acc@16: mean over samples, then over questions), pass@k, response length,
share of cut answers, epistemic markers.

    python evaluate.py --model Qwen/Qwen3-8B                          # AIME24/25, AMC23, MATH500
    torchrun --nproc_per_node 8 evaluate.py --model runs/sdpo/checkpoints/step_*     # Figures 4, 19
    python evaluate.py --model toy/model --data toy/data/ood.jsonl --samples 4

Several models of one shape, as the checkpoints of a run are, share one engine. Writes
<out>/<model>/<benchmark>.jsonl, a line an answer, and <out>/summary.json, and prints one table, a
line a model (Table 2, of SFT's checkpoints). The same command again evaluates only what is missing,
and what belongs to other weights, data or flags than now.

What the paper does not show (the authors' code: 5c51051 of
github.com/beanie00/self-distillation-analysis):
  - Table 11 lists top-k 20, but their script parses it without passing it on: their numbers were
    sampled with --top_k 0
  - their pass@16 is "any of 16"; pass@k here is the unbiased estimator, equal to that at k = n
  - they grade with a looser grader than they train with (it takes 5.4 for 540); here both are one
"""
import argparse
import json
import logging
import math
import os
import re
import signal
import statistics
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import epistemic
from verifier import Verifier, load_questions

# --- arguments -----------------------------------------------------------------------------------

SAMPLING = {  # Table 11: temperature, top-p, top-k by model family
    "DeepSeek-R1-Distill": (0.6, 0.95, 20),
    "Qwen3 thinking": (0.6, 0.95, 20),
    "Qwen3 non-thinking": (0.7, 0.8, 20),
    "OLMo": (0.6, 0.95, 20),
}

def number(kind, low, high=math.inf):
    """A type for argparse: an int or a float from low to high."""
    def number(text):
        if not low <= kind(text) <= high:  # refuses nan, too
            raise argparse.ArgumentTypeError(f"{text} does not lie between {low} and {high}")
        return kind(text)
    return number

def make_parser():
    parser = argparse.ArgumentParser(
        description="Evaluation (Table 11). The defaults are the paper's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, usage=argparse.SUPPRESS)
    add, count, share = parser.add_argument, number(int, 1), number(float, 0, 1)
    add("--model", nargs="+", required=True, help="hub ids or folders, several of one shape")
    add("--data", nargs="+", default=["aime24", "aime25", "amc23", "math500"],
        help="these short names, hub ids, .parquet, .json or .jsonl files")
    add("--enable_thinking", action=argparse.BooleanOptionalAction, default=True,
        help="for Qwen3's chat template")
    add("--samples", type=count, default=16, help="answers to each question: acc@n, pass@1..n")
    add("--temperature", type=number(float, 0), help="default: Table 11, by family")
    add("--top_p", type=share, help="default: Table 11, by family")
    add("--top_k", type=number(int, 0), help="default: Table 11, by family; 0: all tokens")
    add("--max_prompt_tokens", type=count, default=2048, help="longer prompts are dropped")
    add("--max_response_tokens", type=count, default=38912, help="longer answers are cut")
    add("--gpu_memory_utilization", type=number(float, 0.01, 1), default=0.9,
        help="vLLM's share of the GPU")
    add("--out", default="runs/eval", help="folder of the results; finished ones are kept")
    add("--seed", type=number(int, 0), default=0, help="of sampling")
    return parser

def family(model_type, chat_template, enable_thinking):
    """Row of Table 11 for a model; Qwen3's if none fits, since its sampling is the common one."""
    if "<think>" in chat_template and "<｜Assistant｜>" in chat_template:
        return "DeepSeek-R1-Distill"
    if model_type.startswith("olmo"):
        return "OLMo"
    return "Qwen3 thinking" if enable_thinking else "Qwen3 non-thinking"

def choose_sampling(args, config, tokenizer):
    """dict(temperature, top_p, top_k): the flags, else Table 11's for the model's family."""
    table_11 = SAMPLING[family(config.model_type, tokenizer.chat_template, args.enable_thinking)]
    flags = (args.temperature, args.top_p, args.top_k)
    chosen = [given if flag is None else flag for flag, given in zip(flags, table_11)]
    if chosen[0] == 0 and args.samples > 1:
        raise ValueError("--temperature 0 gives the same answer each time: use --samples 1")
    if chosen[1] == 0:
        raise ValueError("--top_p 0 leaves no token to sample")
    return dict(zip(("temperature", "top_p", "top_k"), chosen))

def result_names(models):
    """{name of its results: model}: Qwen3-8B, or sdpo/step_100 for the checkpoint of a run.

    Where two would have one name, the whole path. In the order of steps: 20 before 100.
    """
    def step(model):
        return int((re.findall(r"step_(\d+)/?$", model) or [-1])[0])
    def short(model):
        parts = [part for part in Path(model).parts if part not in ("checkpoints", "..", "/")]
        return "/".join(parts[-2:] if "checkpoints" in Path(model).parts[-2:-1] else parts[-1:])
    models = sorted(models, key=step)
    if len({short(model) for model in models}) == len(models):
        return {short(model): model for model in models}
    return {model.strip("/").replace("../", ""): model for model in models}

# --- measures ------------------------------------------------------------------------------------

def pass_at_k(n, correct, k):
    """Chance that k of n answers, drawn without replacement, hold one of the `correct` ones.

    The unbiased estimator 1 - C(n - c, k) / C(n, k), Chen et al. 2021; at k = n the authors' "any".
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} answers")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)

def summarise(records, samples):
    """The row of one benchmark: acc@n, pass@k and means over all answers."""
    correct = {}
    for r in records:
        correct[r["index"]] = correct.get(r["index"], 0) + r["correct"]
    accuracies = [c / samples for c in correct.values()]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k < samples] + [samples]
    return dict(
        epistemic.averages(records), questions=len(correct), samples=samples,
        # over questions: the samples of one are no independent draws
        standard_error=(statistics.stdev(accuracies) / len(accuracies) ** 0.5
                        if len(accuracies) > 1 else None),
        pass_at={k: statistics.fmean(pass_at_k(samples, int(c), k) for c in correct.values())
                 for k in ks})

def table(models):
    """{model: {benchmark: row}} as a block a benchmark, a line a model."""
    lines = []
    for benchmark, row in next(iter(models.values())).items():
        n = row["samples"]
        title, best = f"{benchmark}, {row['questions']:,} questions", f"pass@{n}"
        lines.append(f"{title:32s}{'score':>8s}{'':8s}{best:>8s}{'length':>9s}{'cut':>7s}"
                     f"{'epistemic':>11s}")
        for name, rows in models.items():
            s = rows[benchmark]
            error = "" if s["standard_error"] is None else f" ± {s['standard_error']:.3f}"
            lines.append(f"  {name:30s}{s['score']:8.3f}{error:8s}{s['pass_at'][n]:8.3f}"
                         f"{s['length']:9,.0f}{s['truncated']:7.1%}{s['epistemic']:11.1f}")
    return "\n".join(lines)

# --- run -----------------------------------------------------------------------------------------

def read_result(path, key):
    """The finished records of a benchmark, if they belong to these weights, data and flags."""
    key_file = path.with_suffix(".key")
    if not path.exists():
        return None
    if not key_file.exists() or key_file.read_text() != f"{key} {path.stat().st_size}":
        return say(f"{path} is of other weights, data or flags, or not whole: evaluated again")
    return [json.loads(line) for line in path.read_text().splitlines()]

def sample_benchmark(llm, verifier, questions, name, sampling, args):
    """The records of every question's answers; each rank samples its share."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = list(enumerate(questions))[rank::ranks]
    # what stands in the think part is no answer yet (authors' eval.py)
    groups = generate(llm, verifier, [q for _, q in mine], args.seed + rank, after_think=True,
                      n=args.samples, max_tokens=args.max_response_tokens, **sampling)
    records = exchange([
        epistemic.record(o.text, o.reward, len(o.token_ids), o.finish_reason == "stop",
                         benchmark=name, index=i, question=q["messages"][-1]["content"],
                         answer=q["answer"]) for (i, q), group in zip(mine, groups) for o in group])
    return sorted(records, key=lambda r: r["index"])

def main():
    parser = make_parser()
    args = parser.parse_args()
    try:  # bad input ends with one line and exit code 2, before a model is loaded
        from transformers import AutoConfig
        models, shapes = {}, set()  # models: {name of its results: folder}
        for name, model in result_names(args.model).items():
            models[name], tokenizer = load_tokenizer(model, 0)
            config = AutoConfig.from_pretrained(models[name])
            shapes.add((config.model_type, config.hidden_size, config.num_hidden_layers,
                        config.vocab_size, tokenizer.chat_template))
            if len(shapes) > 1:  # they share the engine and the prompts
                raise ValueError(f"--model {model}: another shape or chat template than the "
                                 "others; evaluate it with a command of its own")
        benchmarks = {Path(s).stem: read_questions(s, tokenizer, args) for s in args.data}
        if len(benchmarks) < len(args.data):
            raise ValueError(f"--data: two benchmarks have one name ({' '.join(args.data)})")
        sampling = choose_sampling(args, config, tokenizer)
        if list(Path(args.out).glob("metrics.jsonl")):
            raise ValueError(f"--out {args.out} is the folder of a training run: name another")
        flags = dict(vars(args), model=None, data=None, out=None, gpu_memory_utilization=None)
        keys = {(model, Path(source).stem): f"{path} {source} {fingerprint(path, source)} "
                f"{flags | sampling}" for model, path in models.items() for source in args.data}
    except Exception as error:  # what transformers, datasets and Jinja raise has no common class
        parser.error(" ".join(str(error).split()))
    device, out, llm, loaded = start_process_group(), Path(args.out), None, None
    longest = min(args.max_prompt_tokens + args.max_response_tokens, config.max_position_embeddings)
    say(f"{args.samples} answers to each question, {dist.get_world_size()} x {device.type}, "
        + ", ".join(f"{name} {value}" for name, value in sampling.items()))
    rows = {model: {} for model in models}
    with Verifier() as verifier:
        for model, name in keys:
            path = out / model / f"{name}.jsonl"
            records = exchange([read_result(path, keys[model, name])])[0]
            if records is None:
                if llm is None:
                    llm = make_engine(models[model], longest, args, device)
                if loaded != model:
                    sleep(llm)
                    sync_weights(llm, load_model(models[model], torch.device("cpu")))
                    loaded = model
                records = sample_benchmark(llm, verifier, benchmarks[name], name, sampling, args)
                if dist.get_rank() == 0:
                    write_lines(path, records)
                    key = f"{keys[model, name]} {path.stat().st_size}"
                    path.with_suffix(".key").write_text(key)
            rows[model][name] = summarise(records, args.samples)
            say(f"{model}  {name}  {rows[model][name]['score']:.3f}")
    say("\n" + table(rows))
    if dist.get_rank() == 0:
        write_lines(out / "config.json", [vars(args)])
        write_lines(out / "summary.json", [dict(vars(args), **sampling, models=rows)])
    say(f"\nresults are in {out}")
    if llm is not None:
        llm.llm_engine.engine_core.shutdown()  # left open, it prints tracebacks at exit
    if dist.is_initialized():
        dist.destroy_process_group()

# --- prompts and models --------------------------------------------------------------------------

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

def read_questions(source, tokenizer, args):
    """load_questions, each with its prompt_ids; drops prompts over --max_prompt_tokens."""
    questions = load_questions(source)
    for q in questions:
        q["prompt_ids"] = render(tokenizer, q["messages"], args.enable_thinking)
    kept = [q for q in questions if len(q["prompt_ids"]) <= args.max_prompt_tokens]
    say(f"{source}: {len(kept):,} of {len(questions):,} prompts fit --max_prompt_tokens")
    if not kept:
        raise ValueError(f"{source}: no prompt fits --max_prompt_tokens {args.max_prompt_tokens}")
    return kept

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

def load_model(path, device):
    from transformers import AutoModelForCausalLM, logging as transformers_logging
    transformers_logging.disable_progress_bar()
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE, output_loading_info=True)
    if found["missing_keys"]:  # transformers only warns, and draws them at random
        sys.exit(f"error: weights are missing in {path}: {sorted(found['missing_keys'])[:3]} ...")
    model.generation_config.do_sample = True  # transformers saves no temperature without it
    return model.to(device)

# --- vLLM ----------------------------------------------------------------------------------------

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # weights, vLLM

def make_engine(path, max_model_len, args, device):
    """vLLM in this process, one engine a rank, asleep, without weights: sync_weights brings them.

    On CPU it packs its weights, and a second sync would miss an LM head that is tied to the
    embeddings (log-probabilities wrong by 0.2, no error): there the head is a tensor of its own.
    """
    cpu = device.type == "cpu"
    say("vLLM starts" + ("" if cpu else ": it measures memory and captures CUDA graphs, minutes"))
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # what it logs before it reads that
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else vLLM takes one
    from vllm import LLM
    llm = LLM(path, dtype=DTYPE, seed=args.seed, enforce_eager=cpu, max_model_len=max_model_len,
              max_num_seqs=256,  # its default of 1,024 takes GPU memory and is never reached
              gpu_memory_utilization=args.gpu_memory_utilization,
              kv_cache_memory_bytes=2 * 2**30 if cpu else None,
              distributed_executor_backend="external_launcher",
              logprobs_mode="processed_logprobs",  # after temperature: what is sampled from
              load_format="dummy", use_tqdm_on_load=False, enable_sleep_mode=not cpu,
              hf_overrides=dict(tie_word_embeddings=False) if cpu else None)
    sleep(llm)
    return llm

def sleep(llm):
    """Frees vLLM's KV cache and weights on the GPU, for the trainer."""
    if torch.cuda.is_available():
        llm.sleep(level=2)

def sync_weights(llm, model):
    """Wakes vLLM with the model's weights, written in place; frees gradients for its cache."""
    model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what torch's allocator still holds
        llm.wake_up(tags=["weights"])
    weights = ((name, p.detach()) for name, p in model.named_parameters(remove_duplicate=False))
    llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
    if torch.cuda.is_available():
        llm.wake_up(tags=["kv_cache"])

def generate(llm, verifier, questions, seed, after_think=False, **sampling):
    """vLLM's n answers to each question, with text and reward: groups in the questions' order."""
    from transformers import set_seed
    from vllm import SamplingParams
    # A seed per request crashes on CPU. The global ones repeat bit for bit: vLLM's older model
    # runner draws from torch's, the newer one from NumPy's. Cached prefixes change the last bit.
    set_seed(seed)
    llm.reset_prefix_cache()
    outputs = llm.generate([dict(prompt_token_ids=q["prompt_ids"]) for q in questions],
                           SamplingParams(detokenize=False, **sampling),
                           use_tqdm=dist.get_rank() == 0 and progress)
    answers, decode = [o for output in outputs for o in output.outputs], llm.get_tokenizer().decode
    texts = [decode(o.token_ids, skip_special_tokens=True) for o in answers]
    golds = [q["answer"] for q, output in zip(questions, outputs) for _ in output.outputs]
    rewards = verifier.verify(texts, golds, after_think=after_think)  # 1 correct, 0 not
    for o, text, reward in zip(answers, texts, rewards):
        o.text, o.reward = text, reward
    return [output.outputs for output in outputs]

class progress(tqdm):
    """A bar that leaves no line on a terminal; elsewhere it writes once a minute at most."""

    def __init__(self, *args, **kwargs):
        wait = 0.1 if sys.stderr.isatty() else 60
        super().__init__(*args, **kwargs, leave=False, mininterval=wait, maxinterval=wait,
                         delay=wait, disable=dist.get_rank() != 0)

    def refresh(self, *args, **kwargs):  # vLLM calls it at the end, whatever the delay
        if time.time() > self.start_t + self.delay:
            super().refresh(*args, **kwargs)

# --- files and processes -------------------------------------------------------------------------

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

def say(message):
    """A line on the screen, from the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)

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
