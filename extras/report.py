"""The paper's figures and tables of your runs: FOLDER/report.html, FOLDER/figures, FOLDER/demo.png.

    python -m extras.report runs            # every run below this folder, finished or not

A run is what its config.json says, never what its folder is called. After the reading comes a
function for each figure or table, in the paper's order: its docstring is its title and its sentence
on the page; of the runs of a setting s it makes {caption: figure, table or HTML}.
"""
import argparse, functools, html, json, math, os, re, statistics, textwrap
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

import epistemic

NAMES = {"score": "score", "length": "tokens an answer", "epistemic": "markers an answer"}
CONTEXTS = ["unguided", "without_think", "regenerated", "full", "uncertain"]
DOMAINS = {"narrow": "Narrow domain: one way of\nanswering serves all",
           "chem": "Narrow domain: chemistry",
           "habits": "Eight ways of answering, one\nfor each kind of question",
           "": "Diverse domain: each question\nneeds its own search"}  # by the data's first letters
USUAL = {"demonstration": "full", "ema": 0.0, "top_k": 100, "control": None, "strength": None}
SAME = """questions_per_step minibatch_questions rollouts temperature max_prompt_tokens
    max_response_tokens warmup_steps""".split()  # flags that all runs of a setting share
NO_PART = """model data enable_thinking script remedy run_dir out seed id commit versions world_size
    wandb steps save_every files eval_data tokens_per_micro_batch recompute_layers adamw_device
    gpu_memory_utilization""".split()  # flags that tell no runs apart

# --- reading -------------------------------------------------------------------------------------

def read(path, use=dict):
    """use(object) of a .json file, or of each row of a .jsonl file; nothing if there is none."""
    rows = path.read_bytes().splitlines(True) if path.exists() else []
    for number, row in enumerate([b"".join(rows)] if path.suffix == ".json" and rows else rows, 1):
        if path.name == "metrics.jsonl" and not row.endswith(b"\n"):
            return  # it is still being written
        try:
            found = use(json.loads(row, strict=False))  # a model's text may hold control characters
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, row {number}: {error!r}") from None
        yield found

@dataclass(eq=False)
class Run:
    """What a config.json describes, with all its seeds. Its `label` is the method and those flags
    that are not as usual in the setting (`differs`)."""
    method: str  # GRPO, SDPO, OPSD, "SFT on d_ug", a remedy, a context, or Base: before training
    setting: tuple  # (model, training data or "", the flags of SAME in words)
    flags: dict  # those that tell the runs of a setting apart
    results: dict = field(default_factory=dict)  # {(benchmark, step): {seed: {question: [answer]}}}

    def steps(self, benchmark):
        """Those that all seeds have."""
        seeds = max(map(len, self.results.values()))
        return sorted(step for name, step in self.results
                      if name == benchmark and len(self.results[name, step]) == seeds)

    def means(self, quantity, benchmark, step):
        """Of each seed."""
        return [statistics.fmean(answer[quantity] for group in seed.values() for answer in group)
                for seed in self.results[benchmark, step].values()]

    @functools.cache
    def value(self, quantity, benchmark, step=None):
        """(mean, the larger of its standard errors, over what), at a step or at the last."""
        step = self.steps(benchmark)[-1] if step is None else step
        means, seeds = self.means(quantity, benchmark, step), self.results[benchmark, step].values()
        asked = [statistics.fmean(answer[quantity] for seed in seeds for answer in seed.get(i, []))
                 for i in [*seeds][0]]  # the answers to one question are not independent
        return statistics.fmean(means), *max((standard_error(means), "s"),
                                             (standard_error(asked), "q"))

    def text(self, quantity, benchmark, step=None):
        mean, error, over = self.value(quantity, benchmark, step)
        digits = {"score": 3, "length": 0, "epistemic": 1}[quantity]
        return f"{mean:,.{digits}f}" + (f" ± {error:,.{digits}f} {over}" if error >= 0 else "")

def standard_error(values):
    """Minus infinity where it is not known, of less than two."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else -math.inf

def describe(config):
    """(method, setting, flags, seed); of evaluate.py's models the first that is no checkpoint."""
    model, data = config["model"], Path(str(config.get("data", ""))).stem
    model = model if isinstance(model, str) else min(model, key=lambda m: "/checkpoints/" in m)
    model = "/".join(Path(model).parts[-2:]) + ", thinking off" * (not config["enable_thinking"])
    script = Path(config.get("script", "")).stem
    method = {"sft_distill": f"SFT on {data}", "controls": "SDPO"}.get(script, script.upper())
    same = ", ".join(f"{flag} {config[flag]}" for flag in SAME if flag in config).replace("_", " ")
    flags = {flag: value for flag, value in config.items() if flag not in SAME + NO_PART}
    flags = {"control": None} | flags
    return config.get("remedy", method), (model, data, same), flags, config["seed"]

def read_answers(file):
    """{benchmark: {question: [answer]}}; of a question's answers only the first keeps its text."""
    found = {}
    def use(row):
        uses = epistemic.count_by_marker(row["response"])
        group = found.setdefault(row["benchmark"], {}).setdefault(row["index"], [])
        group.append(uses | {"score": row["correct"] + 0, "length": row["tokens"] + 0,
                             "epistemic": sum(uses.values()), "row": None if group else row})
    return [*read(file, use)] and found

def load_runs(folder):
    """Every run below the folder, GRPO and SDPO first. ValueError names a broken file and row."""
    runs = {}

    def add(benchmark, step, answers, seed, *who):
        run = runs.setdefault(json.dumps(who, sort_keys=True), Run(*who))
        run.results.setdefault((benchmark, step), {}).setdefault(seed, answers)

    for config in sorted(Path(folder).rglob("config.json")):
        path, made = config.parent, {"summary.json", "metrics.jsonl"}
        if "checkpoints" in config.parts or not made & {*os.listdir(path)}:
            continue
        ((method, setting, flags, seed),) = read(config, describe)
        untrained = setting[0], "", ""
        rows = [row for row in read(path / "metrics.jsonl", lambda row: "score" in row and (  # SFT
            {"step": row["step"]} | {quantity: row[quantity] + 0 for quantity in NAMES})) if row]
        for i, row in enumerate(rows):  # five steps, since one is too noisy
            five = {row["step"]: [row] for row in rows[max(i - 4, 0):i + 1]}
            add("training", row["step"], five, seed, method, setting, flags)
        files = [(file, int(file.stem[5:]), method, setting, flags)
                 for file in path.glob("eval/step_*.jsonl")]
        files += [(path / "eval/step_0.jsonl", 0, "Base", setting, {})] if files else []
        files += [(path / f"{context}.jsonl", 0, context, untrained, {}) for context in CONTEXTS]
        for file in path.rglob("*.jsonl") if not method else []:  # evaluate.py's
            for model in read(file.with_suffix(".json"), lambda result: Path(result["model"])):
                files.append((file, 0, "Base", untrained, {"control": flags["control"]}))
                for who, on, own, _ in read(model.parent.parent / "config.json", describe):
                    own["data"] = ", ".join(on[1:])
                    files[-1] = file, int(model.name[5:]), who, untrained, own
        for file, step, *who in files:
            for benchmark, answers in read_answers(file).items() if file.exists() else []:
                add("" if benchmark in CONTEXTS else benchmark, step, answers, seed, *who)
    if not runs:
        raise ValueError(f"{folder}: no results of runs below it")
    return name_runs([*runs.values()])

def name_runs(runs):
    """Sorts them and sets `label` and `differs`. Usual is what most have, and of |D| the most."""
    words = {"num_questions": "|D| {}", "demonstration": "c {}", "strength": "{}"}
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
Setting = namedtuple("Setting", "model name arms benchmarks fresh other domain")

def settings(runs):
    """[Setting]; only runs of one setting stand in one claim."""
    found, keys = [], sorted({run.setting for run in runs})
    for model, data, same in keys:
        arms = {run.label: run for run in runs if run.setting == (model, data, same)}
        names = [*dict.fromkeys(b for run in reversed(arms.values()) for b, _ in run.results)]
        like = f"{data.removesuffix('_train')}_test", "in", "training"
        fresh = next((b for b in like if b in names), None)
        other = min((b for b in names if b not in ("", fresh, "training")), default=None,
                    key=lambda b: b not in ("ood", "aime24"))
        domain = next(d for d in DOMAINS if data.startswith(d)) if data else None
        name = f"{model}, trained on {data}" if data else model
        if sum(key[:2] == (model, data) for key in keys) > 1:
            name += f"; {same}"
        found.append(Setting(model, name, arms, names, fresh, other, domain))
    return found

# --- drawing -------------------------------------------------------------------------------------

COLOURS = {"Base": "#777777", "GRPO": "#1f6fb4", "SDPO": "#d9600f"}
SHADES, MARKER, WRONG = {"GRPO": "Blues", "SDPO": "Oranges"}, "#7a3fb0", "#c62828"
matplotlib.rcParams.update({
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.titlesize": "medium", "axes.titlelocation": "left", "grid.alpha": 0.25,
    "text.parse_math": False,  # a model's text may hold $
    "axes.prop_cycle": matplotlib.cycler(
        color="#7a3fb0 #2a8a3e #b3872c #c2316f #1a9aa0 #6b4c3b #8a8f00 #e377c2".split())})

def panel(title, xlabel, ylabel, height=3.3):
    axis = Figure((4.8, height), dpi=200, layout="constrained").subplots()
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return axis

def label_ends(axis, ends):
    """Writes labels, [(y, x, label, colour)], right of the plot, joined to their points."""
    (low, high), left = axis.get_ylim(), sum(1 + label.count("\n") for _, _, label, _ in ends)
    free = 1.06  # from the top down, up to where there is room; the plot's height is 1
    for y, x, label, colour in sorted(ends, reverse=True):
        half = 0.035 * (1 + label.count("\n"))
        place = max(min((y - low) / (high - low), free - half), 0.07 * left - half)
        free, left = place - half, left - 1 - label.count("\n")
        axis.annotate(label, (x, y), (1.05, place), textcoords="axes fraction", va="center",
                      color=colour, linespacing=1, annotation_clip=False, arrowprops={
                          "arrowstyle": "-", "color": colour, "ls": ":", "relpos": (0, 0.5)})

def draw_lines(axis, arms, benchmark, quantity, shades=None, tokens=False):
    """The mean of the seeds over the steps, and a band from the lowest to the highest seed."""
    arms, ends = [run for run in arms if run and run.steps(benchmark)], []
    for i, run in enumerate(arms, 1):
        steps, label, colour = run.steps(benchmark), run.label, COLOURS.get(run.label)
        if shades:  # from light to dark
            colour = matplotlib.colormaps[shades](0.3 + 0.65 * i / len(arms))
            label = f"|D| {run.flags['num_questions'] or 'all'}"
        values = [run.means(quantity, benchmark, step) for step in steps]
        middle = [*map(statistics.fmean, values)]
        (line,) = axis.plot(steps, middle, "o-" if len(steps) < 10 else "-", color=colour, lw=2.5)
        axis.fill_between(steps, [*map(min, values)], [*map(max, values)], alpha=0.15,
                          color=line.get_color())
        label += f"\n{run.value('length', benchmark)[0]:,.0f} tokens" if tokens else ""
        ends.append((middle[-1], steps[-1], label, line.get_color()))
    axis.set_ylim(0, 1.03 if quantity == "score" else None)
    label_ends(axis, ends)

def curves(title, arms, benchmark, quantities=NAMES, shades=None):
    """{caption: figure}, for each quantity."""
    found = {f"{title}: {q}": panel(title, "training step", NAMES[q]) for q in quantities}
    for quantity, axis in zip(quantities, found.values()):
        draw_lines(axis, arms, benchmark, quantity, shades)
    return {caption: axis.figure for caption, axis in found.items()}

def table(arms, benchmark):
    """Where the runs end."""
    return [["", "seeds", "step", "score", "tokens", "markers"], *(
        [run.label, len(run.results[benchmark, run.steps(benchmark)[-1]]), run.steps(benchmark)[-1],
         *(run.text(quantity, benchmark) for quantity in NAMES)]
        for run in arms if run.steps(benchmark))]

# --- the paper's claims, figures and tables ------------------------------------------------------

def compare(s, quantity, benchmark, *labels, keeps=False):
    """[verdict, numbers]: is each run's above the next one's (`keeps`: not below it)? By two
    standard errors, at the last step that all of them have. [] where a run is missing."""
    arms = [s.arms.get(label) for label in labels]
    steps = [{step for step in run.steps(benchmark) if step or not benchmark}
             for run in arms if run and run.method != "Base"]
    if None in arms or not set.intersection(*steps):
        return []
    last = max(set.intersection(*steps))
    at = [(quantity, benchmark, 0 if run.method == "Base" else last) for run in arms]
    values = [run.value(*which) for run, which in zip(arms, at)]
    signs = ["≈" if abs(a - b) <= 2 * math.hypot(error, noise) else ">" if a > b else "<"
             for (a, error, _), (b, noise, _) in zip(values, values[1:])]
    verdict = "no" if "<" in signs else "yes" if keeps or "≈" not in signs else "too close"
    text = " ".join(f"{run.label} {run.text(*which)} {sign}"
                    for run, which, sign in zip(arms, at, [*signs, f"(step {last})" * (last > 0)]))
    return [verdict, text]

def sizes(s, method):
    """[run], few questions first, of those that differ in |D| alone."""
    found = [r for r in s.arms.values() if r.method == method and r.differs <= {"num_questions"}]
    return sorted(found, key=lambda run: run.flags.get("num_questions") or math.inf)

def claims(s):
    """The paper's claims. Its numbers are AIME24's. Yes and no: by over two standard errors."""
    score, markers = (functools.partial(compare, s, q, s.other) for q in ("score", "epistemic"))
    learned, trained = (functools.partial(compare, s, "score", b) for b in (s.fresh, "training"))
    many = s.domain == ""  # not in a narrow domain, however many questions it has
    few = next((run.label[4:] for run in sizes(s, "SDPO") if run.label != "SDPO"), " few")
    told = [context.replace("_", " ") for context in CONTEXTS[:4]]
    rows = [
        ("Table 1: the more is shown, the fewer markers", compare(s, "epistemic", "", *told)),
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
    if s.domain in ("narrow", "chem"):
        rows = [("Figure 1a: SDPO learns more than GRPO", learned("SDPO", "GRPO")),
                ("Figure 1a: in shorter answers", compare(s, "length", s.fresh, "GRPO", "SDPO"))]
    rows = [[text, *result] for text, result in rows if result]
    return {"": [["the paper's claim", "holds here", "our numbers"], *rows]} if rows else {}

def figure_1(everything):
    """Figure 1: where self-distillation helps. SDPO wins where one way of answering serves all, \
and falls where each question needs its own search. It is short in both."""
    found = {}
    for model in sorted({s.model for s in everything}):
        own = {s.domain: s for s in sorted(everything, key=lambda s: s.fresh == "in")
               if s.model == model and s.domain is not None and {"GRPO", "SDPO"} <= s.arms.keys()}
        own = [own[domain] for domain in DOMAINS if domain in own]
        rows = [[DOMAINS[s.domain].replace("\n", " ").split(": ")[-1], *row] for s in own
                for row in table(filter(None, map(s.arms.get, COLOURS)), s.fresh)[1:]]
        if own:
            caption = "demo" if {"narrow", ""} <= {s.domain for s in own} else model
            found[caption] = picture(own)
            found[f"{model}, fresh questions"] = [["the domain", *table([], "")[0]], *rows]
    return found

def changed_answers(s):
    """[(Base's, SDPO's)] to other questions; first those that became wrong, short ones first."""
    runs = [s.arms.get(method) for method in ("Base", "SDPO")]
    if s.domain is None or None in runs or not s.other or not all(r.steps(s.other) for r in runs):
        return []
    before, after = ([*run.results[s.other, run.steps(s.other)[-1]].values()][0] for run in runs)
    pairs = [(before[i][0]["row"], after[i][0]["row"]) for i in before if i in after]
    return sorted(pairs, key=lambda pair: (pair[1]["correct"] - pair[0]["correct"],
                                           pair[0]["tokens"]))

@matplotlib.rc_context({"font.size": 16})
def picture(own):
    """An answer before and after, word by word; and score over steps for each domain."""
    figure = Figure((16, 6), dpi=100, layout="constrained")
    left, *axes = figure.subplots(1, 1 + len(own), width_ratios=[2.7, *[1.1] * len(own)])
    for axis, s in zip(axes, own):
        axis.set(title=DOMAINS[s.domain], xlabel="training step")
        draw_lines(axis, map(s.arms.get, ("GRPO", "SDPO")), s.fresh, "score", tokens=True)
    axes[0].set_ylabel("score on fresh questions")
    left.axis("off")
    for before, after in changed_answers(own[-1])[:1]:
        boxed = re.findall(r"\\boxed\{([^{}]*)\}", after["response"])[-1:]
        wrong = rf"(?<!\w){re.escape(boxed[0])}(?!\w)" if boxed else "(?!)"
        lines = [(before, line) for line in textwrap.wrap(before["question"].split("\n")[0], 50)]
        lines = lines[:4]
        for who, answer in (("Before training", before), ("After SDPO", after)):
            right = "right" if answer["correct"] else "wrong"
            lines += [(None, ""), (None, f"{who}: {right}, {answer['tokens']:,} tokens")]
            text = answer["response"].encode("utf-8", "replace").decode()  # half an emoji
            text = [line for part in text.split("\n") for line in textwrap.wrap(part, 50)]
            text = text if len(text) < 8 else [*text[:5], "...", text[-1]]
            lines += [(answer, line) for line in text]
        for number, (answer, line) in enumerate(lines):
            for word in re.finditer(r"\S+", line):
                colour = "#555555" if answer is None else MARKER if epistemic.count(word[0]) else (
                    WRONG if answer is after and re.search(wrong, word[0]) else "#111111")
                left.annotate(word[0], (0, 1), (9.64 * word.start(), -22 * number), va="top",
                              xycoords="axes fraction", textcoords="offset points", color=colour,
                              family="monospace", in_layout=False,
                              weight="bold" if colour in (WRONG, MARKER) else None)
    return figure

def tables_1_2(s):
    """Tables 1, 2: contexts, checkpoints. A solution shown makes answers short and sure; SFT on \
such answers (d_sg), though all are right, makes the model wrong; on unguided ones (d_ug) not."""
    return {b or "five contexts": table(s.arms.values(), b) for b in sorted(s.benchmarks)
            if s.domain is None}

def figures_3_to_6(s):
    """Figures 3 to 6, 14, 20: training. SDPO becomes short, sure and, on other questions, wrong."""
    found, flags = {}, {"demonstration", "ema", "top_k", "lr"}
    arms = [run for run in s.arms.values() if "strength" not in run.flags]
    own = [run for run in arms if run.differs <= flags]
    for b in s.benchmarks if s.domain is not None else []:
        title = {s.other: f"other questions ({b})", "training": b}.get(b, f"fresh questions ({b})")
        found |= curves(title, own, b) | {f"{title}: the end": table(arms, b)}
    return found

def figures_7_8(s):
    """Figures 7, 8: few or many questions. SDPO learns few fast, and loses most of the others."""
    panels = [(b, q, method) for b in s.benchmarks for q in ("score", "length")
              for method in ("GRPO", "SDPO")] if len(sizes(s, "SDPO")) > 2 else []
    return {caption: figure for b, q, method in panels for caption, figure in curves(
        f"{method}: {b}", sizes(s, method), b, [q], SHADES[method]).items()}

def figures_9_11(s):
    """Figures 9 to 11: each marker. A solution shown makes all of them rare, and so does SDPO."""
    benchmark = "" if "" in s.benchmarks else s.other
    arms = [run for method in [*COLOURS, *CONTEXTS] for run in sizes(s, method)]
    axis = panel("", "uses an answer", "", 4.2)
    for run in [run for run in arms if run.steps(benchmark)]:
        uses = [run.value(marker, benchmark)[0] for marker in epistemic.MARKERS]
        axis.plot(uses, epistemic.MARKERS, "o", color=COLOURS.get(run.label), label=run.label)
    axis.invert_yaxis()
    axis.figure.legend(loc="outside lower left", frameon=False, ncols=2, fontsize=9.5)
    return {benchmark: axis.figure} if axis.lines else {}

def tokens_by_kl(files):
    """Table 6 of token_kl.py's files together, the seeds of one model."""
    kl, count = Counter(), Counter()
    for token in [token for file in files for found in read(file) for token in found.values()]:
        kl[token["text"]] += token["kl"]
        count[token["text"]] += token["count"]
    # ours: the paper does not say what is frequent; its rarest variant has 25
    means = {text: kl[text] / n for text, n in count.items() if n >= 25}
    mean = statistics.fmean(means.values())
    rows = [[f"‘{text}’", f"{means[text]:.3f}", count[text], f"{means[text] / mean:.1f}"]
            for text in sorted(means, key=means.get, reverse=True)
            if text.strip(" :,.").lower() in epistemic.MARKERS]
    return [["token", "mean KL", "count", f"times the mean {mean:.3f}"], *rows]

def table_6(files):
    """Table 6: student and teacher by token. In the paper they differ most at markers."""
    return {str(file.parent): tokens_by_kl([file]) for file in files}

def remedies(s):
    """Remedies: score and length on other questions. Wanted: top left. A line joins strengths."""
    arms = [run for run in s.arms.values() if "strength" in run.flags or run.label in COLOURS]
    axis, ends = panel("", "tokens an answer", "score", 4.5), []
    for method in dict.fromkeys(run.method for run in arms if s.other):
        own = sorted((run.flags.get("strength", 0), run.value("length", s.other)[0],
                      run.value("score", s.other)[0]) for run in arms if run.method == method)
        _, x, y = zip(*own)
        (line,) = axis.plot(x, y, "o-", color=COLOURS.get(method))
        ends.append((y[0], x[0], method, line.get_color()))
    label_ends(axis, ends)
    return {s.other: axis.figure, "the end": table(arms, s.other)} if len(ends) > 3 else {}

def answers(s):
    """Answers side by side. To other questions; first those that SDPO gets wrong."""
    found = {}
    for i, pair in enumerate(changed_answers(s)[:3]):
        found[i] = f"<h4>{html.escape(pair[0]['question'])}</h4>"
        for who, answer in zip(("Base", "SDPO"), pair):
            text = re.sub(f"(?i)({'|'.join(epistemic.MARKERS)})", r"<mark>\1</mark>",
                          html.escape(answer["response"]))
            found[i] += (f"<div><b>{who}: {'right' if answer['correct'] else 'wrong'}</b>, "
                         f"{answer['tokens']:,} tokens<pre>{text}</pre></div>")
    return found

# --- the page ------------------------------------------------------------------------------------

SECTIONS = (claims, figure_1, tables_1_2, figures_3_to_6, figures_7_8, figures_9_11, table_6,
            remedies, answers)
ON_SCREEN = claims, figure_1, tables_1_2
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Self-distillation</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1360px; margin: auto; padding: 0 1em }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr));
  gap: 0 1.5em } .figures_7_8 { max-width: 1000px }
h4, .wide, .figure_1 img { grid-column: 1 / -1; overflow-x: auto } img { max-width: 100% }
table { border-collapse: collapse; margin: 0 0 1em } td { border-bottom: 1px solid #ddd;
  vertical-align: top; padding: .2em 1em .2em 0 } mark { background: #ffd54d }
pre { max-height: 24em; overflow: auto; white-space: pre-wrap } tr:first-child { font-weight: bold }
</style><h1>Self-distillation, measured</h1><p>±: the larger standard error of that over seeds (s)
and that over questions (q), in training over five steps. Bands: from the lowest seed to the
highest. Base: before training. Markers: """ + ", ".join(epistemic.MARKERS) + ".</p>"

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
        file = "figures/" + re.sub(r"\W+", "_", f"{name} {caption}").lower() + ".png"
        file = "demo.png" if caption == "demo" else file
        item.savefig(folder / file)
        return f'<img alt="{html.escape(caption)}" src="{file}">'
    rows = "".join("<tr><td>" + "<td>".join(html.escape(str(c)) for c in row) for row in item)
    rows = rows.replace(" ± ", "&nbsp;±&nbsp;")
    return f'<div class="wide"><b>{html.escape(caption)}</b><table>{rows}</table></div>'

def report(folder):
    found, page = settings(load_runs(folder)), PAGE
    whole = {figure_1: found, table_6: sorted(folder.rglob("token_kl.json"))}
    (folder / "figures").mkdir(exist_ok=True)
    for section in SECTIONS:
        title, sentence = section.__doc__.split(". ", 1)
        parts = [("", section(whole[section]))] if section in whole else [
            (s.name, section(s)) for s in found]
        body = ""
        for i, (name, items) in enumerate(parts):
            shown = [show(f"{section.__name__}_{i}", caption, item, folder)
                     for caption, item in items.items()]
            body += (f"<h3>{html.escape(name)}</h3><section class={section.__name__}>"
                     f"{''.join(shown)}</section>") * bool(items)
            for caption, item in items.items() if section in ON_SCREEN else ():
                if isinstance(item, list):
                    print(f"\n{title} {name} {caption}\n\n{markdown(item)}")
        page += f"<h2>{title}</h2><p>{sentence}</p>{body}" if body else ""
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
