"""Tables and figures, from the files that the scripts write. Imports none of them.

    python report.py runs/demo                # what `make demo` left: conditions, sft, grpo, sdpo
    python report.py runs/study/seed_*        # `make study`: means and spread over the seeds

A folder holds some of conditions/ and sft/eval/ (with a summary.json each) and training runs (with
metrics.jsonl and eval/). Prints Table 1, Table 2, where every training run ended, and GRPO beside
SDPO over the steps, and draws them (Figures 3, 7, 8 and 9 in small) as report.png.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def read_lines(path):
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        fail(f"{path}: {error}; has the run that writes it got so far?")

# --- reading -------------------------------------------------------------------------------------

QUANTITIES = (("score", ".3f"), ("length", ",.0f"), ("epistemic", ".1f"))

def read_run(folder):
    """({quantity: values over the steps}, {evaluated step: {benchmark: averages}}) of a run."""
    metrics = read_lines(folder / "metrics.jsonl")
    files = sorted((folder / "eval").glob("step_*.json"), key=lambda p: int(p.stem[5:]))
    if not files:
        fail(f"{folder}/eval: no evaluation in it")
    training = {q: [m[q] for m in metrics] for q, _ in QUANTITIES}
    return training, {int(p.stem[5:]): read_lines(p)[0] for p in files}

def read_folder(folder):
    """(Table 1's rows, Table 2's rows, {name: read_run}) of what the folder holds."""
    def summary(name, key):
        path = folder / name / "summary.json"
        return read_lines(path)[0][key] if path.exists() else {}
    runs = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    tuned = {f"SFT on {Path(name).parent}" if "/" in name else "base": rows  # d_ug/step_45
             for name, rows in summary("sft/eval", "models").items()}
    return summary("conditions", "contexts"), tuned, {run.name: read_run(run) for run in runs}

# --- tables --------------------------------------------------------------------------------------

def spread(values, form):
    """Mean ± standard deviation over the seeds; the value alone if there is one."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"

def table(title, rows, columns):
    """rows: {name: one {column: value} a seed}; columns: (name, format)."""
    lines = [f"{title:24s}" + "".join(f"{name:>18s}" for name, _ in columns)]
    for name, seeds in rows.items():
        cells = (spread([seed[column] for seed in seeds], form) for column, form in columns)
        lines.append(f"{name:24s}" + "".join(f"{cell:>18s}" for cell in cells))
    return "\n".join(lines)

def by_benchmark(summaries):
    """One {benchmark quantity: value} a seed, from one {benchmark: averages} a seed."""
    return [{f"{bench} {q}": s[bench][q] for bench in s for q, _ in QUANTITIES} for s in summaries]

def columns_of(summary):
    return [(f"{bench} {q}", form) for bench in summary for q, form in QUANTITIES]

def ends(runs_by_seed):
    """{run: where it ended, by seed}, the base first: training score (last 5 steps), benchmarks."""
    rows = {}
    for runs in runs_by_seed:
        for name, (training, evals) in runs.items():
            end = by_benchmark([evals[max(evals)]])[0]
            score = statistics.fmean(training["score"][-5:])
            rows.setdefault(name, []).append({**end, "training": score})
        first, (training, evals) = next(iter(runs.items()))
        base = by_benchmark([evals[0]])[0]
        rows.setdefault("base", []).append({**base, "training": training["score"][0]})
    return {"base": rows.pop("base"), **rows}

def over_steps(runs_by_seed, names, benchmark):
    """Figure 3 in numbers: what the runs do at every evaluated step, mean over seeds."""
    evals = runs_by_seed[0][names[0]][1]
    lines = [f"{'':8s}" + "".join(f"{name:^44s}" for name in names),
             f"{'step':8s}" + "".join(f"{q:>11s}" for q in ("score", "length", "epistemic",
                                                            f"{benchmark} score")) * len(names)]
    for step in evals:
        cells = ""
        for name in names:
            runs = [runs[name] for runs in runs_by_seed]
            for q, form in QUANTITIES:  # of the step's rollouts; the first step's are the base's
                value = statistics.fmean(training[q][max(step, 1) - 1] for training, _ in runs)
                cells += f"{value:>11{form}}"
            cells += f"{statistics.fmean(e[step][benchmark]['score'] for _, e in runs):>11.3f}"
        lines.append(f"{step:<8d}{cells}")
    return "\n".join(lines)

# --- figure --------------------------------------------------------------------------------------

def bars(axis, title, values):
    """values: {name: one number a seed}; a bar for the mean, a dot for every seed."""
    axis.bar(range(len(values)), [statistics.fmean(v) for v in values.values()], color="0.75")
    for i, seeds in enumerate(values.values()):
        axis.plot([i] * len(seeds), seeds, "k.", ms=4)
    axis.set_xticks(range(len(values)), values, rotation=20, ha="right", fontsize=8)
    axis.set(title=title)

def plot(conditions, sft, runs_by_seed, benchmark, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7))
    if conditions[0]:
        bars(axes[0, 0], "Table 1: epistemic tokens by context", {
            name: [c[name]["epistemic"] for c in conditions] for name in conditions[0]})
    if sft[0]:
        bars(axes[0, 1], f"Table 2: {benchmark} score after SFT", {
            name: [s[name][benchmark]["score"] for s in sft] for name in sft[0]})
    panels = (axes[0, 2], f"{benchmark} score", None), (axes[1, 0], "training score", "score"), (
        axes[1, 1], "training length (tokens)", "length"), (
        axes[1, 2], "training epistemic tokens", "epistemic")
    for axis, title, quantity in panels:
        for color, name in enumerate(runs_by_seed[0]):
            for i, runs in enumerate(runs_by_seed):
                training, evals = runs[name]
                steps, values = range(1, len(training["score"]) + 1), training.get(quantity)
                if quantity is None:
                    steps, values = list(evals), [e[benchmark]["score"] for e in evals.values()]
                axis.plot(steps, values, color=f"C{color}", lw=1.2, alpha=0.8,
                          marker="o" if quantity is None else "", ms=3, label=None if i else name)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.25)
    axes[0, 2].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)

def main():
    parser = argparse.ArgumentParser(description="Tables and figures of finished runs.")
    parser.error = fail
    parser.add_argument("folders", nargs="+", help="runs/demo, or one folder a seed")
    folders = [Path(folder) for folder in parser.parse_args().folders]
    conditions, sft, runs_by_seed = zip(*map(read_folder, folders))
    if not runs_by_seed[0]:
        fail(f"{folders[0]}: no training run (a folder with metrics.jsonl) in it")
    names = list(runs_by_seed[0])
    if any(list(runs) != names for runs in runs_by_seed):
        fail("the folders hold different runs: " + "; ".join(
            f"{folder}: {' '.join(runs)}" for folder, runs in zip(folders, runs_by_seed)))
    seeds = f"{len(folders)} seeds, mean ± standard deviation" if len(folders) > 1 else "one seed"
    print(f"{seeds}\n")
    if all(conditions):
        print(table("Table 1", {name: [c[name] for c in conditions] for name in conditions[0]},
                    QUANTITIES), end="\n\n")
    if all(sft):
        print(table("Table 2", {name: by_benchmark([s[name] for s in sft]) for name in sft[0]},
                    columns_of(sft[0]["base"])), end="\n\n")
    first = runs_by_seed[0][names[0]][1]
    print(table("after training", ends(runs_by_seed),
                [("training", ".3f"), *columns_of(first[0])]), end="\n\n")
    benchmark = list(first[0])[-1]
    pair = [name for name in ("grpo", "sdpo") if name in names]
    if pair:
        print(over_steps(runs_by_seed, pair, benchmark), end="\n\n")
    picture = (folders[0] if len(folders) == 1 else folders[0].parent) / "report.png"
    plot(conditions, sft, runs_by_seed, benchmark, picture)
    print(f"drawn in {picture}")

if __name__ == "__main__":
    main()
