"""Every figure and table of the paper, from the files that the scripts leave. Imports none of them.

    python report.py runs/demo                # a run, or all that lies below, also while it goes on
    python report.py runs/study/seed_*        # runs of one name are the seeds of one arm

Prints the main tables. Writes report.html, which needs no network, report.png, an overview, and
figures/, each figure as PNG and each table as CSV. SECTIONS, near the end, lists them all.
"""
import argparse, base64, functools, html, io, json, os, re, zlib
from collections import Counter, defaultdict
from pathlib import Path, PurePath
import pandas
from matplotlib import pyplot
import epistemic

# --- reading -------------------------------------------------------------------------------------

NUMBER = (int, float)
MEANS = dict(score=NUMBER, length=NUMBER, epistemic=NUMBER)
ANSWER = dict(index=int, correct=NUMBER, tokens=NUMBER, response=str)
MARKERS = list(epistemic.MARKERS)

def check(record, fields, where):
    """The record, if it is an object with these fields; else an error that says where it is."""
    if not isinstance(record, dict) or not all(
            isinstance(record.get(field), kind) for field, kind in fields.items()):
        raise ValueError(f"{where}: no object with {', '.join(fields) or 'named fields'}")
    return record

def parse(text, where, fields={}):
    try:
        record = json.loads(text, strict=False)  # a model's text may hold raw control characters
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: no whole JSON; was it cut off?") from None
    return check(record, fields, where)

def read_json(path):
    return parse(path.read_bytes(), path) if path.exists() else {}

def read_lines(path, fields={}, growing=False):
    rows = path.read_bytes().splitlines(True) if path.exists() else []
    if growing and rows and not rows[-1].endswith(b"\n"):
        rows.pop()  # half a row: the run goes on
    return [parse(row, f"{path}, row {number}", fields) for number, row in enumerate(rows, 1)]

def read_answers(path, benchmark):
    return [row for row in read_lines(path, ANSWER) if benchmark in (None, row.get("benchmark"))]

@functools.cache
def counted(path, benchmark):
    """The answers without texts; uses an answer of each marker and, after a blank, each word."""
    rows, uses = read_answers(path, benchmark), Counter()
    for row in rows:
        text = row.pop("response")
        uses.update(epistemic.count_by_marker(text))
        uses.update(f" {word}" for word in re.findall("[a-z]+", text.lower()))
        row.update(score=row["correct"], length=row["tokens"], epistemic=epistemic.count(text))
    if not rows:
        raise ValueError(f"{path}: holds no answers to {benchmark}")
    return pandas.DataFrame(rows), pandas.Series(uses, dtype=float) / len(rows)

def results(table, where, answers, **same):
    """Of {benchmark: means}, rows of the one table that all is drawn from, a quantity each.
    answers(benchmark): their file, and the benchmark if the file holds several."""
    for benchmark, means in check(table, {}, where).items():
        n = max(check(means, MEANS, where).get("pass_at", "1"), key=int)
        best = {f"pass@{n}": means["pass_at"][n]} if n != "1" else {}
        at = answers(benchmark)
        same |= dict(benchmark=benchmark, answers=at if at[0].exists() else None)
        for quantity, value in ({q: means[q] for q in MEANS} | best).items():
            yield dict(same, quantity=quantity, value=value)

def read_folder(name, seed, path, config):
    """A folder's results. They are of a kind: "run", a trainer's; "evaluation", evaluate.py's;
    "contexts", generate_conditions.py's. All runs of a model are one group, else each folder is."""
    rows, file = [], path / "metrics.jsonl"
    model = config.get("model")  # evaluate.py's is a list, checkpoints among them
    model = min(model, key=lambda m: "/step_" in m) if isinstance(model, list) else model
    model = "/".join(PurePath(str(model)).parts[-2:])
    model += "" if config.get("enable_thinking", True) else ", thinking off"
    steps = [check(row, MEANS | dict(step=int), f"{file}, row {number}") for number, row in
             enumerate(read_lines(file, growing=True), 1) if "score" in row]  # SFT has none
    for i, row in enumerate(steps):
        five = pandas.DataFrame(steps[max(i - 4, 0):i + 1])  # one step is too noisy
        rows += [dict(kind="run", group=model, arm=name, step=row["step"], benchmark="training",
                      quantity=q, value=five[q].mean(), error=five[q].sem()) for q in MEANS]
    for file in path.glob("eval/step_*.json"):
        step = int(file.stem[5:])
        for arm in [name] if step else [name, "base"]:
            rows += results(read_json(file), file, lambda b: (file.with_suffix(".jsonl"), b),
                            kind="run", group=model, arm=arm, step=step)
    summary = read_json(file := path / "summary.json")
    models = check(summary.get("models", {}), {}, file)
    bases = [evaluated for evaluated in models if "/step_" not in evaluated]
    for evaluated, table in models.items():
        arm, _, step = evaluated.rpartition("/step_")
        arm = re.sub("^(d_ug|d_sg)$", r"SFT on \1", arm) or (
            "base" if bases == [evaluated] else evaluated)
        rows += results(table, file, lambda b: (path / evaluated / f"{b}.jsonl", None), arm=arm,
                        kind="evaluation", group=name, step=int(step) if step.isdigit() else 0)
    for context, means in check(summary.get("contexts", {}), {}, file).items():
        rows += results({"": means}, file, lambda _: (path / f"{context}.jsonl", None), arm=context,
                        kind="contexts", group=name, step=0)
    return [dict(row, seed=seed, model=model) for row in rows]

def find(roots):
    """{(name, seed, path): config} of all folders with results; seed_N is no part of a name."""
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
    return {key: read_json(key[2] / "config.json") for key in sorted(found)}

UNCOMPARED = re.compile("run_dir|seed|id|commit|versions|world_size|wandb|steps|.*_every|"
                        "files|eval_.*|tokens_per_.*|recompute_.*|gpu_memory_.*")

class Found:
    """`results`: a row a quantity; `end`: those of each arm's last step; `configs` of the training
    runs; `aside`: runs that have figures of their own."""
    def __init__(self, folders):
        self.folders = folders
        table = pandas.DataFrame(
            [row for key, config in folders.items() for row in read_folder(*key, config)],
            columns=["kind", "model", "group", "arm", "seed", "step", "benchmark", "quantity",
                     "value", "error", "answers"])
        self.results = table.sort_values("arm", kind="stable", key=lambda arms: arms.map(
            dict(base=0, grpo=1, sdpo=2)).fillna(3))  # these first, everywhere
        same = ["kind", "group", "arm", "seed", "benchmark", "quantity"]
        last = self.results.groupby(same).step.transform("max") == self.results.step
        self.end = self.results[last].drop_duplicates(same)  # several runs have one base
        # over the questions: the answers to one question are no independent draws
        self.end["error"] = [
            counted(*row.answers)[0].groupby("index")[row.quantity].mean().sem()
            if isinstance(row.answers, tuple) and row.quantity in MEANS else row.error
            for row in self.end.itertuples()]
        runs = {*table.arm[table.kind == "run"]}
        self.configs = {name: config for (name, *_), config in folders.items() if name in runs}
        # question sets and strengths, NAME_NUMBER, and controls leave the room to the others
        few = [arm for arm in self.configs if not re.search(r"_[\d.]+$|^control_", arm)][:8]
        self.aside = {*self.configs} - {*few} if len(self.configs) > 8 else set()

    def alike_but_for(self, flag):
        """[{run: its value of the flag}] of runs that differ in this flag alone, smallest first."""
        groups = defaultdict(dict)
        for arm, config in self.configs.items():
            rest = {k: v for k, v in config.items() if k != flag and not UNCOMPARED.fullmatch(k)}
            groups[json.dumps(rest, sort_keys=True)][arm] = config.get(flag)
        return [dict(sorted(values.items(), key=lambda item: (item[1] is None, item[1] or 0)))
                for values in groups.values() if len({*values.values()}) > 1]

    def answered(self, *kinds):
        rows = self.end[self.end.kind.isin(kinds) & (self.end.quantity == "score")]
        return rows[rows.answers.notna()]

# --- tables and pictures -------------------------------------------------------------------------

QUANTITIES = dict(score=("Score", "share right", ".3f"), length=("Length", "tokens", ",.0f"),
                  epistemic=("Words of doubt", "uses an answer", ".1f"))
PLACES = {"training": "in training", "in": "in domain", "coverage_test": "on fresh questions",
          "ood": "out of distribution"}
pandas.set_option("display.max_colwidth", None, "mode.string_storage", "python")  # half emojis
pyplot.switch_backend("Agg")
pyplot.style.use("tableau-colorblind10")
pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                        "grid.alpha": 0.25, "axes.titlelocation": "left", "axes.titlesize": 10,
                        "legend.frameon": False, "legend.fontsize": 8, "text.parse_math": False})

def spread(rows):
    """Means and standard errors: over the seeds; of one seed over its questions."""
    same = rows.groupby(["arm", "benchmark", "quantity"], sort=False)
    return pandas.DataFrame(dict(mean=same.value.mean(), seeds=same.size(),
                                 error=same.value.sem().fillna(same.error.first())))

def in_text(quantity, mean, error):
    form = QUANTITIES.get(quantity, ["", "", ".3f"])[2]
    return f"{mean:{form}}" + (f" ± {error:{form}}" if error == error else "")  # nan: unknown

def grid(numbers):
    """A row an arm, a column a benchmark's quantity, training first."""
    rows = defaultdict(dict)
    for (arm, benchmark, quantity), mean, _, error in numbers.itertuples():
        rows[arm][f"{benchmark} {quantity}".strip()] = in_text(quantity, mean, error)
    table = pandas.DataFrame.from_dict(rows, orient="index")
    return table[sorted(table, key=lambda name: "training" not in name)].fillna("")

class Page:
    def __init__(self):
        self.html, self.files, self.section = "", {}, ""

    def add(self, title, suffix, content):
        words = re.sub(r"\W+", "_", f"{self.section.split(':')[0]} {title}".lower()).strip("_")
        name = f"figures/{len(self.files) + 1:03d}_{words[:90]}.{suffix}"
        self.files[name] = content
        return name

    def table(self, title, table, numbers=None, style="wide"):
        """`numbers`: what its CSV holds, if that is not the table itself."""
        content = (table if numbers is None else numbers).to_csv().encode("utf-8", "replace")
        self.html += (f'<div class="{style}"><b>{html.escape(title)}</b> <a href="'
                      f'{self.add(title, "csv", content)}">CSV</a>{table.to_html(border=0)}</div>')

    def figure(self, title, draw, data, xlabel="uses an answer", ylabel=""):
        """A picture of its own, so that the page sets as many beside each other as have room."""
        figure, axis = pyplot.subplots(figsize=(4.8, 3.3), layout="constrained")
        draw(axis, data)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))  # where it covers nothing
        figure.savefig(image := io.BytesIO(), dpi=120)
        pyplot.close(figure)
        self.add(title, "png", image.getvalue())
        self.html += (f'<img alt="{html.escape(title)}" src="data:image/png;base64,'
                      f'{base64.b64encode(image.getvalue()).decode()}">')

def lines(axis, series):
    """{name: y by x, a column a seed}. Their mean, and a band from the lowest to the highest."""
    for i, (name, seeds) in enumerate(series.items()):
        marker = "os"[i // 10 % 2] if len(seeds) < 12 else None
        style = dict(ms=3) if len(seeds) > 1 else dict(ms=9, fillstyle="none")  # hides no other
        (line,) = axis.plot(seeds.mean(axis=1), marker=marker, label=name, **style)
        axis.fill_between(seeds.index, seeds.min(axis=1), seeds.max(axis=1), alpha=0.15,
                          color=line.get_color())
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axis.locator_params(axis="x", integer=True)
    if seeds.index.name == "size":
        axis.set_xscale("log", base=2)
        axis.set_xticks(seeds.index, seeds.index.astype(int), rotation=90)

def bars(axis, series):
    """{name: uses of words, a column a seed}. Their mean, for each word that is said."""
    means = pandas.DataFrame({name: seeds.mean(axis=1) for name, seeds in series.items()})
    most = means.abs().max(axis=1).sort_values()
    means = means.loc[most.index[(most > 0) | (most.max() == 0)]]
    axis.figure.set_figheight(1.5 + 0.13 * len(means) * (len(series) + 1))
    means.plot.barh(ax=axis, width=0.8)

# --- the paper's figures and tables --------------------------------------------------------------

def tables(page, found, kind):
    for group, rows in found.end[found.end.kind == kind].groupby("group", sort=False):
        page.table(group, grid(spread(rows)), spread(rows))

def figures(page, rows, x="step", xlabel="step"):
    """One a benchmark and quantity: a line over x for each `label` of the rows."""
    for (group, b, q), part in rows.groupby(["group", "benchmark", "quantity"], sort=False):
        series = {label: own.pivot_table(index=x, columns="seed", values="value")
                  for label, own in part.groupby("label", sort=False)}
        series = {name: seeds for name, seeds in series.items() if x != "step" or len(seeds) > 1}
        name, unit, _ = QUANTITIES.get(q, (q, "share right", ""))
        if series:
            page.figure(f"{name} {PLACES.get(b, f'on {b}')}\n{group}", lines, series, xlabel, unit)

def over_steps(page, found, flag=None, kind="run", benchmarks=()):
    """Of all runs, or of those that differ in one flag alone."""
    rows = found.results[found.results.kind == kind]
    rows = rows[rows.benchmark.isin(benchmarks)] if benchmarks else rows
    for arms in found.alike_but_for(flag) if flag else [{*rows.arm} - found.aside - {"base"}]:
        labels = {arm: f"{arms[arm]} ({arm})" if flag else arm for arm in arms}
        figures(page, rows.assign(label=rows.arm.map(labels)))

def over_sizes(page, found):
    ends = found.end[found.end.kind == "run"]
    for sizes in found.alike_but_for("num_questions"):
        base = [ends[ends.arm == "base"].assign(label="base", size=n) for n in sizes.values()]
        figures(page, pandas.concat([*base, ends[ends.arm.isin(sizes)].assign(
            label=min(sizes, key=len), size=ends.arm.map(sizes))]), "size", "|D|")

def score_against_length(page, found):
    """A dot an arm; a line through the strengths of a remedy, NAME_STRENGTH."""
    remedies = [arm for arm, config in found.configs.items() if "remedy" in config]
    rows = found.end[found.end.arm.isin([*remedies, "base", "grpo", "sdpo"] if remedies else [])]
    rows = rows[(rows.kind == "run") & (rows.benchmark != "training")].pivot_table(
        "value", ["group", "benchmark", "arm"], "quantity").reset_index()
    figures(page, rows.assign(
        seed=0, quantity="score", label=rows.arm.str.replace(r"_[\d.]+$", "", regex=True),
        value=rows.get("score")), "length", "tokens")

def uses(rows):
    """Of markers and words, as `counted` names them: a row a group, benchmark, arm and seed."""
    keys = pandas.MultiIndex.from_frame(rows[["group", "benchmark", "arm", "seed"]])
    return pandas.DataFrame([counted(*at)[1] for at in rows.answers]).set_axis(keys).fillna(0)

def changes(rows):
    """In each arm against the base of its seed; of the base's other words the mean size."""
    table = uses(rows)
    is_base = table.index.isin(["base"], level=2)
    base, arms = table[is_base].droplevel(2), table[~is_base]
    change = (arms - base.reindex(arms.index.droplevel(2)).to_numpy()).dropna().loc[:, base.any()]
    others = change.drop(columns=[f" {marker}" for marker in MARKERS], errors="ignore")
    return change.assign(other_words=others.filter(regex="^ ").abs().mean(axis=1))

def word_bars(page, table):
    for (group, benchmark), part in table.filter([*MARKERS, "other_words"]).groupby(
            level=[0, 1], sort=False):
        page.figure(f"Words of doubt {PLACES.get(benchmark, benchmark)}\n{group}", bars, {
            arm: own.droplevel([0, 1, 2]).T for arm, own in part.groupby(level=2, sort=False)})

def changed_words(page, found, flag=None):
    rows = found.answered("run") if flag else found.answered("run", "evaluation")
    for arms in found.alike_but_for(flag) if flag else [{*rows.arm} - found.aside]:
        word_bars(page, changes(rows[rows.arm.isin({"base", *arms})]))

def token_kl(page, found):
    for name, seed, path in found.folders:
        fields, file = dict(text=str, kl=NUMBER, count=NUMBER), path / "token_kl.json"
        rows = [check(token, fields, file) for token in read_json(file).values()]
        if rows:
            tokens = pandas.DataFrame(rows).set_index("text")
            kl = tokens.kl / tokens["count"]
            # ours: the paper does not say what is frequent; its rarest variant has 25
            mean = kl[tokens["count"] >= 25].mean()
            ten = tokens.index.str.strip(" :,.").str.lower().isin(MARKERS)
            tokens = tokens.assign(mean=kl, ratio=kl / mean)[ten].rename("‘{}’".format).round(3)
            page.table(f"{name} {seed}: {mean:.3f} on average", tokens.sort_values("ratio")[::-1])

def trace(arm, a):
    """The ten words are marked as epistemic.py counts them: as substrings, in any case."""
    text = re.sub(f"(?ia){'|'.join(MARKERS)}", r"<mark>\g<0></mark>", html.escape(a["response"]))
    text = text.replace("\n", "<br>")  # pandas would print a backslash and an n
    return (f"<b>{html.escape(arm)}: {'right' if a['correct'] else 'wrong'}</b>, {a['tokens']:,} "
            f"tokens, {epistemic.count(a['response'])} words of doubt<pre>{text}</pre>")

def traces(page, found):
    """Beside each other, to a question, the first answers; first where not all agree."""
    asked = {}  # evaluate.py's answers hold their question
    rows = pandas.concat(map(found.answered, ("evaluation", "run", "contexts")))
    rows = rows[~rows.arm.isin(found.aside)].drop_duplicates(["group", "benchmark", "arm"])
    for (group, benchmark), arms in rows.groupby(["group", "benchmark"], sort=False):
        first = pandas.DataFrame({r.arm: {a["index"]: a for a in read_answers(*r.answers)[::-1]}
                                  for r in arms[:4].itertuples()}).dropna()
        differ = first.map(lambda answer: answer["correct"]).nunique(axis=1) > 1
        chosen = first.loc[sorted(differ.index, key=lambda i: (not differ[i], i))[:6]]
        asked |= {(benchmark, a["index"], a["answer"]): " ".join(a["question"].split())
                  for a in chosen.stack() if {"question", "answer"} <= a.keys()}
        cells = chosen.apply(lambda answers: answers.map(functools.partial(trace, answers.name)))
        cells.index = [html.escape(f"{asked.get((benchmark, i, a), f'Question {i}')} Right: {a}")
                       for i, a in chosen.iloc[:, 0].map(lambda a: a.get("answer")).items()]
        page.html += (f"<b>{html.escape(f'{group} {benchmark}')}: not all agree on {differ.sum()} "
                      f"of {len(differ)} questions</b><div class=traces>"
                      f"{cells.to_html(escape=False, header=False, border=0)}</div>")

def settings(page, found):
    flags = pandas.DataFrame(found.configs).T.fillna("").astype(str)
    if len(flags):  # those first in which runs differ
        page.table("The runs' flags", flags[sorted(flags, key=lambda f: flags[f].nunique() == 1)])

CLAIMS = (  # the claim; the paper's numbers; what is compared; the order, with >= for "not below"
    ("Takeaway 1, Table 1: the more the context tells, the fewer words of doubt", "182.5 > 159.8 > "
     "24.1 > 8.8", "contexts", "", "epistemic", "unguided > without_think > regenerated > full"),
    ("Takeaway 2, Table 2: right answers without doubt teach to be wrong, doubtful ones not",
     "51.0, 54.8 > 20.2", "evaluation", "OTHER", "score", "SFT on d_ug >= base > SFT on d_sg"),
    ("Takeaway 3, Section 5: GRPO keeps the score on other questions, SDPO does not",
     "56.0, 54.7 > 40% less", "run", "OTHER", "score", "grpo >= base > sdpo"),
    ("Takeaway 3, Table 5: GRPO keeps the words of doubt, SDPO does not", "24.4, 21.4 > 9.2",
     "run", "OTHER", "epistemic", "grpo >= base > sdpo"),
    ("Takeaway 4, Figure 7: few questions SDPO learns as well", "|D| up to 128", "run", "training",
     "score", "sdpo FEW >= grpo FEW"),
    ("Takeaway 4, Figure 7: many it learns less well", "|D| = 512", "run", "training", "score",
     "grpo MANY > sdpo MANY"),
    ("Takeaway 4, Figure 8: on other questions it loses most with few", "a figure", "run", "OTHER",
     "score", "grpo MANY > grpo FEW > sdpo MANY > sdpo FEW"))

def claims(found, model):
    """The numbers here with the signs that hold between them, and whether they agree."""
    rows, names, table = found.end[found.end.model == model], {}, {}
    names["OTHER"] = next((b for b in ("ood", "aime24") if b in {*rows.benchmark}), "")
    for sizes in found.alike_but_for("num_questions"):
        method = re.sub(r"_\d+$", "", min(sizes, key=len))
        names[f"{method} FEW"] = min(sizes, key=lambda arm: abs((sizes[arm] or 10**9) - 8))
        names[f"{method} MANY"] = [*sizes][-1]
    for claim, paper, kind, benchmark, quantity, order in CLAIMS:
        claimed = re.findall(" (>=?) ", order)
        keys = [(names.get(arm, arm.split(" M")[0]), names.get(benchmark, benchmark), quantity)
                for arm in re.split(" >=? ", order)]
        own = spread(rows[rows.kind == kind]).reindex(keys)
        apart = -own["mean"].diff()[1:]
        noise = 2 * (own.error.fillna(0) ** 2).rolling(2).sum()[1:] ** 0.5
        signs = [">" if a > n else "<" if a < -n else "≈" for a, n in zip(apart, noise)]
        agrees = all(sign == ">" or sign + want == "≈>=" for sign, want in zip(signs, claimed))
        here = " ".join(f"{key[0]} {in_text(quantity, mean, error)} {sign}" for key, mean, error,
                        sign in zip(keys, own["mean"], own.error, [*signs, ""]))
        verdict = "no" if "<" in signs else "yes" if agrees else "too close to tell"
        ran = own["mean"].notna().all()
        table[claim] = {"the paper; scores of AIME24": paper, "here": here if ran else "",
                        "agrees": verdict if ran else "not run"}
    return pandas.DataFrame(table).T

# --- the page ------------------------------------------------------------------------------------

SECTIONS = (  # title, what to see, what draws it, and with what
    ("Where the runs ended", "Training: the mean of the last five steps.", tables, "run"),
    ("Settings", "From config.json, those first that differ.", settings),
    ("Tables 1, 7: five contexts", "The same questions, with more or less of their solution in the "
     "prompt. The toy takes a regenerated solution for a full one.", tables, "contexts"),
    ("Figure 9: the words by context", "Each is said less, the more the context tells.",
     lambda page, found: word_bars(page, uses(found.answered("contexts")))),
    ("Table 2: the last checkpoints", "As evaluate.py asks them.", tables, "evaluation"),
    ("Figures 1, 3-5, 15-18: over the steps", "SDPO gets short, sure, and on other questions "
     "wrong. OPSD's hybrid gains first in the paper; not on the toy: its teacher doubts least.",
     over_steps),
    ("Figures 3, 4, 14: demonstration", "Shown less, it loses less.", over_steps, "demonstration"),
    ("Figure 6: a teacher that follows", "By its rate. In the paper SDPO falls further; the toy, "
     "which has nothing left to lose, does not.", over_steps, "ema"),
    ("Figure 7: training by |D|", "SDPO learns few questions quickly, in short answers; many not.",
     over_steps, "num_questions", "run", ["training"]),
    ("Figure 8: evaluation by |D|", "GRPO gains with |D|, SDPO stays below the base.", over_sizes),
    ("Figure 11: words by |D|", "SDPO loses most with few.", changed_words, "num_questions"),
    ("Figure 20a: top-k of the loss", "No width prevents the fall.", over_steps, "top_k"),
    ("Figure 20b: the learning rate", "A lower one delays the fall.", over_steps, "lr"),
    ("Remedies", "Wanted: top left. A line joins a remedy's strengths.", score_against_length),
    ("Figures 4, 6, 19: checkpoints", "acc@n, pass@n; evaluate.py", over_steps, "", "evaluation"),
    ("Figures 3d, 4d, 12, 16d: the words against the base", "Last, the mean size of the change of "
     "all other words. In the paper the ten change 30 to 40 times as much; not on the toy: it has "
     "400 tokens and says little but checks, so that all its words change.", changed_words),
    ("Table 6: student against teacher", "In the paper 1.9 to 6.8 times the mean.", token_kl),
    ("Read the traces", "The ten words are marked.", traces))

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Self-distillation</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1500px; margin: auto; padding: 0 1em }
section { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)) }
section > * { grid-column: 1 / -1; min-width: 0; margin: .3em 0 } .wide { overflow-x: auto }
section > img { grid-column: auto; width: 100%; max-width: 576px } mark { background: #ffd54d }
table { border-collapse: collapse } tr { border-bottom: 1px solid #ddd; vertical-align: top }
td, th { padding: .1em .7em; text-align: left } pre { white-space: pre-wrap }
.wide td, .wide thead th { white-space: nowrap; text-align: right } .traces td { min-width: 17em }
@media (max-width: 600px) { .claims thead { display: none }
  .claims tr > *, .traces tr > * { display: block } } </style><h1>Self-distillation, measured</h1>"""

def write(out, files):
    """Replaces and removes what report.py wrote before and nobody changed since, and no more."""
    own = [out / name for name, checksum in read_json(out / "figures/written.json").items()
           if (out / name).is_file() and zlib.crc32((out / name).read_bytes()) == checksum]
    for path in (out / name for name in files):
        if os.path.lexists(path) and path not in own:
            raise ValueError(f"{path} is not report.py's own, and stays: move it, or give --out")
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for path in own:
        path.unlink()
    written = json.dumps({name: zlib.crc32(content) for name, content in files.items()})
    for name, content in ({"figures/written.json": written.encode()} | files).items():
        aside = out / f"{name}.part"
        aside.write_bytes(content)
        aside.rename(out / name)

def report(folders, out):
    found, page, sections = Found(find(folders)), Page(), {}
    if not found.folders:
        raise ValueError(f"{folders[0]}: no metrics.jsonl and no summary.json below it")
    seeds = found.results.seed.nunique()
    print(f"{seeds} seeds, mean ± standard error" if seeds > 1 else "one seed")
    for (_, group), rows in found.end.groupby(["kind", "group"]):
        print(f"\n{group}\n{grid(spread(rows)).to_string()}")
    for model in found.end.model.unique():
        table = claims(found, model)
        page.table(f"The paper's claims, and {model}", table, style="claims")
        print("", *(f"{r.agrees:18} {r.Index}" for r in table.itertuples() if r.here), sep="\n")
    top = page.html
    for page.section, caption, draw, *more in SECTIONS:
        page.html = ""
        draw(page, found, *more)
        if page.html:
            sections[page.section] = f"<h2>{page.section}</h2><p>{caption}</p>{page.html}"
    commits = {str(config.get("commit", "unknown"))[:7] for config in found.configs.values()}
    links = " · ".join(f'<a href="#{i}">{title}</a>' for i, title in enumerate(sections))
    text = (f"{PAGE}{top}<p>±: standard error, over seeds, else over questions, in training over "
            "steps; ≈: less than two of it apart; band: from the lowest seed to the highest; words "
            f"of doubt, or epistemic: {', '.join(MARKERS)}. {pandas.Timestamp.now():%Y-%m-%d}, "
            f"runs of commit {', '.join(sorted(commits))}.</p><p>{links}</p>"
            + "".join(f'<section id="{i}">{s}</section>\n' for i, s in enumerate(sections.values()))
            + "<p>Other sections have nothing to draw in these folders.</p>")
    pictures = [content for name, content in page.files.items() if name.endswith("png")]
    figure = pyplot.figure(figsize=(19.2, 10), layout="constrained")
    for i, picture in enumerate(pictures[:12], 1):
        figure.add_subplot(3, 4, i).imshow(pyplot.imread(io.BytesIO(picture)))
        pyplot.axis("off")
    figure.savefig(overview := io.BytesIO(), dpi=90)
    write(out, page.files | {"report.html": text.encode("utf-8", "replace"),
                             "report.png": overview.getvalue()})
    print(f"\n{len(pictures)} figures in {out}/report.html, an overview in {out}/report.png")

def main():
    parser = argparse.ArgumentParser(description="Every table and figure of finished runs.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or folders that hold them")
    parser.add_argument("--out", type=Path, help="where report.html, report.png and figures/ go")
    args = parser.parse_args()
    try:
        first, *others = args.folders
        report(args.folders, args.out or (first.parent if others else first))
    except (ValueError, OSError) as error:
        parser.error(error)

if __name__ == "__main__":
    main()
