r"""Questions with their answers, and: is this response correct?

`load_questions` reads a data set, `Verifier` gives the training reward and the evaluation's score:
the content of the last balanced \boxed{...} is correct if it equals the gold as a string or, says
math-verify, as mathematics (the authors' training reward, without its traps: theirs reads the last
100 characters only, and loses `5{,}400`, `\text{540}`, `\dfrac{14}{3}`).

    with Verifier() as verifier:
        rewards = verifier.verify(responses, golds)  # 1.0 or 0.0 each, in input order

Model text is hostile: `9^{9^{9^{9}}}` never returns, other answers eat all memory.  Strings and
plain numbers are compared here, algebra is left to processes with a limit on time and memory: fresh
interpreters that run this file, neither forks of the trainer (which holds CUDA and vLLM) nor
multiprocessing's spawn (which would import the training script again).
"""

import contextlib
import ctypes
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
    """[dict(messages, answer)] of a short name, a hub id, or a .parquet/.json/.jsonl file.

    Takes the schemas of the paper's files (`prompt` as messages and `reward_model.ground_truth`,
    each maybe a JSON string), plain `problem` or `question` with `answer`, and multiple choice.
    The last message gets App. D's form: DAPO's own instruction off, INSTRUCTION on.
    Raises ValueError, one line that names file and row.
    """
    rows = _read_rows(source)
    questions = []
    for i, row in enumerate(rows, 1):
        try:
            questions.append(_parse_question(row))
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{source}, row {i}: {error}") from None
    if not questions:
        raise ValueError(f"{source}: holds no questions")
    return questions


def _read_rows(source):
    path = Path(source)
    if path.suffix not in (".parquet", ".json", ".jsonl"):
        from datasets import load_dataset

        name, config, split = HUB.get(source, (source, None, "train"))
        try:
            return load_dataset(name, config, split=split)
        except Exception as error:  # the hub's failures have no common class
            raise ValueError(f"{source}: no .parquet/.json/.jsonl file, and the hub gives no data "
                             f"set {name} ({_first_line(error)})") from None
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
    except Exception as error:  # missing, unreadable, not parquet, not UTF-8
        raise ValueError(f"{source}: cannot be read ({_first_line(error)})") from None
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


def _first_line(error):
    return (str(error).strip() or repr(error)).splitlines()[0]


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
    if not text.endswith(INSTRUCTION.strip()):
        for theirs in (r"^Solve the following math problem step by step\. The last line of your "
                       r"response should .*? answer to the problem\.\s*",
                       r'\s*Remember to put your answer on its own line after "Answer:"\.\s*$',
                       r"\s*Please reason step by step\.\s*$"):
            text = re.sub(theirs, "", text, flags=re.S)
        messages[-1]["content"] = text.strip() + INSTRUCTION
    return dict(messages=messages, answer=gold)


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


# ------------------------------------------------------------------- What strings alone can settle
_DELIMITER = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]")
# The formula is only a part of the text: something marks it, or there are two words in a row.
_PROSE = re.compile(_DELIMITER.pattern + r"|box|(?<![\\A-Za-z{ ])[A-Za-z]{2,} [A-Za-z]{2,}")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!;: ]\s*|~)(?=[0-9]{3}(?![0-9]))")
_WRAPPER = re.compile(r"(?:\\(?:text\w*|mbox|math(?:rm|bf|it|sf)|boldsymbol)\s*)?\{([^{}]*)\}")
_TEXT = re.compile(r"\\(?:text\w*|mbox|math(?:rm|bf))\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\[,!;: ]|~|\\q?quad(?![a-zA-Z])|\s+")
_LOOSE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])|\\(?:left|right)(?![a-zA-Z])")
_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+|[1-9][0-9]{0,2}(?:[, ][0-9]{3})+)(?:\.[0-9]*)?|\.[0-9]+)")
_BASE = re.compile(r"(?<=[0-9])_\{?([0-9]+)")  # the 7 of 204_7
_LETTER = re.compile(r"\(?\s*([A-J])\s*\)?")
_CHOICE = re.compile(r"(?:\(\s*([A-J])\s*\)|([A-J])\s*[.:)]|([A-J])$)(.*)", re.DOTALL)
_CHOICE_AGAIN = re.compile(r"(?:^|[\s,;/&(])(?:(?:or|and)\s*\(?[A-J]\b|\(?[A-J]\s*[.:)])")
# A gold with one of these may have several values; without, an answer with a hedge has too many.
_SEVERAL = re.compile(r"[,;<>]|\\(?:pm|mp|cup|cap|in|leq?|geq?|neq?)(?![a-zA-Z])|\b(?:or|and)\b")
_HEDGE = re.compile(
    r"(?<![A-Za-z\\])(?:or|and|not|but|either|maybe)(?![A-Za-z])|[0-9] +[0-9]"
    r"|\\(?:text\w*|mbox)\s*\{[^{}]*(?<![A-Za-z])[0-9][^{}]*\}")


def _clean(text: str) -> str:
    r"""The answer without `$`, thousands marks, a final full stop, a \text{} around it all."""
    text = _THOUSANDS.sub("", _DELIMITER.sub("", text)).strip().rstrip("\\. ")
    while wrapper := _WRAPPER.fullmatch(text):
        text = wrapper[1].strip().rstrip("\\. ")
    return text


def _key(text: str) -> str:
    """Equal for answers that differ only in spacing and in the size of fractions and brackets."""
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    return _LOOSE.sub("", _SPACE.sub(" ", text)).strip()


def _number(text: str) -> Fraction | None:
    is_number = len(text) <= MAX_ANSWER and _NUMBER.fullmatch(text)  # int() has a limit of digits
    return Fraction(re.sub("[, ]", "", text)) if is_number else None


def _choice(text: str) -> str | None:
    """The letter of `B`, `(B)`, `B: 12 mol`; None for `ABCD`, `A or B`, `A: 1, B: 2`."""
    match = _CHOICE.fullmatch(_clean(_TEXT.sub(r"\1", text)))
    return None if not match or _CHOICE_AGAIN.search(match[4]) else match[1] or match[2] or match[3]


def _settle(gold: str, answer: str, boxed: bool) -> float | tuple[str, str, bool]:
    """The verdict, where strings and plain numbers settle it, or the request for a worker."""
    gold, answer = gold.strip(), answer.strip()
    limit = MAX_ANSWER if boxed else MAX_TEXT
    if not gold or not answer or len(answer) > limit or len(gold) + len(answer) > MAX_TEXT:
        return 0.0  # a box that long lists guesses, or attacks the parser
    if gold == answer:
        return 1.0
    bare = _clean(last_boxed(gold) or gold)
    if letter := _LETTER.fullmatch(_TEXT.sub(r"\1", bare)):
        return float(_choice(answer if boxed else last_boxed(answer) or answer) == letter[1])
    if not boxed and _PROSE.search(answer):
        return gold, answer, boxed
    reply = _clean(answer)
    if not reply or _key(bare) == _key(reply):
        return float(bool(reply))
    if (expected := _number(bare)) is not None and (found := _number(reply)) is not None:
        return float(expected == found)  # final: the commonest error, a wrong integer, is cheap
    if "\\text" in gold or "\\mbox" in gold or bare.isalpha() and len(bare) > 3:
        words = [re.sub(r"[\s{}]+", "", _TEXT.sub(r"\1", s)).casefold() for s in (bare, reply)]
        if words[0] == words[1] or bare.isalpha():
            return float(words[0] == words[1])  # as a product of letters, "east" would be "seat"
    if set(_BASE.findall(reply)) - set(_BASE.findall(bare)) - {"10"}:
        return 0.0  # math-verify ignores the base of a number
    if boxed and not _SEVERAL.search(bare):
        # math-verify drops a final \text{...} as a unit, so "6 \text{ (or 5)}" would be 6, reads
        # "2 3" as 6, and takes one side of "540 = 541".
        sides = map(str.strip, re.split(r"=|\\(?:approx|equiv)", reply))
        if _HEDGE.search(_key(reply)) or len({*map(_number, sides)} - {None}) > 1:
            return 0.0
    return gold if _PROSE.search(gold) else bare, reply, boxed


# --------------------------------------------------------------------------------------- Verifier
class Verifier:
    """Compares answers; a context manager, or call `close()`.  Not for two threads at once.

    `workers`: processes, default min(8, CPUs), started when first needed.  `timeout`: seconds of
    wall-clock for one answer (the authors' 5), counted from when a ready worker has it.
    `memory_mb`: MiB that a worker may use on top of what its imports took.  `timeouts` and
    `crashes` count the answers that got 0 because their worker was stopped or died.  RuntimeError
    if no worker can start (math-verify missing or broken): all-zero rewards would hide it.
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
        r"""1.0 for each response whose last \boxed{} equals its gold, else 0.0, in input order.

        `after_think`: read only what stands after the last `</think>`.
        """
        boxes = [last_boxed(answer_part(r) if after_think else r) or "" for r in responses]
        return self._judge([(gold, box, True) for gold, box in zip(golds, boxes, strict=True)])

    def equal(self, pairs: list[tuple[str, str]]) -> list[float]:
        r"""1.0 for each (gold, prediction) that are equal, else 0.0, in input order.

        A prediction that is one whole `\boxed{...}` is read as `verify` reads a box; in any other
        text math-verify looks for the answer, which is more lenient.
        """
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


# --------------------------------------------------------------------------------- In the worker
def _comparer():
    """`same(gold, answer, boxed) -> bool`; math-verify is imported here, never in the trainer."""
    import logging

    import sympy.physics.units  # noqa: F401  simplify() would import it later, and it needs eval
    from latex2sympy2_extended.latex2sympy2 import latex2sympy
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
    sys.modules["math_verify.parser"].parse_expr = lambda text, evaluate: latex2sympy(
        text.strip(" .").replace("**", "^"), normalization_config=None)
    sys.modules["sympy.core.evalf"].lambdify = lambda n, term: lambda k: int(term.subs(n, k))
    logging.disable(logging.CRITICAL)
    latex = [LatexExtractionConfig()]

    def read(text, whole):
        # One formula from end to end, which is all that a box may hold; from any other text, if it
        # is none, what math-verify finds in it.  (Its default finds a 2 in a bare 2\sqrt{2}.)
        # No timeout: theirs is signal.alarm, and the parent's kill is the limit.
        parsed = []
        if whole or not _PROSE.search(text):
            parsed = parse("$" + " ".join(text.split()) + "$", latex, parsing_timeout=None)
        if whole or any(not isinstance(p, str) for p in parsed):
            return parsed
        return parse(text, [*latex, ExprExtractionConfig()], parsing_timeout=None) or parsed

    def same(gold, answer, boxed):
        return verify(read(gold, False), read(answer, boxed), timeout_seconds=None)

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
