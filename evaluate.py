"""Evaluation: Sec. 5-6, Table 11 and App. F.4.

n answers to every question of a benchmark, sampled as Table 11 says for the model's family:
score (the paper's acc@16: mean over samples, then over questions), pass@k, response length,
share of cut answers, epistemic markers.

    python evaluate.py --model Qwen/Qwen3-8B                          # AIME24/25, AMC23, MATH500
    torchrun --nproc_per_node 8 evaluate.py --model runs/sdpo/checkpoints/step_100
    python evaluate.py --model toy/model --data toy/data/ood.jsonl --samples 4

Writes <out>/<benchmark>.jsonl, a line an answer, and <out>/summary.json, and prints one table. A start
with the same folder and flags goes on with the benchmarks that are missing.

What a reader of the paper would not expect:
  - Table 11 lists top-k 20, but the authors' script parses it without passing it on: their numbers
    were sampled with --top_k 0
  - their pass@16 is "any of 16"; pass@k here is the unbiased estimator, equal to that at k = n
  - they grade with a looser grader than they train with (it takes 5.4 for 540); here both are one
"""

import argparse
import contextlib
import json
import logging
import math
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import epistemic
from verifier import Verifier, load_questions

# --- arguments -----------------------------------------------------------------------------------

SAMPLING = {  # Table 11: temperature, top-p, top-k by model family
    "DeepSeek-R1-Distill": (0.6, 0.95, 20),
    "Qwen3 thinking": (0.6, 0.95, 20),
    "Qwen3 non-thinking": (0.7, 0.8, 20),
    "OLMo": (0.6, 0.95, 20),
}

def parse_args(argv=None):
    def positive(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} must be at least 1")
        return int(text)

    parser = argparse.ArgumentParser(
        description="Evaluation (Table 11). Defaults are the paper's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = fail
    add = parser.add_argument
    add("--model", required=True, help="hub id or Hugging Face folder")
    add("--data", nargs="+", default=["aime24", "aime25", "amc23", "math500"],
        help="any of these short names, hub ids, .parquet/.json/.jsonl files")
    add("--enable_thinking", action=argparse.BooleanOptionalAction, default=True,
        help="the chat template's switch (Qwen3)")
    add("--samples", type=positive, default=16, help="answers to a question: acc@n, pass@1..n")
    add("--temperature", type=float, help="Table 11, by family, if not given")
    add("--top_p", type=float, help="the same")
    add("--top_k", type=int, help="the same; 0: all tokens")
    add("--max_prompt_tokens", type=positive, default=2048, help="longer ones are left out")
    add("--max_response_tokens", type=positive, default=38912, help="longer ones are cut")
    add("--out", default="runs/eval", help="a folder without a summary.json")
    add("--seed", type=int, default=0, help="of sampling")
    return parser.parse_args(argv)

def fail(message):
    """Bad input: one line and exit code 2. Every rank gets here; the first one speaks."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def family(model_type, chat_template, enable_thinking):
    """Row of Table 11 for a model; Qwen3's if none fits, since its sampling is the common one."""
    if "<think>" in chat_template and "<｜Assistant｜>" in chat_template:
        return "DeepSeek-R1-Distill"
    if model_type.startswith("olmo"):
        return "OLMo"
    return "Qwen3 thinking" if enable_thinking else "Qwen3 non-thinking"

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
        questions=len(correct), samples=samples, score=statistics.fmean(accuracies),
        # over questions: the samples of one are no independent draws
        standard_error=(statistics.stdev(accuracies) / len(accuracies) ** 0.5
                        if len(accuracies) > 1 else None),
        pass_at={k: statistics.fmean(pass_at_k(samples, int(c), k) for c in correct.values())
                 for k in ks},
        length=statistics.fmean(r["tokens"] for r in records),
        truncated=statistics.fmean(not r["finished"] for r in records),
        epistemic=statistics.fmean(r["epistemic"] for r in records),
    )

def table(summary):
    lines = [f"{'':16s}{'questions':>10s}{'score':>16s}{'pass@n':>8s}{'length':>9s}{'cut':>7s}"
             f"{'epistemic':>11s}"]
    for name, s in summary.items():
        error = "" if s["standard_error"] is None else f" ± {s['standard_error']:.3f}"
        lines.append(f"{name:16s}{s['questions']:10,d}{s['score']:>8.3f}{error:8s}"
                     f"{s['pass_at'][s['samples']]:8.3f}{s['length']:9,.0f}{s['truncated']:7.1%}"
                     f"{s['epistemic']:11.1f}")
    return "\n".join(lines)

# --- prompts -------------------------------------------------------------------------------------

def render(tokenizer, messages, enable_thinking):
    """Token ids of a chat up to where the model speaks (Table 12).

    A template with a BOS writes it itself (DeepSeek), so that none is added here.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                         enable_thinking=enable_thinking)
    return tokenizer.encode(text, add_special_tokens=False)

def load_tokenizer(args):
    """(tokenizer, config) of --model: what can be wrong with it shows before its weights load."""
    from transformers import AutoConfig, AutoTokenizer
    try:
        config = AutoConfig.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        fail(f"--model {args.model}: no model folder, and no model on the hub "
             f"({str(error).strip().splitlines()[0]})")
    if tokenizer.chat_template is None:
        fail(f"--model {args.model}: its tokenizer has no chat template")
    if len(tokenizer) > config.vocab_size:
        fail(f"--model {args.model}: the tokenizer has {len(tokenizer):,} tokens and the model "
             f"{config.vocab_size:,}: they do not belong together")
    if tokenizer.eos_token_id is None:
        fail(f"--model {args.model}: its tokenizer has no end token, so no answer would end")
    if int(os.environ.get("RANK", 0)) == 0:
        if args.enable_thinking and not any(word in str(tokenizer.chat_template)
                                            for word in ("enable_thinking", "<think>")):
            print(f"{args.model}: its chat template has no thinking to switch on")
        if not ends_answers(tokenizer, args.model):
            print(f"{args.model}: its chat template ends no answer with {tokenizer.eos_token}: most "
                  f"will run on to --max_response_tokens")
    return tokenizer, config

def ends_answers(tokenizer, model):
    """Whether an answer in the chat template is followed by a token that vLLM stops at."""
    from transformers import GenerationConfig
    ends = [tokenizer.eos_token_id]
    with contextlib.suppress(OSError):  # a folder without generation_config.json
        more = GenerationConfig.from_pretrained(model).eos_token_id
        ends += more if isinstance(more, list) else [more]
    chat = [dict(role="user", content="Question"), dict(role="assistant", content="Answer")]
    _, _, behind = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("Answer")
    return not set(ends).isdisjoint(tokenizer.encode(behind, add_special_tokens=False))

def with_prompts(source, tokenizer, args):
    """load_questions, each with its prompt_ids; those over --max_prompt_tokens left out."""
    try:
        questions = load_questions(source)
    except ValueError as error:
        fail(error)
    for q in questions:
        q["prompt_ids"] = render(tokenizer, q["messages"], args.enable_thinking)
    kept = [q for q in questions if len(q["prompt_ids"]) <= args.max_prompt_tokens]
    if not kept:
        fail(f"{source}: all {len(questions)} prompts are longer than --max_prompt_tokens "
             f"{args.max_prompt_tokens}")
    if len(kept) < len(questions) and int(os.environ.get("RANK", 0)) == 0:
        print(f"{source}: {len(questions) - len(kept):,} of {len(questions):,} prompts left out")
    return kept

# --- run -----------------------------------------------------------------------------------------

def load_engine(args, device, max_model_len):
    """vLLM in this very process, one engine a rank, with the weights of --model."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # of what it says before it reads that
    if device.type == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    from vllm import LLM
    return LLM(args.model, dtype="float32" if device.type == "cpu" else "bfloat16", seed=args.seed,
               enforce_eager=device.type == "cpu", max_model_len=max_model_len,
               gpu_memory_utilization=0.9, distributed_executor_backend="external_launcher",
               use_tqdm_on_load=False)

def start_process_group():
    """torchrun's group, or under plain python one of a single process; returns its device."""
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items():
        os.environ.setdefault(name, str(value))
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", **alone)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", **alone)
    return device

def exchange(items):
    """Every rank's list, joined in the order of the ranks."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]

def cannot_write(path, error):
    """A full disk, a folder made read-only or deleted under the run: one line, exit code 1."""
    sys.exit(f"error: {path}: cannot be written ({error!r:.200}); what was finished is whole: put "
             f"that right and go on from there")

def write_lines(path, rows):
    """JSON Lines, written aside and renamed, so that a reader never finds half a file."""
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        aside.rename(path)
    except OSError as error:
        cannot_write(path, error)

def main():
    args = parse_args()
    out = Path(args.out)
    if (out / "summary.json").exists():
        fail(f"--out {out} already holds results: name another folder or remove it")
    names = [Path(source).stem for source in args.data]
    if len(set(names)) < len(names):
        fail(f"--data: two benchmarks have one name ({' '.join(names)}), so would their files")
    tokenizer, config = load_tokenizer(args)
    benchmarks = {n: with_prompts(s, tokenizer, args) for n, s in zip(names, args.data)}
    row = family(config.model_type, tokenizer.chat_template, args.enable_thinking)
    for name, value in zip(("temperature", "top_p", "top_k"), SAMPLING[row]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not 0 < args.top_p <= 1 or args.top_k < 0:
        fail(f"--top_p {args.top_p} must lie in (0, 1], and --top_k {args.top_k} not be negative")

    path = out / "config.json"
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in vars(args).items():
            if name != "out" and before.get(name) != value:
                fail(f"--{name} {value}: {path.parent} was begun with {before.get(name)}; "
                     "name another folder, or go on as it was begun")

    device = start_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        write_lines(path, [vars(args)])
    limit = args.max_prompt_tokens + args.max_response_tokens
    llm = load_engine(args, device, min(limit, config.max_position_embeddings))
    from vllm import SamplingParams
    params = SamplingParams(n=args.samples, temperature=args.temperature, top_p=args.top_p,
                            top_k=args.top_k, max_tokens=args.max_response_tokens)
    if rank == 0:
        print(f"{args.model}: {row} sampling, temperature {args.temperature}, top-p {args.top_p}, "
              f"top-k {args.top_k}; {args.samples} answers to a question; {world_size} x "
              f"{device.type}")
    summary = {}
    with Verifier() as verifier:
        for name, questions in benchmarks.items():
            finished = exchange([(out / f"{name}.jsonl").exists()])[0]  # by an earlier start
            if finished:
                lines = (out / f"{name}.jsonl").read_text().splitlines()
                summary[name] = summarise([json.loads(line) for line in lines], args.samples)
                continue
            mine = list(enumerate(questions))[rank::world_size]
            # one global seed: a seed a request crashes vLLM on CPU, and this repeats bit for bit
            torch.manual_seed(args.seed + rank)
            llm.reset_prefix_cache()
            prompts = [dict(prompt_token_ids=q["prompt_ids"]) for _, q in mine]
            bar = rank == 0 and sys.stderr.isatty()
            outputs = llm.generate(prompts, params, use_tqdm=bar)
            flat = [(i, q, o) for (i, q), group in zip(mine, outputs) for o in group.outputs]
            # what stands in the think part is no answer yet (authors' eval.py)
            marks = verifier.verify([o.text for _, _, o in flat], [q["answer"] for _, q, _ in flat],
                                    after_think=True)
            records = exchange([
                dict(benchmark=name, index=i, question=q["messages"][-1]["content"],
                     answer=q["answer"], response=o.text, correct=mark, tokens=len(o.token_ids),
                     finished=o.finish_reason == "stop", epistemic=epistemic.count(o.text))
                for (i, q, o), mark in zip(flat, marks)
            ])
            records.sort(key=lambda r: r["index"])
            summary[name] = summarise(records, args.samples)
            if rank == 0:
                write_lines(out / f"{name}.jsonl", records)
    if rank == 0:
        print(table(summary))
        write_lines(out / "summary.json", [dict(vars(args), benchmarks=summary)])
    llm.llm_engine.engine_core.shutdown()  # left open, it prints tracebacks at exit
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
