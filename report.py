"""Tables and figures, from the files that the scripts write. Imports none of them.

    python report.py runs/demo        # what `make demo` left: before/, sdpo/, after/
"""
import argparse
import json
import sys
from pathlib import Path

def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"{path}: {error}; has the run that writes it finished?")

def read_lines(path):
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        fail(f"{path}: {error}; has the run that writes it got so far?")

def before_after_table(before, after):
    """Score, length and markers of each benchmark before and after, from two summary.json."""
    lines = [f"{'':12s}{'score':>22s}{'response tokens':>22s}{'epistemic tokens':>22s}",
             f"{'':12s}" + f"{'base':>11s}{'SDPO':>11s}" * 3]
    for name, b in before["benchmarks"].items():
        a = after["benchmarks"][name]
        cells = [f"{s[key]:{form}}" for key, form in
                 (("score", ".3f"), ("length", ",.0f"), ("epistemic", ".1f")) for s in (b, a)]
        lines.append(f"{name:12s}" + "".join(f"{cell:>11s}" for cell in cells))
    return "\n".join(lines)

QUANTITIES = (("score", "score"), ("response tokens", "length"), ("epistemic tokens", "epistemic"))

def curves(run_dir):
    """{quantity: {line: (steps, values)}} of a training run: its rollouts and its evaluations."""
    metrics = read_lines(run_dir / "metrics.jsonl")
    steps = [m["step"] for m in metrics]
    lines = {q: {"training": (steps, [m[key] for m in metrics])}
             for q, key in QUANTITIES}
    files = sorted((run_dir / "eval").glob("step_*.json"), key=lambda p: int(p.stem[5:]))
    for path in files:
        for name, s in read_json(path).items():
            for q, key in QUANTITIES:
                xs, ys = lines[q].setdefault(name, ([], []))
                xs.append(int(path.stem[5:]))
                ys.append(s[key])
    return lines

def plot(lines, title, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(lines), figsize=(4.2 * len(lines), 3.4))
    for axis, (quantity, named) in zip(axes, lines.items()):
        for name, (xs, ys) in named.items():
            style = dict(color="0.6", lw=1) if name == "training" else dict(marker="o", ms=3)
            axis.plot(xs, ys, label=name, **style)
        axis.set(title=quantity, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=130)

def main():
    parser = argparse.ArgumentParser(description="Tables and figures of finished runs.")
    parser.error = fail
    parser.add_argument("folder", help="what make demo wrote: before/, sdpo/ and after/ in it")
    folder = Path(parser.parse_args().folder)
    before, after = (read_json(folder / name / "summary.json") for name in ("before", "after"))
    lines = curves(folder / "sdpo")
    config = read_json(folder / "sdpo/config.json")
    print(f"{config['model']}, before and after {config['steps']} steps of SDPO "
          f"({before['samples']} answers to a question)\n")
    print(before_after_table(before, after))
    picture = folder / "sdpo.png"
    plot(lines, "SDPO: shorter, surer, and worse, out of distribution most of all", picture)
    print(f"\nscore, length and epistemic tokens over the steps: {picture}")

if __name__ == "__main__":
    main()
