"""Every figure and table of the paper, from the files that the scripts leave. Imports none of them.

    python report.py runs/demo                # what `make demo` left: conditions, sft, grpo, sdpo
    python report.py runs/study/seed_*        # `make study`; runs of one name are seeds of one arm
    python report.py runs                     # all there is below, also while a run goes on

Prints the main tables. Writes into --out (else the given folder, or the one above several)
report.html, which needs no network, report.png, an overview, and figures/, every figure as PNG and
every table as CSV. SECTIONS, near the end, lists them all.
"""
import argparse
import base64
import datetime
import functools
import hashlib
import html
import io
import json
import math
import os
import re
from collections import Counter, defaultdict
from pathlib import Path, PurePath
from types import SimpleNamespace

import matplotlib
matplotlib.use("Agg")
import pandas
from matplotlib import pyplot

import epistemic

# --- reading -------------------------------------------------------------------------------------

NUMBER = (int, float)
MEANS = dict(score=NUMBER, length=NUMBER, epistemic=NUMBER)
ANSWER = dict(index=int, correct=NUMBER, tokens=NUMBER, response=str)
TOKEN = dict(text=str, kl=NUMBER, count=NUMBER)
MARKERS = list(epistemic.MARKERS)

def check(record, fields, where):
    """The record, if it is an object with these fields; else an error that says where it is."""
    if not (isinstance(record, dict)
            and all(isinstance(record.get(name), kind) for name, kind in fields.items())):
        raise ValueError(f"{where}: not an object with {', '.join(fields) or 'named fields'}")
    return record

def parse(text, fields, where):
    try:
        record = json.loads(text, strict=False)  # a model's text may hold raw control characters
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: no whole JSON; was it cut off?") from None
    return check(record, fields, where)

def read_json(path):
    """The object in the file, an empty one if there is no such file."""
    return parse(path.read_bytes(), {}, path) if path.exists() else {}

def read_lines(path, fields={}, growing=False):
    """The objects of a JSON Lines file, none if there is no such file."""
    rows = path.read_bytes().splitlines(True) if path.exists() else []
    if growing and rows and not rows[-1].endswith(b"\n"):
        del rows[-1]  # half a row: the run goes on
    for number, text in enumerate(rows, 1):
        yield parse(text, fields, f"{path}, row {number}")

def read_answers(path, benchmark):
    """Those of a file; of one benchmark, if it is named."""
    return (row for row in read_lines(path, ANSWER) if benchmark in (None, row.get("benchmark")))

@functools.cache
def counted(path, benchmark):
    """A row an answer, without its text; and the uses an answer of each marker and, with a blank
    before it, of each word."""
    rows, uses = [], Counter()
    for row in read_answers(path, benchmark):
        text = row.pop("response")
        uses.update(epistemic.count_by_marker(text))
        uses.update(f" {word}" for word in re.findall("[a-z]+", text.lower()))
        rows.append(dict(row, score=row["correct"], length=row["tokens"],
                         epistemic=epistemic.count(text)))
    if not rows:
        raise ValueError(f"{path}: holds no answers to {benchmark}")
    return pandas.DataFrame(rows), pandas.Series(uses, dtype=float) / len(rows)

def question_error(row):
    """The standard error over questions: the answers to one question are no independent draws."""
    if row.quantity not in MEANS or not isinstance(row.answers, tuple):
        return row.error
    return counted(*row.answers)[0].groupby("index")[row.quantity].mean().sem()

def results(means, where, answers, **same):
    """Rows of the one table that all is drawn from, a quantity each."""
    check(means, MEANS, where)
    most = max(check(means.get("pass_at", {}), {}, where), key=int, default="1")
    best = {f"pass@{most}": means["pass_at"][most]} if most != "1" else {}
    answers = answers if answers[0].exists() else None
    return [dict(same, answers=answers, quantity=quantity, value=value)
            for quantity, value in ({q: means[q] for q in MEANS} | best).items()]

def read_folder(name, seed, path):
    """A folder's config and results. A result is of a kind: "run", a trainer's; "evaluation",
    evaluate.py's; "contexts", generate_conditions.py's. All runs of a model are one group, else
    each folder is one. `answers`: their file, and the benchmark if the file holds several.
    """
    config, file = read_json(path / "config.json"), path / "metrics.jsonl"
    model = config.get("model")  # evaluate.py's is a list, checkpoints among them
    model = min(model, key=lambda m: "/step_" in m) if isinstance(model, list) else model
    model = "/".join(PurePath(str(model)).parts[-2:])
    model += "" if config.get("enable_thinking", True) else ", thinking off"

    steps = pandas.DataFrame(check(row, MEANS | dict(step=int), f"{file}, row {number}")
                             for number, row in enumerate(read_lines(file, growing=True), 1)
                             if "score" in row)  # SFT has none
    five = [steps[[*MEANS]][max(i - 4, 0):i + 1] for i in range(len(steps))]  # one is too noisy
    rows = [dict(kind="run", group=model, arm=name, step=int(step), benchmark="training",
                 quantity=q, value=some[q].mean(), error=some[q].sem())
            for some, step in zip(five, steps.get("step", ())) for q in MEANS]
    for file in path.glob("eval/step_*.json"):
        step = int(file.stem[5:])
        for benchmark, means in read_json(file).items():
            rows += results(means, file, (file.with_suffix(".jsonl"), benchmark), kind="run",
                            group=model, arm=name if step else "base", step=step,
                            benchmark=benchmark)
    file = path / "summary.json"
    models = check(read_json(file).get("models", {}), {}, file)
    for evaluated, benchmarks in models.items():
        arm, _, step = evaluated.rpartition("/step_")
        arm = f"SFT on {arm}" if arm in ("d_ug", "d_sg") else arm or (
            evaluated if sum("/step_" not in model for model in models) > 1 else "base")
        for benchmark, means in check(benchmarks, {}, file).items():
            rows += results(means, file, (path / evaluated / f"{benchmark}.jsonl", None),
                            kind="evaluation", group=name, arm=arm, benchmark=benchmark,
                            step=int(step) if step.isdigit() else 0)
    for context, means in check(read_json(file).get("contexts", {}), {}, file).items():
        rows += results(means, file, (path / f"{context}.jsonl", None), kind="contexts",
                        group=name, arm=context, benchmark="", step=0)
    return SimpleNamespace(name=name, seed=seed, path=path, config=config,
                           rows=[dict(row, seed=seed, model=model) for row in rows])

def find(roots):
    """The folders below the roots that hold results; a folder seed_N is no part of a name."""
    found, top = {}, os.path.commonpath([root.absolute() for root in roots])
    for here, below, files in (i for r in roots for i in os.walk(r.absolute(), followlinks=True)):
        path, real = Path(here), Path(here).resolve()
        below[:] = [d for d in below if d not in ("checkpoints", "rollouts", "rounds")
                    and (real / d).resolve() not in (real, *real.parents)]  # a link to itself
        if {"summary.json", "metrics.jsonl", "token_kl.json"} & {*files}:
            seeds = [p for p in path.parts if re.fullmatch(r"seed_\d+", p)] or ["seed_0"]
            own = [p for p in path.parts if p not in seeds][-1]
            inner = "/".join(p for p in path.relative_to(top).parts if p not in seeds)
            found[inner or own, int(seeds[-1][5:]), path] = None
    return [read_folder(*key) for key in sorted(found)]

# --- choosing ------------------------------------------------------------------------------------

FIRST = dict(base=0, grpo=1, sdpo=2)  # in every table and figure
# flags that change nothing that is compared
UNCOMPARED = re.compile("run_dir|seed|commit|versions|world_size|resume|wandb|steps|.*_every|"
                        "eval_.*|tokens_per_.*|recompute_.*|offload_.*|gpu_memory_.*")

class Found:
    """What there is. `results`: a row a quantity; `end`: those of each arm's last step; `configs`
    of the training runs; `aside`: runs that have figures of their own."""
    def __init__(self, folders):
        self.folders = folders
        table = pandas.DataFrame([row for f in folders for row in f.rows], columns=[
            "kind", "model", "group", "arm", "seed", "step", "benchmark", "quantity", "value",
            "error", "answers"])
        place = table.arm.map(FIRST).fillna(len(FIRST))
        self.results = table.assign(place=place).sort_values("place", kind="stable")
        same = ["kind", "group", "arm", "seed", "benchmark", "quantity"]
        last = self.results.groupby(same).step.transform("max") == self.results.step
        self.end = self.results[last].drop_duplicates(same)  # several runs have one base
        self.end["error"] = [question_error(row) for row in self.end.itertuples()]

        self.configs = {f.name: f.config for f in folders if f.rows and f.rows[0]["kind"] == "run"}
        small = {arm for sizes in self.alike_but_for("num_questions") for arm in [*sizes][:-1]}
        plain = [arm for arm in sorted(self.configs, key=lambda arm: FIRST.get(arm, len(FIRST)))
                 if not {"remedy", "control"} & self.configs[arm].keys()]
        shown = plain if len(plain) <= 8 else [arm for arm in plain if arm not in small][:8]
        self.aside = self.configs.keys() - shown

    def alike_but_for(self, flag):
        """[{run: its value of the flag}] of runs that differ in this flag alone, smallest first."""
        groups = defaultdict(dict)
        for arm, config in self.configs.items():
            rest = {k: v for k, v in config.items() if k != flag and not UNCOMPARED.fullmatch(k)}
            groups[json.dumps(rest, sort_keys=True)][arm] = config.get(flag)
        return [dict(sorted(values.items(), key=lambda item: (item[1] is None, item[1] or 0)))
                for values in groups.values() if len({*values.values()}) > 1]

    def answered(self, *kinds):
        """The last results that have answers: a row an arm, seed and benchmark."""
        rows = self.end[self.end.kind.isin(kinds) & ~self.end.arm.isin(self.aside)]
        return rows[(rows.quantity == "score") & rows.answers.notna()]

# --- tables and pictures -------------------------------------------------------------------------

QUANTITIES = dict(score=("Score", "share right", ".3f"), length=("Length", "tokens", ",.0f"),
                  epistemic=("Words of doubt", "uses an answer", ".1f"))
PLACES = {"training": "in training", "in": "in domain", "ood": "out of distribution"}
# Okabe and Ito's, for the colour-blind, its yellow left out; the last two ours
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D00", "#7A5195", "#333333"]
pandas.set_option("display.max_colwidth", None)
pyplot.rcParams.update({
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "text.parse_math": False})

def spread(rows):
    """Means and standard errors: over the seeds; of one seed over its questions."""
    same = rows.groupby(["arm", "benchmark", "quantity"], sort=False)
    errors = same.value.sem().fillna(same.error.first())
    return pandas.DataFrame(dict(mean=same.value.mean(), error=errors, seeds=same.size()))

def in_text(quantity, mean, error):
    form = QUANTITIES.get(quantity, ["", "", ".3f"])[2]
    return f"{mean:{form}}" + (f" ± {error:{form}}" if error == error else "")  # nan: unknown

def grid(numbers):
    """A row an arm, a column a benchmark's quantity, training first."""
    rows = defaultdict(dict)
    for (arm, benchmark, quantity), mean, error, _ in numbers.itertuples():
        rows[arm][f"{benchmark} {quantity}".strip()] = in_text(quantity, mean, error)
    table = pandas.DataFrame.from_dict(rows, orient="index")
    return table[sorted(table, key=lambda name: "training" not in name)].fillna("")

class Page:
    """The HTML of the sections, and the files beside it."""
    def __init__(self):
        self.html, self.files, self.section = "", {}, ""

    def add_file(self, title, suffix, content):
        words = re.sub(r"\W+", "_", f"{self.section.split(':')[0]} {title}".lower()).strip("_")
        name = f"figures/{len(self.files) + 1:03d}_{words[:90]}.{suffix}"
        self.files[name] = content
        return name

    def table(self, title, table, numbers=None, style="wide"):
        """`numbers`: what its CSV holds, if that is not the table itself."""
        content = (table if numbers is None else numbers).to_csv().encode("utf-8", "replace")
        self.html += (f'<div class="{style}"><b>{html.escape(title)}</b> '
                      f'<a href="{self.add_file(title, "csv", content)}">CSV</a>'
                      f'{table.to_html(border=0)}</div>')

    def figure(self, title, group, draw, data, xlabel="uses an answer", ylabel=""):
        """A picture of its own, so that the page sets as many beside each other as have room."""
        figure, axis = pyplot.subplots(figsize=(4.8, 3.3), layout="constrained")
        draw(axis, data)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.set_title(f"{title}\n{group}", loc="left")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))  # where it covers nothing
        figure.savefig(image := io.BytesIO(), dpi=120)
        pyplot.close(figure)
        self.add_file(f"{title} {group}", "png", image.getvalue())
        self.html += (f'<img alt="{html.escape(f"{title}, {group}")}" src="data:image/png;base64,'
                      f'{base64.b64encode(image.getvalue()).decode()}">')

def lines(axis, series):
    """{name: y by x, a column a seed}. Their mean, and a band from the lowest to the highest."""
    for i, (name, seeds) in enumerate(series.items()):
        style = dict(color=COLORS[i % 8], marker="os"[i // 8 % 2] if len(seeds) < 12 else None)
        axis.plot(seeds.mean(axis=1), ms=3, label=name, **style)
        axis.fill_between(seeds.index, seeds.min(axis=1), seeds.max(axis=1), alpha=0.15,
                          color=style["color"])
    axis.set_ylim(0)
    axis.locator_params(axis="x", integer=True)
    if seeds.index.name == "size":
        sizes = sorted(set().union(*(seeds.index for seeds in series.values())))
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, sizes)

def bars(axis, series):
    """{name: uses of words, a column a seed}. Their mean, and a line from seed to seed."""
    means = pandas.DataFrame({name: seeds.mean(axis=1) for name, seeds in series.items()})
    most = means.abs().max(axis=1).sort_values()
    means = means.loc[most[most > 0].index]
    ends = [[mean - seeds.loc[mean.index].min(axis=1), seeds.loc[mean.index].max(axis=1) - mean]
            for (_, mean), seeds in zip(means.items(), series.values())]
    axis.figure.set_figheight(1.5 + 0.13 * len(means) * (len(series) + 1))
    means.plot.barh(ax=axis, width=0.8, color=COLORS, xerr=ends)

# --- the paper's figures and tables --------------------------------------------------------------

def tables(page, found, kind):
    for group, rows in found.end[found.end.kind == kind].groupby("group", sort=False):
        page.table(group, grid(spread(rows)), spread(rows))

def figures(page, rows, x="step", xlabel="step"):
    """One a benchmark and quantity: a line over x for each `label` of the rows."""
    for (group, benchmark, quantity), part in rows.groupby(
            ["group", "benchmark", "quantity"], sort=False):
        series = {label: own.pivot_table(index=x, columns="seed", values="value")
                  for label, own in part.groupby("label", sort=False)}
        series = {name: seeds for name, seeds in series.items() if x == "length" or len(seeds) > 1}
        name, unit, _ = QUANTITIES.get(quantity, (quantity, "share right", ""))
        if series:
            page.figure(f"{name} {PLACES.get(benchmark, f'on {benchmark}')}", group, lines, series,
                        xlabel, unit)

def over_steps(page, rows, labels):
    """Of {arm: its label}, from the base on."""
    parts = [rows[rows.arm.isin(["base", arm])].assign(label=label) for arm, label in labels.items()]
    figures(page, pandas.concat([rows[:0].assign(label=""), *parts]))

def all_over_steps(page, found, kind):
    rows = found.results[found.results.kind == kind]
    over_steps(page, rows, {a: a for a in rows.arm.unique() if a not in found.aside | {"base"}})

def compared(page, found, flag, *benchmarks):
    rows = found.results[found.results.kind == "run"]
    rows = rows[rows.benchmark.isin(benchmarks)] if benchmarks else rows
    for values in found.alike_but_for(flag):
        over_steps(page, rows, {arm: f"{value} ({arm})" for arm, value in values.items()})

def over_question_sets(page, found):
    ends = found.end[found.end.kind == "run"]
    parts = [ends[:0].assign(label="", size=0)]
    for sizes in found.alike_but_for("num_questions"):
        parts.append(ends[ends.arm.isin(sizes)].assign(
            label=f"{min(sizes, key=len)} and others", size=ends.arm.map(sizes)))
        parts += [ends[ends.arm == "base"].assign(label="base", size=n) for n in sizes.values()]
    figures(page, pandas.concat(parts), "size", "|D|, questions to train on")

def score_against_length(page, found):
    """A dot an arm; a line through the strengths of a remedy, NAME_STRENGTH."""
    remedies = {arm for arm, config in found.configs.items() if "remedy" in config}
    rows = found.end[(found.end.kind == "run") & (found.end.benchmark != "training")]
    rows = rows[rows.arm.isin(remedies | FIRST.keys())].pivot_table(
        index=["group", "benchmark", "place", "arm"], columns="quantity", values="value")
    rows = rows.reset_index()
    if remedies:
        figures(page, rows.assign(
            value=rows.score, quantity="score", seed=0,
            label=rows.arm.str.replace(r"_[\d.]+$", "", regex=True)), "length", "tokens")

def uses(rows):
    """Of markers and words, as `counted` names them: a row a group, benchmark, arm and seed."""
    keys = pandas.MultiIndex.from_frame(rows[["group", "benchmark", "arm", "seed"]])
    table = pandas.DataFrame([counted(*answers)[1] for answers in rows.answers])
    return table.set_axis(keys).fillna(0)

def changes(rows):
    """Of the uses of the base's words, in each arm against the base of its seed."""
    table = uses(rows)
    is_base = table.index.isin(["base"], level=2)
    base, arms = table[is_base].droplevel(2), table[~is_base]
    return (arms - base.reindex(arms.index.droplevel(2)).to_numpy()).dropna().loc[:, base.any()]

def word_bars(page, table):
    for (group, benchmark), part in table.filter(MARKERS).groupby(level=[0, 1], sort=False):
        page.figure(f"Words of doubt {PLACES.get(benchmark, benchmark)}", group, bars, {
            arm: own.droplevel([0, 1, 2]).T for arm, own in part.groupby(level=2, sort=False)})

def words_of_contexts(page, found):
    word_bars(page, uses(found.answered("contexts")))

def words_of_models(page, found):
    rows = found.answered("run", "evaluation")
    rows = rows[rows.arm == "base"]
    word_bars(page, uses(rows.assign(arm=rows.model, group="before training")))

def changed_words(page, found):
    word_bars(page, changes(found.answered("run", "evaluation")))

def words_by_question_set(page, found):
    ends = found.end[(found.end.quantity == "score") & found.end.answers.notna()]
    for sizes in found.alike_but_for("num_questions"):
        word_bars(page, changes(ends[ends.arm.isin(["base", *sizes]) & (ends.kind == "run")]))

def all_changed_words(page, found):
    """App. B.4."""
    sizes = changes(found.answered("run", "evaluation")).groupby(level=[0, 1, 2]).mean().abs()
    sizes = sizes.loc[:, sizes.columns.str.startswith(" ")]
    ten = sizes.columns.str.strip().isin(MARKERS)
    table = pandas.DataFrame({"the ten words": sizes.loc[:, ten].mean(axis=1),
                              "the base's other words": sizes.loc[:, ~ten].mean(axis=1)})
    if len(table):
        ratio = table["the ten words"] / table["the base's other words"]
        page.table("Mean size of a change, uses an answer", table.assign(ratio=ratio).round(2))

def judged(page, found):
    files = {f"{f.name} {path.relative_to(f.path)}, seed {f.seed}": path
             for f in found.folders for path in sorted(f.path.rglob("*.judged.jsonl"))}
    counts = {name: pandas.Series([r.get("count") for r in read_lines(path, growing=True)], dtype=float)
              for name, path in files.items()}
    if counts:
        page.table("Expressions of doubt", pandas.DataFrame(counts).describe().T.round(2))
        page.figure("Expressions of doubt", "", lambda axis, counts: pandas.DataFrame(
            counts).plot.box(ax=axis, vert=False), counts, "expressions an answer")

FREQUENT = 25  # ours: the paper does not say what is frequent; its rarest variant has 25

def token_kl(page, found):
    tokens = defaultdict(list)
    for f in found.folders:
        file = f.path / "token_kl.json"
        tokens[f.name] += [check(token, TOKEN, file) for token in read_json(file).values()]
    for name, rows in tokens.items():
        table = pandas.DataFrame(rows, columns=[*TOKEN]).groupby("text").sum()
        kl = table.kl / table["count"]
        mean = kl[table["count"] >= FREQUENT].mean()
        table = table.assign(**{"mean KL": kl, "ratio": kl / mean}).sort_values("ratio").round(3)
        if len(table):
            page.table(f"{name}: {mean:.3f} is the mean of tokens seen {FREQUENT} times", table[
                [text.strip(" :,.").lower() in MARKERS for text in table.index]][::-1])

def traces(page, found):
    """Beside each other, to a question, the first answers; first where not all agree."""
    asked = {}  # evaluate.py's answers hold their question
    for (group, benchmark), rows in found.answered("evaluation", "run", "contexts").groupby(
            ["group", "benchmark"], sort=False):
        first = pandas.DataFrame({r.arm: {a["index"]: a for a in reversed([*read_answers(*r.answers)])}
                                  for r in rows.drop_duplicates("arm")[:4].itertuples()}).dropna()
        differ = first.map(lambda answer: answer["correct"]).nunique(axis=1) > 1
        page.html += (f"<h3>{html.escape(f'{group} {benchmark}')}: {differ.sum()} of {len(differ)} "
                      "questions are answered right by one and wrong by another</h3>")
        for index in differ.sort_values(ascending=False, kind="stable").index[:6]:
            answers = first.loc[index]
            asked |= {(benchmark, index): a["question"] for a in answers if "question" in a}
            question = asked.get((benchmark, index), f"Question {index}")
            page.html += (
                f"<details open><summary>{html.escape(question)}</summary>The right answer is "
                f"{html.escape(str(answers.iloc[0].get('answer')))}.<div>" + "".join(
                    f"<div><b>{html.escape(arm)}: {'right' if a['correct'] else 'wrong'}</b>, "
                    f"{a['tokens']:,} tokens, {epistemic.count(a['response'])} words of doubt"
                    f"<pre>{highlighted(a['response'])}</pre></div>"
                    for arm, a in answers.items()) + "</div></details>")

def highlighted(text):
    """The markers as epistemic.py counts them: as substrings, in any case."""
    return re.sub("|".join(MARKERS), r"<mark>\g<0></mark>", html.escape(text), flags=re.I | re.A)

def settings(page, found):
    flags = pandas.DataFrame({arm: {flag: str(value) for flag, value in config.items()}
                              for arm, config in found.configs.items()}).fillna("")
    if len(flags):
        page.table("The runs' flags, those first that differ", flags.loc[
            sorted(flags.index, key=lambda flag: flags.loc[flag].nunique() == 1)])

# --- what the paper claims -----------------------------------------------------------------------

CLAIMS = (  # the claim; the paper's numbers; whose results; the order, >= for "not below"
    ("Takeaway 1, Table 1: the more the context tells, the fewer words of doubt",
     "182.5 > 159.8 > 24.1 > 8.8", "contexts", "", "epistemic",
     "unguided > without_think > regenerated > full"),
    ("Takeaway 1, Table 1: and the shorter the answer", "13,054 > 12,036 > 2,808 > 1,873",
     "contexts", "", "length", "unguided > without_think > regenerated > full"),
    ("Takeaway 2, Table 2: fine-tuning on sure right answers costs score, on doubtful ones not",
     "AIME24 51.0, 54.8 > 20.2", "evaluation", "OTHER", "score",
     "SFT on d_ug >= base > SFT on d_sg"),
    ("Takeaway 3, Figure 3: GRPO keeps the score on other questions; SDPO loses, most if its "
     "teacher is shown most", "AIME24 56.0, 54.7 > 40% less", "run", "OTHER", "score",
     "grpo >= base > sdpo_without_think > sdpo"),
    ("Takeaway 3, Table 5: GRPO keeps the words of doubt, SDPO does not",
     "24.4, 21.4 > 9.2, by a judge", "run", "OTHER", "epistemic", "grpo >= base > sdpo"),
    ("Takeaway 4, Figure 7: SDPO learns few questions as well", "|D| up to 128", "run",
     "training", "score", "sdpo FEW >= grpo FEW"),
    ("Takeaway 4, Figure 7: and in shorter answers", "up to 8 times", "run", "training", "length",
     "grpo FEW > sdpo FEW"),
    ("Takeaway 4, Figure 7: many it does not", "|D| = 512", "run", "training", "score",
     "grpo MANY > sdpo MANY"),
    ("Takeaway 4, Figure 8: on other questions GRPO gains with |D|; SDPO loses most with few",
     "a figure", "run", "OTHER", "score", "grpo MANY > grpo FEW >= sdpo MANY > sdpo FEW"))

def in_order(numbers, order, *column):
    """The arms' numbers with the signs that hold between them, and whether the order agrees."""
    arms, claimed = re.split(" >=? ", order), re.findall(" (>=?) ", order)
    keys = [(arm, *column) for arm in arms]
    if not {*keys} <= {*numbers.index}:
        return "", "not run"
    own, signs = numbers.loc[keys], []
    for i in range(len(claimed)):
        (before, noise), (after, more) = own[["mean", "error"]].fillna(0).iloc[i:i + 2].to_numpy()
        apart = (before - after) / (2 * math.hypot(noise, more) or 1e-9)
        signs.append(">" if apart > 1 else "<" if apart < -1 else "≈")
    text = " ".join(f"{arm} {in_text(column[1], *row[1:3])} {sign}" for arm, row, sign in zip(
        arms, own.itertuples(), [*signs, ""]))
    agrees = all(sign == ">" or sign + want == "≈>=" for sign, want in zip(signs, claimed))
    return text, "no" if "<" in signs else "yes" if agrees else "too close to tell"

def claims(found, model):
    rows, roles, table = found.end[found.end.model == model], {}, {}
    for sizes in found.alike_but_for("num_questions"):
        method = min(sizes, key=len).split("_")[0]
        roles[f"{method} FEW"] = min(sizes, key=lambda arm: abs((sizes[arm] or math.inf) - 8))
        roles[f"{method} MANY"] = [*sizes][-1]
    other = next((b for b in ("ood", "aime24") if b in {*rows.benchmark}), "")
    for claim, paper, kind, benchmark, quantity, order in CLAIMS:
        for role, arm in roles.items():
            order = order.replace(role, arm)
        text, agrees = in_order(spread(rows[rows.kind == kind]), order,
                                benchmark.replace("OTHER", other), quantity)
        table[claim] = {"the paper": paper, "here": text, "agrees": agrees}
    return pandas.DataFrame(table).T

# --- the page ------------------------------------------------------------------------------------

SECTIONS = (  # title, what to see, what draws it, and with what
    ("Where the runs ended", "Training: the mean of the last five steps.", tables, "run"),
    ("Settings", "From config.json.", settings),
    ("Tables 1, 7: five contexts", "The same questions, with more or less of their solution in the "
     "prompt. On the toy a regenerated solution tells as much as a full one.", tables, "contexts"),
    ("Figure 9: the words by context", "Each falls, the more the context tells.", words_of_contexts),
    ("Table 2: the last checkpoints", "As evaluate.py asks them.", tables, "evaluation"),
    ("Figures 1, 3-5, 15-18: the runs over the steps", "SDPO's answers get short and sure first, "
     "then wrong out of distribution. OPSD whose teacher alone thinks gains first in the paper; not "
     "on the toy, where a teacher that sees the solution doubts less than the student.",
     all_over_steps, "run"),
    ("Figures 3, 4, 14: what the teacher is shown", "The less, the less is lost.", compared,
     "demonstration"),
    ("Figure 6: a teacher that follows the student", "By its rate. In the paper SDPO falls further; "
     "on the toy it falls as far, since there is nothing left to lose.", compared, "ema"),
    ("Figure 7: training by |D|", "Few questions SDPO learns quickly, in short answers.", compared,
     "num_questions", "training"),
    ("Figure 8: evaluation by |D|", "GRPO gains with |D|; SDPO stays below the base.",
     over_question_sets),
    ("Figure 11: the words by |D|", "Change against the base: SDPO loses more with few questions.",
     words_by_question_set),
    ("Figure 20a: top-k of the loss", "In the paper no width prevents the fall.", compared, "top_k"),
    ("Figure 20b: the learning rate", "A lower rate delays the fall.", compared, "lr"),
    ("Remedies: score against length", "Wanted: top left. A line joins a remedy's strengths.",
     score_against_length),
    ("Figures 4, 6, 19: checkpoints", "acc@n and pass@n, as evaluate.py asks them.",
     all_over_steps, "evaluation"),
    ("Figure 10: the words of the bases", "Models doubt in words of their own.", words_of_models),
    ("Figures 3d, 4d, 16d: the words against the base", "GRPO keeps them, SDPO does not.",
     changed_words),
    ("Figure 12: all words against the base", "In the paper the ten change 30 to 40 times as much as "
     "others. On the toy they do not: its vocabulary has 400 tokens and its answers are little but "
     "checks, so that every word moves with them.", all_changed_words),
    ("Figure 13, Table 5: a judge's count", "Table 4's examples: judge.py.", judged),
    ("Table 6: where student and teacher part", "Before training, in the paper at the ten words 1.9 "
     "to 6.8 times as far as on average.", token_kl),
    ("Read the traces", "The ten words are marked.", traces))

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Self-distillation</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1500px; margin: auto; padding: 0 1em }
section, details div { display: grid; gap: 0 1em;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)) }
section > * { grid-column: 1 / -1; min-width: 0; margin: .3em 0 }
section > img { grid-column: auto; width: 100%; max-width: 576px }
details div div { display: block } summary, pre { white-space: pre-wrap; overflow-wrap: anywhere }
.wide { overflow-x: auto } mark { background: #ffd54d } table { border-collapse: collapse }
tr { border-bottom: 1px solid #ddd } td, th { padding: .1em .7em; text-align: left }
.wide td, .wide thead th { white-space: nowrap; text-align: right }
@media (max-width: 600px) { .claims tr > * { display: block } }
</style><h1>Self-distillation, measured</h1>
"""

def overview(pictures):
    """The first of them as one."""
    figure, axes = pyplot.subplots(3, 4, figsize=(19.2, 10), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture in zip(axes.flat, pictures):
        axis.imshow(pyplot.imread(io.BytesIO(picture)))
    figure.savefig(image := io.BytesIO(), dpi=90)
    return image.getvalue()

def write(out, files):
    """Replaces and removes what report.py wrote before, which it knows by its hash, and no more."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    own = {name for name, value in read_json(out / "figures/written.json").items()
           if (out / name).is_file()
           and hashlib.sha256((out / name).read_bytes()).hexdigest() == value}
    for name in files:
        if os.path.lexists(out / name) and name not in own:
            raise ValueError(f"{out / name}: not written by report.py, which leaves it as it is; "
                             "move it, or name another folder with --out")
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name in own:
        (out / name).unlink()
    for name, content in {"figures/written.json": json.dumps(hashes).encode(), **files}.items():
        aside = out / f"{name}.part"
        aside.write_bytes(content)
        aside.rename(out / name)

def report(folders, out):
    found, page = Found(find(folders)), Page()
    if not found.folders:
        raise ValueError(f"{folders[0]}: no metrics.jsonl and no summary.json with results below it")
    seeds = found.results.seed.nunique()
    print(f"{seeds} seeds, mean ± standard error" if seeds > 1 else "one seed")
    for (_, group), rows in found.end.groupby(["kind", "group"], sort=False):
        print(f"\n{group}\n{grid(spread(rows)).to_string()}")
    for model in found.end.model.unique():
        table = claims(found, model)
        page.table(f"The paper's claims, and {model}", table, style="claims")
        print("", *(f"{row.agrees:18} {row.Index}" for row in table.itertuples()), sep="\n")

    sections, contents, missing = "", [], []
    top, page.html = page.html, ""
    for page.section, caption, draw, *more in SECTIONS:
        page.html = ""
        draw(page, found, *more)
        if page.html:
            contents.append(f'<a href="#{len(contents)}">{page.section}</a>')
            sections += (f'<section id="{len(contents) - 1}"><h2>{page.section}</h2><p>{caption}</p>'
                         f"{page.html}</section>\n")
        else:
            missing.append(page.section)
    commits = {str(f.config.get("commit", "unknown"))[:7] for f in found.folders}
    text = (
        f"{PAGE}{top}<p>±: standard error, over seeds, else over questions, in training over five "
        f"steps; ≈: less than two of it apart; bands: from the lowest seed to the highest. Epistemic: {', '.join(MARKERS)}. "
        f"Drawn {datetime.date.today()}, commit of the runs: {', '.join(sorted(commits))}.</p>"
        f"<p>{' · '.join(contents)}</p>{sections}<p>Not in these folders: {'; '.join(missing)}.</p>")
    pictures = [content for name, content in page.files.items() if name.endswith("png")]
    write(out, page.files | {"report.html": text.encode("utf-8", "replace"),
                             "report.png": overview(pictures)})
    print(f"\n{len(pictures)} figures in {out}/report.html, an overview in {out}/report.png")

def main():
    parser = argparse.ArgumentParser(description="Every table and figure of finished runs.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or folders that hold them")
    parser.add_argument("--out", type=Path, help="where report.html, report.png and figures/ go")
    args = parser.parse_args()
    out = args.out or (args.folders[0] if len(args.folders) == 1 else args.folders[0].parent)
    try:
        report(args.folders, out)
    except (ValueError, OSError) as error:
        parser.error(error)

if __name__ == "__main__":
    main()
