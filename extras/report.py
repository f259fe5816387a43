"""The paper's figures and tables of your runs: FOLDER/report.html and FOLDER/figures.

    python -m extras.report runs            # every run below this folder, finished or not

A run is what its config.json says, never what its folder is called. After the reading comes a
function for each figure or table, in the paper's order: its docstring is its title and its sentence
on the page; of the runs of a setting s it makes a list of figures and tables.
"""
import argparse
import html
import json
import math
import re
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, mode, stdev

import matplotlib
from matplotlib.figure import Figure

import epistemic

NAMES = {"score": "score", "length": "tokens an answer", "epistemic": "markers an answer"}
CONTEXTS = ["unguided", "without_think", "regenerated", "full", "uncertain"]
SAME = """questions_per_step minibatch_questions rollouts temperature max_prompt_tokens
    max_response_tokens warmup_steps""".split()  # flags that all runs of a setting share
USUAL = {"demonstration": "full", "ema": 0.0, "top_k": 100, "alpha": 0.5, "clip_low": 0.2,
         "clip_high": 0.28, "loss_tokens": 1024, "teacher_thinking": False, "control": None,
         "strength": None}  # the scripts' defaults; what differs stands in a run's label
DOMAINS = {"narrow": "narrow", "chem": "narrow", "habits": "habits", "": "diverse"}  # by the data

# --- reading -------------------------------------------------------------------------------------

# method: GRPO, SDPO, OPSD, "SFT on d_ug", a remedy, a context, or Base: before training;
# setting: (model, training data or "", the flags of SAME in words); flags: those of USUAL, lr, |D|
Who = namedtuple("Who", "method setting flags seed")

@dataclass(eq=False)
class Run:
    """All seeds of what a config.json describes."""
    method: str
    setting: tuple
    flags: dict
    results: dict = field(default_factory=dict)  # {(benchmark, step): {seed: {question: [answer]}}}
    differs: frozenset = frozenset()  # its flags that are not as usual
    label: str = ""  # the method and these flags

    def steps(self, benchmark):
        """Those that all seeds have."""
        seeds = max(map(len, self.results.values()))
        return sorted(step for name, step in self.results
                      if name == benchmark and len(self.results[name, step]) == seeds)

    def means(self, quantity, benchmark, step):
        """Of each seed."""
        return [fmean(answer[quantity] for group in seed.values() for answer in group)
                for seed in self.results[benchmark, step].values()]

    def value(self, quantity, benchmark, step=None):
        """(mean, the larger of its standard errors, over what), at a step or at the last."""
        step = self.steps(benchmark)[-1] if step is None else step
        means, seeds = self.means(quantity, benchmark, step), self.results[benchmark, step].values()
        asked = [fmean(answer[quantity] for seed in seeds for answer in seed.get(i, []))
                 for i in [*seeds][0]]  # the answers to one question are not independent
        errors = [(stdev(values) / len(values) ** 0.5, over)
                  for values, over in ((means, "s"), (asked, "q")) if len(values) > 1]
        return fmean(means), *max(errors, default=(math.inf, ""))

    def text(self, quantity, benchmark, step=None):
        mean, error, over = self.value(quantity, benchmark, step)
        digits = {"score": 3, "length": 0, "epistemic": 1}[quantity]
        return f"{mean:,.{digits}f}" + (f" ± {error:,.{digits}f} {over}" if over else "")

def read(path, use):
    """[use(object)] of a .json file or of each row of a .jsonl file."""
    rows = path.read_bytes().splitlines(True) if path.suffix == ".jsonl" else [path.read_bytes()]
    if path.name == "metrics.jsonl" and rows and not rows[-1].endswith(b"\n"):
        rows.pop()  # it is still being written
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(use(json.loads(row, strict=False)))  # a model's text may hold raw tabs
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, row {number}: {error!r}") from None
    return found

def describe(config):
    model, data = config["model"], Path(str(config.get("data", ""))).stem
    model = model if isinstance(model, str) else model[0]  # evaluate.py has several
    model = re.sub(r".*/models--(.+?)--(.+?)/snapshots/.*", r"\1/\2", model)
    model = "/".join(Path(model).parts[-2:]) + ", thinking off" * (not config["enable_thinking"])
    script = Path(config.get("script", "")).stem
    method = {"sft_distill": f"SFT on {data}", "controls": "SDPO"}.get(script, script.upper())
    same = ", ".join(f"{flag} {config[flag]}" for flag in SAME if flag in config).replace("_", " ")
    flags = {flag: config[flag] for flag in (*USUAL, "lr", "num_questions") if flag in config}
    return Who(config.get("remedy", method), (model, data, same), flags, config["seed"])

def read_answers(file):
    """{benchmark: {question: [answer]}}; of a question's answers only the first keeps its text."""
    found = {}
    def add(row):
        uses = epistemic.count_by_marker(row["response"])
        group = found.setdefault(row["benchmark"], {}).setdefault(row["index"], [])
        group.append(uses | {"score": row["correct"] + 0, "length": row["tokens"] + 0,
                             "epistemic": sum(uses.values()), "row": None if group else row})
    read(file, add)
    return found

def read_training(path, who):
    """(benchmark, step, answers, who) of a run of sdpo.py, grpo.py or a script on top of them."""
    if who.method.startswith("SFT"):
        return  # it samples no answers
    rows = read(path / "metrics.jsonl", lambda row: (
        {"step": row["step"]} | {quantity: row[quantity] + 0 for quantity in NAMES}))
    for i, row in enumerate(rows):
        five = {r["step"]: [r] for r in rows[max(i - 4, 0):i + 1]}  # one is too noisy
        yield "training", row["step"], five, who
    for file in sorted(path.glob("eval/step_*.jsonl")):
        step = int(file.stem[5:])
        for benchmark, answers in read_answers(file).items():
            yield benchmark, step, answers, who
            if step == 0:
                yield benchmark, step, answers, who._replace(method="Base", flags={})

def read_conditions(path, who):
    """The same of generate_conditions.py; its questions are the benchmark ""."""
    for context in CONTEXTS:
        for answers in read_answers(path / f"{context}.jsonl").values():
            yield "", 0, answers, Who(context, (who.setting[0], "", ""), {}, who.seed)

def read_evaluation(path, _):
    """The same of evaluate.py: beside <benchmark>.jsonl a .json says what was evaluated."""
    for file in sorted(path.rglob("*/*.json")):
        ((model, who),) = read(file, lambda row: (Path(row["model"]), describe(row)))
        method, flags, step = "Base", {"control": who.flags.get("control")}, 0
        if model.parent.name == "checkpoints":
            (who,) = read(model.parents[1] / "config.json", describe)
            method, flags, step = who.method, {"data": who.setting[1], **who.flags}, model.name[5:]
        for benchmark, answers in read_answers(file.with_suffix(".jsonl")).items():
            yield benchmark, int(step), answers, Who(
                method, (who.setting[0], "", ""), flags, who.seed)

def load_runs(folder):
    """Every run below the folder, GRPO and SDPO first. ValueError names a broken file and row."""
    runs, readers = {}, {"metrics.jsonl": read_training, "unguided.jsonl": read_conditions,
                         "summary.json": read_evaluation}  # by a file that the folder holds
    for config in sorted(Path(folder).rglob("config.json")):
        kinds = [name for name in readers if (config.parent / name).exists()]
        if "checkpoints" in config.parts or not kinds:
            continue
        (who,) = read(config, describe)
        for benchmark, step, answers, who in readers[kinds[0]](config.parent, who):
            run = runs.setdefault(json.dumps(who[:3], sort_keys=True), Run(*who[:3]))
            run.results.setdefault((benchmark, step), {}).setdefault(who.seed, answers)
    if not runs:
        raise ValueError(f"{folder}: no results of runs below it")
    return label_runs([*runs.values()])

def label_runs(runs):
    """Sets `differs` and `label`; sorts. Of lr and data usual is what most have, of |D| the most."""
    words = {"num_questions": "|D| {}", "demonstration": "c {}", "strength": "{}"}
    for run in runs:
        alike = [r.flags for r in runs if (r.method, r.setting) == (run.method, run.setting)]
        alike.sort(key=lambda f: (-(f.get("num_questions") or math.inf), f.get("lr", 0)))
        usual = {flag: mode(flags.get(flag) for flags in alike) for flag in run.flags}
        run.differs = {flag for flag in run.flags if run.flags[flag] != (usual | USUAL)[flag]}
        parts = [words.get(flag, flag + " {}").format(run.flags[flag])
                 for flag in sorted(run.differs)]
        run.label = ", ".join([run.method, *parts]).replace("_", " ")
    order = ["Base", "GRPO", "SDPO", *CONTEXTS, *sorted(run.method for run in runs)]
    return sorted(runs, key=lambda run: (order.index(run.method), len(run.differs), run.label))

# arms: its runs, {label: run}; fresh: the benchmark of new questions like those of the training,
# else "training"; other: that of other questions; domain: of DOMAINS, None without a training
Setting = namedtuple("Setting", "name arms benchmarks fresh other domain")

def settings(runs):
    """[Setting]; only runs of one setting stand in one claim."""
    found, keys = [], sorted({run.setting for run in runs})
    for model, data, same in keys:
        arms = {run.label: run for run in runs if run.setting == (model, data, same)}
        names = sorted({name for run in arms.values() for name, _ in run.results})
        like = f"{data.removesuffix('_train')}_test", "in", "training"
        fresh = next((name for name in like if name in names), None)
        others = {name for name in names if name not in ("", fresh, "training")}
        other = min(others, key=lambda name: (name not in ("ood", "aime24"), name), default=None)
        domain = next(DOMAINS[d] for d in DOMAINS if data.startswith(d)) if data else None
        name = f"{model}, trained on {data}" if data else model
        if sum(key[:2] == (model, data) for key in keys) > 1:
            name += f"; {same}"
        found.append(Setting(name, arms, names, fresh, other, domain))
    return found

# --- drawing -------------------------------------------------------------------------------------

COLOURS = {"Base": "#777777", "GRPO": "#1f6fb4", "SDPO": "#d9600f"}
matplotlib.rcParams.update({
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": "medium", "axes.titlelocation": "left", "legend.frameon": False,
    "text.parse_math": False})  # a model's text may hold $

def panel(title, xlabel, ylabel):
    axis = Figure((4.8, 3.9), dpi=200, layout="constrained").subplots()
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return axis

def draw_lines(axis, arms, benchmark, quantity, shades=None):
    """Over the steps the mean of the seeds, and a band from the lowest to the highest seed."""
    for i, (label, run) in enumerate(arms.items(), 1):
        steps, colour = run.steps(benchmark), COLOURS.get(run.label)
        if shades:  # from light to dark
            colour = matplotlib.colormaps[shades](0.25 + 0.7 * i / len(arms))
        values = [run.means(quantity, benchmark, step) for step in steps]
        (line,) = axis.plot(steps, [*map(fmean, values)], color=colour, label=label,
                            lw=2.5, marker="o" if len(steps) < 10 else None)
        axis.fill_between(steps, [*map(min, values)], [*map(max, values)], alpha=0.15,
                          color=line.get_color())
    axis.set_ylim(0, 1.03 if quantity == "score" else None)

def curves(title, arms, benchmark, quantities=NAMES, shades=None):
    """A figure for each quantity, of the runs that have the benchmark."""
    figures, arms = [], {label: run for label, run in arms.items() if run.steps(benchmark)}
    for quantity in quantities:
        axis = panel(f"{title} ({benchmark})", "training step", NAMES[quantity])
        draw_lines(axis, arms, benchmark, quantity, shades)
        figures.append(axis.figure)
    return figures if arms else []

def table(arms, benchmark):
    """Where the runs end."""
    rows = [[benchmark, "seeds", "step", "score", "tokens", "markers"]]
    for label, run in arms.items():
        if run.steps(benchmark):
            step = run.steps(benchmark)[-1]
            texts = [run.text(quantity, benchmark) for quantity in NAMES]
            rows.append([label, len(run.results[benchmark, step]), step, *texts])
    return rows

# --- the paper's claims, figures and tables ------------------------------------------------------

def compare(s, quantity, benchmark, more, less, keeps=False):
    """[verdict, numbers]: is `more` above `less` (`keeps`: not below it), by two standard errors, at
    the last step that both have? [] where one is missing. Base is always at step 0."""
    runs = [s.arms[label] for label in (more, less) if label in s.arms]
    steps = [set(run.steps(benchmark)) for run in runs if run.method != "Base"]
    last = max(set.intersection(*steps), default=0) if len(runs) == 2 else 0
    if not last and benchmark or len(runs) < 2 or not all(run.steps(benchmark) for run in runs):
        return []
    at = [0 if run.method == "Base" else last for run in runs]
    (a, error, _), (b, noise, _) = (run.value(quantity, benchmark, i) for run, i in zip(runs, at))
    sign = "≈" if abs(a - b) <= 2 * math.hypot(error, noise) else ">" if a > b else "<"
    verdict = "no" if sign == "<" else "yes" if keeps or sign == ">" else "too close"
    texts = [f"{run.label} {run.text(quantity, benchmark, i)}" for run, i in zip(runs, at)]
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
        ("Table 1: the more is shown, the less markers", shown("unguided", "without think")),
        ("Table 1: less again", shown("without think", "regenerated")),
        ("Table 1: less again", shown("regenerated", "full")),
        ("Table 2: SFT on d_ug keeps the score (51, 55)", score("SFT on d ug", "Base", keeps=True)),
        ("Table 2: SFT on d_sg loses it (20, 55)", score("Base", "SFT on d sg")),
        ("Figure 1b: GRPO learns more than SDPO", many and learned("GRPO", "SDPO")),
        ("Figure 3: GRPO keeps the score (56, 55)", score("GRPO", "Base", keeps=True)),
        ("Figure 3: SDPO loses it (40% lower)", score("Base", "SDPO")),
        ("Figure 3: less, if c has no think part", score("SDPO, c without think", "SDPO")),
        ("Figures 3, 4: SDPO loses markers", markers("Base", "SDPO")),
        ("Figures 3, 4: more than GRPO", markers("GRPO", "SDPO")),
        ("Figure 6: more, if the teacher follows", score("SDPO", "SDPO, ema 0.05")),
        ("Figure 7: few questions SDPO learns", trained("SDPO" + few, "GRPO" + few, keeps=True)),
        ("Figure 7: many less than GRPO", many and trained("GRPO", "SDPO")),
        ("Figure 8: few cost the most elsewhere", score("SDPO", "SDPO" + few)),
        ("Figure 14: an uncertain c costs as well", score("Base", "SDPO, c uncertain"))]
    if s.domain == "narrow":
        rows = [("Figure 1a: SDPO learns more than GRPO", learned("SDPO", "GRPO")),
                ("Figure 1a: in shorter answers", compare(s, "length", s.fresh, "GRPO", "SDPO"))]
    rows = [[text, *result] for text, result in rows if result]
    return [[["the paper's claim", "holds here", "our numbers"], *rows]] if rows else []

def figure_1(s):
    """Figure 1: where self-distillation helps. SDPO is short; right where one way of answering \
serves all (a narrow domain), wrong where each question needs its own search."""
    arms = {method: s.arms[method] for method in COLOURS if method in s.arms}
    if s.domain is None or len(arms) < 3:
        return []
    return [*curves("fresh questions", arms, s.fresh, ["score"]), table(arms, s.fresh)]

def tables_1_2(s):
    """Tables 1, 2: contexts, checkpoints. A solution shown makes answers short and sure; SFT on \
such answers (d_sg), though all are right, makes the model wrong; on unguided ones (d_ug) not."""
    return [table(s.arms, name) for name in s.benchmarks if s.domain is None]

def figures_3_to_6(s):
    """Figures 3 to 6, 14, 20: training. SDPO becomes short, sure and, on other questions, wrong."""
    found, flags = [], {"demonstration", "ema", "top_k", "lr"}
    drawn = {label: run for label, run in s.arms.items() if run.differs <= flags}
    for name in s.benchmarks if s.domain else []:
        title = {s.other: "other questions", "training": "while training"}.get(name, "questions")
        found += [*curves(title, drawn, name), table(s.arms, name)]
    return found

def figures_7_8(s):
    """Figures 7, 8: few or many questions. SDPO learns few fast, and loses most of the others."""
    found = []
    for name in s.benchmarks if len(sizes(s, "SDPO")) > 2 else []:
        for method, shades in (("GRPO", "Blues"), ("SDPO", "Oranges")):
            arms = {f"|D| {run.flags['num_questions'] or 'all'}": run for run in sizes(s, method)}
            found += curves(method, arms, name, ["score", "length"], shades)
    return found

def figures_9_11(s):
    """Figures 9 to 11: each marker. A solution shown makes all of them rare, and so does SDPO."""
    benchmark = "" if "" in s.benchmarks else s.other
    axis = panel(benchmark, "uses an answer", "")
    for label, run in s.arms.items():
        if run.steps(benchmark) and not run.differs:
            uses = [run.value(marker, benchmark)[0] for marker in epistemic.MARKERS]
            axis.plot(uses, epistemic.MARKERS, "o", color=COLOURS.get(label), label=label)
    axis.invert_yaxis()
    return [axis.figure] if axis.lines else []

def table_6(files):
    """Table 6: student and teacher by token. In the paper they differ most at markers."""
    kl, count = Counter(), Counter()
    for token in [token for file in files for row in read(file, dict) for token in row.values()]:
        kl[token["text"]] += token["kl"]
        count[token["text"]] += token["count"]
    # ours: the paper does not say what is frequent; its rarest variant has 25
    means = {text: kl[text] / n for text, n in count.items() if n >= 25}
    mean = fmean(means.values())
    rows = [[f"‘{text}’", f"{means[text]:.3f}", count[text], f"{means[text] / mean:.1f}"]
            for text in sorted(means, key=means.get, reverse=True)
            if text.strip(" :,.").lower() in epistemic.MARKERS]
    return [[["token", "mean KL", "count", f"times the mean {mean:.3f}"], *rows]]

def remedies(s):
    """Remedies: score and length on other questions. Wanted: top left. A line joins strengths."""
    arms = {label: run for label, run in s.arms.items()
            if s.other and (label in COLOURS or "strength" in run.flags)}
    axis = panel(s.other, "tokens an answer", "score")
    for method in dict.fromkeys(run.method for run in arms.values()):
        own = [run for run in arms.values() if run.method == method]
        own.sort(key=lambda run: run.flags.get("strength"))
        points = [[run.value(quantity, s.other)[0] for run in own] for quantity in NAMES]
        axis.plot(points[1], points[0], "o-", color=COLOURS.get(method), label=method)
    return [axis.figure, table(arms, s.other)] if len(axis.lines) > 3 else []

def changed_answers(s):
    """[(Base's, SDPO's)] to other questions; first those that became wrong, short ones first."""
    runs = [s.arms[method] for method in ("Base", "SDPO") if method in s.arms]
    if s.domain is None or len(runs) < 2 or not all(run.steps(s.other) for run in runs):
        return []
    before, after = ([*run.results[s.other, run.steps(s.other)[-1]].values()][0] for run in runs)
    pairs = [(before[i][0]["row"], after[i][0]["row"]) for i in before if i in after]
    return sorted(pairs, key=lambda pair: (pair[1]["correct"] - pair[0]["correct"],
                                           pair[0]["tokens"]))

def answers(s):
    """Answers side by side: Base and SDPO. Other questions; first those that SDPO gets wrong."""
    found = []
    for answer in [answer for pair in changed_answers(s)[:3] for answer in pair]:
        text = f"{'right' if answer['correct'] else 'wrong'}, {answer['tokens']:,} tokens"
        text = html.escape(f"{answer['question']}\n\n({text})\n{answer['response']}")
        text = re.sub(f"(?i)({'|'.join(epistemic.MARKERS)})", r"<mark>\1</mark>", text)
        found.append(f"<pre>{text}</pre>")
    return found

# --- the page ------------------------------------------------------------------------------------

SECTIONS = (claims, figure_1, tables_1_2, figures_3_to_6, figures_7_8, figures_9_11, table_6,
            remedies, answers)
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Self-distillation</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1360px; margin: auto; padding: 0 1em }
section { display: flex; flex-wrap: wrap; gap: 1em 2em } section > * { max-width: 100% }
img { width: 420px } div { overflow-x: auto } td { padding: .2em .8em .2em 0 }
pre { width: 640px; white-space: pre-wrap } tr:first-child { font-weight: bold }
</style><h1>Self-distillation, measured</h1><p>±: the larger standard error of that over seeds (s)
and that over questions (q), in training over five steps. Bands: from the lowest seed to the
highest. Base: before training. Markers: """ + ", ".join(epistemic.MARKERS) + ".</p>"

def markdown(rows):
    """A table as text, which is Markdown too."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(f"{cell!s:{width}}" for cell, width in zip(row, widths))
                     + " |" for row in rows)

def show(item, file):
    """A table, or a figure that goes to the file, as HTML."""
    if isinstance(item, str):
        return item
    if isinstance(item, list):
        rows = ["<tr><td>" + "<td>".join(html.escape(str(cell)) for cell in row) for row in item]
        return f"<div><table>{''.join(rows)}</table></div>"
    item.legend(loc="outside lower left", ncols=2, fontsize=9)
    item.savefig(file)
    return f'<img alt="" src="figures/{file.name}">'

def report(folder):
    """Writes the page; prints the claims."""
    found, page = settings(load_runs(folder)), PAGE
    (folder / "figures").mkdir(exist_ok=True)
    for section in SECTIONS:
        parts = [(s.name, section(s)) for s in found] if section is not table_6 else [
            (str(file.parent), table_6([file])) for file in sorted(folder.rglob("token_kl.json"))]
        title, sentence = section.__doc__.split(". ", 1)
        page += f"<h2>{title}</h2><p>{sentence}</p>" if any(items for _, items in parts) else ""
        for part, (name, items) in enumerate(parts):
            page += f"<h3>{html.escape(name)}</h3><section>" if items else ""
            for i, item in enumerate(items):
                page += show(item, folder / f"figures/{section.__name__}_{part}_{i}.png")
            page += "</section>" if items else ""
            if section is claims and items:
                print(f"\n{name}\n\n{markdown(items[0])}")
    (folder / "report.html").write_text(page, encoding="utf-8", errors="replace")
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
