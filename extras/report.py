"""The paper's figures and tables of your runs: FOLDER/report.html, FOLDER/figures, FOLDER/demo.png.

    python -m extras.report runs            # every run below this folder, finished or not

A run is what its config.json says, never what its folder is called. After the reading comes a
function for each figure or table, in the paper's order. Its docstring is its title and its sentence
on the page; of the runs it makes {caption: figure, table or HTML}.
"""
import argparse, functools, html, json, math, re, statistics, textwrap
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

import epistemic

QUANTITIES = {"score": ("score", "correct", 3), "length": ("tokens an answer", "tokens", 0),
              "epistemic": ("markers an answer", "epistemic", 1)}  # name, in an answer, digits
CONTEXTS = ["unguided", "without_think", "regenerated", "full", "uncertain"]
DOMAINS = {"narrow": "Narrow domain: one manner\nof answering serves all",
           "chem": "Narrow domain: chemistry",
           "habits": "Eight manners of answering,\none for each kind of question",
           "": "Diverse domain: each question\nneeds its own search"}  # by how the data's name begins
USUAL = {"demonstration": "full", "ema": 0.0, "top_k": 100, "control": None}  # as in sdpo.py
NO_PART = """model enable_thinking script remedy run_dir out seed id commit versions world_size
    wandb steps save_every files eval_data tokens_per_micro_batch recompute_layers adamw_device
    gpu_memory_utilization""".split()  # flags that do not tell two runs of a setting apart

# --- reading -------------------------------------------------------------------------------------

def read(path, use=dict):
    """[use(object)] of a .json file, or of each row of a .jsonl file; [] if it does not exist."""
    text, found = path.read_bytes() if path.exists() else b"", []
    *rows, last = text.split(b"\n") if path.suffix == ".jsonl" or not text else [text, b""]
    if last and path.name != "metrics.jsonl":  # there a row is still being written
        rows.append(last)
    for number, row in enumerate(rows, 1):
        try:
            found.append(use(json.loads(row, strict=False)))  # a text may hold control characters
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, row {number}: {error!r}") from None
    return found

def numbers(means):
    return {quantity: means[quantity] + 0.0 for quantity in QUANTITIES}

@functools.lru_cache(maxsize=8)
def read_answers(path, benchmark):
    needed = "index", "response", "correct", "tokens", "epistemic"
    rows = read(path, lambda row: row | {name: row[name] for name in needed})
    return [row for row in rows if row.get("benchmark", benchmark) == benchmark]

@dataclass(eq=False)
class Run:
    """What a config.json describes, with all its seeds."""
    method: str  # GRPO, SDPO, OPSD, "SFT on d_ug", a remedy, a context, or Base: before training
    setting: str  # the model, and what it was trained on
    flags: dict  # those that tell runs apart
    results: dict = field(default_factory=dict)  # {(benchmark, step): {seed: {quantity: mean}}}
    label: str = ""  # the method, and the flags that are not as usual: differs
    differs: list = field(default_factory=list)

    def steps(self, benchmark):
        """Those that all seeds have."""
        seeds = max(map(len, self.results.values()))
        return sorted(step for (name, step), means in self.results.items()
                      if name == benchmark and len(means) == seeds)

    def means(self, benchmark, step=None):
        """Of each seed, at a step or at the last."""
        step = self.steps(benchmark)[-1] if step is None else step
        return [*self.results[benchmark, step].values()]

    def answers(self, benchmark, step=None):
        """Of all seeds, one after the other; [] if they were not kept."""
        files = [means["file"] for means in self.means(benchmark, step) if "file" in means]
        return [row for path, name in files for row in read_answers(path, name)]

    @functools.cache
    def value(self, quantity, benchmark, step=None):
        """(mean, its largest standard error, over what), for which see the page's head."""
        means, by_question = self.means(benchmark, step), {}
        for answer in self.answers(benchmark, step):  # those to one question are not independent
            by_question.setdefault(answer["index"], []).append(answer[QUANTITIES[quantity][1]])
        errors = [(standard_error([m[quantity] for m in means]), "s"),
                  (standard_error([*map(statistics.fmean, by_question.values())]), "q"),
                  *((m["errors"][quantity], "t") for m in means if "errors" in m)]
        return statistics.fmean(m[quantity] for m in means), *max(errors)

    def text(self, quantity, benchmark, step=None):
        (mean, error, over), form = self.value(quantity, benchmark, step), QUANTITIES[quantity][2]
        return f"{mean:,.{form}f}" + (f" ± {error:,.{form}f} {over}" if error >= 0 else "")

def standard_error(values):
    """Minus infinity of less than two: it is not known."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else -math.inf

def describe(config):
    """(method, model, flags, seed); of evaluate.py's models the first that is no checkpoint."""
    model, data = config["model"], Path(str(config.get("data"))).stem
    model = model if isinstance(model, str) else min(model, key=lambda m: "/checkpoints/" in m)
    model = "/".join(Path(model).parts[-2:]) + ", thinking off" * (not config["enable_thinking"])
    script = Path(config.get("script", "")).stem
    method = {"sft_distill": f"SFT on {data}", "controls": "SDPO"}.get(script, script.upper())
    flags = {flag: value for flag, value in config.items() if flag not in NO_PART}
    flags = {"control": None} | flags | {"data": data}
    return config.get("remedy", method), model, flags, config["seed"]

def training_results(path):
    """(benchmark, step, means) each; "training": of five steps, since one is too noisy."""
    rows = read(path / "metrics.jsonl", lambda row: "score" in row and (row["step"], numbers(row)))
    rows = [row for row in rows if row]  # SFT has no score
    for i, (step, _) in enumerate(rows):
        five = {q: [row[q] for _, row in rows[max(i - 4, 0):i + 1]] for q in QUANTITIES}
        errors = {q: standard_error(values) for q, values in five.items()}
        yield "training", step, {q: statistics.fmean(five[q]) for q in five} | {"errors": errors}
    for file in path.glob("eval/step_*.json"):
        (table,) = read(file, lambda found: {b: numbers(means) for b, means in found.items()})
        for benchmark, means in table.items():
            means["file"] = file.with_suffix(".jsonl"), benchmark
            yield benchmark, int(file.stem[5:]), means

def tables(summary):
    """{model or context: {benchmark: means}}; the benchmark of a context is ""."""
    found = summary.get("models") or {c: {"": m} for c, m in summary["contexts"].items()}
    return {name: {b: numbers(m) for b, m in table.items()} for name, table in found.items()}

def evaluated(file, method):
    """(method, flags, step) of one of evaluate.py's results, if of a checkpoint by its run."""
    for result in read(file):
        run, _, step = result["model"].partition("/checkpoints/step_")
        for method, _, flags, _ in read(Path(run, "config.json"), describe) if step else []:
            return method, flags, int(step)
    return method, {}, 0

def load_runs(folder):
    """Every run below the folder, GRPO and SDPO first. ValueError names a broken file and row."""
    runs = {}

    def add(seed, benchmark, step, means, *who):
        run = runs.setdefault(json.dumps(who, sort_keys=True), Run(*who))
        run.results.setdefault((benchmark, step), {}).setdefault(seed, means)

    for file in sorted(Path(folder).rglob("config.json")):
        path, summary = file.parent, read(file.parent / "summary.json", tables)
        if "checkpoints" in file.parts or not (summary or (path / "metrics.jsonl").exists()):
            continue
        ((method, model, flags, seed),) = read(file, describe)
        for benchmark, step, means in training_results(path):
            setting = f"{model}, trained on {flags['data']}"
            add(seed, benchmark, step, means, method, setting, flags)
            if step == 0:
                add(seed, benchmark, step, means, "Base", setting, {})
        for name, benchmark in [(n, b) for found in summary for n in found for b in found[n]]:
            file, means = path / name / benchmark, summary[0][name][benchmark]
            means["file"] = Path(f"{file}.jsonl"), file.name
            who = name if benchmark == "" or "step_" in name else "Base"
            who, own, step = evaluated(Path(f"{file}.json"), who)
            add(seed, benchmark, step, means, who, model, own)
    return name_runs([*runs.values()])

def name_runs(runs):
    """Sorts them and sets `differs` and `label`: the method, and what differs from the main run."""
    words = {"num_questions": "{} questions", "ema": "EMA teacher {}", "strength": "{}"}
    for run in runs:
        alike = [r.flags for r in runs if (r.method, r.setting) == (run.method, run.setting)]
        main = max(alike, key=lambda flags: (  # most runs differ from it in one flag only
            sum(sum(flags[f] != other.get(f) for f in flags) < 2 for other in alike),
            flags.get("num_questions") or math.inf, -flags.get("lr", 0)))
        run.differs = [f for f, value in run.flags.items() if value != USUAL.get(f, main.get(f))]
        run.label = ", ".join([run.method, *(words.get(f, f + " {}").format(run.flags[f])
                                             for f in run.differs)]).replace("_", " ")
    order = ["Base", "GRPO", "SDPO", *CONTEXTS, *sorted(run.method for run in runs)]
    return sorted(runs, key=lambda run: (order.index(run.method), len(run.differs), run.label))

# --- which runs stand beside each other ----------------------------------------------------------

def settings(runs):
    """[the runs of one setting]"""
    names = dict.fromkeys(run.setting for run in runs)
    return [[run for run in runs if run.setting == name] for name in sorted(names)]

def benchmarks(arms):
    """(new questions like those of the training, else "training"; others, or None; all)"""
    found = list(dict.fromkeys(benchmark for run in arms for benchmark, _ in run.results))
    like = {run.flags["data"].removesuffix("_train") + "_test" for run in arms if run.flags}
    fresh = next((b for b in found if b in like | {"in"}), "training")
    others = [b for b in found if b not in ("", "training", fresh)]
    return fresh, min(others, key=lambda b: b not in ("ood", "aime24"), default=None), found

def partner(arms, run, method, **changes):
    """The run of this method with these flags and all others as in `run`; None without it."""
    for found in arms if run else []:
        wanted = run.flags | changes
        own = {"lr"} if method != run.method and "lr" not in found.differs else set()
        shared = (wanted.keys() & found.flags.keys()) - own
        if found.method == method and all(found.flags[flag] == wanted[flag] for flag in shared):
            return found
    return None

def trio(arms):
    """(Base, GRPO, SDPO) of a setting, whose other flags are equal; None for a missing one."""
    base, grpo, sdpo = (next((r for r in arms if r.method == m), None) for m in COLOURS)
    return base, partner(arms, sdpo, "GRPO") if sdpo else grpo, sdpo

def by_size(arms, method):
    """[run], few questions first, of those that else have the flags of the main SDPO run."""
    sizes = {run.flags["num_questions"] for run in arms if "num_questions" in run.flags}
    found = [partner(arms, trio(arms)[2], method, num_questions=size)
             for size in sorted(sizes, key=lambda size: size or math.inf)]
    return [run for run in found if run]

def by_domain(runs):
    """{model: {domain: runs of a setting}}, where GRPO and SDPO are; better with new questions."""
    found = {}
    for arms in sorted(settings(runs), key=lambda arms: benchmarks(arms)[0].endswith("_test")):
        model, trained, data = arms[0].setting.partition(", trained on ")
        if trained and None not in trio(arms)[1:]:
            found.setdefault(model, {})[next(d for d in DOMAINS if data.startswith(d))] = arms
    return found

# --- drawing -------------------------------------------------------------------------------------

COLOURS = {"Base": "#777777", "GRPO": "#1f6fb4", "SDPO": "#d9600f"}
MARKER, WRONG = "#7a3fb0", "#c62828"
matplotlib.rcParams.update({
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "axes.titlelocation": "left", "text.parse_math": False,
    "axes.prop_cycle": matplotlib.cycler(color="#7a3fb0 #2a8a3e #b3872c #c2316f #1a9aa0".split())})

def panel(title, xlabel, ylabel, height=3.3):
    axis = Figure((4.8, height), dpi=200, layout="constrained").subplots()
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return axis

def label_ends(axis, ends, size=10):
    """Writes labels, [(y, x, label, colour)], right of the plot, joined to their points."""
    low, high = axis.get_ylim()
    free = 1.06  # from the top down, up to where there is room; the plot's height is 1
    for y, x, label, colour in sorted(ends, reverse=True):
        text = "\n".join(textwrap.fill(line, 18) for line in label.split("\n"))
        half = 0.035 * (1 + text.count("\n"))
        place = min((y - low) / (high - low), free - half)
        free = place - half
        axis.annotate(text, (x, y), (1.05, place), textcoords="axes fraction", va="center",
                      color=colour, linespacing=1, annotation_clip=False, fontsize=size,
                      arrowprops={"arrowstyle": "-", "color": colour, "ls": ":", "shrinkB": 3})

def draw_lines(axis, arms, benchmark, quantity, shades=None, size=10, tokens=False):
    """The mean of the seeds over the steps, and a band from the lowest to the highest seed."""
    arms, ends = [run for run in arms if run and run.steps(benchmark)], []
    for run in arms:
        steps, label, colour = run.steps(benchmark), run.label, COLOURS.get(run.label)
        if shades:  # from light to dark
            colour = matplotlib.colormaps[shades](0.35 + 0.6 * arms.index(run) / len(arms))
        values = [[means[quantity] for means in run.means(benchmark, step)] for step in steps]
        middle = [*map(statistics.fmean, values)]
        (line,) = axis.plot(steps, middle, "o-" if len(steps) < 10 else "-", color=colour, lw=2.5)
        axis.fill_between(steps, [*map(min, values)], [*map(max, values)], alpha=0.15,
                          color=line.get_color())
        if tokens:
            label += f"\n{run.value('length', benchmark)[0]:,.0f} tokens"
        ends.append((middle[-1], steps[-1], label, line.get_color()))
    axis.set_ylim(0, 1.03 if quantity == "score" else None)
    label_ends(axis, ends, size)

def curves(title, arms, benchmark, quantities=QUANTITIES, shades=None):
    """{caption: figure}, for each quantity."""
    found = {}
    for quantity in quantities:
        axis = panel(title, "training step", QUANTITIES[quantity][0])
        draw_lines(axis, arms, benchmark, quantity, shades)
        found[f"{title}: {quantity}"] = axis.figure
    return found

def dots(title, xlabel, series):
    """Of {label: {marker: number}} a row for each marker."""
    axis = panel(title, xlabel, "", 4.2)
    for label, uses in series.items():
        axis.plot([*uses.values()], [*uses], "o", color=COLOURS.get(label), label=label)
    axis.invert_yaxis()
    axis.figure.legend(loc="outside lower left", frameon=False, ncols=2, fontsize=9.5)
    return axis.figure

def marker_uses(run, benchmark, step=None):
    """{marker: uses an answer}; {} if the answers were not kept."""
    counts = [epistemic.count_by_marker(a["response"]) for a in run.answers(benchmark, step)]
    return {m: statistics.fmean(c[m] for c in counts) for m in epistemic.MARKERS if counts}

def table(arms, benchmark):
    """Where the runs end."""
    return [["", "seeds", "step", "score", "tokens", "markers"], *(
        [run.label, len(run.means(benchmark)), run.steps(benchmark)[-1],
         *(run.text(quantity, benchmark) for quantity in QUANTITIES)]
        for run in arms if run.steps(benchmark))]

# --- the paper's claims, figures and tables ------------------------------------------------------

def claim(text, paper, quantity, benchmark, *arms, keeps=False):
    """[row]: is each run's number above the next one's (`keeps`: not below)? By two errors."""
    shared = [set(run.steps(benchmark)) for run in arms if run and run.method != "Base"]
    last = max(set.intersection(*shared), default=None) if shared else None
    if None in arms or last is None:
        return []
    steps = [0 if run.method == "Base" else last for run in arms]
    values = [run.value(quantity, benchmark, step) for run, step in zip(arms, steps)]
    signs = ["≈" if abs(a - b) <= 2 * math.hypot(error, noise) else ">" if a > b else "<"
             for (a, error, _), (b, noise, _) in zip(values, values[1:])]
    verdict = "no" if "<" in signs else "yes" if keeps or "≈" not in signs else "too close"
    here = " ".join(f"{run.label} {run.text(quantity, benchmark, step)} {sign}"
                    for run, step, sign in zip(arms, steps, [*signs, ""]))
    return [[text, verdict, paper, here + f"(step {last})" * (last > 0)]]

def claims(runs):
    """The paper's claims. "yes" and "no" are clear by more than two standard errors."""
    found = {}
    for arms in settings(runs):
        (fresh, other, _), (base, grpo, sdpo) = benchmarks(arms), trio(arms)
        of = {run.method: run for run in reversed(arms)}.get  # the main run of a method
        weak, doubt, ema = (partner(arms, sdpo, "SDPO", **flag) for flag in (
            {"demonstration": "without_think"}, {"demonstration": "uncertain"}, {"ema": 0.05}))
        sizes = [run for run in by_size(arms, "SDPO") if partner(arms, run, "GRPO")]
        few, many = (sizes[0], sizes[-1]) if len(sizes) > 1 else (None, None)
        rows = [
            *claim("Table 1: told more, fewer markers", "182.5 > 159.8 > 24.1 > 8.8",
                   "epistemic", "", *map(of, CONTEXTS[:4])),
            *claim("Table 2: SFT on unguided answers keeps the score", "51.0 ≈ 54.8",
                   "score", other, of("SFT on d_ug"), base, keeps=True),
            *claim("Table 2: SFT on guided answers loses it", "54.8 > 20.2",
                   "score", other, base, of("SFT on d_sg")),
            *claim("Figure 1b: GRPO learns more than SDPO", "", "score", fresh, grpo, sdpo),
            *claim("Figure 3: GRPO keeps the score", "56.0 ≈ 54.7",
                   "score", other, grpo, base, keeps=True),
            *claim("Figure 3: SDPO loses it", "54.7 > 33", "score", other, base, sdpo),
            *claim("Figure 3: it loses less without think", "", "score", other, weak, sdpo),
            *claim("Figures 3, 4: SDPO loses markers", "", "epistemic", other, base, sdpo),
            *claim("Figures 3, 4: more than GRPO", "", "epistemic", other, grpo, sdpo),
            *claim("Figure 6: it loses more with an EMA teacher", "", "score", other, sdpo, ema),
            *claim("Figure 7: SDPO learns few questions as well as GRPO", "", "score", "training",
                   few, partner(arms, few, "GRPO"), keeps=True),
            *claim("Figure 7: but not many", "", "score", "training",
                   partner(arms, many, "GRPO"), many),
            *claim("Figure 8: SDPO loses most with few", "", "score", other, many, few),
            *claim("Figure 14: it loses as well if asked for uncertainty", "",
                   "score", other, base, doubt)]
        if arms[0].setting.partition(", trained on ")[2].startswith(("narrow", "chem")):
            rows = [*claim("Figure 1a: SDPO learns more than GRPO", "", "score", fresh, sdpo, grpo),
                    *claim("Figure 1a: in shorter answers", "", "length", fresh, grpo, sdpo)]
        if rows:
            found[arms[0].setting] = [["the paper's claim", "here", "its AIME24", "ours"], *rows]
    return found

def figure_1(runs):
    """Figure 1: where self-distillation helps. SDPO wins where one manner of answering serves \
all questions, and falls where each needs its own search; its answers are short in both."""
    found = {}
    for model, domains in by_domain(runs).items():
        rows = [["a question needs", "Base", "GRPO", "SDPO"]]
        for name in [name for name in DOMAINS if name in domains]:
            arms, fresh = trio(domains[name]), benchmarks(domains[name])[0]
            rows.append([DOMAINS[name].replace("\n", " "), *(
                f"{run.text('score', fresh)} at {run.text('length', fresh)} tokens, step "
                f"{run.steps(fresh)[-1]}" if run and run.steps(fresh) else "" for run in arms)])
            found |= curves(DOMAINS[name], arms[1:], fresh, ["score", "length"])
        found[f"{model}: new questions of the training's kind"] = rows
    return found

def table_1(runs):
    """Table 1: the same questions in five contexts. The more of the solution the prompt shows, \
the shorter the answers and the fewer the markers."""
    return {arms[0].setting: table(arms, "") for arms in settings(runs) if table(arms, "")[1:]}

def table_2(runs):
    """Table 2: checkpoints, by evaluate.py. SFT on answers written with the solution in sight \
(d_sg) costs the score, though all are right; on those written without it (d_ug) it does not."""
    return {f"{arms[0].setting}: {b}": table(arms, b) for arms in settings(runs)
            for b in benchmarks(arms)[2] if b and ", trained on " not in arms[0].setting}

def trained(runs):
    """[(runs, their benchmarks)] of each setting with a training."""
    return [(arms, [b for b in benchmarks(arms)[2]]) for arms in settings(runs)
            if ", trained on " in arms[0].setting]

def figures_3_to_6(runs):
    """Figures 3 to 6, 14, 20: training, by run. SDPO becomes short, sure and, on other \
questions, wrong; no demonstration, EMA teacher, top-k or rate prevents it."""
    found = {}
    for arms, names in trained(runs):
        own = [run for run in arms if {*run.differs} <= {
            "demonstration", "ema", "top_k", "lr"} and "strength" not in run.flags]
        for benchmark in names:
            found |= curves(f"{own[0].setting}: {benchmark}", own, benchmark)
            found[f"{own[0].setting}: {benchmark}, the end"] = table(arms, benchmark)
    return found

def figures_7_8(runs):
    """Figures 7, 8: few or many questions. SDPO learns few fast, in short answers, and many \
badly; on other questions few cost it the most."""
    found = {}
    for arms, names in trained(runs):
        for benchmark in names if len(by_size(arms, "SDPO")) > 2 else []:
            for quantity in ("score", "length"):
                for method, shades in (("GRPO", "Blues"), ("SDPO", "Oranges")):
                    found |= curves(f"{method}: {benchmark}", by_size(arms, method), benchmark,
                                    [quantity], shades)
    return found

def figure_9(runs):
    """Figure 9: each marker by context. All are rarer, the more the prompt shows."""
    return {arms[0].setting: dots("", "uses an answer", {
        run.label: marker_uses(run, "") for run in arms if run.steps("")})
        for arms in settings(runs) if table(arms, "")[1:]}

def figure_11(runs):
    """Figures 10, 11: each marker before and after training. SDPO uses all of them less."""
    found = {}
    for arms, _ in trained(runs):
        other, sizes = benchmarks(arms)[1], by_size(arms, "GRPO") + by_size(arms, "SDPO")
        uses = {run.label: marker_uses(run, other) for run in [trio(arms)[0], *sizes] if run and run.steps(other)}
        if all(uses.values()) and len(uses) > 1:
            found[arms[0].setting] = dots("", "uses an answer", uses)
    return found

def remedies(runs):
    """Remedies: score and length on other questions. Wanted: top left. A line joins strengths."""
    found = {}
    for arms, _ in trained(runs):
        other, ends = benchmarks(arms)[1], []
        groups = {}
        for run in arms:
            if run in trio(arms) or "strength" in run.flags:
                groups.setdefault(run.method, []).append(run)
        if len(groups) > 3:
            axis = panel("", "tokens an answer", "score", 4.5)
            for method, group in groups.items():
                points = sorted((r.flags.get("strength", 0), r.value("length", other)[0], r.value("score", other)[0]) for r in group)
                (line,) = axis.plot([x for _, x, _ in points], [y for _, _, y in points], "o-", color=COLOURS.get(method))
                ends.append((points[0][2], points[0][1], method, line.get_color()))
            axis.set_ylim(0)
            label_ends(axis, ends)
            found[arms[0].setting] = axis.figure
    return found

def table_6(runs):
    """Table 6: student and teacher by token, before training. They differ most at markers; in the \
paper 1.9 to 6.8 times the mean."""
    found = {}
    for run in [run for run in runs if run.method == "token_kl"]:
        found[run.setting] = kl_table([token for seed in run.results["", 0].values() for token in seed])
    return found

def kl_table(tokens):
    """Table 6 of [{text, kl (a sum), count}], those of all seeds."""
    sums = {}
    for token in tokens:
        kl, count = sums.get(token["text"], (0, 0))
        sums[token["text"]] = kl + token["kl"], count + token["count"]
    # ours: the paper does not say what is frequent; its rarest variant has 25
    means = {text: kl / count for text, (kl, count) in sums.items() if count >= 25}
    mean = statistics.fmean(means.values())
    ours = [text for text in means if text.strip(" :,.").lower() in epistemic.MARKERS]
    return [["token", "mean KL", "count", "ratio"], *(
        [f"‘{text}’", f"{means[text]:.3f}", sums[text][1], f"{means[text] / mean:.1f}"]
        for text in sorted(ours, key=means.get, reverse=True)),
        [f"mean of {len(means)} tokens", f"{mean:.3f}", "", "1.0"]]

def pair_of_answers(arms):
    """[(answer before, answer after SDPO)] to other questions, those first that became wrong."""
    base, _, sdpo = trio(arms)
    other = benchmarks(arms)[1]
    before, after = ({a["index"]: a for a in reversed(run.answers(other))} for run in (base, sdpo))
    pairs = [(before[i], after[i]) for i in before if i in after]
    return sorted(pairs, key=lambda pair: (pair[1]["correct"] - pair[0]["correct"],
                                           len(pair[0]["response"])))

def answers(runs):
    """Answers side by side. The markers are yellow."""
    found = {}
    for arms, _ in trained(runs):
        for i, pair in enumerate(pair_of_answers(arms)[:3]):
            found[f"{arms[0].setting} {i}"] = f"<h3>{html.escape(pair[0]['question'])}</h3>" + "".join(
                answer_html(who, answer) for who, answer in zip(("Base", "SDPO"), pair))
    return found

def answer_html(who, answer):
    text = html.escape(answer["response"])
    text = re.sub(f"(?i)({'|'.join(epistemic.MARKERS)})", r"<mark>\1</mark>", text)
    right = "right" if answer["correct"] else "wrong"
    return f"<div><b>{who}: {right}</b>, {answer['tokens']:,} tokens<pre>{text}</pre></div>"

def first_picture(runs):
    """In one picture. An answer before and after, and where self-distillation helps."""
    for domains in by_domain(runs).values():
        if {"narrow", ""} <= domains.keys():
            ((before, after), *_) = pair_of_answers(domains[""])
            figure = Figure((16, 6.2), dpi=100, layout="constrained")
            text, *axes = figure.subplots(1, 3, width_ratios=[2.2, 1, 1])
            for axis, name in zip(axes, ("narrow", "")):
                fresh = benchmarks(domains[name])[0]
                axis.set_title(DOMAINS[name], fontsize=17)
                axis.set_xlabel("training step", fontsize=16)
                axis.tick_params(labelsize=15)
                draw_lines(axis, trio(domains[name])[1:], fresh, "score", size=16, tokens=True)
            axes[0].set_ylabel("score on new questions", fontsize=16)
            write_answers(text, before, after)
            return {"demo": figure}
    return {}

def write_answers(axis, before, after):
    """A question and two answers, word by word, in lines of 56 letters; a long answer is cut."""
    axis.axis("off")
    wrong = (re.findall(r"\\boxed\{([^{}]*)\}", after["response"]) or [""])[-1]
    lines = [(line, "black") for line in textwrap.wrap(before["question"].split("\n")[0], 56)]
    for who, answer in (("Before", before), ("After SDPO", after)):
        right = "right" if answer["correct"] else "wrong"
        lines += [("", ""), (f"{who}: {right}, {answer['tokens']:,} tokens", "#555555")]
        own = [line for part in answer["response"].split("\n") for line in textwrap.wrap(part, 56)]
        own = own if len(own) < 9 else [*own[:4], "[...]", *own[-3:]]
        lines += [(line, answer) for line in own]
    for number, (line, answer) in enumerate(lines):
        for word in re.finditer(r"\S+", line):
            marker = any(m in word[0].lower() for m in epistemic.MARKERS)
            bad = answer is after and wrong and re.search(rf"(?<!\w){re.escape(wrong)}(?!\w)", word[0])
            colour = answer if isinstance(answer, str) else WRONG if bad else MARKER if marker else "#222222"
            axis.text(word.start() / 56, 1 - number / 18, word[0], transform=axis.transAxes, va="top",
                      fontsize=15.5, family="monospace", color=colour, in_layout=False,
                      weight="bold" if colour in (WRONG, MARKER) else None)

# --- the page ------------------------------------------------------------------------------------

SECTIONS = (first_picture, claims, figure_1, table_1, table_2, figures_3_to_6, figures_7_8, figure_9,
            figure_11, table_6, remedies, answers)
ON_SCREEN = claims, figure_1, table_1, table_2
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Self-distillation</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1360px; margin: auto; padding: 0 1em }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)) }
.wide { grid-column: 1 / -1; overflow-x: auto } img { width: 100%; max-width: 600px }
table { border-collapse: collapse; margin: 0 0 1em } td { border-bottom: 1px solid #ddd;
  vertical-align: top; padding: .2em 1em .2em 0 } mark { background: #ffd54d }
pre { max-height: 24em; overflow: auto; white-space: pre-wrap } tr:first-child { font-weight: bold }
@media (max-width: 700px) { .claims td { display: block; border: 0; padding: 0 }
  .claims tr { display: block; margin-bottom: 1em } .claims tr:first-child { display: none } }
</style><h1>Self-distillation, measured</h1><p>±: the larger standard error of that over seeds (s)
and that over questions (q); in training over seeds or over five steps (t). Bands: from the lowest
seed to the highest. Base: before training. Markers: """ + ", ".join(epistemic.MARKERS) + ".</p>"

def markdown(rows):
    """A table as text, which is Markdown too."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(f"{cell!s:{width}}" for cell, width in zip(row, widths)) + " |"
             for row in rows]
    return "\n".join([lines[0], "|-" + "-|-".join("-" * width for width in widths) + "-|", *lines[1:]])

def show(name, caption, item, folder):
    """An item as HTML; a figure is a file beside the page."""
    if isinstance(item, str):
        return item
    title = f"<b>{html.escape(caption)}</b>"
    if isinstance(item, Figure):
        file = re.sub(r"\W+", "_", f"{name} {caption}").lower() + ".png"
        item.savefig(folder / "figures" / file)
        return f'<img alt="{html.escape(caption)}" src="figures/{file}">'
    rows = "".join("<tr><td>" + "<td>".join(html.escape(str(c)) for c in row) for row in item)
    return f'<div class="wide {name}">{title}<table>{rows}</table></div>'

def report(folder):
    runs, page = load_runs(folder), PAGE
    (folder / "figures").mkdir(exist_ok=True)
    for section in SECTIONS:
        items = section(runs)
        title, sentence = section.__doc__.split(". ", 1)
        body = "".join(show(section.__name__, *item, folder) for item in items.items())
        page += f"<h2>{title}</h2><p>{sentence}</p><section>{body}</section>" if items else ""
        for caption, rows in items.items() if section in ON_SCREEN else ():
            if isinstance(rows, list):
                print(f"\n{title}; {caption}\n\n{markdown(rows)}")
    (folder / "report.html").write_text(page, encoding="utf-8", errors="replace")
    print(f"\n{len(runs)} runs: {folder}/report.html")

def main():
    parser = argparse.ArgumentParser(description="The paper's tables and figures of your runs.",
                                     usage=argparse.SUPPRESS)
    parser.add_argument("folder", type=Path, help="what holds the runs")
    args = parser.parse_args()
    try:
        report(args.folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))

if __name__ == "__main__":
    main()
