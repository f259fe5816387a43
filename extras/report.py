"""The paper's figures and tables of your runs: FOLDER/report.html and FOLDER/figures.

    python -m extras.report runs            # every run below this folder, finished or not

A run is what its config.json says, never what its folder is called. After the reading comes a
function for each figure or table, in the paper's order: its docstring is its title and its sentence
on the page; of the runs of a setting s it yields figures and tables.
"""
import argparse
import html
import json
import math
import re
from collections import namedtuple
from functools import partial
from pathlib import Path
from statistics import fmean, mode, stdev

import matplotlib
from matplotlib.figure import Figure

import epistemic

NAMES = {"score": "score", "length": "tokens an answer", "epistemic": "markers an answer"}
SAME = """questions_per_step minibatch_questions rollouts temperature max_prompt_tokens
    max_response_tokens warmup_steps""".split()  # flags that all runs of a setting share
USUAL = {"demonstration": "full", "ema": 0.0, "top_k": 100, "alpha": 0.5, "clip_low": 0.2,
         "clip_high": 0.28, "loss_tokens": 1024, "teacher_thinking": False, "control": None,
         "strength": None}  # the scripts' defaults; what differs stands in a run's label
DOMAINS = {"narrow": "narrow", "chem": "narrow", "habits": "habits", "": "diverse"}  # by the data

# --- reading -------------------------------------------------------------------------------------

class Run:
    """All seeds of what a config.json describes."""
    def __init__(self, method, setting, flags):
        self.method = method  # GRPO, SDPO, OPSD, "SFT on d_ug", a remedy, a context, or Base
        self.setting = setting  # (model, training data or "", the flags of SAME in words)
        self.flags = flags  # those of USUAL, lr and num_questions; label_runs compares them
        self.results = {}  # {(benchmark, step): {seed: {question: [answer]}}}

    def steps(self, benchmark):
        return sorted(step for name, step in self.results if name == benchmark)

    def value(self, quantity, benchmark, step=None):
        """(mean, the larger of its standard errors, over what), at a step or at the last."""
        step = self.steps(benchmark)[-1] if step is None or self.method == "Base" else step
        seeds = self.results[benchmark, step].values()
        means = [fmean(a[quantity] for group in seed.values() for a in group) for seed in seeds]
        asked = [fmean(a[quantity] for seed in seeds for a in seed.get(question, []))
                 for question in [*seeds][0]]  # the answers to one question are not independent
        errors = [(stdev(values) / len(values) ** 0.5, over)
                  for values, over in ((means, "s"), (asked, "q")) if len(values) > 1]
        return fmean(means), *max(errors, default=(math.nan, ""))

    def text(self, quantity, benchmark, step=None):
        mean, error, over = self.value(quantity, benchmark, step)
        digits = {"score": 3, "length": 0, "epistemic": 1}[quantity]
        return f"{mean:,.{digits}f}" + (f"±{error:,.{digits}f} {over}" if over else "")

def read(path, use):
    """Yields use(object) of each line of a file."""
    for number, row in enumerate(path.read_bytes().splitlines(True), 1):
        if path.name == "metrics.jsonl" and not row.endswith(b"\n"):
            return  # it is still being written
        try:
            found = use(json.loads(row, strict=False))  # a model's text may hold raw tabs
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, row {number}: {error!r}") from None
        yield found

def describe(config):  # (method, setting, flags, seed)
    data, script = (Path(str(config.get(name, ""))).stem for name in ("data", "script"))
    model = re.sub(r".*/models--(.+?)--(.+?)/snapshots/.*", r"\1/\2", config["model"])
    model = "/".join(Path(model).parts[-2:]) + ", thinking off" * (not config["enable_thinking"])
    method = {"sft_distill": f"SFT on {data}", "controls": "SDPO"}.get(script, script.upper())
    same = ", ".join(f"{flag} {config[flag]}" for flag in SAME if flag in config).replace("_", " ")
    flags = {flag: config[flag] for flag in (*USUAL, "lr", "num_questions") if flag in config}
    return config.get("remedy", method), (model, data, same), flags, config["seed"]

def read_answers(file):
    """{benchmark: {question: [answer]}}; of a question's answers only the first keeps its text."""
    found = {}
    def add(row):
        uses = epistemic.count_by_marker(row["response"])
        group = found.setdefault(row["benchmark"], {}).setdefault(row["index"], [])
        group.append(uses | {"score": row["correct"] + 0, "length": row["tokens"] + 0,
                             "epistemic": sum(uses.values()), "row": None if group else row})
    list(read(file, add))
    return found

def read_training(path):
    """(benchmark, step, answers, seed, method, setting, flags) of a run of sdpo.py or its like."""
    ((method, setting, flags, seed),) = read(path / "config.json", describe)
    if method.startswith("SFT"):
        return  # it samples no answers
    rows = [*read(path / "metrics.jsonl", lambda row: (
        {"step": row["step"]} | {quantity: row[quantity] + 0 for quantity in NAMES}))]
    for i, row in enumerate(rows):
        five = {r["step"]: [r] for r in rows[max(i - 4, 0):i + 1]}  # one is too noisy
        yield "training", row["step"], five, seed, method, setting, flags
    for file in sorted(path.glob("eval/step_*.jsonl")):
        step = int(file.stem[5:])
        for benchmark, answers in read_answers(file).items():
            yield benchmark, step, answers, seed, method, setting, flags
            if step == 0:
                yield benchmark, step, answers, seed, "Base", setting, {}

def read_conditions(path):
    """The same of generate_conditions.py; its questions are the benchmark ""."""
    ((_, (model, *_), _, seed),) = read(path / "config.json", describe)
    for context in "unguided", "without_think", "regenerated", "full", "uncertain":
        for answers in read_answers(path / f"{context}.jsonl").values():
            yield "", 0, answers, seed, context, (model, "", ""), {}

def read_evaluation(path):
    """The same of evaluate.py: beside <benchmark>.jsonl a .json says what was evaluated."""
    for file in sorted(path.rglob("*/*.json")):
        (place,) = read(file, lambda row: Path(row["model"]))
        trained = place.parent.name == "checkpoints"  # of a run, whose config.json says the rest
        config = place.parents[1] / "config.json" if trained else file
        ((method, (model, data, _), flags, seed),) = read(config, describe)
        method, step = (method, int(place.name[5:])) if trained else ("Base", 0)
        flags = flags | {"data": data} if trained else {"control": flags.get("control")}
        for benchmark, answers in read_answers(file.with_suffix(".jsonl")).items():
            yield benchmark, step, answers, seed, method, (model, "", ""), flags

def load_runs(folder):
    """Every run below the folder. ValueError names a broken file and its row."""
    runs, readers = {}, {"metrics.jsonl": read_training, "unguided.jsonl": read_conditions,
                         "summary.json": read_evaluation}  # by a file that it writes
    for name, reader in readers.items():
        for file in sorted(Path(folder).rglob(name)):
            for benchmark, step, answers, seed, *who in reader(file.parent):
                run = runs.setdefault(json.dumps(who, sort_keys=True), Run(*who))
                run.results.setdefault((benchmark, step), {}).setdefault(seed, answers)
    if not runs:
        raise ValueError(f"{folder}: no results of runs below it")
    return [*runs.values()]

def label_runs(runs):
    """Of lr and data usual is what most runs of the method have, of |D| the largest."""
    for run in runs:
        alike = [other.flags for other in runs if other.method == run.method]
        alike.sort(key=lambda f: (-(f.get("num_questions") or math.inf), f.get("lr", 0)))
        usual = {flag: mode(flags.get(flag) for flags in alike) for flag in run.flags} | USUAL
        run.differs = {flag for flag in run.flags if run.flags[flag] != usual[flag]}
        parts = [f"{flag} {run.flags[flag]}" for flag in sorted(run.differs)]
        run.label = ", ".join([run.method, *parts]).replace("_", " ")
    runs.sort(key=lambda run: ([*COLOURS, run.method].index(run.method), len(run.differs)))
    return {run.label: run for run in runs}

# fresh: the benchmark of new questions like those of the training; other: that of other questions
Setting = namedtuple("Setting", "name arms benchmarks fresh other domain")

def settings(runs):
    """Yields Settings; only runs of one setting stand in one claim."""
    keys = sorted({run.setting for run in runs})
    for model, data, same in keys:
        arms = label_runs([run for run in runs if run.setting == (model, data, same)])
        names = sorted({name for run in arms.values() for name, _ in run.results})
        like = data.removesuffix("_train") + "_test", "in", "training"
        fresh = next((name for name in like if name in names), None)
        other = next((name for name in names if name not in ("", fresh, "training")), None)
        domain = next(DOMAINS[d] for d in DOMAINS if data.startswith(d)) if data else None
        name = f"{model}, trained on {data}" if data else model
        name += f"; {same}" * (sum(key[:2] == (model, data) for key in keys) > 1)
        yield Setting(name, arms, names, fresh, other, domain)

# --- drawing -------------------------------------------------------------------------------------

COLOURS = {"Base": "#777777", "GRPO": "#1f6fb4", "SDPO": "#d9600f"}
matplotlib.rcParams.update({
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.prop_cycle": matplotlib.cycler(color="#74b #283 #b82 #c37 #199 #643 #8a0 #e7c".split()),
    "figure.figsize": (4.8, 3.9), "figure.dpi": 200, "figure.constrained_layout.use": True})

def draw_lines(axis, arms, benchmark, quantity):
    """The mean over the steps, with its standard error."""
    for label, run in arms.items():
        steps = run.steps(benchmark)
        means, errors, _ = zip(*[run.value(quantity, benchmark, step) for step in steps])
        axis.errorbar(steps, means, errors, color=COLOURS.get(run.label), label=label, marker=".")
    axis.set_ylim(0, 1.03 if quantity == "score" else None)

def curves(title, arms, benchmark, quantities=NAMES):
    """Yields a figure for each quantity, of the runs that have the benchmark."""
    arms = {label: run for label, run in arms.items() if run.steps(benchmark)}
    for quantity in quantities if arms else []:
        axis = Figure().subplots()
        axis.set(title=title, xlabel="training step", ylabel=NAMES[quantity])
        draw_lines(axis, arms, benchmark, quantity)
        yield axis.figure

def table(arms, benchmark):
    """Where the runs end."""
    rows = [[benchmark, "score", "tokens", "markers"]]
    for run in arms.values():
        for step in run.steps(benchmark)[-1:]:
            name = f"{run.label} (step {step}, seeds {len(run.results[benchmark, step])})"
            rows.append([name, *(run.text(quantity, benchmark) for quantity in NAMES)])
    return rows

# --- the paper's claims, figures and tables ------------------------------------------------------

def compare(s, quantity, benchmark, more, less, keeps=False):
    """[verdict, numbers]: is `more` above `less` (`keeps`: not below it), by two standard errors,
    at the last step that both have? [] where one is missing. Base is at step 0."""
    runs = [s.arms[label] for label in (more, less) if label in s.arms]
    steps = [set(run.steps(benchmark)) for run in runs if run.method != "Base"]
    last = max(set.intersection(*steps), default=0) if len(runs) == 2 else 0
    if len(runs) < 2 or benchmark and not last or not all(run.steps(benchmark) for run in runs):
        return []
    (a, error, _), (b, noise, _) = (run.value(quantity, benchmark, last) for run in runs)
    sign = "≈" if not abs(a - b) > 2 * math.hypot(error, noise) else ">" if a > b else "<"
    verdict = "no" if sign == "<" else "yes" if keeps or sign == ">" else "too close"
    texts = [f"{run.label} {run.text(quantity, benchmark, last)}" for run in runs]
    return [verdict, f"{texts[0]} {sign} {texts[1]}" + f" (step {last})" * (last > 0)]

def sizes(s, method):
    """[run], few questions first, of those that differ in |D| alone."""
    found = [r for r in s.arms.values() if r.method == method and r.differs <= {"num_questions"}]
    return sorted(found, key=lambda run: run.flags.get("num_questions") or math.inf)

def claims(s):
    """The paper's claims. Its numbers are AIME24's. Yes and no: by over two standard errors."""
    score, markers = (partial(compare, s, quantity, s.other) for quantity in ("score", "epistemic"))
    learned, trained = (partial(compare, s, "score", name) for name in (s.fresh, "training"))
    many = s.domain == "diverse"  # not in a narrow domain, however many questions it has
    few = next((run.label[4:] for run in sizes(s, "SDPO") if run.differs), " few")
    shown = partial(compare, s, "epistemic", "")
    rows = [
        ("Table 1: part of a solution, fewer markers", shown("unguided", "without think")),
        ("Table 1: all of it, fewer still", shown("without think", "full")),
        ("Table 2: SFT on d_ug keeps the score (51, 55)", score("SFT on d ug", "Base", keeps=True)),
        ("Table 2: SFT on d_sg loses it (20, 55)", score("Base", "SFT on d sg")),
        ("Figure 1b: GRPO learns more than SDPO", many and learned("GRPO", "SDPO")),
        ("Figure 3: GRPO keeps the score (56, 55)", score("GRPO", "Base", keeps=True)),
        ("Figure 3: SDPO loses it (40% lower)", score("Base", "SDPO")),
        ("Figure 3: less without think", score("SDPO, demonstration without think", "SDPO")),
        ("Figures 3, 4: SDPO loses markers", markers("Base", "SDPO")),
        ("Figures 3, 4: more than GRPO", markers("GRPO", "SDPO")),
        ("Figure 6: more, if the teacher follows", score("SDPO", "SDPO, ema 0.05")),
        ("Figure 7: few questions SDPO learns", trained("SDPO" + few, "GRPO" + few, keeps=True)),
        ("Figure 7: many less than GRPO", many and trained("GRPO", "SDPO")),
        ("Figure 8: few cost the most elsewhere", score("SDPO", "SDPO" + few)),
        ("Figure 14: an uncertain c costs as well", score("Base", "SDPO, demonstration uncertain"))]
    if s.domain == "narrow":
        rows = [("Figure 1a: SDPO learns more than GRPO", learned("SDPO", "GRPO")),
                ("Figure 1a: in shorter answers", compare(s, "length", s.fresh, "GRPO", "SDPO"))]
    rows = [[text, *result] for text, result in rows if result]
    if rows:
        yield [["the paper's claim", "holds here", "our numbers"], *rows]

def tables_1_2(s):
    """Tables 1, 2: contexts, checkpoints. A solution shown makes answers short and sure; SFT on \
such answers (d_sg), though all are right, makes the model wrong; on unguided ones (d_ug) not."""
    for name in [] if s.domain else s.benchmarks:
        yield table(s.arms, name)

def figures_1_to_6(s):
    """Figures 1, 3 to 6, 14: training. SDPO turns short and sure: right in narrow domains only."""
    drawn = {label: run for label, run in s.arms.items()
             if label != "Base" and run.differs <= {"demonstration", "ema", "top_k", "lr"}}
    for name in s.benchmarks if s.domain else []:
        title = f"other questions ({name})" if name == s.other else name
        yield from curves(title, drawn, name)
        yield table(s.arms, name)

def figures_7_8(s):
    """Figures 7, 8: few or many questions. SDPO learns few fast, and loses most of the others."""
    for name in s.benchmarks if len(sizes(s, "SDPO")) > 2 else []:
        for method in ("GRPO", "SDPO"):
            arms = {f"|D| {run.flags['num_questions'] or 'all'}": run for run in sizes(s, method)}
            yield from curves(f"{method}: {name}", arms, name, ["score", "length"])

def figures_9_11(s):
    """Figures 9 to 11: each marker. A solution shown makes all of them rare, and so does SDPO."""
    benchmark = "" if "" in s.benchmarks else s.other
    arms = [run for run in s.arms.values() if run.steps(benchmark) and not run.differs]
    rows = [[marker, *(f"{run.value(marker, benchmark)[0]:.2f}" for run in arms)]
            for marker in epistemic.MARKERS]
    if arms:
        yield [["uses an answer", *(run.label for run in arms)], *rows]

def table_6(file):
    """Of token_kl.py's file. What is frequent is ours: the paper's rarest variant has 25."""
    (tokens,) = read(file, dict.values)
    frequent = [t | {"kl": t["kl"] / t["count"]} for t in tokens if t["count"] >= 25]
    mean = fmean(t["kl"] for t in frequent)
    rows = [[f"‘{t['text']}’", f"{t['kl']:.3f}", f"{t['count']:,}", f"{t['kl'] / mean:.1f}"]
            for t in sorted(frequent, key=lambda t: -t["kl"])
            if t["text"].strip(" :,.").lower() in epistemic.MARKERS]
    return [["token", "mean KL", "count", f"times the mean {mean:.3f}"], *rows]

def remedies(s):
    """Remedies: score and length on other questions. Wanted: top left. A line joins strengths."""
    arms = {label: run for label, run in s.arms.items() if run.steps(s.other)
            and (label in COLOURS or "strength" in run.flags)}
    axis = Figure().subplots()
    axis.set(title=s.other, xlabel=NAMES["length"], ylabel=NAMES["score"])
    for method in dict.fromkeys(run.method for run in arms.values()):
        own = [run for run in arms.values() if run.method == method]
        own.sort(key=lambda run: run.flags.get("strength"))
        points = [[run.value(q, s.other)[0] for run in own] for q in ("length", "score")]
        axis.plot(*points, "o-", color=COLOURS.get(method), label=method)
    if len(axis.lines) > 3:
        yield axis.figure
        yield table(arms, s.other)

def changed_answers(s):
    """[(Base's, SDPO's)] to other questions; first those that became wrong, short ones first."""
    runs = [s.arms[method] for method in ("Base", "SDPO") if method in s.arms]
    if len(runs) < 2 or not all(run.steps(s.other) for run in runs):
        return []
    before, after = ([*run.results[s.other, run.steps(s.other)[-1]].values()][0] for run in runs)
    pairs = [(before[i][0]["row"], after[i][0]["row"]) for i in before if i in after]
    return sorted(pairs, key=lambda pair: (pair[1]["correct"] - pair[0]["correct"],
                                           pair[0]["tokens"]))

def answers(s):
    """Answers side by side. Other questions; first those that SDPO gets wrong."""
    for pair in changed_answers(s)[:3]:
        texts = [f"{'right' if answer['correct'] else 'wrong'}, {answer['tokens']:,} tokens\n\n"
                 f"{answer['response']}" for answer in pair]
        yield [["the question", "Base", "SDPO"], [pair[0]["question"], *texts]]

# --- the page ------------------------------------------------------------------------------------

SECTIONS = claims, tables_1_2, figures_1_to_6, figures_7_8, figures_9_11, remedies, answers
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Self-distillation</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1360px; margin: auto; padding: 0 1em }
img { width: 420px; max-width: 100% } div { overflow-x: auto } tr:first-child { font-weight: bold }
td { padding-right: .8em; vertical-align: top; white-space: pre-wrap } table { margin-top: 1em }
</style><h1>Self-distillation, measured</h1><p>±: the larger standard error of that over seeds (s)
and that over questions (q), in training over five steps. Base: before training.</p>"""

def show(item, file):
    """A table as HTML, with the markers marked, or a figure, which goes to the file."""
    if isinstance(item, Figure):
        item.legend(loc="outside lower left", ncols=2, fontsize=8, handlelength=1, frameon=False)
        item.savefig(file)
        return f'<img alt="" src="figures/{file.name}">'
    rows = ["<tr><td>" + "<td>".join(html.escape(str(cell)) for cell in row) for row in item]
    rows = re.sub(f"(?i)({'|'.join(epistemic.MARKERS)})", r"<mark>\1</mark>", "".join(rows))
    return f"<div><table>{rows}</table></div>"

def report(folder):  # writes the page, prints the claims
    found = [*settings(load_runs(folder))]
    page = PAGE + "<img src=demo.png style='width: 100%'>" * (folder / "demo.png").exists()
    (folder / "figures").mkdir(exist_ok=True)
    for section in SECTIONS:
        title, sentence = section.__doc__.split(". ", 1)
        for i, s in enumerate(found):
            items = [show(item, folder / f"figures/{section.__name__}_{i}_{j}.png")
                     for j, item in enumerate(section(s))]
            if items:
                page += f"<h2>{title} ({html.escape(s.name)})</h2><p>{sentence}</p>"
                page += f"<section>{''.join(items)}</section>"
    for file in sorted(folder.rglob("token_kl.json")):
        page += f"<h2>Table 6: {html.escape(str(file))}</h2>" + show(table_6(file), None)
    (folder / "report.html").write_text(page, encoding="utf-8", errors="replace")
    for s, rows in [(s, rows) for s in found for rows in claims(s)]:
        print(f"\n{s.name}")
        for claim, verdict, numbers in rows[1:]:
            print(f"{verdict:11}{claim:47}{numbers}")
    print(f"\n{folder}/report.html")

def main():
    parser = argparse.ArgumentParser(description="The paper's tables and figures of your runs.",
                                     usage=argparse.SUPPRESS)
    parser.add_argument("folder", type=Path, help="what holds the runs")
    try:
        report(parser.parse_args().folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))

if __name__ == "__main__":
    main()
