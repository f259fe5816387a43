"""The README's first picture: one answer before and after SDPO, and score over steps.

    python toy/picture.py runs/demo              # writes runs/demo/demo.png, 1,600 pixels wide

Needs GRPO and SDPO on the narrow and on the diverse questions, as `make demo` leaves them.
"""
import argparse
import re
import sys
import textwrap
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parent.parent))

import epistemic
from extras.report import COLOURS, changed_answers, draw_lines, load_runs, settings

TITLES = {"narrow": "Narrow domain: one way of\nanswering serves all",
          "diverse": "Diverse domain: each question\nneeds its own search"}
MARKER, WRONG, TEXT = "#7a3fb0", "#c62828", "#111111"

def draw_scores(axis, s):
    """Score on fresh questions over the steps; at a line's end its tokens an answer."""
    arms = {method: s.arms[method] for method in ("GRPO", "SDPO")}
    draw_lines(axis, arms, s.fresh, "score")
    axis.set(title=TITLES[s.domain], xlabel="training step")
    place = 1.2  # of the label above
    for label, run in sorted(arms.items(), key=lambda arm: -arm[1].value("score", s.fresh)[0]):
        step, score = run.steps(s.fresh)[-1], run.value("score", s.fresh)[0]
        place = min(score, place - 0.15)
        text = f"{label}\n{run.value('length', s.fresh)[0]:,.0f} tokens"
        axis.annotate(text, (step, score), (1.06, place), textcoords=("axes fraction", "data"),
                      va="center", color=COLOURS[label], annotation_clip=False)

def wrap(text):
    """Lines of 50 characters, at most eight; half an emoji, which cannot be drawn, as "?"."""
    text = text.encode("utf-8", "replace").decode()
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, 50)]
    return lines if len(lines) < 9 else [*lines[:6], "...", lines[-1]]

def draw_answers(axis, before, after):
    """The question and both answers, word by word: markers and the wrong result in colour."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", after["response"])[-1:] or ["(?!)"]
    result = re.compile(rf"(?<!\w){re.escape(found[0])}(?!\w)")
    lines = [("question", line) for line in wrap(before["question"].split("\n")[0])]
    for who, answer in (("Before training", before), ("After SDPO", after)):
        grade = "right" if answer["correct"] else f"wrong; right is {answer['answer']}"
        lines += [("", ""), ("heading", f"{who}: {answer['tokens']:,} tokens, {grade}")]
        lines += [(who, line) for line in wrap(answer["response"])]
    for number, (kind, line) in enumerate(lines):
        for word in re.finditer(r"\S+", line):
            colour = TEXT
            if kind in ("Before training", "After SDPO") and epistemic.count(word[0]):
                colour = MARKER
            elif kind == "After SDPO" and result.search(word[0]):
                colour = WRONG
            bold = kind == "heading" or colour != TEXT
            axis.annotate(word[0], (0, 1), (9.64 * word.start(), -22 * number), color=colour,
                          va="top", xycoords="axes fraction", textcoords="offset points",
                          family="monospace", weight="bold" if bold else None)

def main():
    parser = argparse.ArgumentParser(description="First picture.", usage=argparse.SUPPRESS)
    parser.add_argument("folder", type=Path, help="what holds the runs")
    folder = parser.parse_args().folder
    try:
        found = {s.domain: s for s in settings(load_runs(folder)) if "GRPO" in s.arms}
        pairs = changed_answers(found["diverse"]) if "diverse" in found else []
        if not pairs or "narrow" not in found or "SDPO" not in found["narrow"].arms:
            raise ValueError(f"{folder}: no GRPO and SDPO on narrow and on diverse questions")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    matplotlib.rcParams.update({
        "font.size": 16, "lines.linewidth": 3, "lines.markersize": 14, "axes.titlesize": "medium",
        "axes.titlelocation": "left", "text.parse_math": False})
    figure = Figure((16, 6), dpi=100)
    left, *axes = figure.subplots(1, 3, width_ratios=[2.9, 1.1, 1.1])
    for axis, domain in zip(axes, TITLES):
        draw_scores(axis, found[domain])
    axes[0].set_ylabel("score on fresh questions")
    left.axis("off")
    draw_answers(left, *pairs[0])
    figure.savefig(folder / "demo.png")
    print(folder / "demo.png")

if __name__ == "__main__":
    main()
