r"""Questions with their answers, and: is this response correct?

What follows the last `</think>` is graded, all of it if there is none: the last `\boxed{...}`, or
the last <answer> if the gold has such tags.  A gold that is a number, as in DAPO, AIME and AMC,
wants one number of exactly that value, a word that word.  The rest goes to math-verify, in a
process with limits, for model text is hostile: `\prod_{n=1}^{10^9} n!` never returns."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

# ----------------------------------------------------------------------------------- Questions
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."  # App. D
OTHER_FORMS = re.compile(  # of DAPO and of the authors' files: INSTRUCTION replaces them
    r"^Solve the following math problem step by step.*\s*|\s*(?:Remember to put|Please reason).*$")
HUB = {"dapo": ("open-r1/DAPO-Math-17k-Processed", "all", "train"),  # id, configuration, split
       "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
       "aime25": ("math-ai/aime25", None, "test"),
       "amc23": ("math-ai/amc23", None, "test"),
       "math500": ("HuggingFaceH4/MATH-500", None, "test")}
NO_ANSWER = {"", "proof", "notfound", "n/a", "null", "none", "nan", "inf", "-inf"}

def load_questions(source):
    """[dict(messages, answer[, solution])] of a short name, a hub id or a .parquet, .json, .jsonl.
    ValueError in one line names file, row and column of what no response could answer."""
    questions, place = [], source
    try:
        for row in read_rows(source) or [{}]:  # an empty file is refused for its first row
            place = f"{source}, row {len(questions) + 1}"
            questions.append(parse_question({name.lower(): row[name] for name in row}))
    except Exception as error:  # those of files and of the hub have no common class
        raise ValueError(f"{place}: {error}") from None
    return questions

def read_rows(source):
    if source.endswith(".parquet"):
        import pyarrow.parquet
        return pyarrow.parquet.read_table(source).to_pylist()
    if source.endswith((".json", ".jsonl")):
        text = Path(source).read_text(encoding="utf-8-sig").strip()
        if not text.startswith("["):  # JSON Lines, also in chemistry_train.json
            text = "[" + re.sub(r"(\n\s*)", r",\1", text) + "]"  # one text: an error names its line
        return json.loads(text)
    from datasets import load_dataset
    name, config, split = HUB.get(source, (source, None, "train"))
    return load_dataset(name, config, split=split)

def parse_question(row):
    for column in ("prompt", "reward_model"):  # JSON texts in aime25, amc23 and math500
        with contextlib.suppress(ValueError, TypeError):
            row[column] = json.loads(row.get(column))
    row["reward_model"] = (row.get("reward_model") or {}).get("ground_truth")
    asked = row.get("prompt") or row.get("problem") or row.get("question")
    if not isinstance(asked, list):
        asked = [dict(role="system", content=row.get("system")), dict(role="user", content=asked)]
    messages = [dict(role=m["role"], content=m["content"]) for m in asked if m["content"]]
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError("prompt, problem or question: no question that ends with the user's text")
    column, gold = next(((name, row[name]) for name in ("reward_model", "answer", "final_answer",
                         "solution") if row.get(name) is not None), ("answer", ""))
    gold = gold[0] if isinstance(gold, list) and len(gold) == 1 else gold
    gold = int(gold) if isinstance(gold, float) and gold.is_integer() else gold  # not 1e+16
    gold = "" if isinstance(gold, (list, dict)) else str(gold).rpartition("####")[2]  # GSM8K
    gold = re.sub(r"\\boxed +([^\s$.{]+)", r"\\boxed{\1}", gold)  # MATH: so it is $\boxed 2$.
    gold = (last_boxed(gold) or gold).strip()
    gold = re.sub(r"(?i)^(?:the )?(?:final )?answer(?: is:?|:) *", "", gold)  # Answer: 5
    gold = re.sub(r"""^\[ ?(["']?)([^][,"']+)\1 ?\]$""", r"\2", gold)  # ["70"], [70]
    if gold.lower() in NO_ANSWER or len(gold) > 200:  # DAPO's, MATH's and AIME's have at most 53
        raise ValueError(f"{column}: no answer that a response could give: {gold[:80]!r}")
    if any("<answer>" in message["content"] for message in messages):
        gold = f"<answer>{gold}</answer>"  # chemistry's prompt stays, others get App. D's
    elif not messages[-1]["content"].endswith(INSTRUCTION.strip()):
        messages[-1]["content"] = OTHER_FORMS.sub("", messages[-1]["content"]).strip() + INSTRUCTION
    solution = dict(solution=row["solution"]) if row.get("solution") else {}
    return dict(messages=messages, answer=gold, **solution)

# ------------------------------------------------------------------------------------- Grading
CHANGING = re.compile(r"^[0-9]+[a-z] ?$|[,;<>]|\\(?:lor|ne|[lg][et]|pm)|\{[ .eix]*\}|\b(?:or|and|"
    r"not|never|if|to|than|more|less|least|most|is wrong|otherwise|approximately|squared|cubed|"
    r"dozens?|ten(?:s|ths?)|hundred(?:ths?)?|thousand|\w?illion)\b")  # this is not the number alone
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    (r"\\(?:left|right|displaystyle|bf)\b|\\(?:text)?color ?\{\w+\}|\\! ?|\\?\$|\.$", ""),  # \$42
    (r"(?<!\\)\\[,;: ]|~|\s+", " "),  # 12\,345
    (r"\\[dtc]?frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}"),  # \frac12
    (r"\\(?:text|math)(?:bf|it|rm)|\\(?:mbox|bm|boldsymbol|underline)\b", r"\\text"),  # \mbox{ cm}
    (r"\^ ?\{? ?\\circ ?\}?|°|\\?%", r"\\text{ unit}"),  # 90^\circ, 50\%
    (r"(?<=[0-9}]) ?\\approx.*", ""),  # \frac{16}{3} \approx 5.33
    (r"^(?:\\text)? ?\{((?:[^{}]|\{[^{}]*\})*)\}$", r"\1"),  # \text{42}, {\frac{84}{2}}
    (r"(?<=[0-9}]) ?(?:\^?\{?\\text ?\{[A-Za-z /.()-]+\}\}?| [A-Za-z/. ]{2,})(?:\^\{?[23]\}?)?$",
     lambda unit: unit[0] if CHANGING.search(unit[0]) else ""))]  # 42 \text{ cm}^2, 42 km/h
FACTOR = re.compile(  # 42, -1,234.5, (84/2), 10^{5}
    r"[-+−]? ?(?:\( ?-?)?([1-9][0-9]{0,2}(?:(?:[, ]|\{,\})[0-9]{3})+(?:\.[0-9]+)?|[0-9]+\.?[0-9]*"
    r"|\.[0-9]+)(?:\^ ?\{?([0-9]{1,2})\}?)?(?: ?/ ?([0-9]*[1-9][0-9]*))? ?\)?")
BOX_TOKEN = re.compile(r"(?P<box>\\?\\(?:boxed|fbox)\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.S)

def last_boxed(text):
    r"""What the balanced `\boxed{...}` or `\fbox{...}` that begins last holds, "" if none is."""
    starts, start, end = [], 0, 0  # starts: a box's content for each open brace, 0 if not a box's
    for token in BOX_TOKEN.finditer(text, text.find("box") - 3 if "box" in text else len(text)):
        if token.lastgroup in ("box", "open"):
            starts.append(token.end() if token.lastgroup == "box" else 0)
        elif token.lastgroup == "close" and starts and (opened := starts.pop()) > start:
            start, end = opened, token.start()
    return text[start:end].strip()

def find_answer(response, gold):
    text = response.rpartition("</think>")[2]
    if not gold.startswith("<answer>"):
        return last_boxed(text)
    content, closed, _ = text.rpartition("<answer>")[2].partition("</answer>")
    return f"<answer>{content.strip()}</answer>" if closed and "<answer>" in text else ""

def read_number(text):
    r"""The exact value of `1,234.5`, `-\frac{84}{2}` or `6 \cdot 10^{5}`; of all else None."""
    text = re.sub(r"\\[dtc]?frac ?\{ ?(-?[0-9]+) ?\} ?\{ ?([0-9]+) ?\}", r"(\1/\2)", text)
    value = Fraction((-1) ** len(re.findall("[-−]", text)))
    for factor in re.split(r"\\cdot|\\times|\*", text):
        if not (match := FACTOR.fullmatch(factor.strip())):
            return None
        base, power, divisor = match.groups()
        value *= Fraction(re.sub("[{, }]", "", base)) ** int(power or 1) / int(divisor or 1)
    return value

def compare(gold, answer):
    """1.0 or 0.0 where text, numbers and words settle it, else the pair for math-verify."""
    if gold == answer or gold.startswith("<answer>") or not 0 < len(answer) <= 500:  # an attack
        return float(gold == answer != "")
    if gold.isdecimal() and answer.isdecimal():  # most wrong answers
        return float(int(gold) == int(answer))
    for pattern, new in SPELLINGS:
        gold, answer = pattern.sub(new, gold).strip(), pattern.sub(new, answer).strip()
    number = read_number(gold)
    if "=" not in gold:
        *names, value = answer.replace("\\approx", "=").split("=")
        if not {read_number(name.strip()) for name in names} <= {None, number}:
            return 0.0  # 43 = 42
        if not any(map(CHANGING.search, names)):  # x = 42; not 2x = 42
            answer = value.strip()
    if number is not None:
        return float(number == read_number(answer))
    if gold.replace(" ", "") == answer.replace(" ", ""):
        return 1.0
    # Letters, words and 204_5 are texts: to math-verify, east is seat, and 204_5 is 204_7.
    word, other = [re.sub(r"\\text ?|[{}]", "", text).strip(" ().") for text in (gold, answer)]
    if re.fullmatch(r"[A-Za-z]|[0-9]+_[0-9]+|[A-Za-z' -]*[A-Za-z]{3}[A-Za-z' -]*", word):
        return float(word == other or len(word) > 1 and word.lower() == other.lower())
    return gold, answer

class Verifier:
    """Grades texts, 1.0 if right, else 0.0, as is one that meets a limit of seconds or MiB."""

    def __init__(self, workers=None, timeout=5.0, memory_mb=2048):  # 5 seconds, as the authors
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.limits = [str(timeout), str(memory_mb)]

    def verify(self, texts, golds):
        pairs = [(gold, find_answer(text, gold)) for text, gold in zip(texts, golds, strict=True)]
        settled = {pair: compare(*pair) for pair in set(pairs)}
        formulas = sorted({pair for pair in settled.values() if isinstance(pair, tuple)})
        with ThreadPoolExecutor(self.workers) as threads:
            shares = threads.map(self.ask, [formulas[i::self.workers] for i in range(self.workers)])
        verdicts = dict(sum(shares, []))
        return [verdicts.get(settled[pair], settled[pair]) for pair in pairs]

    def ask(self, formulas):
        """[((gold, answer), math-verify's verdict)], 0.0 where the process died over it."""
        verdicts = []
        while len(verdicts) < len(formulas):
            run = subprocess.run(  # no fork: the trainer holds CUDA; sympy's sets want a fixed seed
                [sys.executable, os.path.abspath(__file__), "--worker", *self.limits], text=True,
                input="\n".join(map(json.dumps, formulas[len(verdicts):])), capture_output=True,
                env=os.environ | {"PYTHONHASHSEED": "0"}, start_new_session=True)
            if not run.stdout.startswith("ready"):  # all-zero rewards would hide it
                raise RuntimeError(f"verifier.py --worker: {run.stderr[-300:]}")
            verdicts += [*map(float, run.stdout.split()[1:]), 0.0]
        return list(zip(formulas, verdicts))  # of a process that lived, the last 0.0 is too much

def work(timeout, memory_mb):
    """Answers each JSON line [gold, answer] with a line 1 or 0: are they equal?"""
    out, sys.stdout = sys.stdout, open(os.devnull, "w")  # what sympy prints is no verdict
    import sympy.physics.units  # now, while there is an eval: sympy.simplify imports it later
    from latex2sympy2_extended import latex2sympy2
    from math_verify import verify
    # Model text must not become Python: sympify evals every number, infinite sums are compiled.
    parser, maker = map(sys.modules.get, ("sympy.parsing.sympy_parser", "sympy.utilities.lambdify"))
    parser.eval = maker.eval = maker.exec = None
    parser.parse_expr = lambda text, *_, **__: sympy.Rational(text)
    spelling = latex2sympy2.NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    case = latex2sympy2.ConversionConfig(lowercase_symbols=False)  # k is not K
    def equal(*texts):
        gold, answer = [latex2sympy2.latex2sympy(text, None, True, False, spelling, case).subs(
            sympy.Symbol("i", real=True), sympy.I) for text in texts]
        if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
            difference = (gold - answer).expand()
            if difference.is_number:  # to verify, 1e-20 is 2e-20
                return difference == 0 or not difference.is_Rational and (
                    difference.is_finite and abs(difference.n(100)) <= abs(gold) / 10**90)
        return verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True)
    assert equal(r"\frac{1}{2}", "0.5")  # also warms the parser's caches
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, timeout)  # nobody handles it: the kernel kills
        verdict = False
        with contextlib.suppress(Exception):  # not a formula
            verdict = bool(equal(*json.loads(line)))
        print(int(verdict), file=out, flush=True)

if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    work(float(sys.argv[2]), int(sys.argv[3]))
