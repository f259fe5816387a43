r"""Questions with their answers, and: is this response correct?

`load_questions` reads a data set, `Verifier` gives the training reward and the evaluation's score:
1 if the content of the last balanced \boxed{...} is the gold in a careful mathematician's eyes;
where the question asks for <answer> tags (chemistry), if the last of them hold just the gold.

    with Verifier() as verifier:
        rewards = verifier.verify(responses, golds)  # 1.0 or 0.0 each, in input order

               gold            equal to it                            not equal to it
    exact      \frac13         2/6, 0.\overline{3}, x = \frac13       0.333333
    decimal    0.33            \frac13, 0.330: what rounds to it      0.34
    percent    50, or 0.5      50\%                                   0.5, or 0.5\%
    units      15 \text{ cm}^2 15, 15 \text{ square centimeters}      15 \text{ cm}
    degrees    30^\circ        30, \frac{\pi}{6}                      \frac{\pi}{3}
    scale      2000000         2 \text{ million}, 2 \cdot 10^6        2
    mixed      1\frac{4}{5}    \frac95, 1.8, 1 4/5                    1 \cdot \frac45
    lists      1,-2            -2,1; \{1,-2\}; x=1 \text{ or } x=-2   1; 1,-2,3
    tuples     (1,2)           1,2                                    (2,1), [1,2]
    intervals  (3,4]           3 < t \le 4, \{x \mid 3 < x \le 4\}    [3,4]
    letters    3+2t            2t+3, f(t) = 2t+3                      3+2s, 3+2T, 3+2
    names      x=5             5                                      y=5, x=5=6
    bases      204_5           204_{5}, 204                           204_6, 54; 540_7 for 540

Where gold and answer cannot be told apart without the question (40 girls or 40 cats, a parameter
under another letter, the ratio or the time 10:30, 2x = 5 for 5) the verdict is 0.

How: both become one normal form; strings and plain numbers are compared in this process, the rest
in others with a limit on time and memory, for model text is hostile: `\prod_{n=1}^{10^9} n!` never
returns.  They are fresh interpreters that run this file: neither forks of the trainer (which holds
CUDA and vLLM) nor multiprocessing's spawn (which would import the training script again).
"""

import contextlib
import ctypes
import functools
import json
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

MAX_ANSWER = 1_000  # characters in a box; the golds of DAPO, MATH500, AIME and AMC have at most 53
MAX_TEXT = 15_000  # characters of a gold and a whole text given to `equal`; a pipe takes 64 KiB
LIFETIME = 2_000  # answers of one worker; sympy's caches grow, and must not meet the memory limit
STARTUP = 120.0  # s for a worker to get ready: 1 s warm, minutes from a cold network disk

# ----------------------------------------------------------------------------------- Questions
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."  # App. D
HUB = {  # short name: (hub id, configuration, split)
    "dapo": ("open-r1/DAPO-Math-17k-Processed", "all", "train"),  # each of the 17k once
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "amc23": ("math-ai/amc23", None, "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
}


def load_questions(source):
    """[dict(messages, answer[, solution])] of a short name, a hub id, or a .parquet/.json/.jsonl.

    Takes the schemas of the paper's files (`prompt` and `reward_model`, each maybe a JSON string)
    and plain `problem` or `question` with `answer`.  A `solution` that is a text is kept beside
    the answer; without another answer it is the answer itself.  The last message gets App. D's
    form: DAPO's own instruction off, INSTRUCTION on.  Not where the row's text asks for <answer>
    tags, as the `system` of SciKnowEval's chemistry does: it stays to the letter, and the gold is
    tagged too.  Raises ValueError, one line that names file and row.
    """
    questions = []
    for i, row in enumerate(_read_rows(source), 1):
        try:
            questions.append(_parse_question(row))
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{source}, row {i}: {error}") from None
    if not questions:
        raise ValueError(f"{source}: holds no questions")
    return questions


def _read_rows(source):
    path = Path(source)
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        if path.suffix not in (".json", ".jsonl"):
            from datasets import load_dataset

            name, config, split = HUB.get(source, (source, None, "train"))
            return load_dataset(name, config, split=split)
        text = path.read_text(encoding="utf-8")
    except Exception as error:  # the hub's failures have no common class
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"{source}: cannot be read, neither as a .parquet, .json or .jsonl file "
                         f"nor from the hub ({reason})") from None
    if text.lstrip()[:1] == "[":
        lines = [(1, text)]
    else:  # JSON Lines, whatever the suffix says (the authors' chemistry/train.json)
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: not JSON ({error})") from None
        rows.extend(value if isinstance(value, list) else [value])
    return rows


def _parse_question(row):
    if not isinstance(row, dict):
        raise ValueError("not an object with a question and an answer")

    def decoded(value):  # aime25, amc23 and math500 keep structures as JSON strings
        with contextlib.suppress(ValueError):
            if isinstance(value, str) and value.lstrip()[:1] in "[{":
                return json.loads(value)
        return value

    prompt = decoded(next((row[k] for k in ("prompt", "problem", "question") if row.get(k)), None))
    reward = decoded(row.get("reward_model"))
    golds = [reward.get("ground_truth") if isinstance(reward, dict) else None]
    golds += [row.get("answer"), row.get("solution")]
    gold = str(next((g for g in golds if g is not None), "")).strip()
    is_chat = isinstance(prompt, list) and prompt and isinstance(prompt[0], dict)
    messages = [dict(m) for m in prompt] if is_chat else [dict(role="user", content=prompt)]
    text = messages[-1].get("content")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no question (looked for prompt, problem, question)")
    if not gold:
        raise ValueError("no answer (looked for reward_model.ground_truth, answer, solution)")
    if isinstance(row.get("system"), str) and not is_chat:
        messages.insert(0, dict(role="system", content=row["system"]))
    if any("<answer>" in str(m.get("content")) for m in messages):
        gold = f"<answer>{gold}</answer>"
    elif not text.endswith(INSTRUCTION.strip()):
        for theirs in (r"^Solve the following math problem step by step\. The last line of your "
                       r"response should .*? answer to the problem\.\s*",
                       r'\s*Remember to put your answer on its own line after "Answer:"\.\s*$',
                       r"\s*Please reason step by step\.\s*$"):
            text = re.sub(theirs, "", text, flags=re.S)
        messages[-1]["content"] = text.strip() + INSTRUCTION
    question = dict(messages=messages, answer=gold)
    if isinstance(row.get("solution"), str) and golds[:2] != [None, None]:
        question["solution"] = row["solution"]
    return question


# ---------------------------------------------------------------------------------- Extraction
# `\\boxed{` is text that went through JSON twice.  Braces come in runs: 1 MB of them is one token.
_TOKEN = re.compile(r"\\\\?(boxed|fbox)\s*\{|\\.|\{+|\}+", re.DOTALL)


def answer_part(text: str) -> str:
    """What stands after the last `</think>`; the whole text if there is none."""
    return text.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    r"""Content of the last balanced `\boxed{...}`, else of the last balanced `\fbox{...}`, or None.

    "Last" is the one that begins last: of nested boxes the inner one.  A box that never closes, as
    in a response cut off by the length limit, is passed over, and an earlier one counts.  `\{` and
    `\}` are text, not braces.  One pass, linear in the text.
    """
    if "box" not in text:
        return None
    depth, opened, found = 0, [], {"boxed": (0, 0), "fbox": (0, 0)}
    for token in _TOKEN.finditer(text, max(0, text.index("box") - 3)):
        if token[1]:
            depth += 1
            opened.append((depth, token.end(), token[1]))
        elif token[0][0] == "{":
            depth += len(token[0])
        elif token[0][0] == "}":
            left = max(0, depth - len(token[0]))  # a brace that closes nothing is ignored
            while opened and opened[-1][0] > left:
                level, start, kind = opened.pop()
                found[kind] = max(found[kind], (start, token.start() + depth - level))
            depth = left
    start, end = found["boxed"] if found["boxed"][0] else found["fbox"]
    return text[start:end] if start else None


def last_tagged(text: str) -> str:
    """The last `<answer>` with what stands before its `</answer>`, stripped; "" if it never closes:
    unlike a box's, an earlier one does not count then."""
    content, closed, _ = text.rpartition("<answer>")[2].partition("</answer>")
    return f"<answer>{content.strip()}</answer>" if closed and "<answer>" in text else ""


# --------------------------------------------------------------------------------- Normal form
_GREEK = ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
          "phi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega").split()
_UNICODE = str.maketrans({
    **{letter: rf"\{name} " for letter, name in zip("αβγδεζηθικλμνξρστφχψωΓΔΘΛΣΦΨΩ", _GREEK)},
    "π": r"\pi ", "−": "-", "–": "-", "∞": r"\infty ", "×": r"\cdot ", "·": r"\cdot ", "÷": "/",
    "*": r"\cdot ", "±": r"\pm ", "≤": r"\le ", "≥": r"\ge ", "≈": r"\approx ", "∈": r"\in ",
    "∪": r"\cup ", "∅": r"\emptyset ", "°": r"^{\circ}", "²": "^{2}", "³": "^{3}"})
_COMMANDS = {name: new for new, names in {
    r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom", r"\cdot ": "times", r"\mod ": "bmod",
    r"\le ": "leq leqslant", r"\ge ": "geq geqslant", "<": "lt", ">": "gt", "(": "langle",
    ")": "rangle", "|": "lvert rvert vert", r"\{": "lbrace", r"\}": "rbrace", ",": "quad qquad",
    r"\or ": "lor vee", r"\and ": "land wedge", r"\emptyset": "varnothing", r"\overline": "bar",
    r"^{\circ}": "degree", "":  # how it looks
    "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle mathbf mathit mathsf "
    "boldsymbol bm underline ensuremath rm bf it"}.items() for name in names.split()}
_SCALES = dict(hundred="10^{2}", thousand="10^{3}", million="10^{6}", billion="10^{9}",
               trillion="10^{12}")
_UNITS = {word: name for name, words in {  # a plural s is dropped
    "degree": "deg", "percent": "percentage pct", "dollar": "usd", "cm": "centimeter",
    "m": "meter", "km": "kilometer", "inch": "in inche", "foot": "ft feet", "mile": "mi",
    "square": "sq squared", "": "unit of the per"}.items() for word in words.split()}
_BARE = "(?:km|cm|m|ft|miles?)/(?:h|hr|hour|s|sec|min)|mm|cm|km|kg|lbs?|oz|ft|mph|hrs?|mins?"
# Words that change what stands before them, or guess again: "3 hundredths", "6 if n is even".
_CHANGING = re.compile(
    r"\b(?:\w*teen(?:ths?)?|\w*ty|twelfths?|(?:zero|one|two|three|four|five|six|seven|eight|nine|"
    rf"ten|eleven|twelve|dozen|score|{'|'.join(_SCALES)}|hal[fv]e?|quarter|third|fif|ninth|tenth)"
    r"(?:th)?s?|not|no|if|when|unless|except|but|maybe|perhaps|either|than|least|most|plus|minus|"
    r"times|over|to|squared|cubed|doubled|halved|factorial|between|wrong|negative|above|through|"
    r"more|less|alternatively|k)\b|[0-9]", re.IGNORECASE)

# The rules: what each is about, pattern, replacement; applied in this order.  The trainer's process
# runs them on hostile text: a pattern must take linear time (no two repeats that can share text).
_RULES = [(re.compile(pattern), new) for _, pattern, new in (
    ("row that lost a backslash", r"(?<!\\)\\(?=[-0-9])", r"\\\\"),
    ("root sign", r"√ ?([0-9]+|[a-z])", r"\\sqrt{\1}"),
    ("thousands", r"(?<=[0-9]) ?(?:\{,\}|,?(?:\\[,!;: ] ?)+|~)(?=[0-9]{3}(?![0-9]))", ""),
    ("thousands too", r"(?<![0-9.,([])(?<!\\\{)[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)"
     r"(?![0-9,/])", lambda m: re.sub("[, ]", "", m[0])),
    ("formula", r"(?<!\\)\$|(?<!\\)\\[()\[\]]", ""),
    ("space", r"(?:(?<!\\)\\[,!;:> ]|~) ?", " "),
    ("colour", r"\\(?:text)?color ?\{[^{}]{0,40}\}", ""),
    ("upright", r"\\(?:text[a-z]*|mathrm|mbox|operatorname) ?(?=\{)", r"\\text"),
    ("names", r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln)(?![A-Za-z])", r"\\\1 "),
    ("commands", r"\\([a-zA-Z]+)", lambda m: _COMMANDS.get(m[1], m[0])),
    ("words", r"\\(?:text|begin|end)\{[^{}]*\}|\\[a-zA-Z]+|"
     rf"((?<=[0-9.}} ])(?:{_BARE})|(?:[A-Za-z]{{2,}} )+[A-Za-z]{{2,}}|[A-Za-z]{{4,}}|or|and|yes|no)"
     "(?![A-Za-z])", lambda m: rf"\text{{{m[1]}}}" if m[1] else m[0]),
    ("and, or", r"\\text\{([^{}]*)\}", lambda m: _AND.sub(r"} \\\1 \\text{", m[0])),
    ("no words", r"\\text\{([^A-Za-z{}]*|e|i)\}", r"\1"),
    ("power of a unit", r"(\\text\{[^{}^]*)\^([23])\}", r"\1}^\2"),
    ("numerator", r"\\frac ?([0-9A-Za-z]|\\pi)", r"\\frac{\1}"),
    ("denominator", r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\}) ?([0-9A-Za-z]|\\pi)", r"\1{\2}"),
    ("root", r"\\sqrt ?([0-9A-Za-z]|\\pi)", r"\\sqrt{\1}"),
    ("exponent", r"\^ ?(-?[0-9]+|[A-Za-z]|\\circ|\\pi)", r"^{\1}"),
    ("index", r"_ ?([0-9]+|[A-Za-z])", r"_{\1}"),
    ("sine of degrees", r"(\\(?:sin|cos|tan|cot|sec|csc)) ?\(?([0-9]+)\^\{ ?\\circ ?\}\)?",
     r"\1(\\frac{\2\\pi}{180})"),
    ("degrees", r"\^\{ ?\\circ ?\}", r"\\text{degree}"),
    ("percent", r"\\?%", r"\\text{percent}"),
    ("ordinal", r"(?<=[0-9]) ?(?:\^\{)?(?:\\text\{)?(?:st|nd|rd|th)(?![A-Za-z])\}{0,2}", ""),
    ("remainder", r"\\pmod ?\{? ?([0-9a-z]+) ?\}?", r"\\text{modulo}"),
    ("scale", rf"(?<=[0-9]) ?\\text\{{ ?({'|'.join(_SCALES)})s?(?= |\}})([^{{}}]*)\}}",
     lambda m: rf"\cdot {_SCALES[m[1]]}" + (rf"\text{{{m[2]}}}" if m[2].strip() else "")),
    ("dollars", r"\\\$ ?(-?[0-9]*\.?[0-9]+(?:\\cdot 10\^\{[0-9]+\})?)", r"\1\\text{dollar}"),
    ("square unit", r"\\text\{([^{}]*)\}\^\{2\}", r"\\text{\1 square}"),
    ("cubic unit", r"\\text\{([^{}]*)\}\^\{3\}", r"\\text{\1 cubic}"),
    ("compound unit", r"(\\text\{[^{}]*)\} ?/? ?\\text\{", r"\1 "),
    ("fraction in a line", r"(?<![0-9A-Za-z)}.])([0-9]+)/([0-9]+)(?![0-9A-Za-z.(!\\^])",
     r"\\frac{\1}{\2}"),
    ("mixed number", r"(?<![0-9.}\])A-Za-z])([0-9]+) ?(\\frac\{([0-9]{1,30})\}\{([0-9]{1,30})\})",
     lambda m: f"({m[1]}+{m[2]})" if int(m[3]) < int(m[4]) else m[0]),
    ("repeating", r"(?<![0-9])([0-9]{1,30})\.([0-9]{0,30})\\overline\{([0-9]{1,30})\}", lambda m:
     rf"\frac{{{int(m[1] + m[2] + m[3]) - int(m[1] + m[2])}}}"
     rf"{{{len(m[3]) * '9'}{len(m[2]) * '0'}}}"),
    ("set builder", r"^\\\{ ?(?:[a-z]|\\[a-z]+) ?(?:\\in ?\\mathbb\{R\} ?)?(?:\\mid|\||:)(.*)\\\}$",
     r"\1"),
    ("member of a set", r"^(?:[a-z]|\\[a-z]+) ?\\in ?(?=\\\{)", ""),
    ("all numbers", r"\\mathbb\{R\}", r"(-\\infty,\\infty)"),
    ("matrix", r"(?:\\\\ ?)?\\(begin|end)\{[pb]matrix\}", r"\\\1 "),
    ("semicolon", "(?<!\\\\);", ","),
    ("row of a matrix", r"\\\\", ";"),
    ("cell of a matrix", r"(?<!\\)&", ","),
)]
_AND = re.compile(r" ?\b(and|or)\b ?")
_LOOSE = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")


def _normal(text: str) -> str:
    """One spelling of what mathematicians write in several; no value changes."""
    text = " ".join(text.translate(_UNICODE).split())
    for pattern, new in _RULES:
        text = pattern.sub(new, text)
    text = _LOOSE.sub("", " ".join(text.split())).rstrip("\\. ")
    for _ in range(4):  # braces around it all
        if text[:1] != "{" or text[-1:] != "}" or _split(text[:-1], "}")[1]:
            break
        text = text[1:-1].strip().rstrip("\\. ")
    return text


# ------------------------------------------------------------------- What strings alone can settle
# The formula is only a part of the text: something marks it, or there are two words in a row.
_PROSE = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]|box|(?<![\\A-Za-z{ ])[A-Za-z]{2,} [A-Za-z]{2,}")
_TEXT = re.compile(r"\\(?:text\w*|mbox|math(?:rm|bf))\s*\{([^{}]*)\}")
_ALL_WORDS = re.compile(r"(?:\\text\{[^{}]*\}|\\and|\\or|[ ,])+")
_LETTER = re.compile(r"\(?\s*([A-J])\s*\)?")
_CHOICE = re.compile(r"[ ({]*([A-J])(?:[ )}]*|[ )}]*[.:)](?!.*\b[A-J]\b).*)", re.DOTALL)
_NUMBER = re.compile(r"(-?)(?:\\frac\{(-?[0-9]+)\}\{([0-9]+)\}|"
                     r"([0-9]+\.?[0-9]*|\.[0-9]+)(?:\\cdot 10\^\{(-?[0-9]{1,3})\})?)")


def _number(text: str) -> tuple[Fraction, Fraction] | None:
    """(value, worth of the last decimal place, 0 if it is exact) of a plain number, else None."""
    match = _NUMBER.fullmatch(text) if len(text) <= MAX_ANSWER else None  # int() has a limit
    if not match or match[3] and not int(match[3]):
        return None
    sign, top, bottom, digits, power = match.groups()
    value = Fraction(int(top), int(bottom)) if top else Fraction(f"{digits}e{power or 0}")
    decimals = len((digits or "").partition(".")[2])
    place = Fraction(10) ** (int(power or 0) - decimals) if decimals else Fraction(0)
    return (-value if sign else value), place


def _same_number(gold: str, answer: str) -> bool | None:
    """An exact gold wants an exact answer; a decimal gold takes what rounds to it."""
    expected, found = _number(gold), _number(answer)
    return 2 * abs(expected[0] - found[0]) <= expected[1] if expected and found else None


def _choice(text: str) -> str | None:
    """The letter of `B`, `(B)`, `B: 12 mol`; None for `ABCD`, `A or B`, `A: 1, B: 2`."""
    match = _CHOICE.fullmatch(_TEXT.sub(r"\1", text).replace("$", "").strip(" .{}"))
    return match and match[1]


def _settle(gold: str, answer: str, boxed: bool) -> float | tuple[str, str, bool]:
    """The verdict, where strings and plain numbers settle it, or the request for a worker."""
    gold, answer = gold.strip(), answer.strip()
    limit = MAX_ANSWER if boxed else MAX_TEXT
    if not gold or not answer or len(answer) > limit or len(gold) + len(answer) > MAX_TEXT:
        return 0.0  # a box that long lists guesses, or attacks the parser
    if gold == answer or gold.startswith("<answer>"):  # a letter alone, as the authors' mcq.py
        return float(gold == answer)
    if (verdict := _same_number(gold, answer)) is not None:
        return float(verdict)  # the commonest error, a wrong integer, is cheap
    bare = last_boxed(gold) or gold
    if letter := _LETTER.fullmatch(_TEXT.sub(r"\1", bare)):
        return float(_choice(answer if boxed else last_boxed(answer) or answer) == letter[1])
    if not boxed and _PROSE.search(answer):
        return gold, answer, False
    bare, reply = _normal(bare), _normal(answer)
    if not reply or bare == reply:
        return float(bool(reply))
    if (verdict := _same_number(bare, reply)) is not None:
        return float(verdict)
    if _ALL_WORDS.fullmatch(bare):  # as a product of letters, "east" would be "seat"
        return float(bare.casefold() == reply.casefold())
    return (bare, reply, True) if boxed else (gold, answer, False)


# --------------------------------------------------------------------------------------- Verifier
class Verifier:
    """Compares answers; a context manager, or call `close()`.  Not for two threads at once.

    `workers`: processes, default min(8, CPUs), started when first needed.  `timeout`: seconds of
    wall-clock for one answer (the authors' 5).  `memory_mb`: MiB that a worker may use on top of
    its imports.  `timeouts` and `crashes` count the answers that got 0 because their worker was
    stopped or died.  RuntimeError if no worker can start: all-zero rewards would hide it.
    """

    def __init__(self, workers: int | None = None, timeout: float = 5.0, memory_mb: int = 1024):
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.timeout, self.memory_mb, self._pid = timeout, memory_mb, os.getpid()
        self.timeouts = self.crashes = self._failed_starts = 0
        self._pool, self._selector = [], selectors.DefaultSelector()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Kill and reap all workers.  A later call starts new ones."""
        for worker in list(self._pool) if os.getpid() == self._pid else ():  # not a fork's to kill
            self._discard(worker)

    def verify(self, responses: list[str], golds: list[str], after_think=False) -> list[float]:
        r"""1.0 for each response whose last \boxed{} equals its gold, else 0.0, in input order; a
        gold in <answer> tags wants the same in the response's last ones, and no box counts;
        with `after_think` only what stands after the last `</think>` is read."""
        texts = [answer_part(r) if after_think else r for r in responses]
        return self._judge([
            (gold, (last_tagged if gold.startswith("<answer>") else last_boxed)(text) or "", True)
            for gold, text in zip(golds, texts, strict=True)])

    def equal(self, pairs: list[tuple[str, str]]) -> list[float]:
        r"""1.0 for each equal (gold, prediction).  In a text that is not one whole \boxed{...}
        math-verify looks for the answer, which is more lenient."""
        boxes = [(gold, text, last_boxed(text)) for gold, text in pairs]
        return self._judge([(gold, box, True) if text.strip() == f"\\boxed{{{box}}}"
                            else (gold, text, False) for gold, text, box in boxes])

    def _judge(self, triples: list[tuple[str, str, bool]]) -> list[float]:
        settled = {triple: _settle(*triple) for triple in dict.fromkeys(triples)}
        requests = list(dict.fromkeys(s for s in settled.values() if isinstance(s, tuple)))
        # ASCII JSON: newlines, NUL and lone surrogates travel as escapes.
        lines = [json.dumps(request).encode() + b"\n" for request in requests]
        verdicts = dict(zip(requests, self._run(lines), strict=True))
        return [verdicts.get(settled[triple], settled[triple]) for triple in triples]

    def _run(self, lines: list[bytes]) -> list[float]:
        verdicts, todo = [0.0] * len(lines), list(range(len(lines)))[::-1]
        try:
            while todo or any(w.task is not None for w in self._pool):
                wanted = len(todo) + sum(w.task is not None for w in self._pool)
                for _ in range(len(self._pool), min(self.workers, wanted)):
                    self._start()
                for worker in [w for w in self._pool if w.ready and w.task is None][: len(todo)]:
                    try:
                        worker.stdin.write(lines[todo[-1]])
                    except BrokenPipeError:  # it died idle: no answer is lost
                        self._discard(worker)
                        continue
                    worker.task, worker.deadline = todo.pop(), time.monotonic() + self.timeout
                waits = [w.deadline for w in self._pool if w.task is not None or not w.ready]
                pause = max(0.0, min(waits, default=0.0) - time.monotonic())
                for event, _ in self._selector.select(pause):
                    self._hear(event.data, verdicts)
                for worker in [w for w in self._pool if w.task is not None or not w.ready]:
                    if time.monotonic() > worker.deadline:
                        self.timeouts += worker.ready
                        self._discard(worker, f"nothing heard for {STARTUP:.0f} s")
        finally:  # after Ctrl-C: a late verdict must not be taken for the next request's
            for worker in [w for w in self._pool if w.task is not None]:
                self._discard(worker)
        return verdicts

    def _start(self) -> None:
        command = [sys.executable, os.path.abspath(__file__), "--worker"]
        worker = subprocess.Popen(  # a fixed seed, as sympy's order of a set, so a verdict, has it
            [*command, str(self.timeout), str(self.memory_mb)], bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""})
        worker.ready, worker.task, worker.answers = False, None, 0
        worker.deadline = time.monotonic() + STARTUP
        self._pool.append(worker)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)

    def _hear(self, worker: subprocess.Popen, verdicts: list[float]) -> None:
        said = os.read(worker.stdout.fileno(), 4096)
        if worker.task is not None and said in (b"1\n", b"0\n"):
            verdicts[worker.task], worker.task = float(said), None
            worker.answers += 1
            if worker.answers == LIFETIME:
                self._discard(worker)
        elif not worker.ready and said == b"ready\n":
            worker.ready, self._failed_starts = True, 0
        else:  # end of file or an error: it left, was killed, or cannot import math-verify
            self.crashes += worker.task is not None
            self._discard(worker, said.decode(errors="replace") or "killed")

    def _discard(self, worker: subprocess.Popen, reason: str | None = None) -> None:
        self._pool.remove(worker)
        self._selector.unregister(worker.stdout)
        worker.kill()
        worker.stdin.close()
        worker.stdout.close()
        worker.wait()  # no zombie
        self._failed_starts += reason is not None and not worker.ready
        if self._failed_starts >= 3:
            self._failed_starts = 0
            raise RuntimeError(f"the verifier's workers cannot start: {reason}")


# ------------------------------------------------------------- Structure and value, in a worker
_TOKENS = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPENING = {"(", "[", "{", r"\{", r"\lfloor", r"\lceil", r"\begin"}
_CLOSING = {")", "]", "}", r"\}", r"\rfloor", r"\rceil", r"\end"}
_ORDER = {"=": "=", "<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}  # read from the right
_SYMBOL = r"(?:[A-Za-z]|\\(?!pi|infty)[a-z]+)(?:_\{[^{}]*\})?'*(?:(?:\^\{-1\})?\([^()]*\))?"
_NAME = re.compile(rf"{_SYMBOL}|\({_SYMBOL}(?:,{_SYMBOL})*\)|\\text\{{[^{{}}]*\}}")
_NAMING = re.compile(r"(?:[A-Za-z+|(), ']|\\text\{[A-Za-z ]*\}|\\(?!pi|infty|text)[a-z]+)+")
_KNOWN = ("frac sqrt pi infty cdot binom sin cos tan cot sec csc arcsin arccos arctan sinh cosh "
          "tanh log ln exp lfloor rfloor lceil rceil sum prod int lim to mod gcd lcm min max")
_FORMULA = re.compile(r"(?:[A-Za-z0-9+\-/^_(){}\[\]|!.,= ]|"
                      rf"\\(?:{'|'.join(_KNOWN.split() + _GREEK)})(?![A-Za-z]))+")
# What the parser reads otherwise than people do, 2 3, 2{3}, 2(3), 2\frac{3}{2}, 5_a, A^T, I, and
# what is never an answer but takes for ever: 9^{9^{9^{9}}}, (9!)!, 100000!.
_MISREAD = re.compile(r"[0-9] ?\{? ?[0-9.]* [0-9]|[0-9] ?\{ ?[0-9]|[0-9)}]_|[0-9] ?\(-?[0-9]+\)|"
                      r"[0-9.]\\frac\{[0-9]+\}\{[0-9]|\^\{?T|(?<![\\A-Za-z])I|"
                      r"(?:\^\{[^{}^]*){3}|!\)*!|[0-9]{5}!")


def _split(text, *marks):
    """(the parts between marks that stand in no bracket, those marks)"""
    parts, found, depth, start = [], [], 0, 0
    for token in _TOKENS.finditer(text):
        depth -= token[0] in _CLOSING
        if depth == 0 and token[0] in marks:
            parts.append(text[start:token.start()].strip())
            found.append(token[0])
            start = token.end()
        depth += token[0] in _OPENING
    return [*parts, text[start:].strip()], found


def _list(text):
    r"""(brackets and marks, items) of what is `(...)`, `\{...\}`, a matrix, else None."""
    match = re.fullmatch(r"(\\\{|[(\[]|\\begin)(.*)(\\\}|[)\]]|\\end)", text, re.DOTALL)
    if not match or _split(text[:-len(match[3])], *_CLOSING)[1]:
        return None
    items, marks = _split(match[2], ",", ";")
    return [match[1] + match[3], *marks], items


def _interval(text):
    r"""`x\in(1,2]` for the inequality that says so, else None."""
    sides, signs = _split(text, *_ORDER)
    if signs and not set(signs) - {">", r"\ge"}:
        sides, signs = sides[::-1], [_ORDER[sign] for sign in signs[::-1]]
    if len(sides) == 2 and _NAME.fullmatch(sides[0]):
        sides, signs = [r"-\infty", *sides], ["<", *signs]
    elif len(sides) == 2:
        sides, signs = [*sides, r"\infty"], [*signs, "<"]
    if len(sides) != 3 or not _NAME.fullmatch(sides[1]) or set(signs) - {"<", r"\le"}:
        return None
    return rf"{sides[1]}\in{'[('[signs[0] == '<']}{sides[0]},{sides[2]}{'])'[signs[1] == '<']}"


def _members(text):
    r"""The members of a list, a set, a union, a \pm; of an inequality, its interval."""
    if (braces := _list(text)) and braces[0][0] == r"\{\}":
        text = text[2:-2]
    parts, marks = _split(text, ",", r"\or", r"\and", r"\cup")
    if r"\and" in marks and any(map(_interval, parts)):
        return [text]  # an intersection
    if marks:
        return [member for part in parts for member in _members(part)]
    if text.count(r"\pm") == 1 and text.count(r"\mp") < 2:
        return [text.replace(r"\pm", upper).replace(r"\mp", lower) for upper, lower in ("+-", "-+")]
    return [_interval(text) or text]


def _is_name(side, gold):
    r"""Does the left side of an equation name the quantity?  x, f(2), m+n; not 2x, x-1, \pi."""
    side = re.sub(r"_\{[^{}]*\}|(?<=[A-Za-z}])(?:\^\{-1\})?\([^()]*\)", "", side)
    symbols, others = (set(re.findall(r"\\[a-zA-Z]+|[A-Za-z]", text)) for text in (side, gold))
    return bool(_NAMING.fullmatch(side)) and not _CHANGING.search(side) and not symbols & others


def _unit(text):
    r"""`15\text{square cm}` as ("15", its unit's one name); the text and "" without a unit."""
    match = re.fullmatch(r"(.+?)\\text\{([A-Za-z .,:'()/-]*)\}", text, re.DOTALL)
    if not match or _CHANGING.search(match[2]) or match[2].count("percent") > 1:
        return text, ""
    words = [word.removesuffix("s") or word for word in re.findall("[a-z]+", match[2].lower())]
    names = [_UNITS.get(word, word) for word in words]
    return match[1], "percent" if "percent" in names else " ".join(sorted(names)).strip()


def _same(gold, answer):
    """Are they equal?  Both in normal form, as are all texts below."""
    golds, answers, ordered = _members(gold), _members(answer), False
    for one, many in ((golds, answers), (answers, golds)):  # 1,2 may stand for (1,2)
        if len(one) == 1 < len(many) and (items := _list(one[0])) and items[0][0] == "()":
            one[:], ordered = items[1], True
    if len(golds) != len(answers):
        return False
    labels = {m.partition("=")[0] if "=" in m else _unit(m)[1] for m in golds}
    if ordered or len(labels) > 1:  # 60,40 is not 40 girls, 60 boys
        return all(map(_same_member, golds, answers))
    for member in golds:
        found = next((a for a in answers if _same_member(member, a)), None)
        if found is None:
            return False
        answers.remove(found)
    return True


def _same_member(gold, answer):
    (*names, value), signs = _split(gold, r"\in", *_ORDER)
    if names and not (signs in (["="], [r"\in"]) and _NAME.fullmatch(names[0])):
        return _same_equation(gold, answer)
    sides = [side for side in _split(answer, "=", r"\in", r"\approx", r"\equiv")[0] if side]
    if len(sides) > 1 and (sides[0] == names[0] if names else _is_name(sides[0], value)):
        sides = sides[1:]
    elif len(sides) > 1 and names:
        return _same_equation(gold, answer)  # 2x-y+3=0 for y=2x+3
    exact = [_same_value(value, side) for side in sides]
    return any(exact) and all(  # 1/3 = 0.333: what stands beside the answer rounds to it
        right or (_number(side) or (0, 0))[1] > 0 and _same_value(side, value)
        for right, side in zip(exact, sides))


_FACTORS = {"percent": r"\frac{%s}{100}", "degree": r"\frac{(%s)\pi}{180}"}


def _same_value(gold, answer):
    (gold, unit), (answer, other) = _unit(gold), _unit(answer)
    if unit and other and unit != other:
        return False  # not even where the numbers agree
    if unit != other and (factor := _FACTORS.get(unit or other)):
        plain = r"\pi" not in gold + answer and (
            "degree" in (unit, other) or abs((_number(gold) or (0, 0))[0]) >= 1)
        return plain and _same_value(gold, answer) or _same_value(
            factor % gold if unit else gold, factor % answer if other else answer)
    if gold == answer:
        return True
    items, own = _list(gold), _list(answer)
    if items and own and len(items[1]) > 1:
        return items[0] == own[0] and all(map(_same, items[1], own[1]))
    if (verdict := _same_number(gold, answer)) is not None:
        return verdict
    if re.fullmatch(r"[0-9A-F]+_\{[0-9]+\}", gold):
        return gold.startswith(answer + "_")  # 204_5 may be 204, but 540 is not 540_7
    if gold.isdigit() and answer in (gold + "_{2}", gold + "_{10}"):
        return True
    first, second, expected = _parse(gold), _parse(answer), _number(gold)
    if expected and expected[1]:
        return bool(abs(second - first) <= expected[1] / 2)
    if first.is_infinite or second.is_infinite:
        return first == second
    difference = first - second
    if difference.expand() == 0:
        return True
    letters = enumerate(sorted(difference.free_symbols, key=str))
    sample = difference.subs({letter: Fraction(3 * i + 5, 7) for i, letter in letters})
    if bool(sample.is_number and abs(sample.evalf(30)) > 1e-9):
        return False  # at once: the proof below takes seconds where there is nothing to prove
    return bool(difference.equals(0))


def _same_equation(gold, answer):
    """Do two equations differ by a factor only?  x-y=1 and 2y=2x-2."""
    (sides, signs), (others, turned) = _split(gold, *_ORDER), _split(answer, *_ORDER)
    if signs != ["="] or turned != ["="]:
        return False
    left, right = (_parse(a) - _parse(b) for a, b in (sides, others))
    factor = (left / right).simplify()
    return bool(factor.is_Rational and factor != 0)


@functools.lru_cache(64)
def _parse(text):
    """The expression.  Exact: 0.5 becomes a fraction, not a float."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    if not _FORMULA.fullmatch(text) or _MISREAD.search(text):
        raise ValueError("not one formula")
    text = re.sub(r"([0-9]*)\.([0-9]+)", lambda m: (
        rf"(\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}})"), text)
    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    parsed = latex2sympy(text, is_real=True, normalization_config=None,
                         conversion_config=config).doit()
    if not isinstance(parsed, sympy.Expr) or parsed.has(sympy.nan, sympy.zoo):
        raise ValueError("not an expression")
    if parsed.has(sympy.oo, -sympy.oo) and not parsed.is_infinite:
        raise ValueError("sympy reckons oddly with infinities: 7 - (oo - Ei(1)) is 0")
    return parsed.subs(sympy.Symbol("i", real=True), sympy.I) if "i" in text else parsed


# --------------------------------------------------------------------------------- In the worker
def _comparer():
    """`same(gold, answer, boxed) -> bool`; math-verify is imported here, never in the trainer."""
    import logging

    import sympy.physics.units  # noqa: F401  simplify() would import it later, and it needs eval
    from latex2sympy2_extended import latex2sympy2
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from sympy import Float, Rational, lambdify

    # Model text must not become Python.  In math-verify 0.9 with sympy 1.14 it does thrice: sympify
    # evals every number, a bare "1/2" goes to parse_expr, which is eval (the LaTeX grammar reads it
    # too), and infinite sums are compiled, names from the text included (subs does the same).
    def number(text, *_, **__):
        return Rational(text) if re.fullmatch("[-+0-9/]+", text) else Float(text)

    parser, compiler = sys.modules["sympy.parsing.sympy_parser"], sys.modules[lambdify.__module__]
    parser.eval = compiler.eval = compiler.exec = None  # a path we have not seen fails
    parser.parse_expr = number
    sys.modules["math_verify.parser"].parse_expr = lambda text, evaluate: latex2sympy2.latex2sympy(
        text.strip(" .").replace("**", "^"), normalization_config=None)
    sys.modules["sympy.core.evalf"].lambdify = lambda n, term: lambda k: int(term.subs(n, k))
    logging.disable(logging.CRITICAL)
    latex = [LatexExtractionConfig()]

    def find(text):
        # One formula from end to end; if it is none, what math-verify finds in the text.
        # No timeout: theirs is signal.alarm, and the parent's kill is the limit.
        whole = [] if _PROSE.search(text) else parse(f"${' '.join(text.split())}$", latex,
                                                     parsing_timeout=None)
        if any(not isinstance(p, str) for p in whole):
            return whole
        return parse(text, [*latex, ExprExtractionConfig()], parsing_timeout=None) or whole

    def same(gold, answer, boxed):
        if boxed:
            return _same(gold, answer)  # in normal form already
        with contextlib.suppress(Exception):  # of a text, not one formula
            if _same(_normal(gold), _normal(answer)):
                return True
        return verify(find(gold), find(answer), timeout_seconds=None)

    return same


def _work(timeout: float, memory_mb: int) -> None:
    """Answer each JSON line [gold, answer, boxed] on stdin with a line 1 or 0."""
    # PR_SET_PDEATHSIG: die, even if busy, with the trainer's thread that started this process.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what sympy prints is no verdict
    try:
        same = _comparer()
        if not same(r"\frac{1}{2}", "0.5", True):  # also warms the parser's caches
            raise RuntimeError("math-verify cannot read LaTeX: is antlr4-python3-runtime there?")
        with open("/proc/self/statm") as file:  # pages of address space
            limit = int(file.read().split()[0]) * resource.getpagesize() + memory_mb * 2**20
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]  # of the whole job; -1 is none
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except BaseException as error:
        os.write(out, f"{type(error).__name__}: {error}"[:2000].encode())
        return
    os.write(out, b"ready\n")
    for line in sys.stdin.buffer:
        signal.alarm(int(timeout) + 2)  # the kernel's own kill, should the parent be stopped
        try:
            verdict = same(*json.loads(line))
        except MemoryError:
            return  # its state is unsure; the parent counts a crash
        except Exception:
            verdict = False  # not a formula
        signal.alarm(0)
        os.write(out, b"1\n" if verdict else b"0\n")


if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    _work(float(sys.argv[2]), int(sys.argv[3]))
