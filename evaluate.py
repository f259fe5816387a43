"""Evaluation: Sec. 5-6, Table 11 and App. F.4 of the paper.

n responses to every question of a benchmark, sampled as Table 11 says for the model's family: score
(acc@n: mean over samples, then questions), pass@k, length, rate of cut ones, epistemic markers.

    python evaluate.py --model Qwen/Qwen3-8B                          # AIME24/25, AMC23, MATH500
    torchrun --nproc_per_node 8 evaluate.py --model runs/sdpo/checkpoints/step_*     # Figures 4, 19

Models that differ in nothing but their weights share one engine. <out>/<model>/<benchmark>.jsonl
holds a line a response, <benchmark>.json the result and what it belongs to, <out>/summary.json all
results. The same command again makes what is missing or belongs to another model, data or flags.
On another number of GPUs the responses will be others.

What the paper does not show (the authors' code: 5c51051 of beanie00/self-distillation-analysis):
  - Table 11 lists top-k 20, but their script never passes it on: they sampled with --top_k 0
  - their pass@16 is "any of 16"; pass@k here is the unbiased estimator, equal to that at k = n
  - they grade with a looser grader than they train with (it takes 5.4 for 540); here both are one
"""
import argparse
import json
import math
import os
import statistics
import sys
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from tqdm import tqdm

import epistemic
from verifier import Verifier, load_questions

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # of model and vLLM
TQDM = dict(leave=False, disable=not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0")

# --- arguments, Table 11 -------------------------------------------------------------------------

def make_parser():
    parser = argparse.ArgumentParser(
        description="Evaluation (Table 11). The defaults are the paper's; (ours) marks the others.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, usage=argparse.SUPPRESS)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", nargs="+", required=True, help="hub ids or folders that differ in weights only")
    add("--data", nargs="+", default=["aime24", "aime25", "amc23", "math500"],
        help="these, hub ids, or .parquet, .json or .jsonl files")
    add("--enable_thinking", action=switch, default=True, help="for Qwen3's chat template")
    add("--samples", type=int, default=16, help="responses to each question: acc@n, pass@1..n")
    add("--temperature", type=float, help="None: Table 11's, by family")
    add("--top_p", type=float, help="None: Table 11's, by family")
    add("--top_k", type=int, help="None: Table 11's, by family; 0: all tokens")
    add("--max_prompt_tokens", type=int, default=2048, help="longer prompts are dropped")
    add("--max_response_tokens", type=int, default=38912, help="longer responses are cut")
    add("--gpu_memory_utilization", type=float, default=0.9, help="(ours) for vLLM")
    add("--out", default="runs/eval", help="folder of the results; finished ones are kept")
    add("--seed", type=int, default=0, help="of sampling")
    return parser

def choose_sampling(chat_template, args):
    """dict(temperature, top_p, top_k): the flags, else Table 11's for the model's family."""
    table_11 = dict(temperature=0.6, top_p=0.95, top_k=20)  # R1-Distill, OLMo, Qwen3 thinking
    if not args.enable_thinking and "enable_thinking" in chat_template:  # Qwen3 non-thinking
        table_11 = dict(temperature=0.7, top_p=0.8, top_k=20)
    return table_11 | {k: v for k, v in vars(args).items() if k in table_11 and v is not None}

# --- measures ------------------------------------------------------------------------------------

def pass_at_k(n, correct, k):
    """Chance that k of n responses, drawn without replacement, hold a correct one (Chen et al.)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)

def summarise(records, samples):
    """The row of one benchmark: acc@n, pass@k and means over all responses."""
    correct = {}  # of each question
    for r in records:
        correct[r["index"]] = correct.get(r["index"], 0) + int(r["correct"])
    scores = [c / samples for c in correct.values()]  # the samples of one are not independent
    error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    pass_at = {str(k): statistics.fmean(pass_at_k(samples, c, k) for c in correct.values())
               for k in range(1, samples + 1)}
    return dict(epistemic.averages(records), questions=len(correct), samples=samples,
                standard_error=error, pass_at=pass_at)

def table(models):
    """{model: {benchmark: row}} as text, a line a row, those of one benchmark together."""
    lines = [f"{'benchmark':14s}{'model':23s} n   score          pass@n   length    cut  epistemic"]
    rows = [(benchmark, name, s) for name, rows in models.items() for benchmark, s in rows.items()]
    for benchmark, name, s in sorted(rows, key=lambda row: row[0]):
        error = "" if s["standard_error"] is None else f" ± {s['standard_error']:.3f}"
        lines.append(f"{benchmark:14s}{name:22s}{s['samples']:3d}{s['score']:8.3f}{error:8s}"
                     f"{s['pass_at'][str(s['samples'])]:8.3f}{s['length']:9,.0f}"
                     f"{s['truncated']:7.1%}{s['epistemic']:11.1f}")
    return "\n".join(lines)

# --- run -----------------------------------------------------------------------------------------

def sample_benchmark(llm, verifier, questions, sampling, args):
    """The records of the responses to all questions. Each rank samples a part."""
    own = questions[dist.get_rank() :: dist.get_world_size()]
    rollouts = generate(llm, verifier, own, args.seed + dist.get_rank(), n=args.samples,
                        max_tokens=args.max_response_tokens, **sampling)
    records = [epistemic.record(r, question=r.question["messages"][-1]["content"], **{
        field: r.question[field] for field in ("benchmark", "index", "answer")}) for r in rollouts]
    return sorted(all_gather(records), key=lambda r: r["index"])

def main():
    parser = make_parser()
    args = parser.parse_args()
    start_process_group()
    out, loaded = Path(args.out), None
    try:  # bad input ends with one line and exit code 2, before vLLM starts
        from transformers import AutoConfig, AutoTokenizer  # takes seconds, --help waits for none
        if Path(out, "metrics.jsonl").exists():
            raise ValueError(f"--out {out} is the folder of a training run: name another")
        models = find_models(args.model)
        first = next(iter(models.values()))
        tokenizer = AutoTokenizer.from_pretrained(first)
        if tokenizer.decode(tokenizer.encode("So 3?", add_special_tokens=False)) != "So 3?":
            raise ValueError(f"--model {first}: its tokenizer loses text; is a file missing?")
        positions = AutoConfig.from_pretrained(first).max_position_embeddings
        args.max_prompt_tokens = min(args.max_prompt_tokens, positions - 1)  # 1 for the response
        benchmarks = {source: read_questions(source, tokenizer, args) for source in args.data}
        sampling = choose_sampling(tokenizer.chat_template, args)
        origins = {Path(out, name, f"{Path(source).stem}.json"):  # of each result
                   origin_of(folder, source, sampling, args)
                   for name, folder in models.items() for source in args.data}
        if len(origins) < len(args.model) * len(args.data):
            raise ValueError("two of --model or of --data have one name: a command for each")
        missing = {path: origin for path, origin in origins.items() if not path.exists()
                   or not json.loads(path.read_text()).items() >= origin.items()}
        say(f"{len(missing)} of {len(origins)} results are to be made, {sampling}")
        for folder in {origin["model"] for origin in missing.values()}:
            load_model(folder)  # what cannot be read ends here
    except Exception as error:  # what transformers, datasets and Jinja raise has no common class
        parser.error(" ".join(str(error).split()))

    longest = min(args.max_prompt_tokens + args.max_response_tokens, positions)
    llm = make_engine(first, longest, args) if missing else None
    verifier = Verifier()
    for path, origin in missing.items():
        if loaded != origin["model"]:
            loaded = origin["model"]
            sync_weights(llm, load_model(loaded))
        questions = benchmarks[origin["data"]]
        records = sample_benchmark(llm, verifier, questions, sampling, args)
        row = summarise(records, args.samples)
        say(f"{path.with_suffix('')}  {epistemic.line(row)}")
        if dist.get_rank() == 0:
            path.unlink(missing_ok=True)  # killed here, the responses belong to nothing
            write_lines(path.with_suffix(".jsonl"), records)
            write_lines(path, [dict(origin, row=row)])
    if dist.get_rank() == 0:
        say(f"\n{table(write_summary(out, args))}\n\nresults are in {out}")
    if llm:
        llm.llm_engine.engine_core.shutdown()  # left open, it prints tracebacks at exit

# --- a reader of the paper may stop here: vLLM, questions, models, files, processes --------------

def make_engine(path, max_model_len, args):
    """vLLM in this process, one engine a rank; sync_weights brings its weights."""
    say("vLLM starts; on a GPU this takes minutes")
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else vLLM takes one
    from vllm import LLM
    cpu = not torch.cuda.is_available()
    return LLM(path, dtype=DTYPE, seed=args.seed, max_model_len=max_model_len,
               load_format="dummy", use_tqdm_on_load=False,
               max_num_seqs=256,  # its default of 1,024 takes GPU memory and is never reached
               gpu_memory_utilization=args.gpu_memory_utilization,
               kv_cache_memory_bytes=2 * 2**30 if cpu else None, enforce_eager=cpu,
               distributed_executor_backend="external_launcher",
               logprobs_mode="processed_logprobs",  # after temperature: what is sampled from
               # a checkpoint's LM head may differ from the embeddings that its model ties it to
               hf_overrides=dict(tie_word_embeddings=False))

def sync_weights(llm, model):
    """The model's weights, written into vLLM's in place."""
    weights = ((name, w.detach()) for name, w in model.named_parameters(remove_duplicate=False))
    llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))

def load_model(path):
    """A model in CPU memory."""
    from transformers import AutoModelForCausalLM, logging
    logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE,
                                                            output_loading_info=True)
    except Exception as error:  # of half a file "header too large", and not which
        raise ValueError(f"{path}: {error}") from None
    if found["missing_keys"]:  # transformers only warns, and draws them at random
        raise ValueError(f"{path}: weights are missing: {sorted(found['missing_keys'])[:3]} ...")
    return model

Rollout = namedtuple("Rollout", "question response_ids logprobs text finished reward")

def generate(llm, verifier, questions, seed, **sampling):
    """Graded rollouts, those of one question together, in the questions' order."""
    from transformers import set_seed
    from vllm import SamplingParams
    # A seed per request crashes on CPU; the global ones repeat bit for bit, torch's and NumPy's
    # (vLLM draws from one or the other). Cached prefixes change the last bit.
    set_seed(seed)
    llm.reset_prefix_cache()
    outputs = llm.generate([dict(prompt_token_ids=q["prompt_ids"]) for q in questions],
                           SamplingParams(detokenize=False, **sampling),  # token by token: slow
                           use_tqdm=not TQDM["disable"] and (lambda **bar: tqdm(**bar, **TQDM)))
    answers = [(q, answer) for q, output in zip(questions, outputs) for answer in output.outputs]
    decode = llm.get_tokenizer().decode  # batch_decode makes one text of no answers at all
    texts = [decode(answer.token_ids, skip_special_tokens=True) for _, answer in answers]
    rewards = verifier.verify(texts, [q["answer"] for q, _ in answers])
    return [Rollout(q, list(a.token_ids), a.logprobs and a.logprobs.logprobs, text,
                    a.finish_reason == "stop", reward)
            for (q, a), text, reward in zip(answers, texts, rewards)]

def render(tokenizer, messages, enable_thinking):
    """Token ids of a chat up to where the answer begins (Table 12)."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False,
                                         enable_thinking=enable_thinking)

def read_questions(source, tokenizer, args):
    """[{messages, answer, prompt_ids, benchmark, index}], prompts within --max_prompt_tokens."""
    questions = load_questions(source)
    for q in questions:
        q["prompt_ids"] = render(tokenizer, q["messages"], args.enable_thinking)
    fitting = [q for q in questions if len(q["prompt_ids"]) <= args.max_prompt_tokens]
    say(f"{source}: {len(fitting):,} of {len(questions):,} prompts fit")
    if not fitting:
        raise ValueError(f"{source}: no prompt within {args.max_prompt_tokens:,} tokens")
    return [dict(q, benchmark=Path(source).stem, index=i) for i, q in enumerate(fitting)]

def find_models(models):
    """{name of its results: folder}: Qwen3-8B, or sdpo/step_100 for the checkpoint of a run."""
    folders = {}
    for model in sorted(models, key=len):  # step_20 before step_100
        if Path(model).suffix == ".part":
            raise ValueError(f"--model {model}: half a checkpoint, left by a killed run")
        *_, run, parent, last = "", "", *Path(os.path.abspath(model)).parts
        folder = model if Path(model).is_dir() else snapshot_download(
            model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"])
        folders[f"{run}/{last}" if parent == "checkpoints" else last] = folder
        if beside_weights(folder) != beside_weights(next(iter(folders.values()))):
            raise ValueError(f"--model {model}: it differs from the first in more than weights "
                             "(config, tokenizer, chat template or eos): a command for each")
    return folders

def beside_weights(folder):
    """What the engine loads of a model besides its weights."""
    from transformers import AutoConfig, AutoTokenizer
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    settings = {name: value for name, value in config.to_dict().items()
                if name not in ("dtype", "transformers_version", "_name_or_path")}
    file = Path(folder, "generation_config.json")  # where there is none the config's eos holds
    eos = (json.loads(file.read_text()) if file.exists() else settings).get("eos_token_id")
    return settings, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, eos

def origin_of(folder, source, sampling, args):
    """What a result belongs to: flags, model, data, and (name, size, time) of their files."""
    flags = dict(vars(args), **sampling, model=folder, data=source, out=None)
    files = [path for path in [*Path(folder).iterdir(), Path(source)] if path.is_file()]
    stats = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)]
    return dict(flags, gpu_memory_utilization=None, files=stats)

def write_summary(out, args):
    """summary.json, {model: {benchmark: row}} of all results in the folder, and config.json."""
    models, folders = {}, []
    for path in sorted(out.rglob("*/*.json"), key=lambda path: (len(str(path.parent)), path)):
        result = json.loads(path.read_text())
        if "row" in result:
            models.setdefault(str(path.parent.relative_to(out)), {})[path.stem] = result["row"]
            folders.append(result["model"])
    write_lines(out / "config.json", [dict(vars(args), model=folders, script="evaluate.py")])
    write_lines(out / "summary.json", [dict(models=models)])
    return models

def write_lines(path, rows):
    """JSON Lines, renamed when complete: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unfinished.rename(path)

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

def all_gather(items):
    """Every rank's list, joined in the order of the ranks."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]

def say(message):
    """A line on the screen, from the first rank only."""
    if dist.get_rank() == 0:
        print(message, flush=True)

if __name__ == "__main__":
    main()
