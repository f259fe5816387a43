"""Evaluation: Sec. 5-6, Table 11 and App. F.4.

n answers to every question of a benchmark, sampled as Table 11 says for the model's family:
score (the paper's acc@16: mean over samples, then over questions), pass@k, response length,
share of cut answers, epistemic markers.

    python evaluate.py --model Qwen/Qwen3-8B                          # AIME24/25, AMC23, MATH500
    torchrun --nproc_per_node 8 evaluate.py --model runs/sdpo/checkpoints/step_*     # Figures 4, 19
    python evaluate.py --model toy/model --data toy/data/ood.jsonl --samples 4

Several models of one shape, as the checkpoints of a run are, share one engine: the weights are
exchanged in place. Writes <out>/<model>/<benchmark>.jsonl, a line an answer, and
<out>/summary.json, and prints one table, a line a model (Table 2, of SFT's checkpoints). A start
with the same --out goes on with what is missing.

What a reader of the paper would not expect (the authors' code: commit 5c51051 of
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
import statistics
import sys
import time
from datetime import timedelta
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
    parser = argparse.ArgumentParser(
        description="Evaluation (Table 11). Defaults are the paper's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, add = fail, parser.add_argument
    add("--model", nargs="+", required=True, help="hub id or folder; several of one shape")
    add("--data", nargs="+", default=["aime24", "aime25", "amc23", "math500"],
        help="any of these short names, hub ids, .parquet/.json/.jsonl files")
    add("--enable_thinking", action=argparse.BooleanOptionalAction, default=True,
        help="for Qwen3's chat template")
    add("--samples", type=int, default=16, help="answers to a question: acc@n, pass@1..n")
    add("--temperature", type=float, help="Table 11, by family, if not given")
    add("--top_p", type=float, help="the same")
    add("--top_k", type=int, help="the same; 0: all tokens")
    add("--max_prompt_tokens", type=int, default=2048, help="longer prompts are left out")
    add("--max_response_tokens", type=int, default=38912, help="longer answers are cut")
    add("--gpu_memory_utilization", type=float, default=0.9, help="vLLM's share of the GPU")
    add("--out", default="runs/eval", help="a new folder, or one to go on with")
    add("--seed", type=int, default=0, help="of sampling")
    return parser.parse_args(argv)

def check_args(args, out):
    for name in ("samples", "max_prompt_tokens", "max_response_tokens"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)} must be at least 1")
    if not 0 < args.top_p <= 1 or args.top_k < 0:
        fail(f"--top_p {args.top_p} must lie in (0, 1], and --top_k {args.top_k} not be negative")
    for flag, names in (("--data", [Path(source).stem for source in args.data]),
                        ("--model", list(map(model_name, args.model)))):
        if len(set(names)) < len(names):
            fail(f"{flag}: two have one name ({' '.join(names)}), so would their results")
    path = out / "config.json"
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in vars(args).items():
            if name not in ("out", "model") and before.get(name) != value:
                fail(f"--{name} {value}: {out} was begun with {before.get(name)}; name another "
                     "folder, or go on as it was begun")
    elif out.exists() and (out.is_file() or any(out.iterdir())):
        fail(f"--out {out} holds something else: name another folder or remove it")

def model_name(model):
    """What its results are called: Qwen3-8B, or of a run's checkpoint sdpo/step_100."""
    parts = Path(model).parts
    return f"{parts[-3]}/{parts[-1]}" if parts[-2:-1] == ("checkpoints",) else parts[-1]

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

# --- prompts -------------------------------------------------------------------------------------

def render(tokenizer, messages, enable_thinking):
    """Token ids of a chat up to where the model speaks (Table 12); the template writes any BOS."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                         enable_thinking=enable_thinking)
    return tokenizer.encode(text, add_special_tokens=False)

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
    if len(kept) < len(questions):
        say(f"{source}: {len(questions) - len(kept):,} of {len(questions):,} prompts left out")
    return kept

def load_tokenizer(model, longest):
    """(tokenizer, config) of a model: what can be wrong with it shows before any weights load."""
    from transformers import AutoConfig, AutoTokenizer
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # missing, or a config.json that contradicts itself: no common class
        fail(f"--model {model}: no model folder, and no model on the hub "
             f"({str(error).strip().splitlines()[0]})")
    if tokenizer.chat_template is None:
        fail(f"--model {model}: its tokenizer has no chat template")
    if len(tokenizer) > config.vocab_size:
        fail(f"--model {model}: the tokenizer has {len(tokenizer):,} tokens and the model "
             f"{config.vocab_size:,}: they do not belong together")
    if longest > config.max_position_embeddings:
        fail(f"--max_prompt_tokens and --max_response_tokens: together {longest:,}, more than the "
             f"{config.max_position_embeddings:,} positions of {model}")
    return tokenizer, config

# --- run -----------------------------------------------------------------------------------------

def empty_engine(args, device, max_model_len):
    """vLLM in this very process, one engine a rank, without weights: load_weights brings them.

    On CPU it packs them, and a second model's would miss a head that is tied to the embeddings:
    there it gets a head of its own.
    """
    cpu = device.type == "cpu"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # of what it says before it reads that
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else vLLM leaves one
    from vllm import LLM
    return LLM(args.model[0], dtype="float32" if cpu else "bfloat16", seed=args.seed,
               enforce_eager=cpu, max_model_len=max_model_len, max_num_seqs=256,
               gpu_memory_utilization=args.gpu_memory_utilization,
               kv_cache_memory_bytes=2 * 2**30 if cpu else None,
               distributed_executor_backend="external_launcher", load_format="dummy",
               use_tqdm_on_load=False,
               hf_overrides=dict(tie_word_embeddings=False) if cpu else None)

def load_weights(llm, name):
    """Gives vLLM the weights of a model, in place."""
    from transformers import AutoModelForCausalLM, logging as transformers_logging
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    weights = ((key, p.detach()) for key, p in model.named_parameters(remove_duplicate=False))
    llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))

def answer(llm, verifier, questions, name, params, seed):
    """This rank's records: every question's answers, graded."""
    from transformers import set_seed
    mine = list(enumerate(questions))[dist.get_rank() :: dist.get_world_size()]
    # one global seed: a seed a request crashes vLLM on CPU, and this repeats bit for bit
    set_seed(seed + dist.get_rank())
    llm.reset_prefix_cache()
    prompts = [dict(prompt_token_ids=q["prompt_ids"]) for _, q in mine]
    outputs = llm.generate(prompts, params, use_tqdm=dist.get_rank() == 0 and sys.stderr.isatty())
    flat = [(i, q, o) for (i, q), group in zip(mine, outputs) for o in group.outputs]
    # what stands in the think part is no answer yet (authors' eval.py)
    rewards = verifier.verify([o.text for _, _, o in flat], [q["answer"] for _, q, _ in flat],
                              after_think=True)
    return [epistemic.record(o.text, reward, len(o.token_ids), o.finish_reason == "stop",
                             benchmark=name, index=i, question=q["messages"][-1]["content"],
                             answer=q["answer"]) for (i, q, o), reward in zip(flat, rewards)]

def start_process_group():
    """torchrun's group, or under plain python one of a single process; returns its device."""
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items():
        os.environ.setdefault(name, str(value))
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # AdamW in CPU memory wants its share of the cores, of which torchrun leaves it one
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    # a rank may wait for another's rollouts of 20,000 tokens longer than the usual half hour
    dist.init_process_group(backend, timeout=timedelta(hours=6), **alone)
    return device

def exchange(items):
    """Every rank's list, joined in the order of the ranks."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]

def say(message):
    """A line on the screen, from the first rank alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, flush=True)

def fail(message):
    """Bad input: one line and exit code 2. From the first rank at once, and torchrun ends the
    others; where only another rank fails, it is heard two seconds later."""
    if int(os.environ.get("RANK", 0)):
        time.sleep(2)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def write_lines(path, rows):
    """JSON Lines, written aside and renamed, so that a reader never finds half a file."""
    path.parent.mkdir(exist_ok=True)  # of a run whose folder is gone, nothing is begun anew
    aside = path.with_name(path.name + ".part")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.rename(path)

def main():
    args, shapes = parse_args(), []
    steps = {m: re.findall(r"step_(\d+)/?$", m) for m in args.model}
    args.model.sort(key=lambda m: int(steps[m][0]) if steps[m] else -1)  # 20 before 100
    for model in args.model:
        tokenizer, config = load_tokenizer(model, 0)
        shapes.append((config.model_type, config.hidden_size, config.num_hidden_layers,
                       config.vocab_size))
        if shapes[-1] != shapes[0]:
            fail(f"--model {model}: another shape than {args.model[0]}; evaluate it by itself")
    kind = family(config.model_type, tokenizer.chat_template, args.enable_thinking)
    for name, value in zip(("temperature", "top_p", "top_k"), SAMPLING[kind]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    out = Path(args.out)
    check_args(args, out)
    benchmarks = {Path(s).stem: with_prompts(s, tokenizer, args) for s in args.data}
    device = start_process_group()
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_lines(out / "config.json", [vars(args)])
    longest = args.max_prompt_tokens + args.max_response_tokens
    llm = empty_engine(args, device, min(longest, config.max_position_embeddings))
    from vllm import SamplingParams
    params = SamplingParams(n=args.samples, temperature=args.temperature, top_p=args.top_p,
                            top_k=args.top_k, max_tokens=args.max_response_tokens)
    say(f"{kind} sampling, temperature {args.temperature}, top-p {args.top_p}, top-k {args.top_k}; "
        f"{args.samples} answers to a question; {dist.get_world_size()} x {device.type}")
    models = {}
    with Verifier() as verifier:
        for model in args.model:
            loaded, rows = False, models.setdefault(model_name(model), {})
            for name, questions in benchmarks.items():
                path = out / model_name(model) / f"{name}.jsonl"
                lines = exchange([path.read_text() if path.exists() else None])[0]
                if lines:  # by an earlier start
                    rows[name] = summarise(list(map(json.loads, lines.splitlines())), args.samples)
                    continue
                if not loaded:
                    load_weights(llm, model)
                    loaded = True
                records = exchange(answer(llm, verifier, questions, name, params, args.seed))
                records.sort(key=lambda r: r["index"])
                rows[name] = summarise(records, args.samples)
                if dist.get_rank() == 0:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_lines(path, records)
            say(f"{model}: " + "  ".join(f"{n} {row['score']:.3f}" for n, row in rows.items()))
    say("\n" + table(models))
    if dist.get_rank() == 0:
        write_lines(out / "summary.json", [dict(vars(args), models=models)])
    llm.llm_engine.engine_core.shutdown()  # left open, it prints tracebacks at exit
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, a folder that is gone
        sys.exit(f"error: {error}; what was finished is whole: the same command goes on")
