r"""Questions with their answers, and: is this response correct?

A gold that is a number, as all of DAPO, AIME and AMC and 4 of 5 of MATH-500 are, is compared by
`read_number`: it reads a text as one number or none, exactly, and never sees the gold, so no box
can hold two guesses.  Letters and words are compared as text.  Only other golds go to math-verify,
in processes that can be killed, for model text is hostile: `\prod_{n=1}^{10^9} n!` never returns.

Given up: right, but gets 0                  Given up: wrong, but gets 1
204 for 204_5, 1010_2 for 1010               15 cm for 15 cm^2, 36 cents or 36% for \$36
\frac{\pi}{6} for 30^\circ, \pi for 3.14     42 pairs, 42 score: a word that no list here has
e^0, \log_2 8; R^2 = 42, \cos A = \frac34    y = 5 where x is asked; k = 2k for 2k; 1% for 1
7 goats and 4 toys for 7,4; (C) 12 for (C)   \sqrt{51} \approx 9.9 for \sqrt{51}
"""

import ast
import contextlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

# ----------------------------------------------------------------------------------- Questions
MAX_GOLD = 200  # characters; the golds of DAPO, MATH-500, AIME and AMC have at most 53
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."  # App. D
THEIRS = re.compile(  # what INSTRUCTION replaces
    r"^Solve the following math problem step by step\. .*? answer to the problem\.\s*|"
    r'\s*(?:Remember to put your answer on its own line after "Answer:"|'
    r"Please reason step by step)\.\s*$", re.DOTALL)
HUB = {"dapo": ("open-r1/DAPO-Math-17k-Processed", "all", "train"),  # id, configuration, split
       "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
       "aime25": ("math-ai/aime25", None, "test"),
       "amc23": ("math-ai/amc23", None, "test"),
       "math500": ("HuggingFaceH4/MATH-500", None, "test")}


def load_questions(source):
    """[dict(messages, answer[, solution])] of a short name, a hub id, or a .parquet/.json/.jsonl.

    Reads the paper's files, DAPO, AIME, AMC, MATH, GSM8K, DeepMath, NuminaMath.  The last message
    gets App. D's form; if the row asks for <answer> tags (chemistry), it stays and the gold is
    tagged.  ValueError, one line with file, row and column, for what no response could answer.
    """
    questions = []
    for number, row in enumerate(_read_rows(source), 1):
        try:
            questions.append(_parse_question(row))
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from None
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
        text = path.read_text(encoding="utf-8-sig")  # Windows puts a byte order mark first
    except Exception as error:  # the hub's failures have no common class
        raise ValueError(f"{source}: cannot be read as a file or from the hub: {error!r}") from None
    # One list, or JSON Lines, whatever the suffix says (the authors' chemistry/train.json).
    lines = [text] if text.lstrip()[:1] == "[" else text.split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line) if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}, line {number}: not JSON ({error})") from None
        rows += value if isinstance(value, list) else [value]
    return rows


def _parse_question(row):
    if not isinstance(row, dict):
        raise ValueError("not an object with a question and an answer")
    row = {name.lower(): value for name, value in row.items()}  # AIME has Problem and Answer
    for column in ("prompt", "reward_model"):  # JSON texts in aime25, amc23 and math500
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            row[column] = json.loads(row.get(column))
    if isinstance(row.get("reward_model"), dict):
        row["reward_model"] = row["reward_model"].get("ground_truth")

    column = next((name for name in ("prompt", "problem", "question") if row.get(name)), None)
    if column is None:
        raise ValueError("no question (looked for prompt, problem, question)")
    messages = [dict(role="user", content=row[column])]
    if isinstance(row[column], list) and all(isinstance(m, dict) for m in row[column]):
        messages = [dict(message) for message in row[column]]
    elif isinstance(row.get("system"), str):
        messages.insert(0, dict(role="system", content=row["system"]))
    if not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        raise ValueError(f"{column}: each message needs a role and a content that are texts")
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError(f"{column}: no question (the last message must be the user's)")
    column = next((name for name in ("reward_model", "answer", "final_answer", "solution")
                   if row.get(name) is not None), None)
    if column is None:
        raise ValueError("no answer (looked for reward_model, answer, final_answer, solution)")
    gold = row[column]
    gold = gold[0] if isinstance(gold, list) and len(gold) == 1 else gold
    if not isinstance(gold, (str, int, float)):
        raise ValueError(f"{column}: one text or number must be the answer: {str(gold)[:80]}")
    gold = re.sub(r'^\["(.*)"\]$', r"\1", str(gold).strip())  # ["70"] as a JSON text
    if "####" in gold:  # GSM8K: prose, then #### 72
        gold = gold.rpartition("####")[2].strip()
    elif column == "solution" or len(gold) > MAX_GOLD:  # MATH, NuminaMath: prose with a box
        gold = (last_boxed(gold) or gold).strip()
    if not 0 < len(gold) <= MAX_GOLD:
        raise ValueError(f"{column}: no answer, but {len(gold)} characters without a \\boxed")
    if any("<answer>" in message["content"] for message in messages):
        gold = f"<answer>{gold}</answer>"
    elif not messages[-1]["content"].endswith(INSTRUCTION.strip()):
        messages[-1]["content"] = THEIRS.sub("", messages[-1]["content"]).strip() + INSTRUCTION
    question = dict(messages=messages, answer=gold)
    if isinstance(row.get("solution"), str) and column != "solution":
        question["solution"] = row["solution"]
    json.dumps(question, ensure_ascii=False).encode()  # half an emoji raises a ValueError
    return question


# ---------------------------------------------------------------------------------- Extraction
_BOX_TOKEN = re.compile(r"\\\\?(boxed|fbox)\s*+\{|\\.|[{}]", re.DOTALL)  # \\boxed: JSON, twice


def last_boxed(text):
    r"""Text of the balanced `\boxed{...}` that begins last, else of such an `\fbox{...}`; or None.
    One that never closes, as in a response cut off, is passed over; `\{` and `\}` are no braces."""
    opened, found = [], {}
    for token in _BOX_TOKEN.finditer(text, max(0, text.find("box") - 3)):
        if token[1] or token[0] == "{":
            opened.append((token[1], token.end()))
        elif token[0] == "}" and opened:
            kind, start = opened.pop()
            found[kind] = max(found.get(kind, (0, 0)), (start, token.start()))
    start, end = found.get("boxed") or found.get("fbox") or (0, None)
    return None if end is None else text[start:end]


def last_tagged(text):
    """The last `<answer>`, stripped; "" if it never closes: an earlier one does not count then."""
    content, closed, _ = text.rpartition("<answer>")[2].partition("</answer>")
    return f"<answer>{content.strip()}</answer>" if closed and "<answer>" in text else ""


# ------------------------------------------------------------------------------------ Spelling
# All patterns from here on run in the trainer's own process, on hostile text: they take linear
# time.  Where two repeats could share text, they are possessive (`++`, `*+`) and give none back.
MAX_ANSWER = 500  # characters in a box; a longer one lists guesses, or attacks the parser
_BRACES = r"\{(?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+\}"  # nested as deep as answers are
_COMMANDS = {name: new for new, names in {
    r"\frac": "dfrac tfrac cfrac sfrac", r"\binom": "dbinom", r"\cdot ": "times", "(": "langle",
    ")": "rangle", "<": "lt", ">": "gt", r"\le ": "leq leqslant", r"\ge ": "geq geqslant",
    r"\emptyset": "varnothing", r"^\circ ": "degree", r"\text": "textbf textit textrm mathrm bm "
    "mathbf mathsf mathit mbox operatorname boldsymbol emph underline", " ": "left right big bigl "
    "bigr Big bigg Bigg displaystyle textstyle quad qquad bf rm large Large checkmark therefore",
}.items() for name in names.split()}
_UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": r"\cdot ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "∪": r"\cup ", "≤": r"\le ", "≥": r"\ge ", "≈": r"\approx ", "≡": r"\equiv ", "±": r"\pm ",
    "°": r"^\circ ", "²": "^2", "³": "^3", "€": r"\$", "£": r"\$", "¥": r"\$"})
_SCALES = dict(hundred=2, thousand=3, million=6, billion=9, trillion=12)
_SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    (r"(?<!\\)\\! ?|\\(?:text)?color ?\{[^{}]*+\}|\\phantom\{\.\}|^ ?\*\*|\*\* ?$|\\\\ ?$", ""),
    (r"(?<!\\)\\(?=[-0-9])", r"\\\\"),  # a matrix whose rows lost a backslash
    (r"\\([A-Za-z]++)", lambda m: _COMMANDS.get(m[1], m[0])),
    (r"(?:(?<!\\)\$|(?<!\\)\\[()\[\],;:> ]|~|\s)++", " "),
    (r"\\text ?\{ ?(?:negative|minus) ?\}", "-"),
    (r"\\text ?\{([^A-Za-z{}]*+|[ei])\}", r"{\1}"),  # no words
    (r"(?:√|\\sqrt(?![A-Za-z])) ?([0-9]++|[a-z])", r"\\sqrt{\1}"),  # \sqrt13 is no \sqrt{1}3
    (r"\\frac ?([0-9]|\\pi|(?<= )[a-z])", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*+\}) ?([0-9a-z]|\\pi)", r"\1{\2}"),
    (r"([\^_]) ?\{ ?([0-9A-Za-z]) ?\}", r"\1\2"),
    (r"[({]([0-9]++)[)}] ?(?=_[2-9])", r"\1"), (r"(?<=[0-9])_ ?\{? ?10 ?\}?(?![0-9])", " "),  # base
    (r"(?<![0-9.,([])(?<!\\\{)(?<!, )[1-9][0-9]{0,2}(\{,? ?\}|[, ])[0-9]{3}(?:\1[0-9]{3})*+"
     r"(?![0-9,])", lambda m: re.sub("[^0-9]", "", m[0])),  # 1,234
    (r"\{(?: ?([-.:]) ?|(, | ))\}", r"\1\2"),  # \text{-}1, 3{.}14, 1\text{, }2
    (r"([0-9]{1,99})\.([0-9]{0,99})\\overline ?\{([0-9]{1,99})\}", lambda m:
     rf"({m[1]}.{m[2]}0+\frac{{{m[3]}}}{{{'9' * len(m[3])}{'0' * len(m[2])}}})"),  # 0.1666...
    (r"(?<![0-9.^_)}])([0-9]{1,99}) ?(\\frac\{([0-9]{1,99})\}\{([0-9]{1,99})\})", lambda m:
     f"({m[1]}+{m[2]})" if int(m[3]) < int(m[4]) else m[0]),  # 1 4/5
    (r"(?<=[0-9])(?:\^ ?\{?)?(?:\\text ?\{)?(st|nd|rd|th)(?![A-Za-z])\}{0,2}", r"\1"),
    (r"(?:(?<!11)(?<=1)st|(?<!12)(?<=2)nd|(?<!13)(?<=3)rd|(?<=[04-9])th|(?<=1[1-3])th)\b", ""),
    (rf"(?<=[0-9]) ?(\\text ?\{{ ?)?({'|'.join(_SCALES)})\b",
     lambda m: rf"\cdot 10^{{{_SCALES[m[2]]}}} {m[1] or ''}"),
    (r"(?:^|(?<==)|(?<== )) ?\\text ?\{( ?[A-Za-z]{2}[A-Za-z ]*+:? ?)\} ?(?=[-0-9\\])",  # Sum: 5
     lambda m: m[0] if _CHANGING.search(m[1]) else ""),
    (r"\^ ?(?:\\circ|\{ ?\\circ ?\})(?: ?\\text ?\{ ?[CF] ?\})?+", r"\\text{ degrees}"),
    (r"\\?%", r"\\text{ percent}"),  # units: all in one \text{...}
    (r"(?<=[0-9}]) ?((?:[ckm]m|m(?=[\^/])|kg|lbs?|oz|ft|in|mph|hrs?|mins?|secs?)(?:/[a-z]{1,4})?"
     r"|(?<= )[A-Za-z]{4,}+(?: [A-Za-z]{2,}+)*+)(?![A-Za-z(])", r"\\text{\1}"),
    (r"(\\text\{[^{}]*[A-Za-z]) ?\} ?\^([23])", r"\1^\2}"),
    (r"(\\text\{[^{}]*+)\} ?(/?) ?\\text\{ ?", lambda m: f"{m[1]}{m[2] or ' '}"),
)]


def clean(text):
    """One spelling of what people write in several; no value changes."""
    text = text.translate(_UNICODE)
    if r"\$" in text:  # a currency stands before its number, other units behind
        text = text.replace(r"\$", " ").rstrip(". ") + r"\text{ dollars}"
    for pattern, new in _SPELLINGS:
        text = pattern.sub(new, text)
    while match := re.fullmatch(rf" *+(?:(?:\\text|\\boxed)? ?({_BRACES})|(.*[^.])\.) *+", text):
        text = match[2] or match[1][1:-1]
    digits = "zero one two three four five six seven eight nine".split()
    return str(digits.index(text)) if text in digits else " ".join(text.split())


# ------------------------------------------------------------------------------------- Numbers
_WORD = r"(?:[A-Za-z]{2,}+|[mshgL](?![A-Za-z]))(?:\^[23])?"
_UNIT = re.compile(rf"(?: ?\\text\{{ ?\(?(?:{_WORD}\.?(?:[ /-]{_WORD}){{0,2}})?\)? ?\}})?")
_CHANGING = re.compile(  # words that change what stands before them, or guess again
    r"\b(?:or|oder|and|not|no|if|when|unless|but|to|than|least|most|more|less|plus|minus|negative|"
    r"is wrong|incorrect|rejected|neither|nor|never|cannot|except|under|multiples? of|sqrt|"
    r"times|twice|over|vs|either|else|maybe|about|none|squared|cubed|power|pi|mod|base|log|ln|sin|"
    r"cos|tan|root|rad|(?:radian|gradian|tenth|ten|st|nd|rd|th)s?|[IVXLC]{2,}|percent percent|"
    r"(?:one|two|three|four|fi[fv]|six|seven|eigh|nin|eleven|twel|thir|twen|hundred|thousand|dozen|"
    r"\w+illion|hal[fv]|quarter|altern|approx|otherw|undef|infin|arc|factorial)\w*)\b", re.I)
_ARITHMETIC = re.compile(r"(?:[0-9 */^(){}]|\.(?=[0-9])|[-+](?! ?[-+])|!(?!!)|"
                         r"\\(?:cdot|div|bmod|frac|binom|sqrt)(?![A-Za-z]))*+")
_PYTHON = [(re.compile(pattern), new) for pattern, new in (  # for its grammar, never its eval
    (r"(?<=[0-9)}]) ?(?=\(|\\(?:frac|binom|sqrt))", "*"),
    (r"([0-9]*+)\.([0-9]++)", lambda m: f"({m[1]}{m[2]}/1{'0' * len(m[2])})"),
    (r"(?<![0-9])0++(?=[0-9])", ""),
    (r"\\cdot", "*"), (r"\\div", "/"), (r"\\bmod", "%"), (r"\\", ""),  # frac{8}{2}
    (r"\^", "**"), (r"\{", "["), (r"\}", "]"), ("!", " .factorial"))]  # frac[8][2], 3 .factorial
_SMALL = {n: n for n in range(-200, 201)}  # exponents and the like; others raise a KeyError
_FUNCTIONS = {"frac": lambda a: lambda b: a / b,
              "binom": lambda n: lambda k: Fraction(math.comb(_SMALL[n], _SMALL[k])),
              "sqrt": {n * n: Fraction(n) for n in range(1_000)}.__getitem__}
_OPERATORS = {
    ast.UAdd: lambda a: a, ast.USub: lambda a: -a, ast.List: lambda a: a,
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b, ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a ** _SMALL[b], ast.Subscript: lambda function, a: function(a),
    ast.Attribute: lambda n: Fraction(math.factorial(_SMALL[n]))}


def _value(node):
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.Name):
        return _FUNCTIONS[node.id]
    parts = [_value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    value = _OPERATORS[type(getattr(node, "op", node))](*parts)
    if isinstance(value, Fraction) and max(map(int.bit_length, value.as_integer_ratio())) > 1_000:
        raise ValueError("300 digits")
    return value


def read_number(text):
    """(value, half its last decimal place, percent?) of a text that is one number; else None."""
    end = _ARITHMETIC.match(text).end()
    python = text[:end]
    if (not _UNIT.fullmatch(text, end) or _CHANGING.search(text, end)
            or re.search(r"[0-9] [0-9]|[)}] ?[0-9]|[0-9] ?\\frac", python)):  # two, side by side
        return None
    for pattern, new in _PYTHON:
        python = pattern.sub(new, python)
    try:
        value = Fraction(_value(ast.parse(python, mode="eval").body))
    except Exception:  # no arithmetic; SyntaxError, KeyError, ZeroDivisionError, MemoryError, ...
        return None
    places = re.fullmatch(r"-?[0-9]*+\.([0-9]++) ?", text[:end])
    return value, Fraction(1, 2 * 10 ** len(places[1])) if places else 0, "percent" in text[end:]


def agree(gold, found):
    """An exact gold wants an exact answer; a decimal gold takes what rounds to it."""
    (value, half, percent), (other, _, other_percent) = gold, found
    if percent != other_percent and abs(other if percent else value) < 1:  # 0.5 and 50%
        value, half = (value / 100, half / 100) if percent else (value * 100, half * 100)
    return abs(value - other) <= half


_LETTERS = ("alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|rho|sigma|tau|phi|"
            "varphi|chi|psi|omega|Delta|Omega|ell|angle|triangle|max|min|gcd|lcm|sum|det|[lr]floor")
_SYMBOLS = (  # side by side, each with its index and argument: x, AB, N_{\max}, P(A), |z|, [ABC]
    rf"(?:(?:[A-Za-z]'*+|\\(?:{_LETTERS})(?![A-Za-z])|\[[A-Z ]++\]|\|(?![xy]\|)(?:[A-Za-z' ]|"
    r"\\c[au]p)++\||\\frac\{[A-Za-z]+\}\{[A-Za-z]+\}|\\(?:text|overline|vec|math[a-z]+) ?"
    rf"\{{[A-Za-z ,.:]*+\}})(?:\^\{{-1\}})?+(?:_(?:\w|{_BRACES}))?+"
    r"(?:\((?:[^()]++|\([^()]*+\))*+\))?+ ?+)++")
_NAME = re.compile(  # AB^2, |z|^2, and sums and products of names: 100m+n; not x^2, 2x, x-1
    rf"{_SYMBOLS}(?:(?<=[A-Z][A-Z]|.\|)\^2 ?)?|.*\\cdots.*|"
    rf"[0-9]*+{_SYMBOLS}(?:\^2 ?)?(?:(?:[-+]|\\cdot) ?[0-9]*+{_SYMBOLS}(?:\^2 ?)?)++")


def states(answer, gold):
    """Is each side of `x = 6/4 = 1.5` a name, or a number that agrees with the gold?"""
    answer = re.sub(rf"\\(?:sum|prod)_(?:\w|{_BRACES})(?:\^(?:\w|{_BRACES}))? ?", r"\\sum ", answer)
    answer, congruent, modulus = answer.partition(r"\pmod")
    sides = re.split(r" ?(?:=|\\approx|\\equiv) ?", answer.strip())
    found = [read_number(side) for side in sides[sides[0] == "":]  # `= 5` has an empty side
             if side == sides[-1] or not _NAME.fullmatch(side) or _CHANGING.search(side)]
    if not found or None in found or found[0][0] < 0 and re.fullmatch(r"[0-9]+ ?- ?[0-9]+", answer):
        return False  # 1-10 is a range
    if congruent and agree(gold, found[-1]):  # 2025 \equiv 25 \pmod{1000}
        modulus = re.fullmatch(r" ?\{? ?([1-9][0-9]{0,9}) ?\}?", modulus)
        return bool(modulus) and not any((n[0] - gold[0]) % int(modulus[1]) for n in found)
    return (any(agree(gold, number) for number in found)  # others may be rounded: 16/3 = 5.33
            and all(agree(gold, number) or agree(number, gold) for number in found))


# ------------------------------------------------------------------------------------- Formulas
_MISREAD = re.compile(  # 2 3 as 5, A^T as A, I as i, (2)(3) as 5; and commands it knows not
    r"'|[0-9] [0-9]|[0-9] ?\\?[{[] ?[0-9]|\[-?\\infty|\\infty\]|[0-9)}]_|\^\{?T|(?<![A-Za-z\\])I|"
    r"[0-9] ?\\frac\{[0-9]+\}\{[0-9]|\(-?[0-9.]+\) ?[0-9({[]|(?<!\\)\\(?!(?:frac|sqrt|pi|infty|"
    r"cdot|binom|a?r?c?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|[lr](?:floor|ceil)|[lg]e|in|cup|pm|"
    rf"begin|end|emptyset|mathbb|{_LETTERS})(?![a-z]))[A-Za-z]")
_FORMULA = [(re.compile(pattern), new) for pattern, new in (
    (r"^\\\{ ?[a-z] ?(?:\\mid|\||:)(.*)\\\}$", r"\1"), (r"^f\(x\) ?=", "y="),
    (r"^(?:=|\+|\\approx)|\\approx ?[0-9]*\.[0-9]+", ""),
    (r"^([^()]*[<>][^()]*?)\\text\{ ?or ?\}([^()]*)$", r"(\1) \\cup (\2)"),
    (r",? ?\\text\{ ?(?:or|and) ?\}|,?(?<![{ ]) (?:or|and) ", ","),
    (r" ?\\text\{(?! ?deg)([^{}0-9]*)\}$", lambda m: m[0] if _CHANGING.search(m[1]) else ""),
    (r"^([a-z]) ?\\in ?(?=[(\[\\])", r"\1="), (r"(\\log_[0-9]) ?\{?([0-9]+)\}?$", r"\1(\2)"),
    (r"(?<![_^0-9.])([0-9]+) ?(?=\(|\\binom)", r"\1\\cdot "),  # which the parser would add
)]
_LABEL = re.compile(rf"(?:^|(?<=,)) ?({_SYMBOLS}|\([a-z](?:, ?[a-z])++\) ?)=")


def settle(gold, answer):
    """1.0 or 0.0 where text and numbers settle it, else the request for a worker."""
    if gold == answer or gold.startswith("<answer>"):  # a letter alone, as the authors' mcq.py
        return float(gold == answer != "")
    if max(len(answer), len(gold)) > MAX_ANSWER:
        return 0.0
    if re.fullmatch("-?[0-9]++", gold) and re.fullmatch("-?[0-9]++", answer):  # most errors
        return float(int(gold) == int(answer))
    gold, answer = clean(gold), clean(answer)
    if not answer or gold == answer:
        return float(bool(answer))
    if number := read_number(gold):
        return float(states(answer, number))
    if re.fullmatch(r"\(?[A-J]\)?|[A-Za-z '-]*[A-Za-z]{2}[A-Za-z '-]*", gold):
        words = re.sub(r"\\text\{([^{}]*+)\}", r"\1", answer)  # to math-verify "east" is "seat"
        return float(gold.strip("()").casefold() == words.strip(' ().!"').casefold())
    for pattern, new in _FORMULA:
        gold, answer = pattern.sub(new, gold).strip(), pattern.sub(new, answer).strip()
    if "=" in gold:
        gold, sides = gold if "=" in answer else _LABEL.sub("", gold), [answer]
    else:
        sides = _LABEL.sub("", answer).split("=")  # x=1, x=2 for 1, 2
    sides = [side for side in sides if side.replace(" ", "") != gold.replace(" ", "")]
    sides = [f"({s})" if gold[:1] == "(" != s[:1] and "," in s else s for s in sides]  # x=1, y=2
    marks = ":=" if re.search(r"[<>]|\\[lg]e|\\pm", gold + answer) else ":=,["
    count = [[text.replace(r"\sqrt[", "").count(m) for m in marks] for text in (gold, *sides)]
    unordered = "," in gold and (answer[:1] == "(" and gold[:1] not in "(["
                                 or gold[:1] + answer[:2] == r"(\{")
    if unordered or count != [count[0]] * len(count) or (
            sides and any(map(_MISREAD.search, (gold, *sides)))):
        return 0.0
    return json.dumps([gold, *sides]) if sides else 1.0


# --------------------------------------------------------------------------------------- Verifier
class Verifier(contextlib.AbstractContextManager):
    """Grades responses; a context manager, or call `close()`.  Not for two threads at once.

    `workers` processes, default min(8, CPUs), start when first needed.  Each answer has `timeout`
    seconds of wall-clock (the authors' 5), each worker `memory_mb` MiB of address space; `stopped`
    counts the answers that got 0 because their worker met a limit or was killed.
    """

    def __init__(self, workers=None, timeout=5.0, memory_mb=2048):
        self.workers, self.stopped = workers or min(8, os.cpu_count() or 1), 0
        self._limits = [str(timeout), str(memory_mb)]
        self._threads, self._started = ThreadPoolExecutor(self.workers), {}  # a process a thread

    def close(self, *_):
        """Kills and reaps all workers."""
        for worker in list(self._started.values()):
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._started.values():
            worker.communicate()

    __exit__ = close

    def verify(self, responses, golds, after_think=False):
        r"""1.0 for each response whose last \boxed{} equals its gold, else 0.0, in input order; a
        gold in <answer> tags wants the same in the response's last ones, and no box counts.
        `after_think`: only what stands after the last `</think>` is read.  As in the authors'
        evaluation, a response without it is read whole, also one that was cut off while it
        thought; in training the caller gives that one 0."""
        texts = [r.rpartition("</think>")[2] if after_think else r for r in responses]
        pairs = [(gold, (last_tagged if gold.startswith("<answer>") else last_boxed)(text) or "")
                 for text, gold in zip(texts, map(str, golds), strict=True)]
        settled = {pair: settle(*pair) for pair in set(pairs)}
        requests = list({s for s in settled.values() if isinstance(s, str)})
        said = dict(zip(requests, self._threads.map(self._ask, requests)))
        self.stopped += list(said.values()).count(None)
        return [float(said.get(settled[pair], settled[pair]) or 0) for pair in pairs]

    def _ask(self, request):
        """The verdict of this thread's worker; None if it died over it."""
        worker = self._started.get(threading.get_ident())
        if worker is None or worker.poll() is not None:  # one that died idle costs no answer
            # Neither a fork of the trainer, which holds CUDA and vLLM, nor multiprocessing's spawn,
            # which imports it again.  A fixed seed: sympy's order of a set, so a verdict, has it.
            worker = self._started[threading.get_ident()] = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), "--worker", *self._limits], bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the trainer's to handle
                env={**os.environ, "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""})
            if worker.stdout.readline() != b"ready\n":  # all-zero rewards would hide it
                raise RuntimeError("a worker cannot start; why says: verifier.py --worker 5 2048")
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(request.encode() + b"\n")
            if said := worker.stdout.readline():
                return said == b"1\n"
        worker.communicate()  # no zombie


# --------------------------------------------------------------------------------- In the worker
def _work(timeout, memory_mb):
    """Answers each JSON line [gold, side, ...] on stdin with a line 1 or 0: are all equal?"""
    out = os.dup(1)
    os.dup2(2, 1)  # what sympy prints is no verdict
    import sympy.physics.units  # now, while there is an eval: simplify() would import it later
    from latex2sympy2_extended import latex2sympy2
    from math_verify import verify

    # Model text must not become Python.  In math-verify 0.9 with sympy 1.14 it does twice: sympify
    # evals every number, and infinite sums are compiled, names from the text included.
    parser, maker = map(sys.modules.get, ("sympy.parsing.sympy_parser", "sympy.utilities.lambdify"))
    parser.eval = maker.eval = maker.exec = None  # a path we have not seen fails
    parser.parse_expr = lambda text, *_, **__: sympy.Rational(text)
    sys.modules["sympy.core.evalf"].lambdify = lambda n, term: lambda k: int(term.subs(n, k))
    config = latex2sympy2.ConversionConfig(lowercase_symbols=False)
    spelling = latex2sympy2.NormalizationConfig(malformed_operators=True, nits=True, boxed="none")

    def read(text):  # not parse(), which looks for formulas in a text and drops units: h, m, t
        formula = latex2sympy2.latex2sympy(
            text, is_real=True, normalization_config=spelling, conversion_config=config)
        if isinstance(formula, sympy.Union) and re.search("[<>]|[lg]e", text):  # x < 2 or x > 3
            return sympy.Or(*formula.args).as_set()
        return formula.subs(sympy.Symbol("i", real=True), sympy.I)

    def equal(a, b):
        if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
            gap = (a - b).expand()
            if not gap.free_symbols:  # to verify, 1e-20 is 2e-20, and 2^{2^{10}}+1 is 2^{2^{10}}
                return not gap or not gap.is_Rational and bool(abs(gap.n(100)) < abs(a) / 10**90)
        # Without its timeout, which is signal.alarm: the worker has its own.
        return verify(a, b, timeout_seconds=None, allow_set_relation_comp=True)

    assert equal(read(r"\frac{1}{2}"), read("0.5"))  # also warms the parser's caches
    with contextlib.suppress(ValueError):  # the whole job has a lower limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    os.write(out, b"ready\n")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, timeout)  # nobody handles it: the kernel kills
        try:
            gold, *sides = map(read, json.loads(line))
            verdict = all(equal(gold, side) for side in sides)
        except MemoryError:
            return  # its state is unsure
        except Exception:
            verdict = False  # not a formula
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(out, b"1\n" if verdict else b"0\n")


if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    _work(float(sys.argv[2]), int(sys.argv[3]))
