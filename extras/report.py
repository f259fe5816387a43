"""The paper's figures and tables of your runs: FOLDER/report.html, FOLDER/figures, FOLDER/demo.png.

    python -m extras.report runs            # every run below this folder, finished or not

A run is what its config.json says, never what its folder is called. After the reading comes a
function for each figure or table, in the paper's order: its docstring is its title and its sentence
on the page; of the runs of a setting s it makes {caption: figure, table or HTML}.
"""
import argparse, functools, html, json, math, os, re, statistics, textwrap
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

import epistemic

QUANTITIES = {"score": ("score", "correct", 3), "length": ("tokens an answer", "tokens", 0),
              "epistemic": ("markers an answer", "epistemic", 1)}  # name, in an answer, digits
CONTEXTS = ["unguided", "without_think", "regenerated", "full", "uncertain"]
DOMAINS = {"narrow": "Narrow domain: one way of\nanswering serves all",
           "chem": "Narrow domain: chemistry",
           "habits": "Eight ways of answering, one\nfor each kind of question",
           "": "Diverse domain: each question\nneeds its own search"}  # by how the data's name begins
USUAL = {"demonstration": "full", "ema": 0.0, "top_k": 100, "control": None}  # as in sdpo.py
SAME = """questions_per_step minibatch_questions rollouts temperature max_prompt_tokens
    max_response_tokens warmup_steps""".split()  # flags that all runs of a setting share
NO_PART = """model data enable_thinking script remedy run_dir out seed id commit versions world_size
    wandb steps save_every files eval_data tokens_per_micro_batch recompute_layers adamw_device
    gpu_memory_utilization""".split()  # flags that tell no runs apart

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

def numbers(table):
    return {name: {q: means[q] + 0.0 for q in QUANTITIES} for name, means in table.items()}

@functools.lru_cache(maxsize=8)
def read_answers(path, benchmark):
    needed = "index", "response", "correct", "tokens", "epistemic"
    rows = read(path, lambda row: row | {name: row[name] for name in needed})
    return [row for row in rows if row.get("benchmark", benchmark) == benchmark]

@dataclass(eq=False)
class Run:
    """What a config.json describes, with all its seeds."""
    method: str  # GRPO, SDPO, OPSD, "SFT on d_ug", a remedy, a context, or Base: before training
    setting: tuple  # (model, training data or "", the flags of SAME in words)
    flags: dict  # those that tell the runs of a setting apart
    results: dict = field(default_factory=dict)  # {(benchmark, step): {seed: {quantity: mean}}}
    label: str = ""  # the method, and those flags that are not as usual: `differs`
    differs: set = frozenset()

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
        return [row for m in self.means(benchmark, step) for row in read_answers(*m["file"])]

    @functools.cache
    def value(self, quantity, benchmark, step=None):
        """(mean, the largest of its standard errors, over what), for which see the page's head."""
        means, by_question = self.means(benchmark, step), {}
        for answer in self.answers(benchmark, step):  # those to one question are not independent
            by_question.setdefault(answer["index"], []).append(answer[QUANTITIES[quantity][1]])
        errors = [(standard_error([m[quantity] for m in means]), "s"),
                  (standard_error([*map(statistics.fmean, by_question.values())]), "q"),
                  *((standard_error(m["five"][quantity]), "t") for m in means if "five" in m)]
        return statistics.fmean(m[quantity] for m in means), *max(errors)

    def text(self, quantity, benchmark, step=None):
        (mean, error, over), form = self.value(quantity, benchmark, step), QUANTITIES[quantity][2]
        return f"{mean:,.{form}f}" + (f" ± {error:,.{form}f} {over}" if error >= 0 else "")

def standard_error(values):
    """Minus infinity of less than two: it is not known."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else -math.inf

def describe(config):
    """(method, setting, flags, seed); of evaluate.py's models the first that is no checkpoint."""
    model, data = config["model"], Path(str(config.get("data", ""))).stem
    model = model if isinstance(model, str) else min(model, key=lambda m: "/checkpoints/" in m)
    model = "/".join(Path(model).parts[-2:]) + ", thinking off" * (not config["enable_thinking"])
    script = Path(config.get("script", "")).stem
    method = {"sft_distill": f"SFT on {data}", "controls": "SDPO"}.get(script, script.upper())
    same = ", ".join(f"{flag} {config[flag]}" for flag in SAME if flag in config).replace("_", " ")
    flags = {flag: value for flag, value in config.items() if flag not in [*SAME, *NO_PART]}
    flags = {"control": None} | flags
    return config.get("remedy", method), (model, data, same), flags, config["seed"]

def training_results(path):
    """(benchmark, step, means, answers) each; "training": of five steps, since one is too noisy."""
    rows = read(path / "metrics.jsonl",  # SFT's have no score
                lambda row: numbers({row["step"]: row} if "score" in row else {}))
    rows = [item for row in rows for item in row.items()]
    for i, (step, _) in enumerate(rows):
        five = {q: [row[q] for _, row in rows[max(i - 4, 0):i + 1]] for q in QUANTITIES}
        means = {q: statistics.fmean(values) for q, values in five.items()}
        yield "training", step, means | {"five": five}, path / "none"
    for file in path.glob("eval/step_*.json"):
        for benchmark, means in read(file, numbers)[0].items():
            yield benchmark, int(file.stem[5:]), means, file.with_suffix(".jsonl")

def load_runs(folder):
    """Every run below the folder, GRPO and SDPO first. ValueError names a broken file and row."""
    runs = {}

    def add(seed, benchmark, step, means, answers, *who):
        run = runs.setdefault(json.dumps(who, sort_keys=True), Run(*who))
        means["file"] = answers, benchmark or answers.stem
        run.results.setdefault((benchmark, step), {}).setdefault(seed, means)

    for file in sorted(Path(folder).rglob("config.json")):
        path, summary = file.parent, file.parent / "summary.json"
        if "checkpoints" in file.parts or not {summary.name, "metrics.jsonl"} & {*os.listdir(path)}:
            continue
        ((method, setting, flags, seed),) = read(file, describe)
        for result in training_results(path):
            add(seed, *result, method, setting, flags)
            if result[1] == 0:
                add(seed, *result, "Base", setting, {})
        setting = setting[0], "", ""
        for contexts in read(summary, lambda found: numbers(found.get("contexts", {}))):
            for name, means in contexts.items():
                add(seed, "", 0, means, path / f"{name}.jsonl", name, setting, {})
        for file in [path / name / f"{benchmark}.json" for found in read(summary)
                     for name, table in found.get("models", {}).items() for benchmark in table]:
            for place, means in read(file, lambda r: (Path(r["model"]), numbers({"": r["row"]})[""])):
                training = read(place.parent.parent / "config.json", describe)  # of a checkpoint
                method, on, flags, _ = training[0] if training else ("Base", (), {}, 0)
                step = int(place.name.removeprefix("step_")) if training else 0
                add(seed, file.stem, step, means, file.with_suffix(".jsonl"), method, setting,
                    flags | {"data": ", ".join(on[1:])})
    return name_runs([*runs.values()])

def name_runs(runs):
    """Sorts them and sets `differs` and `label`: the method, and what is not as usual."""
    words = {"num_questions": "{} questions", "demonstration": "c {}", "strength": "{}"}
    for run in runs:
        alike = [r.flags for r in runs if (r.method, r.setting) == (run.method, run.setting)]
        alike.sort(key=lambda f: (-(f.get("num_questions") or math.inf), f.get("lr", 0)))
        usual = {flag: statistics.mode(flags.get(flag) for flags in alike) for flag in run.flags}
        run.differs = {f for f, v in run.flags.items() if v != USUAL.get(f, usual[f])}
        run.label = ", ".join([run.method, *(words.get(f, f + " {}").format(run.flags[f])
                                             for f in sorted(run.differs))]).replace("_", " ")
    order = ["Base", "GRPO", "SDPO", *CONTEXTS, *sorted(run.method for run in runs)]
    return sorted(runs, key=lambda run: (order.index(run.method), len(run.differs), run.label))

# arms: its runs, {label: run}; fresh: the benchmark of new questions like those of the training,
# else "training"; other: that of other questions; domain: of DOMAINS, None without a training
Setting = namedtuple("Setting", "model name arms fresh other benchmarks domain")

def settings(runs):
    """Only runs of one setting stand in one claim."""
    found = []
    for model, data, same in sorted({run.setting for run in runs}):
        arms = {run.label: run for run in runs if run.setting == (model, data, same)}
        names = list(dict.fromkeys(b for run in arms.values() for b, _ in run.results))
        like = f"{data.removesuffix('_train')}_test", "in", "training"
        fresh = next((b for b in like if b in names), None)
        others = [b for b in names if b not in ("", fresh, "training")]
        other = min(others, key=lambda b: b not in ("ood", "aime24"), default=None)
        domain = next(d for d in DOMAINS if data.startswith(d)) if data else None
        name = f"{model}, trained on {data}; {same}" if data else model
        found.append(Setting(model, name, arms, fresh, other, names, domain))
    return found

# --- drawing -------------------------------------------------------------------------------------

COLOURS = {"Base": "#777777", "GRPO": "#1f6fb4", "SDPO": "#d9600f"}
MARKER, WRONG, SHADES = "#7a3fb0", "#c62828", {"GRPO": "Blues", "SDPO": "Oranges"}
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
    for i, run in enumerate(arms, 1):
        steps, label, colour = run.steps(benchmark), run.label, COLOURS.get(run.label)
        if shades:  # from light to dark
            colour = matplotlib.colormaps[shades](0.3 + 0.65 * i / len(arms))
        values = [[means[quantity] for means in run.means(benchmark, step)] for step in steps]
        middle = [*map(statistics.fmean, values)]
        (line,) = axis.plot(steps, middle, "o-" if len(steps) < 10 else "-", color=colour, lw=2.5)
        axis.fill_between(steps, [*map(min, values)], [*map(max, values)], alpha=0.15,
                          color=line.get_color())
        label += f"\n{run.value('length', benchmark)[0]:,.0f} tokens" if tokens else ""
        ends.append((middle[-1], steps[-1], label, line.get_color()))
    axis.set_ylim(0, 1.03 if quantity == "score" else None)
    label_ends(axis, ends, size)

def curves(title, arms, benchmark, quantities=QUANTITIES, shades=None):
    """{caption: figure}, for each quantity."""
    found = {f"{title}: {q}": panel(title, "training step", QUANTITIES[q][0]) for q in quantities}
    for quantity, axis in zip(quantities, found.values()):
        draw_lines(axis, arms, benchmark, quantity, shades)
    return {caption: axis.figure for caption, axis in found.items()}

def marker_dots(arms, benchmark):
    """Uses an answer of each marker, a row each."""
    axis = panel("", "uses an answer", "", 4.2)
    for run in [run for run in arms if run.steps(benchmark) and run.answers(benchmark)]:
        counts = [epistemic.count_by_marker(a["response"]) for a in run.answers(benchmark)]
        uses = [statistics.fmean(count[m] for count in counts) for m in epistemic.MARKERS]
        axis.plot(uses, epistemic.MARKERS, "o", color=COLOURS.get(run.label), label=run.label)
    axis.invert_yaxis()
    axis.figure.legend(loc="outside lower left", frameon=False, ncols=2, fontsize=9.5)
    return axis.figure

def table(s, benchmark):
    """Where the runs end."""
    return [["", "seeds", "step", "score", "tokens", "markers"], *(
        [run.label, len(run.means(benchmark)), run.steps(benchmark)[-1],
         *(run.text(quantity, benchmark) for quantity in QUANTITIES)]
        for run in s.arms.values() if run.steps(benchmark))]

# --- the paper's claims, figures and tables ------------------------------------------------------

def compare(s, quantity, benchmark, *labels, keeps=False):
    """[verdict, numbers]: is each run's above the next one's (`keeps`: not below it)? By two
    standard errors, at the last step that all of them have. [] where a run is missing."""
    arms = [s.arms.get(label) for label in labels]
    steps = [{*run.steps(benchmark)} for run in arms if run and run.method != "Base"]
    if None in arms or not set.intersection(*steps):
        return []
    last = max(set.intersection(*steps))
    at = [(quantity, benchmark, 0 if run.method == "Base" else last) for run in arms]
    values = [run.value(*which) for run, which in zip(arms, at)]
    signs = ["≈" if abs(a - b) <= 2 * math.hypot(error, noise) else ">" if a > b else "<"
             for (a, error, _), (b, noise, _) in zip(values, values[1:])]
    text = " ".join(f"{sign} {run.label} {run.text(*which)}"
                    for sign, run, which in zip(["", *signs], arms, at))
    verdict = "no" if "<" in signs else "yes" if keeps or "≈" not in signs else "too close"
    return [verdict, text + f" (step {last})" * (last > 0)]

def sizes(s, method):
    """[run], few questions first, of those that differ in |D| alone."""
    found = [r for r in s.arms.values() if r.method == method and r.differs <= {"num_questions"}]
    return sorted(found, key=lambda run: run.flags.get("num_questions") or math.inf)

def claims(s):
    """The paper's claims. Its numbers are of AIME24; yes and no are clear by more than two \
standard errors."""
    above, other, fresh = functools.partial(compare, s), s.other, s.fresh
    few = next((run.label[4:] for run in sizes(s, "SDPO") if run.label != "SDPO"), " few")
    told = [context.replace("_", " ") for context in CONTEXTS[:4]]
    rows = [
        ("Table 1: the more is shown, the fewer markers", above("epistemic", "", *told)),
        ("Table 2: SFT on d_ug keeps the score (51.0, 54.8)",
         above("score", other, "SFT on d ug", "Base", keeps=True)),
        ("Table 2: SFT on d_sg loses it (54.8 > 20.2)", above("score", other, "Base", "SFT on d sg")),
        ("Figure 1b: GRPO learns more", above("score", fresh, "GRPO", "SDPO")),
        ("Figure 3: GRPO keeps the score (56.0, 54.7)",
         above("score", other, "GRPO", "Base", keeps=True)),
        ("Figure 3: SDPO loses it (40% lower)", above("score", other, "Base", "SDPO")),
        ("Figure 3: less, if c has no think part",
         above("score", other, "SDPO, c without think", "SDPO")),
        ("Figures 3, 4: SDPO loses markers", above("epistemic", other, "Base", "SDPO")),
        ("Figures 3, 4: more than GRPO", above("epistemic", other, "GRPO", "SDPO")),
        ("Figure 6: more, if the teacher follows", above("score", other, "SDPO", "SDPO, ema 0.05")),
        ("Figure 7: SDPO learns few questions as well",
         above("score", "training", "SDPO" + few, "GRPO" + few, keeps=True)),
        ("Figure 7: many less well", above("score", "training", "GRPO", "SDPO")),
        ("Figure 8: few cost the most", above("score", other, "SDPO", "SDPO" + few)),
        ("Figure 14: c that shows doubt costs, too", above("score", other, "Base", "SDPO, c uncertain"))]
    if s.domain in ("narrow", "chem"):
        rows = [("Figure 1a: SDPO learns more", above("score", fresh, "SDPO", "GRPO")),
                ("Figure 1a: in shorter answers", above("length", fresh, "GRPO", "SDPO"))]
    rows = [[text, *result] for text, result in rows if result]
    return {"": [["the paper's claim", "holds here", "our numbers"], *rows]} if rows else {}

def figure_1(everything):
    """Figure 1: where self-distillation helps. SDPO wins where one way of answering serves all, \
and falls where each question needs its own search; its answers become short in both."""
    found = {}
    for model in sorted({s.model for s in everything}):
        own = sorted((s for s in everything if s.model == model and s.domain is not None and
                      {"GRPO", "SDPO"} <= s.arms.keys()), key=lambda s: "_test" in str(s.fresh))
        own = {s.domain: s for s in own}  # rather that with fresh questions
        own = [own[name] for name in DOMAINS if name in own]
        rows = [["a question needs", *table(own[0], "")[0]]] if own else []
        rows += [[DOMAINS[s.domain].replace("\n", " "), *row] for s in own
                 for row in table(s, s.fresh)[1:] if row[0] in COLOURS]
        found |= {f"demo {model}": picture(own), f"{model}: fresh questions": rows} if own else {}
    return found

def changed_answers(s):
    """[(Base's, SDPO's)] to other questions; first those that became wrong, short ones first."""
    runs = [s.arms.get(method) for method in ("Base", "SDPO")]
    if None in runs or not s.other or not all(run.steps(s.other) for run in runs):
        return []
    before, after = ({a["index"]: a for a in run.answers(s.other)[::-1]} for run in runs)
    pairs = [(before[i], after[i]) for i in before if i in after]
    return sorted(pairs, key=lambda two: (two[1]["correct"] - two[0]["correct"], two[0]["tokens"]))

def picture(own):
    """An answer before and after, word by word; and score over steps for each domain."""
    figure = Figure((16, 6), dpi=100, layout="constrained")
    left, *axes = figure.subplots(1, 1 + len(own), width_ratios=[2.7, *[1.1] * len(own)])
    for axis, s in zip(axes, own):
        axis.set_title(DOMAINS[s.domain], fontsize=17)
        axis.set_xlabel("training step", fontsize=16)
        axis.tick_params(labelsize=15)
        draw_lines(axis, map(s.arms.get, ("GRPO", "SDPO")), s.fresh, "score", size=16, tokens=True)
    axes[0].set_ylabel("score on fresh questions", fontsize=16)
    left.axis("off")
    for before, after in changed_answers(own[-1])[:1]:
        boxed = re.findall(r"\\boxed\{([^{}]*)\}", after["response"])[-1:]
        wrong = rf"(?<!\w){re.escape(boxed[0])}(?!\w)" if boxed else "(?!)"
        lines = [(None, before["question"].split("\n")[0])]
        for who, answer in (("Before", before), ("After SDPO", after)):
            right = "right" if answer["correct"] else "wrong"
            lines += [(None, ""), (None, f"{who}: {right}, {answer['tokens']:,} tokens")]
            lines += [(answer, line) for line in answer["response"].split("\n") if line]
        lines = [(answer, part) for answer, line in lines for part in textwrap.wrap(line, 54) or [""]]
        for number, (answer, line) in enumerate(lines[:20]):
            for word in re.finditer(r"\S+", line):
                colour = "#555555" if answer is None else MARKER if epistemic.count(word[0]) else (
                    WRONG if answer is after and re.search(wrong, word[0]) else "#111111")
                left.annotate(
                    word[0], (0, 1), (9.33 * word.start(), -22 * number), fontsize=15.5,
                    xycoords="axes fraction", textcoords="offset points", va="top", color=colour,
                    family="monospace", weight="bold" if colour in (WRONG, MARKER) else None,
                    in_layout=False)
    return figure

def table_1(s):
    """Table 1: the same questions in five contexts. The more of the solution the prompt shows, \
the shorter the answers and the fewer the markers."""
    return {"": table(s, "")} if "" in s.benchmarks else {}

def table_2(s):
    """Table 2: checkpoints, by evaluate.py. SFT on answers written with the solution in sight \
(d_sg) costs the score, though all are right; on those written without it (d_ug) it does not."""
    return {b: table(s, b) for b in s.benchmarks if b and s.domain is None}

def figures_3_to_6(s):
    """Figures 3 to 6, 14, 20: training, by run. SDPO becomes short, sure and, on other \
questions, wrong; no demonstration, EMA teacher, top-k or rate prevents it."""
    found, flags = {}, {"demonstration", "ema", "top_k", "lr"}
    own = [r for r in s.arms.values() if r.differs <= flags and "strength" not in r.flags]
    for benchmark in s.benchmarks if s.domain is not None else []:
        found |= curves(benchmark, own, benchmark) | {f"{benchmark}: the end": table(s, benchmark)}
    return found

def figures_7_8(s):
    """Figures 7, 8: few or many questions. SDPO learns few fast, in short answers, and many \
badly; on other questions few cost it the most."""
    panels = [(b, q, method) for b in s.benchmarks for q in ("score", "length")
              for method in ("GRPO", "SDPO")] if len(sizes(s, "SDPO")) > 2 else []
    return {caption: figure for b, q, method in panels for caption, figure in curves(
        f"{method}: {b}", sizes(s, method), b, [q], SHADES[method]).items()}

def figure_9(s):
    """Figure 9: each marker by context. All are rarer, the more the prompt shows."""
    return {"": marker_dots(s.arms.values(), "")} if "" in s.benchmarks else {}

def figure_11(s):
    """Figures 10, 11: each marker before and after training. SDPO uses all of them less."""
    arms = [run for method in COLOURS for run in sizes(s, method)]
    return {s.other: marker_dots(arms, s.other)} if s.other and s.domain is not None else {}

def remedies(s):
    """Remedies: score and length on other questions. Wanted: top left. A line joins strengths."""
    arms = [run for run in s.arms.values() if "strength" in run.flags or run.label in COLOURS]
    arms = sorted(arms, key=lambda run: run.flags.get("strength", 0))
    if not s.other or all("strength" not in run.flags for run in arms):
        return {}
    axis, ends = panel("", "tokens an answer", "score", 4.5), []
    for method in dict.fromkeys(run.method for run in arms):
        points = [[run.value(q, s.other)[0] for q in ("length", "score")]
                  for run in arms if run.method == method]
        (line,) = axis.plot(*zip(*points), "o-", color=COLOURS.get(method))
        ends.append((points[0][1], points[0][0], method, line.get_color()))
    axis.set_ylim(0)
    label_ends(axis, ends)
    return {s.other: axis.figure}

def answers(s):
    """Answers side by side. To other questions; first those that SDPO gets wrong."""
    found = {}
    for i, pair in enumerate(changed_answers(s)[:3] if s.domain is not None else []):
        found[i] = f"<h4>{html.escape(pair[0]['question'])}</h4>"
        for who, answer in zip(("Base", "SDPO"), pair):
            text = re.sub(f"(?i)({'|'.join(epistemic.MARKERS)})", r"<mark>\1</mark>",
                          html.escape(answer["response"]))
            right = "right" if answer["correct"] else "wrong"
            found[i] += f"<div><b>{who}: {right}</b>, {answer['tokens']:,} tokens<pre>{text}</pre></div>"
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

# --- the page ------------------------------------------------------------------------------------

SECTIONS = (claims, figure_1, table_1, table_2, figures_3_to_6, figures_7_8, figure_9, figure_11,
            remedies, answers)
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Self-distillation</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1360px; margin: auto; padding: 0 1em }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)) }
h4, .wide, .figure_1 { grid-column: 1 / -1; overflow-x: auto } img { max-width: 100% }
table { border-collapse: collapse; margin: 0 0 1em } td { border-bottom: 1px solid #ddd;
  vertical-align: top; padding: .2em 1em .2em 0 } mark { background: #ffd54d }
pre { max-height: 24em; overflow: auto; white-space: pre-wrap } tr:first-child { font-weight: bold }
</style><h1>Self-distillation, measured</h1><p>±: the larger standard error of that over seeds (s)
and that over questions (q); in training over seeds or over five steps (t). Bands: from the lowest
seed to the highest. Base: before training. Markers: """ + ", ".join(epistemic.MARKERS) + ".</p>"

def markdown(rows):
    """A table as text, which is Markdown too."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(f"{cell!s:{width}}" for cell, width in zip(row, widths))
                     + " |" for row in rows)

def show(name, caption, item, folder):
    """An item as HTML; a figure is a file beside the page."""
    if isinstance(item, str):
        return item
    if isinstance(item, Figure):
        file = re.sub(r"\W+", "_", f"{name} {caption}").lower() + ".png"
        item.savefig(folder / "figures" / file)
        return f'<img class={name} alt="{html.escape(caption)}" src="figures/{file}">'
    if name in ("claims", "figure_1", "table_1", "table_2"):
        print(f"\n{name} {caption}\n\n{markdown(item)}")
    rows = "".join("<tr><td>" + "<td>".join(html.escape(str(c)) for c in row) for row in item)
    return f'<div class="wide {name}"><b>{html.escape(caption)}</b><table>{rows}</table></div>'

def report(folder):
    found, page = settings(load_runs(folder)), PAGE
    (folder / "figures").mkdir(exist_ok=True)
    for section in SECTIONS:
        title, sentence = section.__doc__.split(". ", 1)
        parts = {"": figure_1(found)} if section is figure_1 else {s.name: section(s) for s in found}
        body = "".join(f"<h3>{html.escape(name)}</h3><section>" + "".join(
            show(section.__name__, f"{caption}", item, folder) for caption, item in items.items())
            + "</section>" for name, items in parts.items() if items)
        page += f"<h2>{title}</h2><p>{sentence}</p>{body}" if body else ""
    (folder / "report.html").write_text(page, encoding="utf-8", errors="replace")
    print(f"\n{folder}/report.html")

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
