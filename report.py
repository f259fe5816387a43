"""Every figure and table, from the files that the scripts write. Imports none of them.

    python report.py runs/demo                # what `make demo` left: conditions, sft, grpo, sdpo
    python report.py runs/study/seed_*        # `make study`; runs of one name are seeds of one arm
    python report.py runs                     # all there is below, also while a run goes on

Prints the main tables. Writes into --out (else the given folder, or the one above several)
report.html, which holds everything and needs no network, report.png, an overview, and figures/.
SECTIONS, at the end, lists every figure and table with the files that it is drawn from.
"""
import argparse
import base64
import functools
import html
import io
import json
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path, PurePath
from statistics import fmean, stdev
from types import SimpleNamespace

import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot

import epistemic

# --- reading -------------------------------------------------------------------------------------

FORMS = dict(score=".3f", length=",.0f", epistemic=".1f")
unread = {}  # {file: why a line of it was left out}

def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def read_lines(path):
    """The objects of a JSON Lines file, none if there is no such file. Another line is left out and
    named: the last one is half written while a run goes on."""
    text = path.read_bytes() if path and path.is_file() else b""
    for number, line in enumerate(text.splitlines(), 1):
        try:  # surrogatepass: half an emoji is what a token limit leaves
            yield dict(json.loads(line.decode("utf-8", "surrogatepass"), strict=False))
        except (ValueError, TypeError, RecursionError):
            unread[path] = f"line {number} is no JSON object"

class Point(SimpleNamespace):
    """One benchmark's {quantity: mean}, `values`, of an `arm` at a `step`; `path`: of its answers.

    kind and where: "run" and its model, or "evaluation" or "contexts" and its folder. A run's
    training is one of its benchmarks. What the others began with is the arm "base".
    """
    def answers(self):
        for r in read_lines(self.path):  # a run keeps all its benchmarks' in one file
            if "response" in r and (self.kind != "run" or r["benchmark"] == self.benchmark):
                yield r

    @functools.cached_property
    def digest(self):
        """(uses an answer of each marker, of each word, {question: [record without text]})."""
        markers, words, questions = Counter(), Counter(), defaultdict(list)
        for r in self.answers():
            text = r.pop("response")
            markers.update(epistemic.count_by_marker(text))
            words.update(re.findall("[a-z]+", text.lower()))
            questions[r["index"]].append(dict(r, score=r["correct"], length=r["tokens"]))
        n = sum(map(len, questions.values()))
        return [{w: c / n for w, c in uses.items()} for uses in (markers, words)] + [questions]

class Folder:
    """A folder with results, as points. Those of one name are the seeds of one arm."""
    def __init__(self, name, seed, path):
        self.name, self.seed, self.path, self.points = name, seed, path, []
        self.config, self.summary, self.errors, self.token_kl = (
            next(read_lines(path / f"{file}.json"), {})
            for file in ("config", "summary", "errors", "token_kl"))
        model = self.config.get("model")  # evaluate.py's is a list, checkpoints among them
        model = min(model, key=lambda m: "/step_" in m) if isinstance(model, list) else model
        self.model = "/".join(PurePath(str(model)).parts[-2:]) + (
            "" if self.config.get("enable_thinking", True) else ", thinking off")
        rows = [m for m in read_lines(path / "metrics.jsonl") if "score" in m]  # SFT has none
        for i in range(len(rows) + 1 if rows else 0):  # five steps together: one's few are noisy
            mean = {q: fmean(m[q] for m in rows[max(i - 5, 0):i] or rows[:1]) for q in FORMS}
            self.add("run", name if i else "base", i, "training", mean, None)
        for file in path.glob("eval/step_*.json"):
            for b, row in next(read_lines(file), {}).items():
                step = int(file.stem[5:])
                self.add("run", name if step else "base", step, b, row, file.with_suffix(".jsonl"))
        models = self.summary.get("models", {})
        alone = sum("/step_" not in model for model in models) == 1
        for model, benchmarks in models.items():
            arm, _, step = model.rpartition("/step_")
            arm = f"SFT on {arm}" if arm in ("d_ug", "d_sg") else arm
            for b, row in benchmarks.items():
                self.add("evaluation", arm or ("base" if alone else model), int(step) if arm else 0,
                         b, row, path / model / f"{b}.jsonl")
        for context, row in self.summary.get("contexts", {}).items():
            self.add("contexts", context, 0, "", row, path / f"{context}.jsonl")

    def add(self, kind, arm, step, benchmark, row, path):
        n = max(row.get("pass_at", "1"), key=int)
        best = {f"pass@{n}": row["pass_at"][n]} if n != "1" else {}
        self.points.append(Point(
            kind=kind, where=self.model if kind == "run" else self.name, model=self.model, arm=arm,
            step=step, seed=self.seed, benchmark=benchmark, path=path,
            values={q: row[q] for q in FORMS} | best))

def find(roots):
    """The folders with results below the roots; a folder seed_N is no part of a name."""
    found, top = {}, os.path.commonpath([root.absolute() for root in roots])
    for here, below, files in (i for r in roots for i in os.walk(r.absolute(), followlinks=True)):
        path, real = Path(here), Path(here).resolve()
        below[:] = [d for d in below if d not in ("checkpoints", "rollouts", "rounds")
                    and (real / d).resolve() not in (real, *real.parents)]  # a link to itself
        if {"summary.json", "metrics.jsonl"} & set(files):
            seeds = [p for p in path.parts if re.fullmatch(r"seed_\d+", p)] or ["seed_0"]
            own = [p for p in path.parts if p not in seeds][-1]
            inner = "/".join(p for p in path.relative_to(top).parts if p not in seeds)
            found[inner or own, int(seeds[-1][5:]), path] = None
    return [Folder(*key) for key in sorted(found)]

def last(found, *kinds):
    """{(where, benchmark): {arm: {seed: its last Point}}}, training and the base first."""
    tree = defaultdict(lambda: defaultdict(dict))
    for p in sorted((p for f in found for p in f.points if p.kind in kinds),
                    key=lambda p: (p.benchmark != "training", p.arm != "base")):
        seeds = tree[p.where, p.benchmark][p.arm]
        seeds[p.seed] = max(seeds.get(p.seed, p), p, key=lambda p: p.step)
    return tree

# --- tables --------------------------------------------------------------------------------------

def standard_error(values):
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None

def cell(values, form):
    """Mean ± standard error of [(value, its error)]: over the seeds if there are several."""
    means = [v for v, _ in values]
    error = standard_error(means) if len(means) > 1 else values[0][1] if values else None
    return (f"{fmean(means):{form}}" if means else "") + (f" ± {error:{form}}" if error is not None
                                                          else "")

def grid(title, rows):
    """Lines of cells, the header first, from {name: {seed: {column: (value, error)}}}."""
    columns = dict.fromkeys(c for seeds in rows.values() for row in seeds.values() for c in row)
    return [[title, *columns]] + [[name] + [
        cell([row[c] for row in seeds.values() if c in row], FORMS.get(c.split()[-1], ".3f"))
        for c in columns] for name, seeds in rows.items()]

def as_text(lines):
    widths = [max(map(len, column)) + 2 for column in zip(*lines)]
    return "\n".join(f"{name:{widths[0]}}" + "".join(
        f"{c:>{w}}" for c, w in zip(line, widths[1:])) for name, *line in lines) + "\n"

def as_html(lines):
    head, *body = [[html.escape(str(c)) for c in line] for line in lines]
    return f'<div class="wide"><table><tr><th>{"<th>".join(head)}</tr>' + "".join(
        f'<tr><th>{"<td>".join(line)}</tr>' for line in body) + "</table></div>"

def results(found, kind):
    """{where: {arm: {seed: {"benchmark quantity": (value, error over questions)}}}} at the end."""
    tree = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for (where, b), arms in last(found, kind).items():
        for p in (p for seeds in arms.values() for p in seeds.values()):
            for q, y in p.values.items():  # the answers to one question are no independent draws
                of = [fmean(r[q] for r in rs) for rs in p.digest[2].values() if q in FORMS]
                tree[where][p.arm][p.seed][f"{b} {q}".strip()] = y, standard_error(of)
    return tree

def tables(found, kind):
    return [as_html(grid(where, rows)) for where, rows in results(found, kind).items()]

# --- drawing -------------------------------------------------------------------------------------

# Okabe and Ito's, for the colour-blind, its yellow left out; the last two ours
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D00", "#7A5195", "#333333")
UNITS = dict(score="score (share right)", length="length (tokens)",
             epistemic="epistemic words an answer")
pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                        "axes.grid": True, "grid.alpha": 0.25, "axes.titlesize": 10})
pictures = {}  # {name: PNG} of what was drawn

def file_name(title):
    return re.sub(r"\W+", "_", title.lower()).strip("_")

def panel(title, draw, data, **labels):
    """A picture of its own, so that the page sets as many beside each other as it has room for."""
    figure, axis = pyplot.subplots(figsize=(4.8, 3.2), layout="constrained")
    axis.set(title=title, **labels)
    draw(axis, data)
    figure.savefig(file := io.BytesIO(), dpi=120)
    pyplot.close(figure)
    pictures[f"{len(pictures) + 1:03d}_{file_name(title)}"] = file.getvalue()
    return (f'<img alt="{html.escape(title)}" src="data:image/png;base64,'
            f'{base64.b64encode(file.getvalue()).decode()}">')

def lines(axis, series, sizes=()):
    """series: {name: one {x: y} a seed}. Their mean, and a band from the lowest to the highest."""
    ends, low = [], -0.15
    for color, (name, seeds) in zip(COLORS * 9, series.items()):
        at = {x: [s[x] for s in seeds if x in s] for x in sorted(set().union(*seeds))}
        mean = [fmean(ys) for ys in at.values()]
        axis.plot([*at], mean, color=color, lw=1.6, marker="o" if len(at) < 12 else "", ms=3)
        axis.fill_between([*at], [*map(min, at.values())], [*map(max, at.values())], color=color,
                          alpha=0.15, lw=0)
        ends.append((mean[-1], name, color))
    axis.set_ylim(0, None)
    axis.locator_params(axis="x", integer=True)
    if sizes:  # of question sets
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, sizes)
    # names moved apart where they would cover each other, and down where they would leave the panel
    ends = [(y / axis.get_ylim()[1], name, color) for y, name, color in sorted(ends)]
    for i, (y, name, color) in enumerate(ends):
        low = max(low + 0.065, min(y, 1 - 0.065 * (len(ends) - 1 - i)))
        axis.text(1.02, low, name, color=color, transform=axis.transAxes, va="center", size=8)

def bars(axis, series):
    """series: {arm: one {marker: value} a seed}: for a word a bar an arm, and a dot a seed."""
    most = {w: max(abs(s.get(w, 0)) for seeds in series.values() for s in seeds)
            for w in epistemic.MARKERS}
    words, n = sorted((w for w in most if most[w]), key=lambda w: -most[w]), len(series)
    for i, (color, (name, seeds)) in enumerate(zip(COLORS * 9, series.items())):
        for j, word in enumerate(words):
            values = [s.get(word, 0) for s in seeds]
            axis.barh(j + 0.8 * i / n, fmean(values), 0.8 / n, color=color)
            axis.plot(values, [j + 0.8 * i / n] * len(values), "k.", ms=3 * (len(values) > 1))
            if not j:
                axis.annotate(name, (max(0, *values, 0), 0.8 * i / n), (4, 0), size=8, color=color,
                              textcoords="offset points", va="center")
    axis.set_yticks([j + 0.4 - 0.4 / n for j in range(len(words))], words)
    axis.invert_yaxis()
    never = ", ".join(w for w in most if not most[w])
    axis.set_xlabel(axis.get_xlabel() + (f"\nnever said: {never}" if never else ""))
    axis.figure.set_figheight(1.2 + 0.15 * len(words) * (n + 1))

def shifts(axis, arms):
    """arms: {name: ({marker: shift}, {other word: shift}, ratio)}: a dot a word."""
    for i, (color, (name, (ours, others, ratio))) in enumerate(zip(COLORS * 9, arms.items())):
        for words, y, color in ((ours, i, color), (others, i + 0.35, "0.45")):
            axis.plot([*words.values()], [y] * len(words), "o", ms=4, color=color, alpha=0.6)
            for w in sorted(words, key=lambda w: abs(words[w]))[-1:]:
                axis.annotate(f"{w} {words[w]:+.1f}", (words[w], y), (0, 5), size=7, ha="center",
                              textcoords="offset points", color=color)
        axis.text(1.02, i + 0.17, f"{ratio:.1f} x", transform=axis.get_yaxis_transform())
    axis.set_yticks([i + 0.17 for i in range(len(arms))], arms)
    axis.set_ylim(len(arms) - 0.3, -0.5)
    axis.margins(x=0.15)
    axis.figure.set_figheight(1.2 + 0.6 * len(arms))

def plane(axis, arms):
    """arms: {name: one {quantity: mean} a seed}: a point an arm, a line through those of one name
    with several strengths, NAME_STRENGTH; GRPO and SDPO, the corners, and the base are black."""
    tracks = defaultdict(list)
    for name, seeds in arms.items():
        point = [fmean(s[q] for s in seeds) for q in ("length", "score")]
        tracks[re.sub(r"_[\d.]+$", "", name)].append((name, *point))
    colors = iter(COLORS * 9)
    for name, points in tracks.items():
        corner = name in ("base", "grpo", "sdpo")
        color = "k" if corner else next(colors)
        points.sort(key=lambda p: float(p[0].rpartition("_")[2]) if len(points) > 1 else 0)
        axis.plot(*zip(*(xy for _, *xy in points)), color=color, marker="so"[not corner], ms=4, lw=1)
        for i, (arm, *xy) in enumerate(points):
            label = arm if i == 0 else arm.rpartition("_")[2]
            axis.annotate(label, xy, (4, 4), color=color, size=8 - 2 * (i > 0),
                          textcoords="offset points", weight="bold" if corner else "normal")
    axis.margins(x=0.12)
    axis.set_ylim(0, 1)
    axis.figure.set_size_inches(7, 5)

# --- figures and tables: each gives pieces of HTML, none if there is nothing to draw --------------

def configs(found):
    """{model: {arm: config}} of the training runs."""
    tree = defaultdict(dict)
    for f in (f for f in found if any(p.kind == "run" for p in f.points)):
        tree[f.model][f.name] = f.config
    return tree

def curves(found, where, labels, title):
    """A panel a benchmark and quantity, over the steps, of the arms in {arm: its label}."""
    tree = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for p in (p for f in found for p in f.points if p.where == where):
        for q, y in p.values.items():
            tree[p.benchmark, q][p.arm][p.seed][p.step] = y
    for (b, q), arms in tree.items():
        base = arms["base"] if b != "training" else {}  # another |D|'s first step is another's
        series = {label: [base.get(seed, {}) | steps for seed, steps in arms[a].items()]
                  for a, label in labels.items() if a in arms}
        if series:
            yield panel(f"{title}: {b} {q}", lines, series, xlabel="step", ylabel=UNITS.get(q, q))

def alike(arms, key):
    """The groups of {arm: config} that differ in this flag alone, of those that matter."""
    groups, rest = defaultdict(dict), re.compile(
        f"{key}|run_dir|seed|commit|versions|world_size|resume|steps|.*_every|eval_.*|"
        "tokens_per_.*|recompute_.*|offload_.*|gpu_memory_.*")
    for arm, c in arms.items():
        groups[str({k: c[k] for k in sorted(c) if not rest.fullmatch(k)})][arm] = c
    def order(item):  # numbers before texts
        value = item[1].get(key)
        return (isinstance(value, str), value or 0)
    return [dict(sorted(g.items(), key=order)) for g in groups.values()
            if len({str(c.get(key)) for c in g.values()}) > 1]

def compared(found, key):
    def named(value):
        return f"{value:.2g}" if isinstance(value, float) else value
    return [image for model, arms in configs(found).items() for group in alike(arms, key) for image
            in curves(found, model, {a: f"{named(c.get(key))} ({a})" for a, c in group.items()}, key)]

def all_runs(found, *flags):
    """Eight arms a picture at most; of those that differ in |D| alone the one with the most."""
    for model, arms in configs(found).items():
        few = {a for group in alike(arms, "num_questions") for a in [*group][:-1]}
        shown = [a for a, c in arms.items() if a not in few and all(
            c.get(flag) == value for flag, value in flags)]
        for i in range(0, len(shown), 8):
            yield from curves(found, model, {a: a for a in shown[i:i + 8]}, model)

def checkpoints(found):
    for name in dict.fromkeys(f.name for f in found if "models" in f.summary):
        of = [p for f in found for p in f.points if p.kind == "evaluation" and p.where == name]
        steps = Counter(arm for arm, _ in dict.fromkeys((p.arm, p.step) for p in of))
        yield from curves(found, name, {a: a for a in steps if steps[a] > 1}, name)

def over_data(found, key, size, xlabel):
    """Where the runs ended that differ in their data alone, over its size."""
    for model, arms in configs(found).items():
        rows, series = results(found, "run")[model], defaultdict(lambda: defaultdict(dict))
        for group in alike(arms, key):
            for a, c in group.items():
                for seed, row in rows[a].items() if size(c) else ():
                    for column, (y, _) in row.items():
                        series[column][min(group, key=len), seed][size(c)] = y
        for column, of in series.items():
            sizes = sorted(set().union(*of.values()))
            if len(sizes) < 2:
                continue
            yield panel(f"{model}: {column} at the end", functools.partial(lines, sizes=sizes), {
                name: [s for (n, _), s in of.items() if n == name] for name, _ in of},
                xlabel=xlabel, ylabel=UNITS.get(column.split()[-1], column))

def score_against_length(found):
    remedies = {f.name for f in found if "remedy" in f.config}
    for (where, b), arms in last(found, "run").items() if remedies else ():
        if b != "training" and remedies & arms.keys():
            yield panel(f"{where}: {b}", plane, {
                a: [p.values for p in seeds.values()] for a, seeds in arms.items()
                if a in remedies | {"base", "grpo", "sdpo"}},
                xlabel=UNITS["length"], ylabel=UNITS["score"])

def families(config):
    return int((re.findall(r"families_(\d+)\.jsonl$", str(config.get("data"))) or [0])[0])

def base_words(found):
    models = defaultdict(dict)
    for (where, b), arms in last(found, "run", "evaluation").items():
        for arm, seeds in arms.items():  # an evaluation's, with more answers, instead of a run's
            if rows := [p.digest[0] for p in seeds.values() if not p.step and p.digest[0]]:
                models[b][[*seeds.values()][0].model if arm == "base" else arm] = rows
    return [panel(f"{b}, before training", bars, rows, xlabel="uses an answer")
            for b, rows in models.items() if len(rows) > 1]

def context_words(found):
    for (where, _), arms in last(found, "contexts").items():
        yield panel(where, bars, {a: [p.digest[0] for p in seeds.values()]
                                  for a, seeds in arms.items()}, xlabel="uses an answer")

def against_base(found, draw, measure, xlabel):
    """A panel a benchmark of measure([(base's digest, arm's digest) of each seed]) of each arm."""
    for (where, b), arms in last(found, "run", "evaluation").items():
        base, data = arms.pop("base", {}), {}
        for arm, seeds in arms.items():
            pairs = [(base[s].digest, p.digest) for s, p in seeds.items() if s in base]
            if pairs := [pair for pair in pairs if pair[0][0] and pair[1][0]]:
                data[arm] = measure(pairs)
        for i in range(0, len(data), 8):
            yield panel(f"{where}: {b}", draw, dict([*data.items()][i:i + 8]), xlabel=xlabel)

def marker_shifts(pairs):
    return [{w: new[0][w] - base[0][w] for w in base[0]} for base, new in pairs]

def word_shifts(pairs):
    """App. B.4: ({marker: shift}, {other word of the base's vocabulary: shift}, ratio of means)."""
    shift = {w: fmean(new[1].get(w, 0) - base[1].get(w, 0) for base, new in pairs)
             for w in set().union(*(base[1] for base, _ in pairs))}
    ours = {w: shift.pop(w) for w in epistemic.MARKERS if w in shift}
    a, b = (fmean(map(abs, words.values())) if words else 0 for words in (ours, shift))
    return ours, shift, a / b if b else float("nan")

def judged(found):
    rows, counts = [], {}
    for f, path in ((f, path) for f in found for path in sorted(f.path.rglob("*.judged.jsonl"))):
        answers = [r for r in read_lines(path) if isinstance(r.get("count"), int)]
        if n := [r["count"] for r in answers]:
            name = f"{f.name} {path.relative_to(f.path)}".removesuffix(".judged.jsonl")
            counts[f"{name} ({f.seed})"] = n
            said = Counter(str(e) for r in answers for e in r.get("expressions") or ())
            rows.append([name, f.seed, len(n), cell([(fmean(n), standard_error(n))], ".2f"),
                         "; ".join(e for e, _ in said.most_common(5))])
    if rows:
        yield as_html([["", "seed", "answers", "expressions an answer", "most frequent"], *rows])
        yield panel("Uncertainty expressions", lambda axis, counts: axis.boxplot(
            [*counts.values()], orientation="horizontal", tick_labels=[*counts]), counts)

FREQUENT = 25  # ours: the paper does not say what is frequent; its rarest variant has 25

def token_kl(found):
    with_kl = [f for f in found if f.token_kl]  # in training it is a mean over changing weights
    for f in [f for f in with_kl if f.config.get("lr") == 0] or with_kl:
        tokens = sorted((t["kl"] / t["count"], t["count"], t["text"]) for t in f.token_kl.values()
                        if t["count"])[::-1]
        mean = fmean(frequent) if (frequent := [k for k, n, _ in tokens if n >= FREQUENT]) else 0
        yield as_html([[f"{f.name}, seed {f.seed}", "variant", "mean KL", "count", "ratio"], *(
            [w, f"‘{text}’", f"{kl:.3f}", f"{n:,}", f"{kl / mean:.1f} x" if mean else "–"]
            for w in epistemic.MARKERS for kl, n, text in tokens
            if text in (w, f" {w}", w.title(), f" {w.title()}")), [
            "all", f"{len(frequent):,} tokens seen {FREQUENT} times", f"{mean:.3f}", "", "1.0 x"]])

def errors(found):
    for f in (f for f in found if f.errors):
        kinds = dict.fromkeys(kind for row in f.errors.values() for kind in row)
        yield as_html([[f"{f.name}, seed {f.seed}", *kinds], *(
            [name, *(row.get(kind, 0) for kind in kinds)] for name, row in f.errors.items())])

SHOWN, MODELS, LONGEST = 6, 4, 20_000  # questions a benchmark, answers beside each other, letters

def highlighted(text):
    """HTML of an answer, its markers marked as epistemic.py counts them: as substrings."""
    if len(text) > LONGEST:
        text = (f"{text[:LONGEST // 2]}\n\n[{len(text) - LONGEST:,} letters are left out here]\n\n"
                f"{text[-LONGEST // 2:]}")
    parts = re.split(f"({'|'.join(epistemic.MARKERS)})", text, flags=re.I | re.A)
    return "".join(f"<mark>{html.escape(part)}</mark>" if i % 2 else html.escape(part)
                   for i, part in enumerate(parts))

def traces(found):
    for (where, b), arms in last(found, "contexts", "run", "evaluation").items():
        ends = [p for seeds in arms.values() for p in [min(seeds.items())[1]] if p.digest[2]]
        score = [{i: fmean(r["score"] for r in rs) for i, rs in p.digest[2].items()}
                 for p in ends[:MODELS]]
        both = set(score[0]).intersection(*score) if len(score) > 1 else ()
        apart = {i: max(s[i] for s in score) - min(s[i] for s in score) for i in both}
        chosen = sorted(both, key=lambda i: (-apart[i], i))[:SHOWN]
        first = {i: {} for i in chosen}  # {question: {arm: its first answer}}
        for p in ends[:MODELS]:
            for r in p.answers():
                if r["index"] in first:
                    first[r["index"]].setdefault(p.arm, r)
        if first:
            yield (f"<h3>{html.escape(f'{where} {b}')}</h3><p>"
                   f"{len(first)} of {len(both)} questions; the {sum(map(bool, apart.values()))} "
                   f"on which the models differ come first. {len(score)} of {len(ends)} models, "
                   "the first answer of each.</p>")
        for i, answers in first.items():
            r = next(iter(answers.values()))
            asked = f"{r.get('question', f'Question {i}')} Right answer: {r.get('answer')}"
            yield f"<details><summary>{html.escape(asked)}</summary>" + "".join(
                f"<div><b>{html.escape(arm)}: {'right' if r['correct'] else 'wrong'}</b>, "
                f"{r['tokens']:,} tokens, {epistemic.count(r['response'])} epistemic words"
                f"<pre>{highlighted(r['response'])}</pre></div>" for arm, r in answers.items()
            ) + "</details>"

CONTEXTS, EVAL, DIFFER = "generate_conditions.py's", "evaluate.py's", "runs that differ alone in"
SECTIONS = (  # title, the files (in folders of a run, or a script's) that it is drawn from, by what
    ("Where the runs ended", "metrics.jsonl, eval/", tables, "run"),
    ("Tables 1 and 7: one question in five contexts", f"{CONTEXTS} summary", tables, "contexts"),
    ("Figure 9: the words by context", f"{CONTEXTS} answers", context_words),
    ("Table 2: the last checkpoints", f"{EVAL} summary.json", tables, "evaluation"),
    ("Figures 1, 3-5, 16-18: all runs over the steps", "metrics.jsonl, eval/", all_runs),
    ("Figures 3, 4, 14: what the teacher is shown", f"{DIFFER} demonstration", compared,
     "demonstration"),
    ("Figure 6: a teacher that follows the student", f"{DIFFER} ema", compared, "ema"),
    ("Figure 20a: top-k of the loss", f"{DIFFER} top_k", compared, "top_k"),
    ("Figure 20b: the learning rate", f"{DIFFER} lr", compared, "lr"),
    ("Figure 15: OPSD", 'runs with "context": "gold"', all_runs, ("context", "gold")),
    ("Figure 7: |D|, over the steps", f"{DIFFER} num_questions", compared, "num_questions"),
    ("Figure 8: over |D|", f"{DIFFER} num_questions", over_data, "num_questions",
     lambda config: config.get("num_questions"), "|D|, questions to train on"),
    ("Figure 8 over K task families", f"{DIFFER} data, families_K.jsonl", over_data, "data",
     families, "K, task families to train on"),
    ("Remedies: score against length", "remedies.py's runs", score_against_length),
    ("Figures 4, 6, 19: acc@n, pass@n", f"{EVAL} summary.json of several steps", checkpoints),
    ("Figure 10: the words of several models", "answers of two untrained models", base_words),
    ("Figures 3d, 4d, 11, 16d: the words against the base", "answers of the base and after it",
     against_base, bars, marker_shifts, "change, uses an answer"),
    ("Figure 12: every word against the base", "answers of the base and after it", against_base,
     shifts, word_shifts, "change, uses an answer; right: ratio of the mean sizes\n"
     "coloured: the ten markers; grey: all other words of the base"),
    ("Figure 13, Tables 4, 5: a judge's count", "*.judged.jsonl", judged),
    ("Table 6: KL of student and teacher by token", "token_kl.json", token_kl),
    ("Why answers are wrong", "errors.json", errors),
    ("Read the traces", "answers of two models to the same questions", traces))

# --- page ----------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Self-distillation</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1500px; margin: auto; padding: 0 1em }
section, details[open] { display: grid; gap: 0 1em;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)) }
section > *, summary { grid-column: 1 / -1; min-width: 0; margin: .3em 0 }
section > img { grid-column: auto; width: 100%; max-width: 576px }
.wide { overflow-x: auto } mark { background: #ffd54d }
table { border-collapse: collapse } tr { border-bottom: 1px solid #ddd }
td, th { padding: .1em .7em; text-align: right; white-space: nowrap }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff }
pre { white-space: pre-wrap; overflow-wrap: anywhere } @media print { img { break-inside: avoid } }
</style><h1>Self-distillation, measured</h1>
<p>± is a standard error: over the seeds where there are several, else over the questions. A band
goes from the lowest seed to the highest, a dot is a seed. Training is a mean of five steps.
Epistemic words: MARKERS.</p>
"""

def over_steps(found):
    """Figure 3 in numbers: GRPO beside SDPO at every step that was evaluated."""
    rows = defaultdict(lambda: defaultdict(dict))
    for f in (f for f in found if f.name.split("/")[-1] in ("grpo", "sdpo")):
        tested = {p.step: p.benchmark for p in f.points if p.path}
        for p in f.points:
            for q, y in p.values.items() if p.step in tested else ():
                if p.benchmark == "training" or (p.benchmark, q) == (tested[p.step], "score"):
                    name = q if p.benchmark == "training" else f"{p.benchmark} {q}"
                    rows[p.step][f.seed][f"{f.name} {name}"] = y, None
    return {str(step): rows[step] for step in sorted(rows)}

def overview(path):
    """The first pictures as one."""
    figure, axes = pyplot.subplots(3, 4, figsize=(19.2, 9.6), layout="constrained")
    for axis, png in zip(axes.flat, pictures.values()):
        axis.imshow(pyplot.imread(io.BytesIO(png)))
    for axis in axes.flat:
        axis.axis("off")
    figure.savefig(path, dpi=90)

def main():
    parser = argparse.ArgumentParser(description="Every table and figure of finished runs.")
    parser.error = fail
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or folders that hold them")
    parser.add_argument("--out", type=Path, help="where report.html, report.png and figures/ go")
    args = parser.parse_args()
    out = args.out or (args.folders[0] if len(args.folders) == 1 else args.folders[0].parent)
    found = find(args.folders)
    if not any(f.points for f in found):
        fail(f"{args.folders[0]}: no metrics.jsonl and no summary.json with results below it")
    seeds = len({f.seed for f in found})
    print(f"{seeds} seeds, mean ± standard error\n" if seeds > 1 else "one seed\n")
    for kind, title in dict(contexts="Table 1", evaluation="Table 2", run="after training").items():
        for rows in results(found, kind).values():
            print(as_text(grid(title, rows)))
    print(as_text(grid("step", over_steps(found))))
    page, notes = PAGE.replace("MARKERS", ", ".join(epistemic.MARKERS)), []
    for title, files, draw, *more in SECTIONS:
        before, pieces = len(pictures), "".join(draw(found, *more))
        for name in [*pictures][before:]:
            pictures[f"{name[:4]}{file_name(title.split(':')[0])}{name[3:]}"] = pictures.pop(name)
        if pieces:
            page += f"<section><h2>{title}</h2><p>From {files}.</p>{pieces}</section>\n"
        else:
            notes.append(f"{title}: left out, there is no {files}")
    notes += [f"{path}: {why}, left out" for path, why in unread.items()]
    page += "".join(f"<p>{html.escape(note)}</p>\n" for note in notes)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for old in (out / "figures").glob("[0-9][0-9][0-9]_*.png"):  # of a report made before
        old.unlink()
    for name, png in pictures.items():
        (out / f"figures/{name}.png").write_bytes(png)
    (out / "report.html").write_text(page, encoding="utf-8", errors="replace")
    overview(out / "report.png")
    print(f"{len(pictures)} figures in {out}/report.html, an overview in {out}/report.png")

if __name__ == "__main__":
    main()
