"""The miniature of the paper's experiments on the toy, run by run; and the report on them.

    python toy/study.py study controls remedies     # what to run; `make study` is all three

A run that has ended is not run again, one that was stopped begins anew.  The plan stands first on
the screen, with its time.  Each run's output goes to RUN.log beside its folder.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS, LR = 30, 2e-4  # of SDPO; GRPO takes half that rate
BASE = "--max_response_tokens 320 --model toy/model"
TRAIN = (f"{BASE} --num_questions 512 --questions_per_step 16 --minibatch_questions 16 "
         f"--warmup_steps 5 --steps {STEPS} --eval_every 1000 --save_every 1000 "
         "--tokens_per_micro_batch 8192 --no-recompute_layers --data toy/data/train.jsonl "
         "--eval_data toy/data/in.jsonl toy/data/ood.jsonl --eval_rollouts 2")
SDPO, GRPO = f"sdpo.py {TRAIN} --lr {LR}", f"grpo.py {TRAIN} --lr {LR / 2}"
TESTS = "--data toy/data/in.jsonl toy/data/ood.jsonl --samples 2 --top_k 0"
SFT = (f"{BASE} --lr 1e-4 --batch_size 8 --epochs 3 --tokens_per_micro_batch 8192 "
       "--save_every 1000 --no-recompute_layers")
# The strengths of `--remedy`: the paper's default, and one to either side
REMEDIES = {}


def families(k, out):
    return (f" --data {out}/data/train_families_{k}.jsonl "
            f"--eval_data {out}/data/in_families_{k}.jsonl toy/data/ood.jsonl")


def runs(group, out):
    """{folder's name: its commands, one after the other}."""
    if group == "study":
        chosen = {
            "sft": [f"generate_conditions.py {BASE} --data toy/data/train.jsonl --top_k 0 "
                    "--num_questions 100 --sft_examples 200 --questions_per_round 240 "
                    f"--out {out}/conditions",
                    *(f"sft_distill.py {SFT} --run_dir {out}/sft/{d} "
                      f"--data {out}/conditions/{d}.jsonl" for d in ("d_ug", "d_sg")),
                    f"evaluate.py {BASE} {out}/sft/d_ug/checkpoints/step_75 "
                    f"{out}/sft/d_sg/checkpoints/step_75 {TESTS} --out {out}/sft/eval"],
            "grpo": [GRPO], "sdpo": [SDPO],
            "sdpo_without_think": [f"{SDPO} --demonstration without_think"],
            "sdpo_uncertain": [f"{SDPO} --demonstration uncertain"],
            "sdpo_ema": [f"{SDPO} --ema 0.05"], "sdpo_top_k_20": [f"{SDPO} --top_k 20"],
            "sdpo_lr_tenth": [f"{SDPO} --lr {LR / 10}"],
        }
        for method, command in (("grpo", GRPO), ("sdpo", SDPO)):
            for d in (1, 8, 64, 128):
                chosen[f"{method}_{d}"] = [f"{command} --num_questions {d}"]
            for k in (1, 2, 4):
                chosen[f"{method}_families_{k}"] = [
                    f"toy/problems.py --families {k} --out {out}/data", command + families(k, out)]
        return chosen
    if group == "controls":
        chosen = {f"control_{c}": [SDPO.replace("sdpo.py", f"toy/controls.py {c}")]
                  for c in ("no_marker_loss", "no_answer_loss", "other_question")}
        chosen["control_slow"] = [f"{SDPO} --lr {LR / 3} --steps {3 * STEPS}"]
        chosen["control_grpo_fast"] = [f"{GRPO} --lr {LR}"]
        chosen["control_banned"] = [
            f"toy/controls.py banned {BASE} {TESTS} --out {out}/control_banned/eval"]
        return chosen
    return {f"{remedy}_{strength}": [f"remedies.py {TRAIN} --lr {LR} --remedy {remedy} "
                                     f"--strength {strength}"]
            for remedy, strengths in REMEDIES.items() for strength in strengths}


def run(name, commands, out, seed):
    """The commands one after the other; a file `ended` in the folder says that all have been."""
    folder, start = out / name, time.time()
    if (folder / "ended").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore",
                       TORCH_CPP_LOG_LEVEL="ERROR")
    with open(out / f"{name}.log", "w") as log:
        for command in commands:
            script, *flags = command.split()
            if not script.startswith("toy/problems"):
                flags += ["--seed", str(seed)]
            if "--out" not in flags and "--run_dir" not in flags:
                flags += ["--run_dir", str(folder)]
            if subprocess.run([sys.executable, script, *flags], cwd=ROOT, stdout=log, stderr=log,
                              env=environment).returncode:
                return f"{name}: failed; see {log.name}"
    for checkpoints in list(folder.rglob("checkpoints")):
        shutil.rmtree(checkpoints)  # 20 MB each
    (folder / "ended").touch()
    print(f"seed {seed}  {name:24s} {time.time() - start:5.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="+", choices=["study", "controls", "remedies"])
    parser.add_argument("--out", default="runs/study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each on CPU")
    args = parser.parse_args()
    todo = [(name, commands, Path(args.out) / f"seed_{seed}", seed) for seed in args.seeds
            for group in args.groups
            for name, commands in runs(group, f"{args.out}/seed_{seed}").items()]
    left = [t for t in todo if not (t[2] / t[0] / "ended").exists()]
    print(f"{len(todo)} runs, {len(left)} of them left: about "
          f"{len(left) * MINUTES / args.jobs / 60:.1f} hours with {args.jobs} at a time", flush=True)
    for *_, out, _ in todo:
        out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [error for error in pool.map(lambda t: run(*t), left) if error]
    folders = sorted({str(out) for *_, out, _ in todo})
    subprocess.run([sys.executable, "toy/controls.py", "errors", *folders], cwd=ROOT)
    subprocess.run([sys.executable, "report.py", *folders], cwd=ROOT)
    sys.exit("\n".join(failed) if failed else 0)


MINUTES = 2.0  # a run, on average, on a core of the machine of benchmarks/NOTES.md

if __name__ == "__main__":
    main()
