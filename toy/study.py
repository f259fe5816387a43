"""The miniature of the paper's experiments on the toy, run by run; and the report on them.

    python toy/study.py study coverage controls opsd remedies   # what to run; `make study`: all

A run that has ended with the same commands is not run again; one that was stopped begins anew.
The plan stands first on the screen, with its time.  Each run's output goes to RUN.log beside its
folder.
"""

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import epistemic

# A run of 20 steps, two at a time on the two cores of benchmarks/README.md, mean of 33; and a step
# more, by the 6.3 minutes of coverage's 80, mean of 22
MINUTES, MINUTES_A_STEP = 2.8, 0.058
STEPS, LR = 20, 1e-4  # of SDPO; GRPO takes half that rate
BASE = "--max_response_tokens 320 --model toy/model"
TRAIN = (f"{BASE} --num_questions 512 --questions_per_step 12 --minibatch_questions 12 "
         f"--warmup_steps 3 --steps {STEPS} --save_every 1000 "
         "--tokens_per_micro_batch 8192 --no-recompute_layers --data toy/data/train.jsonl "
         "--eval_data toy/data/in.jsonl toy/data/ood.jsonl")
SDPO, GRPO = f"sdpo.py {TRAIN} --lr {LR}", f"grpo.py {TRAIN} --lr {LR / 2}"
TESTS = "--data toy/data/in.jsonl toy/data/ood.jsonl --samples 2 --top_k 0"
SFT = (f"{BASE} --lr 1e-4 --batch_size 8 --epochs 3 --tokens_per_micro_batch 8192 "
       "--save_every 1000 --no-recompute_layers")
REMEDIES = {  # rate, that of what it is nearer to, SDPO or GRPO; the default strength and its neighbours
    "demopsd": (LR, (0.15, 0.05, 0.45)), "srpo": (LR / 2, (1, 0.3, 3)),
    "antisd": (LR / 2, (0.5, 0.2, 1)), "rlrt": (LR / 2, (0.5, 0.2, 1)),
    "mixture": (LR / 2, (0.9, 0.5, 0.99)), "shield": (LR, (1, 0.5, 0.9)),
    "rlcsd": (LR / 2, (0.5, 0.2, 1)),
}


# App. E and F.1: a toy that can think or not, made from toy/model before the first of these runs;
# the loss on the first 32 tokens stands for OPSD's 1,024
TWO_MODES = "toy/pretrain.py --two_modes 0.5 --steps 200 --lr 1e-3 --out {}/two_modes"
OPSD = f"opsd.py {TRAIN} --lr {LR} --loss_tokens 32 --save_every 5"


# Sec. 6: no place in the list that is mostly right. `gentle` keeps SDPO off the floor of guessing,
# where the order of |D| would be lost; five times as many questions tell it.
SIZES = (1, 8, 64, 128, 512, 1200)
DOMAIN = ("--steps {steps} --save_every 10 --data toy/data/{name}.jsonl "
          "--eval_data toy/data/{name}_test.jsonl {data}/ood.jsonl")
COVERAGE = DOMAIN.format(steps=4 * STEPS, name="coverage", data="{}") + " --num_questions {}"
GENTLE = "--demonstration without_think --save_every 80"
# Figure 1a: questions that one way of answering serves; beside them, one for each family
DOMAINS = {"narrow": STEPS, "habits": 6 * STEPS}  # steps


GROUPS = "study", "coverage", "controls", "opsd", "remedies"


def runs(group, out):
    """{folder's name: its commands, one after the other}."""
    corners = {"grpo": [GRPO], "sdpo": [SDPO]}
    if group == "study":
        chosen = {
            **corners,
            "sft": [f"generate_conditions.py {BASE} --data toy/data/train.jsonl --temperature 1 "
                    "--top_p 1 --top_k 0 --accuracy 0.125 1 --num_questions 100 --sft_examples 200 "
                    "--questions_per_round 240 "
                    f"--out {out}/sft/conditions",
                    *(f"sft_distill.py {SFT} --run_dir {out}/sft/{d} "
                      f"--data {out}/sft/conditions/{d}.jsonl" for d in ("d_ug", "d_sg")),
                    f"evaluate.py {BASE} {out}/sft/d_ug/checkpoints/step_75 "
                    f"{out}/sft/d_sg/checkpoints/step_75 {TESTS} --out {out}/sft/eval",
                    # Table 6
                    f"token_kl.py --model toy/model {out}/sft/conditions/rounds "
                    f"--out {out}/token_kl/token_kl.json"],
            "sdpo_without_think": [f"{SDPO} --demonstration without_think"],
            "sdpo_uncertain": [f"{SDPO} --demonstration uncertain"],
            "sdpo_ema": [f"{SDPO} --ema 0.05"], "sdpo_top_k_20": [f"{SDPO} --top_k 20"],
            "sdpo_lr_tenth": [f"{SDPO} --lr {LR / 10}"],
        }
        return chosen
    if group == "coverage":
        chosen = {f"{method}_{d}": [f"{command} {COVERAGE.format('toy/data', d)}"]
                  for d in SIZES for method, command in (("grpo", GRPO), ("sdpo", SDPO))}
        chosen |= {f"{method}_{name}": [
            f"{command} {DOMAIN.format(steps=steps, name=name, data='toy/data')}"]
            for name, steps in DOMAINS.items()
            for method, command in (("grpo", GRPO), ("sdpo", SDPO))}
        return chosen | {f"sdpo_gentle_{d}": [
            f"toy/problems.py --train 0 --eval 1000 --seed 1 --out {out}/data_{d}",
            f"{SDPO} {COVERAGE.format(f'{out}/data_{d}', d)} {GENTLE}"] for d in (8, 512)}
    if group == "controls":
        chosen = {**corners, **{f"control_{c}": [SDPO.replace("sdpo.py", f"toy/controls.py {c}")]
                  for c in ("no_markers", "no_marker_loss", "no_answer_loss", "other_question")}}
        chosen["control_slow"] = [f"{SDPO} --lr {LR / 3} --steps {3 * STEPS}"]
        chosen["control_grpo_fast"] = [f"{GRPO} --lr {LR}"]
        chosen["control_banned"] = [
            f"toy/controls.py banned {BASE} {TESTS} --out {out}/control_banned/eval"]
        return chosen
    if group == "opsd":
        flags = {"off_grpo": (GRPO, "--no-enable_thinking"),
                 "off_sdpo": (SDPO, "--no-enable_thinking"), "opsd": (OPSD, ""),
                 "opsd_hybrid": (OPSD, "--no-enable_thinking --teacher_thinking")}
        return {name: [f"{command} --model {Path(out).parent}/two_modes {more}"]
                for name, (command, more) in flags.items()}
    return {**corners, **{
        f"{remedy}_{strength}": [f"remedies.py {TRAIN} --lr {lr} "
                                 f"--remedy {remedy} --strength {strength}"]
        for remedy, (lr, strengths) in REMEDIES.items() for strength in strengths}}


def complete(command, folder, seed):
    """The command with its seed and folder; problems.py has its own, token_kl.py draws nothing."""
    if not command.startswith(("toy/problems.py", "token_kl.py")):
        command += f" --seed {seed}"
    return command if re.search("--(out|run_dir) ", command) else f"{command} --run_dir {folder}"


def run(name, commands, out, seed):
    """The commands one after the other; a file `ended` in the folder holds those that have ended."""
    folder, start = out / name, time.time()
    shutil.rmtree(folder, ignore_errors=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore",
                       TORCH_CPP_LOG_LEVEL="ERROR")
    with open(out / f"{name}.log", "w") as log:
        for command in commands:
            if subprocess.run([sys.executable, *complete(command, folder, seed).split()], cwd=ROOT,
                              stdout=log, stderr=log, env=environment).returncode:
                return f"{name}: failed; see {log.name}"
    for checkpoints in list(folder.rglob("checkpoints")):
        shutil.rmtree(checkpoints)  # 20 MB each
    (folder / "ended").write_text("\n".join(commands))
    print(f"seed {seed}  {name:24s} {time.time() - start:5.0f} s", flush=True)


def spread(values):
    deviation = round(stdev(values), 4) if len(values) > 1 else None
    return [round(fmean(values), 4), deviation, len(values)]


def numbers(folders):
    """{arm: {benchmark: {quantity: [mean, standard deviation, seeds]}}} of the ended runs."""
    seen = collections.defaultdict(lambda: collections.defaultdict(list))
    for folder in folders:
        found = {}
        for run in sorted(folder.glob("*/eval")):
            steps = sorted(run.glob("step_*.json"), key=lambda p: int(p.stem[5:]))
            if not (run.parent / "ended").exists():
                continue
            config = json.loads((run.parent / "config.json").read_text()) if steps else {}
            base = "base" if config.get("model") == "toy/model" else (
                "base_on" if config.get("enable_thinking") else "base_off")
            if steps:
                found.setdefault(base, {})
                found[base] = json.loads(steps[0].read_text()) | found[base]
                lines = (run.parent / "metrics.jsonl").read_text().splitlines()[-10:]
                found[run.parent.name] = json.loads(steps[-1].read_text()) | {
                    "training": {q: fmean(json.loads(line)[q] for line in lines)
                                 for q in ("score", "length", "epistemic")}}
            if not steps:  # evaluate.py's; of the base without doubt and of Table 2
                models = json.loads((run / "summary.json").read_text())["models"]
                for model, rows in models.items():
                    name = model.removesuffix("/step_75")
                    if name != "model":
                        found[f"sft_{name}"] = rows
                    elif run.parent.name != "sft":
                        found[run.parent.name] = rows
        if (folder / "sft/ended").exists():
            contexts = json.loads((folder / "sft/conditions/summary.json").read_text())
            found |= {f"context_{c}": {"train": row} for c, row in contexts["contexts"].items()}
        for arm, rows in found.items():
            for benchmark, row in rows.items():
                seen[arm][benchmark].append(row)
    return {arm: {benchmark: {q: spread([row[q] for row in rows])
                              for q in ("score", "length", "epistemic")}
                  for benchmark, rows in benchmarks.items()} for arm, benchmarks in seen.items()}


def curves(folders):
    """{arm: {benchmark: {step: as in numbers()}}} of the ended runs evaluated on their way."""
    seen = collections.defaultdict(list)
    for folder in folders:
        for ended in sorted(folder.glob("*/ended")):
            steps = sorted(ended.parent.glob("eval/step_*.json"), key=lambda p: int(p.stem[5:]))
            for file in steps if len(steps) > 2 else ():
                for benchmark, row in json.loads(file.read_text()).items():
                    seen[ended.parent.name, benchmark, file.stem[5:]].append(row)
    found = collections.defaultdict(lambda: collections.defaultdict(dict))
    for (arm, benchmark, step), rows in seen.items():
        found[arm][benchmark][step] = {q: spread([row[q] for row in rows])
                                       for q in ("score", "length", "epistemic")}
    return found


def number(quantity, value):
    """.292 for a score, 66 tokens, 3.3 markers."""
    form = dict(score=".3f", length=".0f", epistemic=".1f")[quantity]
    return f"{value:{form}}".removeprefix("0" if quantity == "score" else "")


def cell(quantity, values):
    """.292 ± .015, of what spread() made."""
    return " ± ".join(number(quantity, value) for value in values[:2] if value is not None)


def table(found, arms, benchmarks=("in", "ood")):
    """Rows of Markdown: the arms, {name of the row: arm}, that there are numbers of."""
    columns = [(b, q) for b in benchmarks for q in ("score", "length", "epistemic")]
    lines = ["| | " + " | ".join(f"{b} {q}" for b, q in columns) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for name, arm in arms.items():
        if arm in found:
            cells = []
            for b, q in columns:
                cells.append(cell(q, found[arm].get(b, {}).get(q, ())))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_of_domains(found):
    """Rows of Markdown: fresh questions of the same kind, and ood, by how many ways they need."""
    columns = [(method, benchmark, q) for method in ("grpo", "sdpo")
               for benchmark, q in (("fresh", "score"), ("fresh", "length"), ("ood", "score"))]
    names = [f"{method.upper()} {benchmark} {q}" for method, benchmark, q in columns]
    lines = ["| questions, step | " + " | ".join(names) + " |", "|---" * (len(columns) + 1) + "|"]
    for domain, (arm, test, steps) in DOMAIN_ROWS.items():
        for step in steps if f"sdpo_{arm}" in found else ():
            cells = []
            for method, benchmark, q in columns:
                rows = found[f"{method}_{arm}"][test if benchmark == "fresh" else benchmark]
                cells.append(cell(q, rows[str(step)][q]))
            lines.append(f"| {domain}, {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def errors(folders):
    """{arm: {kind: wrong answers out of domain, over all seeds}}, from controls.py's errors.json."""
    seen = collections.defaultdict(collections.Counter)
    for folder in folders:
        for name, kinds in json.loads((folder / "errors.json").read_text()).items():
            arm, benchmark = name.split(", ")
            if benchmark == "ood":
                seen[arm].update(kinds)
    return seen


def table_of_errors(found, arms):
    """Rows of Markdown: of the wrong answers, how many are wrong for which reason."""
    kinds = sorted({kind for arm in arms.values() for kind in found.get(arm, {})})
    lines = ["| wrong answers, ood | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(str(found[arm].get(k, 0)) for k in kinds)
                              + " |" for name, arm in arms.items() if arm in found])


def commits(folders):
    """{commit: how many of the training runs it made}, as they say themselves."""
    configs = [json.loads(p.read_text()) for f in folders for p in sorted(f.glob("*/config.json"))]
    return dict(collections.Counter(c["commit"][:7] for c in configs if c.get("commit")))


def token_kl(folders, frequent=25):
    """Table 6, all seeds together: {variant: [mean KL, count, ratio to the mean of the frequent]}."""
    seen = collections.defaultdict(lambda: [0.0, 0])
    for file in (folder / "token_kl/token_kl.json" for folder in folders):
        for token in json.loads(file.read_text()).values() if file.exists() else ():
            seen[token["text"]][0] += token["kl"]
            seen[token["text"]][1] += token["count"]
    means = {text: [kl / n, n] for text, (kl, n) in seen.items() if n >= frequent}
    if not means:
        return {}
    mean = fmean(kl for kl, _ in means.values())
    rows = {text: [round(kl, 4), n, round(kl / mean, 2)] for text, (kl, n) in means.items()
            if text.strip(" :,.").lower() in epistemic.MARKERS}
    return rows | {f"mean of {len(means)} tokens": [round(mean, 4), "", 1.0]}


DOMAIN_ROWS = {  # name: arms, benchmark, steps
    "one way (`narrow`)": ("narrow", "narrow_test", (0, 10, 20)),
    "eight ways (`habits`)": ("habits", "habits_test", (0, 20, 40, 80, 120)),
    "a search (`coverage`)": ("512", "coverage_test", (0, 20, 40)),
}
TABLES = {  # of toy/README.md, from results/toy/numbers.json
    "controls": {
        "base": "base", "base, markers forbidden in sampling": "control_banned", "SDPO": "sdpo",
        "SDPO, markers removed from both distributions": "control_no_markers",
        "SDPO, no loss at the student's own markers": "control_no_marker_loss",
        "SDPO, no loss after `</think>`": "control_no_answer_loss",
        "SDPO, the teacher gets another question's answer": "control_other_question",
        "SDPO, learning rate / 3, steps x 3": "control_slow",
        "GRPO": "grpo", "GRPO at SDPO's learning rate": "control_grpo_fast"},
    "study": {
        "base": "base", "GRPO": "grpo", "SDPO": "sdpo", "SDPO, c = s without think":
        "sdpo_without_think", "SDPO, uncertain prompt (App. C)": "sdpo_uncertain",
        "SDPO, moving teacher (EMA .05)": "sdpo_ema", "SDPO, top-k 20": "sdpo_top_k_20",
        "SDPO, learning rate / 10": "sdpo_lr_tenth", "SFT on unguided answers": "sft_d_ug",
        "SFT on solution-guided answers": "sft_d_sg"},
    "contexts": {"(1) unguided": "context_unguided",
                 "(3) solution without think": "context_without_think",
                 "App. C: full solution, uncertain prompt": "context_uncertain",
                 "(4) regenerated": "context_regenerated", "(2) full solution": "context_full"},
    "coverage": {"base": "base", **{
        f"{name}, {d:,} question{'s'[:d - 1]}": f"{arm}_{d}"
        for name, arm, sizes in (("GRPO", "grpo", SIZES), ("SDPO", "sdpo", SIZES), (
            "SDPO, c = s without think", "sdpo_gentle", (8, 512))) for d in sizes}},
    "opsd": {"base, thinking off": "base_off", "GRPO, thinking off": "off_grpo",
             "SDPO, thinking off": "off_sdpo", "base, thinking on": "base_on",
             "OPSD, student and teacher think": "opsd",
             "OPSD, only the teacher thinks": "opsd_hybrid"},
    "remedies": {"base": "base", "GRPO": "grpo", "SDPO": "sdpo", **{
        f"`{remedy}` {strength}": f"{remedy}_{strength}"
        for remedy, (_, strengths) in REMEDIES.items() for strength in strengths}},
}


def tables(found):
    """{name: Markdown}: what toy/README.md shows, of the numbers that there are."""
    benchmarks = dict(contexts=("train",), coverage=("training", "coverage_test", "ood"))
    texts = {name: table(found["arms"], arms, benchmarks.get(name, ("in", "ood")))
             for name, arms in TABLES.items()}
    kl = ["| token | mean KL | count | ratio |\n|---|---|---|---|", *(
        f"| `{text}` | {kl:.3f} | {n} | {ratio:.1f} |"
        for text, (kl, n, ratio) in sorted(found["token_kl"].items(), key=lambda row: -row[1][0]))]
    return texts | {"domains": table_of_domains(found["curves"]),
                    "errors": table_of_errors(found["errors"], TABLES["controls"]),
                    "kl": "\n".join(kl)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="+", choices=GROUPS)
    parser.add_argument("--out", default="runs/study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each on CPU")
    args = parser.parse_args()
    todo = {(seed, name): (name, commands, Path(args.out) / f"seed_{seed}", seed)
            for seed in args.seeds for group in args.groups for name in runs(group, args.out)
            for commands in [runs(group, f"{args.out}/seed_{seed}")[name]]}.values()
    left = [(name, commands, out, seed) for name, commands, out, seed in todo
            if not (out / name / "ended").exists()
            or (out / name / "ended").read_text() != "\n".join(commands)]
    steps = [int(re.findall(r"--steps (\d+)", f"--steps {STEPS} {commands[-1]}")[-1])
             for _, commands, *_ in left]
    minutes = sum(MINUTES + MINUTES_A_STEP * (n - STEPS) for n in steps)
    print(f"{len(todo)} runs, {len(left)} of them left: about {minutes / args.jobs / 60:.1f} hours "
          f"with {args.jobs} at a time", flush=True)
    for *_, out, _ in todo:
        out.mkdir(parents=True, exist_ok=True)
    if "opsd" in args.groups and not Path(args.out, "two_modes").exists():
        subprocess.run([sys.executable, *TWO_MODES.format(args.out).split()], cwd=ROOT, check=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [error for error in pool.map(lambda t: run(*t), left) if error]
    folders = sorted({str(out) for *_, out, _ in todo})
    subprocess.run([sys.executable, "toy/controls.py", "errors", *folders], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "report.py", *folders], cwd=ROOT)
    folders = [Path(folder) for folder in folders]
    found = dict(commits=commits(folders), arms=numbers(folders), curves=curves(folders),
                 errors=errors(folders), token_kl=token_kl(folders))
    (Path(args.out) / "numbers.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n\n".join(f"{name}\n{text}" for name, text in tables(found).items()))
    sys.exit("\n".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
