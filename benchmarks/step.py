"""Whole steps on the toy: our script, and beside it TRL 1.16's trainer.

    python benchmarks/step.py                      # sdpo.py; --algorithm grpo
    pip install -r benchmarks/requirements.txt     # then --trl: SDPOTrainer, too

The same model, questions, 8 rollouts each, longest response, temperature, update size and machine,
one after the other; the median of --steps after one to warm up. TRL samples with transformers: on
CPU its vLLM mode fails at the first weight sync.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODEL, DATA = ROOT / "toy/model", ROOT / "toy/data/train.jsonl"

def ours(args):
    """[(seconds of a step, of its rollouts, tokens a response)], as the script notes them."""
    run_dir, size = tempfile.mkdtemp() + "/run", str(args.questions)
    subprocess.run([
        sys.executable, f"{args.algorithm}.py", "--model", MODEL, "--data", DATA, "--eval_data",
        "--questions_per_step", size, "--minibatch_questions", size, "--lr", "1e-6",
        "--max_response_tokens", str(args.max_response_tokens), "--save_every", "1000",
        "--tokens_per_micro_batch", "8192", "--steps", str(args.steps + 1), "--run_dir", run_dir],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = map(json.loads, Path(run_dir, "metrics.jsonl").read_text().splitlines())
    return [(sum(row["seconds"].values()), row["seconds"]["rollout"], row["length"])
            for row in rows]

def trl(args):
    """The same of TRL's trainer; it does not say what its rollouts take."""
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
    data = Dataset.from_list([dict(prompt=q["messages"], answer=q["answer"])
                              for q in load_questions(str(DATA))])
    cuda = torch.cuda.is_available()
    config = Config(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=32,
                    gradient_accumulation_steps=args.questions * 8 // 32, num_generations=8,
                    max_completion_length=args.max_response_tokens, temperature=1.0,
                    learning_rate=1e-6, weight_decay=0.01, max_steps=args.steps + 1, report_to=[],
                    save_strategy="no", use_cpu=not cuda, bf16=cuda, gradient_checkpointing=False,
                    logging_steps=1, disable_tqdm=True, **more)
    seconds, lengths = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()
        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)
        def on_log(self, *_, logs, **__):
            lengths.extend(v for k, v in logs.items() if k == "completions/mean_length")
    verifier = Verifier()
    def reward(completions, answer, **_):
        return verifier.verify([c[-1]["content"] for c in completions], answer)
    trainer = Trainer(model=AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
                      reward_funcs=reward, args=config, train_dataset=data,
                      processing_class=AutoTokenizer.from_pretrained(MODEL),
                      callbacks=[Clock()])
    trainer.train()
    return [(s, float("nan"), length) for s, length in zip(seconds, lengths)]

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--algorithm", choices=["grpo", "sdpo"], default="sdpo")
    add("--trl", action="store_true", help="TRL's trainer, too")
    add("--questions", type=int, default=32, help="a step, a multiple of 4")
    add("--max_response_tokens", type=int, default=400)
    add("--steps", type=int, default=5)
    args = parser.parse_args()
    for arm in [ours, trl] if args.trl else [ours]:
        steps = sorted(arm(args)[1:])
        step, rollout, length = steps[len(steps) // 2]
        print(f"{args.algorithm}, {arm.__name__}: {step:.2f} s a step, {rollout:.2f} of them "
              f"rollouts, {length:.0f} tokens a response", flush=True)

if __name__ == "__main__":
    main()
