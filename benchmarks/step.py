"""Whole steps on the toy: our script beside TRL 1.16's trainer, and where the time goes.

    pip install -r benchmarks/requirements.txt
    python benchmarks/step.py                     # sdpo.py, then SDPOTrainer; --algorithm grpo

The same model, questions, number of rollouts, longest answer, temperature, update size and machine,
one after the other, each in a process of its own; the median of --steps after one to warm up.
TRL samples with transformers: on CPU its vLLM mode fails at the first weight sync.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MODEL, DATA = ROOT / "toy/model", ROOT / "toy/data/train.jsonl"

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--algorithm", choices=["grpo", "sdpo"], default="sdpo")
    add("--arms", nargs="+", choices=["ours", "trl"], default=["ours", "trl"])
    add("--questions", type=int, default=32, help="a step")
    add("--rollouts", type=int, default=8, help="a question")
    add("--max_response_tokens", type=int, default=400)
    add("--steps", type=int, default=5)
    add("--arm", help=argparse.SUPPRESS)  # set in the process of one arm
    return parser.parse_args()

def ours(args):
    """The script's main(), with a clock around what samples and what computes gradients."""
    script = __import__(args.algorithm)
    spent = {}
    def timed(name):
        function = getattr(script, name)
        def call(*a, **k):
            start = time.perf_counter()
            result = function(*a, **k)
            spent[name] = spent.get(name, 0) + time.perf_counter() - start
            return result
        setattr(script, name, call)
    for name in ("generate", "update"):
        timed(name)
    steps, log, ended = [], script.log, time.perf_counter()
    def note(*a):  # a step: from one line of metrics.jsonl to the next
        nonlocal ended
        log(*a)
        steps.append(dict(spent, step=time.perf_counter() - ended))
        ended = time.perf_counter()
        spent.clear()
    script.log = note
    run_dir = Path(tempfile.mkdtemp()) / "run"
    sys.argv = [f"{args.algorithm}.py", "--model", str(MODEL), "--data", str(DATA), "--eval_data",
                "--questions_per_step", str(args.questions), "--minibatch_questions",
                str(args.questions), "--rollouts", str(args.rollouts), "--lr", "1e-6",
                "--max_response_tokens", str(args.max_response_tokens),
                "--tokens_per_micro_batch", "8192", "--save_every", "1000",
                "--steps", str(args.steps + 1), "--run_dir", str(run_dir)]
    script.main()
    steps = sorted(steps[1:], key=lambda s: s["step"])  # the first holds the start-up
    m = steps[len(steps) // 2]
    length = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[1])["length"]
    return dict(seconds=m["step"], length=length, parts=dict(
        generation=m["generate"], update=m["update"],
        rest=m["step"] - m["generate"] - m["update"]))

def trl(args):
    """TRL's trainer with the same numbers."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from verifier import Verifier, load_questions
    if args.algorithm == "sdpo":
        from trl.experimental.sdpo import SDPOConfig as Config, SDPOTrainer as Trainer
        more = dict(distillation_mode="topk_logits", distillation_topk=100, distillation_alpha=0.5,
                    distillation_add_tail=True, teacher_model_kind="base")
    else:
        from trl import GRPOConfig as Config, GRPOTrainer as Trainer
        more = dict(beta=0.0, epsilon=0.2, epsilon_high=0.28, loss_type="grpo")
    questions = load_questions(str(DATA))
    data = Dataset.from_list([dict(prompt=q["messages"], answer=q["answer"]) for q in questions])
    verifier = Verifier()

    def reward(completions, answer, **_):
        return verifier.verify([c[-1]["content"] for c in completions], answer)
    batch, cuda = args.questions * args.rollouts, torch.cuda.is_available()
    config = Config(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=32,
                    gradient_accumulation_steps=batch // 32, num_generations=args.rollouts,
                    max_completion_length=args.max_response_tokens, temperature=1.0,
                    learning_rate=1e-6, weight_decay=0.01, max_steps=args.steps + 1, report_to=[],
                    save_strategy="no", use_cpu=not cuda, bf16=cuda, gradient_checkpointing=False,
                    logging_steps=1, disable_tqdm=True, **more)
    times, lengths = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter() - self.start)
        def on_log(self, *_, logs, **__):
            lengths.extend(v for k, v in logs.items() if k == "completions/mean_length")
    trainer = Trainer(model=AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
                      reward_funcs=reward, args=config, train_dataset=data,
                      processing_class=AutoTokenizer.from_pretrained(MODEL), callbacks=[Clock()])
    trainer.train()
    verifier.close()
    times = sorted(times[1:])
    return dict(seconds=times[len(times) // 2], length=lengths[1] if lengths[1:] else float("nan"))

def main():
    args = parse_args()
    if args.arm:
        result = (ours if args.arm == "ours" else trl)(args)
        return print("\nRESULT", json.dumps(result))
    print(f"{args.algorithm}, {args.questions} questions x {args.rollouts} rollouts of at most "
          f"{args.max_response_tokens} tokens, toy, {os.cpu_count()} cores\n")
    results = {}
    for arm in args.arms:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--arm", arm],
                              capture_output=True, text=True, cwd=ROOT)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            sys.exit(f"{arm}: no result\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        r = results[arm] = json.loads(lines[-1][7:])
        print(f"{arm:5s} {r['seconds']:7.2f} s a step, {r['length']:.0f} tokens an answer",
              flush=True)
        for name, seconds in r.get("parts", {}).items():
            print(f"        {name:12s} {seconds:7.2f} s  {seconds / r['seconds']:6.1%}")
    if len(results) == 2:
        print(f"\n{results['trl']['seconds'] / results['ours']['seconds']:.1f} times as fast")

if __name__ == "__main__":
    main()
