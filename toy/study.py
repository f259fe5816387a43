"""The miniature of the paper's experiments on the toy, run by run; and the report on them.

    python toy/study.py study coverage controls opsd remedies   # what to run; `make study`: all

A run that has ended with the same commands is not run again; one that was stopped begins anew.
The plan stands first on the screen, with its time. Each run's output goes to RUN.log beside its
folder. At the end come OUT/numbers.json, the tables of toy/README.md and OUT/report.html.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from extras.report import NAMES, table_6

# --- what to run ---------------------------------------------------------------------------------

GROUPS = "study", "coverage", "controls", "opsd", "remedies"
# Two runs at a time on the two cores of benchmarks/README.md: 33 of 20 steps took 2.8 minutes each,
# 22 of 80 steps 6.3
MINUTES, MINUTES_A_STEP = 1.6, 0.058
STEPS, LR = 20, 1e-4  # of SDPO; GRPO takes half that rate
BASE = "--max_response_tokens 320 --model toy/model"
TRAIN = (f"{BASE} --num_questions 512 --questions_per_step 12 --minibatch_questions 12 "
         f"--warmup_steps 3 --steps {STEPS} --save_every 1000 "
         "--tokens_per_micro_batch 8192 --no-recompute_layers --data toy/data/train.jsonl "
         "--eval_data toy/data/in.jsonl toy/data/ood.jsonl")
SDPO, GRPO = f"sdpo.py {TRAIN} --lr {LR}", f"grpo.py {TRAIN} --lr {LR / 2}"
TESTS = "--data toy/data/in.jsonl toy/data/ood.jsonl --samples 2 --top_k 0"
CONDITIONS = (f"generate_conditions.py {BASE} --data toy/data/train.jsonl --temperature 1 "
              "--top_p 1 --top_k 0 --accuracy 0.125 1 --num_questions 100 --sft_examples 200 "
              "--questions_per_round 240")
SFT = (f"sft_distill.py {BASE} --lr 1e-4 --batch_size 8 --epochs 3 --tokens_per_micro_batch 8192 "
       "--save_every 1000 --no-recompute_layers")
REMEDIES = {  # the rate, SDPO's or GRPO's, what it is nearer to; the default strength, two others
    "demopsd": (LR, (0.15, 0.05, 0.45)), "srpo": (LR / 2, (1, 0.3, 3)),
    "antisd": (LR / 2, (0.5, 0.2, 1)), "rlrt": (LR / 2, (0.5, 0.2, 1)),
    "mixture": (LR / 2, (0.9, 0.5, 0.99)), "shield": (LR, (1, 0.5, 0.9)),
    "rlcsd": (LR / 2, (0.5, 0.2, 1)),
}
# App. E and F.1: a toy that can think or not, made from toy/model before the first of these runs;
# the loss on the first 32 tokens stands for OPSD's 1,024
TWO_MODES = "toy/pretrain.py --two_modes 0.5 --steps 200 --lr 1e-3 --out {}/two_modes"
OPSD = f"-m extras.opsd {TRAIN} --lr {LR} --loss_tokens 32 --save_every 5"
# Figure 1 and Section 6: training questions of another kind, and fresh ones of the same kind. One
# way of answering serves `narrow`, `habits` has one for each family, `coverage` needs a search
DOMAIN = ("--steps {steps} --save_every 10 --data toy/data/{name}.jsonl "
          "--eval_data toy/data/{name}_test.jsonl {data}/ood.jsonl")
COVERAGE = DOMAIN.format(steps=4 * STEPS, name="coverage", data="{}") + " --num_questions {}"
DOMAINS = {"narrow": STEPS, "habits": 6 * STEPS}  # steps
SIZES = 1, 8, 64, 128, 512, 1200

def runs(group, out):
    """{folder's name: its commands, one after the other}."""
    both = {"grpo": [GRPO], "sdpo": [SDPO]}
    if group == "study":
        return both | {
            "sft": [f"{CONDITIONS} --out {out}/sft/conditions",
                    *(f"{SFT} --run_dir {out}/sft/{d} --data {out}/sft/conditions/{d}.jsonl"
                      for d in ("d_ug", "d_sg")),
                    f"evaluate.py {BASE} {out}/sft/d_ug/checkpoints/step_75 "
                    f"{out}/sft/d_sg/checkpoints/step_75 {TESTS} --out {out}/sft/eval",
                    f"-m extras.token_kl --model toy/model {out}/sft/conditions/rounds "
                    f"--out {out}/token_kl/token_kl.json"],
            "sdpo_without_think": [f"{SDPO} --demonstration without_think"],
            "sdpo_uncertain": [f"{SDPO} --demonstration uncertain"],
            "sdpo_ema": [f"{SDPO} --ema 0.05"], "sdpo_top_k_20": [f"{SDPO} --top_k 20"],
            "sdpo_lr_tenth": [f"{SDPO} --lr {LR / 10}"]}
    if group == "coverage":
        flags = {size: COVERAGE.format("toy/data", size) for size in SIZES}
        flags |= {name: DOMAIN.format(steps=steps, name=name, data="toy/data")
                  for name, steps in DOMAINS.items()}
        chosen = {f"{method}_{name}": [f"{command} {more}"]
                  for method, (command,) in both.items() for name, more in flags.items()}
        # without think SDPO stays above the level of guessing, where the order of |D| would be
        # lost; five times as many questions tell it
        return chosen | {f"sdpo_without_think_{size}": [
            f"toy/problems.py --train 0 --eval 1000 --seed 1 --out {out}/data_{size}",
            f"{SDPO} {COVERAGE.format(f'{out}/data_{size}', size)} "
            "--demonstration without_think --save_every 80"] for size in (8, 512)}
    if group == "controls":
        return both | {f"control_{c}": [SDPO.replace("sdpo.py", f"toy/controls.py {c}")]
                       for c in ("no_markers", "no_marker_loss", "no_answer_loss",
                                 "other_question")} | {
            "control_lr_third": [f"{SDPO} --lr {LR / 3} --steps {3 * STEPS}"],
            "control_grpo_lr_double": [f"{GRPO} --lr {LR}"],
            "control_banned": [
                f"toy/controls.py banned {BASE} {TESTS} --out {out}/control_banned/eval"]}
    if group == "opsd":
        flags = {"grpo_thinking_off": (GRPO, "--no-enable_thinking"),
                 "sdpo_thinking_off": (SDPO, "--no-enable_thinking"), "opsd": (OPSD, ""),
                 "opsd_hybrid": (OPSD, "--no-enable_thinking --teacher_thinking")}
        return {name: [f"{command} --model {Path(out).parent}/two_modes {more}"]
                for name, (command, more) in flags.items()}
    return both | {f"{remedy}_{strength}": [
        f"-m extras.remedies {TRAIN} --lr {lr} --remedy {remedy} --strength {strength}"]
        for remedy, (lr, strengths) in REMEDIES.items() for strength in strengths}

def complete(command, folder, seed):
    """The command with seed and folder; problems.py has a seed of its own, token_kl draws none."""
    if not command.startswith(("toy/problems.py", "-m extras.token_kl")):
        command += f" --seed {seed}"
    return command if re.search("--(out|run_dir) ", command) else f"{command} --run_dir {folder}"

def run(folder, commands, seed):
    """The commands one after the other; when all have ended, a file `ended` holds them."""
    start = time.time()
    shutil.rmtree(folder, ignore_errors=True)
    with open(f"{folder}.log", "w") as log:
        for command in commands:
            if subprocess.run([sys.executable, *complete(command, folder, seed).split()], cwd=ROOT,
                              stdout=log, stderr=log).returncode:
                return f"{folder} failed; see {log.name}"
    for checkpoints in list(folder.rglob("checkpoints")):
        shutil.rmtree(checkpoints)  # 20 MB each
    (folder / "ended").write_text("\n".join(commands))
    print(f"{time.time() - start:5.0f} s  {folder}", flush=True)

# --- what numbers.json holds ---------------------------------------------------------------------

def results(folder):
    """Yields (arm, benchmark, step, {quantity: mean}) of the ended runs of a seed."""
    for run in [ended.parent for ended in sorted(folder.glob("*/ended"))]:
        if (run / "metrics.jsonl").exists():
            config = json.loads((run / "config.json").read_text())
            thinking = "_thinking_on" if config["enable_thinking"] else "_thinking_off"
            base = "base" + thinking * (config["model"] != "toy/model")
            for file in run.glob("eval/step_*.json"):
                for benchmark, row in json.loads(file.read_text()).items():
                    yield run.name, benchmark, file.stem[5:], row
                    if file.stem == "step_0":
                        yield base, benchmark, "0", row
            rows = [*map(json.loads, (run / "metrics.jsonl").read_text().splitlines()[-10:])]
            yield run.name, "training", "0", {q: fmean(row[q] for row in rows) for q in NAMES}
        for file in run.glob("eval/summary.json"):  # evaluate.py's; Table 2, or no marker sampled
            for model, rows in json.loads(file.read_text())["models"].items():
                arm = run.name if model == "model" else f"sft_{model.removesuffix('/step_75')}"
                for benchmark, row in rows.items():
                    yield arm, benchmark, "0", row
        for file in run.glob("conditions/summary.json"):
            for context, row in json.loads(file.read_text())["contexts"].items():
                yield f"context_{context}", "train", "0", row

def numbers(folders):
    """(where the arms end, the curves of those that were evaluated on their way):
    {arm: {benchmark: {quantity: [mean, standard deviation, seeds]}}}, and the same by step."""
    seen = defaultdict(lambda: defaultdict(dict))  # {(arm, benchmark): {step: {folder: row}}}
    for folder in folders:
        for arm, benchmark, step, row in results(folder):
            seen[arm, benchmark][step].setdefault(folder, row)  # the base is that of many runs
    ends, curves = defaultdict(dict), defaultdict(dict)
    for (arm, benchmark), steps in seen.items():
        found = {step: {q: spread([row[q] for row in steps[step].values()]) for q in NAMES}
                 for step in sorted(steps, key=int)}
        ends[arm][benchmark] = [*found.values()][-1]
        if len(found) > 2:
            curves[arm][benchmark] = found
    return ends, curves

def spread(values):
    deviation = round(stdev(values), 4) if len(values) > 1 else None
    return [round(fmean(values), 4), deviation, len(values)]

def errors(folders):
    """{arm: {kind: wrong answers to ood questions, of all seeds}}, from controls.py."""
    found = defaultdict(Counter)
    for folder in folders:
        for name, kinds in json.loads((folder / "errors.json").read_text()).items():
            if name.endswith(", ood"):
                found[name.removesuffix(", ood")].update(kinds)
    return found

def token_kl(out):
    """The rows of Table 6, of the sums over all seeds, which go to OUT/token_kl.json."""
    sums = {}
    for file in out.glob("seed_*/token_kl/token_kl.json"):
        for token, row in json.loads(file.read_text()).items():
            old = sums.setdefault(token, row | {"kl": 0, "count": 0})
            old.update(kl=old["kl"] + row["kl"], count=old["count"] + row["count"])
    if not sums:
        return [[]]
    (out / "token_kl.json").write_text(json.dumps(sums))
    return table_6(out / "token_kl.json")

# --- the tables of toy/README.md, from results/toy/numbers.json ----------------------------------

DOMAIN_ROWS = {  # name: arms, benchmark, steps
    "one way (`narrow`)": ("narrow", "narrow_test", (0, 10, 20)),
    "eight ways (`habits`)": ("habits", "habits_test", (0, 20, 120)),
    "a search (`coverage`)": ("512", "coverage_test", (0, 40)),
}
TABLES = {  # name: benchmarks, {row: arm, or several: those after the first stand in brackets}
    "study": (("in", "ood"), {
        "base": "base", "GRPO": "grpo", "SDPO": "sdpo",
        "SDPO, c = s without think": "sdpo_without_think",
        "SDPO, uncertain prompt (App. C)": "sdpo_uncertain",
        "SDPO, moving teacher (EMA .05)": "sdpo_ema", "SDPO, top-k 20": "sdpo_top_k_20",
        "SFT on unguided answers": "sft_d_ug", "SFT on solution-guided answers": "sft_d_sg"}),
    "contexts": (("train",), {
        "(1) unguided": "context_unguided", "(3) solution without think": "context_without_think",
        "App. C: full solution, uncertain prompt": "context_uncertain",
        "(4) regenerated": "context_regenerated", "(2) full solution": "context_full"}),
    "coverage": (("training", "coverage_test", "ood"), {
        "base": "base",
        **{f"{method.upper()}, {size} questions": f"{method}_{size}"
           for method in ("grpo", "sdpo") for size in (8, 512)},
        **{f"SDPO, c = s without think, {size} questions": f"sdpo_without_think_{size}"
           for size in (8, 512)}}),
    "opsd": (("in", "ood"), {
        "base, thinking off": "base_thinking_off", "GRPO, thinking off": "grpo_thinking_off",
        "SDPO, thinking off": "sdpo_thinking_off", "base, thinking on": "base_thinking_on",
        "OPSD, both think": "opsd", "OPSD, only the teacher thinks": "opsd_hybrid"}),
    "remedies": (("in", "ood"), {
        "GRPO": "grpo", "SDPO": "sdpo",
        **{f"`{remedy}` {middle} ({low}, {high})":
           f"{remedy}_{middle} {remedy}_{low} {remedy}_{high}"
           for remedy, (_, (middle, low, high)) in REMEDIES.items()}}),
    "controls": (("in", "ood"), {
        "base, no marker sampled": "control_banned", "SDPO": "sdpo",
        "SDPO, markers removed from both distributions": "control_no_markers",
        "SDPO, no loss at the student's own markers": "control_no_marker_loss",
        "SDPO, no loss after `</think>`": "control_no_answer_loss",
        "SDPO, the teacher gets another question's answer": "control_other_question",
        "SDPO, learning rate / 3, steps x 3": "control_lr_third",
        "GRPO at SDPO's learning rate": "control_grpo_lr_double"}),
}

def cell(quantity, values):
    """.292 ± .015, of what spread() made."""
    form = {"score": ".3f", "length": ".0f", "epistemic": ".1f"}[quantity]
    texts = [f"{value:{form}}" for value in values[:2] if value is not None]
    return " ± ".join(text.removeprefix("0" * (quantity == "score")) for text in texts)

def markdown(rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])

def table(ends, benchmarks, arms):
    """Markdown; the rows that there are numbers of."""
    columns = [(b, q) for b in benchmarks for q in NAMES]
    rows = [["", *(f"{b} {NAMES[q].split()[0]}" for b, q in columns)]]
    for name, arm in arms.items():
        arm, *others = arm.split()
        if {arm, *others} <= {*ends}:
            rows.append([name, *(cell(q, ends[arm].get(b, {}).get(q, ())) for b, q in columns)])
            for i, (b, q) in enumerate(columns, 1):
                means = ", ".join(cell(q, ends[other][b][q][:1]) for other in others)
                rows[-1][i] += f" ({means})" * bool(others)
    return markdown(rows)

def table_of_domains(curves):
    """Markdown: fresh questions of the same kind, and ood, by how many ways they need."""
    columns = [(method, benchmark, q) for method in ("grpo", "sdpo")
               for benchmark, q in (("fresh", "score"), ("fresh", "length"), ("ood", "score"))]
    rows = [["questions, step", *(f"{m.upper()} {b} {NAMES[q].split()[0]}" for m, b, q in columns)]]
    for domain, (arm, test, steps) in DOMAIN_ROWS.items():
        for step in steps if {f"grpo_{arm}", f"sdpo_{arm}"} <= {*curves} else ():
            rows.append([f"{domain}, {step}", *(
                cell(q, curves[f"{m}_{arm}"][test if b == "fresh" else b][str(step)][q])
                for m, b, q in columns)])
    return markdown(rows)

def tables(found):
    """{name: Markdown}: what toy/README.md shows, of the numbers that there are."""
    texts = {name: table(found["arms"], *what) for name, what in TABLES.items()}
    return texts | {"domains": table_of_domains(found["curves"]),
                    "kl": markdown(found["token_kl"])}

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="+", choices=GROUPS)
    parser.add_argument("--out", type=Path, default="runs/study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each on CPU")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", TORCH_CPP_LOG_LEVEL="ERROR")
    folders, plan = [args.out / f"seed_{seed}" for seed in args.seeds], {}
    for folder, seed in zip(folders, args.seeds):
        folder.mkdir(parents=True, exist_ok=True)
        plan |= {folder / name: (commands, seed) for group in args.groups
                 for name, commands in runs(group, folder).items()}
    left = [(folder, commands, seed) for folder, (commands, seed) in plan.items()
            if not (folder / "ended").exists()
            or (folder / "ended").read_text() != "\n".join(commands)]
    minutes = sum(MINUTES + MINUTES_A_STEP * int(re.findall(
        r"--steps (\d+)", f"--steps {STEPS} {commands[-1]}")[-1]) for _, commands, _ in left)
    print(f"{len(plan)} runs, {len(left)} of them left: about {minutes / args.jobs / 60:.1f} hours "
          f"with {args.jobs} at a time", flush=True)
    if "opsd" in args.groups and not (args.out / "two_modes").exists():
        subprocess.run([sys.executable, *TWO_MODES.format(args.out).split()], cwd=ROOT, check=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [error for error in pool.map(lambda task: run(*task), left) if error]
    subprocess.run([sys.executable, "toy/controls.py", "errors", *folders], cwd=ROOT, check=True)
    ends, curves = numbers(folders)
    commits = Counter(str(json.loads(file.read_text())["commit"])[:7]
                      for folder in folders for file in folder.glob("*/config.json"))
    found = dict(commits=commits, arms=ends, curves=curves, errors=errors(folders),
                 token_kl=token_kl(args.out))
    (args.out / "numbers.json").write_text(json.dumps(found, indent=1) + "\n")
    subprocess.run([sys.executable, "-m", "extras.report", args.out], cwd=ROOT)
    print("\n\n".join(f"{name}\n{text}" for name, text in tables(found).items()))
    sys.exit("\n".join(failed) if failed else 0)

if __name__ == "__main__":
    main()
