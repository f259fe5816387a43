"""verifier.py: what is extracted, what is equal, and that no model text can harm a run.

Of the answers generated from the benchmarks' golds a fixed sample is graded; all of them, for
minutes, with `python tests/test_verifier.py --all`.
"""
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from answers import GOLDS, equivalents, near_misses

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import verifier as verifier_module  # noqa: E402
from verifier import Verifier, last_boxed, load_questions, read_number, settle  # noqa: E402

SHARED = ROOT.parent / "shared/data"  # third-party data, not part of the repository
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
ALL = "--all" in sys.argv
ENDLESS = r"\binom{10^9}{5\cdot 10^8}+x"  # a worker never returns from it
ALGEBRA = (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}")  # equal, and only a worker sees it


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, timeout=30.0) as shared:
        yield shared
    assert shared.stopped == 0


def box(content):
    return rf"Thus the answer is $\boxed{{{content}}}$."


def grade(verifier, pairs):
    return verifier.verify([box(answer) for _, answer in pairs], [gold for gold, _ in pairs])


# ------------------------------------------------------------------------------------ extraction
@pytest.mark.parametrize("text, expected", [
    (r"\boxed{42}", "42"),
    (r"first \boxed{wrong}, then \boxed{42}.", "42"),
    (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
    (r"\boxed {7}", "7"),
    ("\\boxed{\n7\n}", "\n7\n"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{4} and then \boxed{never closes", "4"),
    (r"\boxed{never closes, \boxed{4}", "4"),
    (r"} } \boxed{4} {", "4"),
    (r"\boxed{}", ""),
    (r"\fbox{7}", "7"),
    (r"\boxed{6} or \fbox{7}", "6"),
    (r"\\boxed{8}", "8"),
    (r"\boxed{never closes", None),
    (r"\boxed 540", None),
    ("no box", None),
    ("", None),
])
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected



@pytest.mark.parametrize("text, expected", [
    (r"\boxed{" * 100_000, None),
    (r"\boxed{" + "{" * 500_000 + "}" * 500_001, 1_000_000),
    (r"\boxed{" + "{}" * 250_000, None),
    (r"\boxed{7} " * 5_000, 1),
    ("\\" * 1_000_000, None),
    (r"\boxed" + " " * 1_000_000, None),
    (("\\" * 50 + "boxed") * 20_000, None),
], ids=["unclosed", "nested", "pairs", "many", "backslashes", "spaces", "escapes"])
def test_extraction_is_linear(text, expected):
    start = time.process_time()
    found = last_boxed(text)
    assert time.process_time() - start < 2.0  # quadratic would take minutes to hours
    assert (found if expected is None else len(found)) == expected


@needs_shared
def test_extraction_agrees_with_published_cases():
    for case in map(json.loads, (SHARED / "verifier/boxed_extraction.jsonl").open()):
        expected = case["expected"]
        if case["function"] == "last_boxed_only_string" and expected is not None:
            expected = expected[expected.index("{") + 1 : -1]  # theirs keeps the wrapper
        assert last_boxed(case["text"]) == expected, case


def test_after_think(verifier):
    texts = [r"<think>\boxed{4}</think>\boxed{5}", r"<think>\boxed{5}</think>so it is 4",
             r"\boxed{5}", "</think>" * 10 + r"\boxed{5}", r"\boxed{5}" + "</think>" * 10]
    assert verifier.verify(texts, ["5"] * 5, after_think=True) == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert verifier.verify(texts, ["5"] * 5) == [1.0] * 5


# -------------------------------------------------------------------------------------- equality
def listed(name):
    """[(gold, answer)] of tests/answers.txt"""
    text = (ROOT / "tests/answers.txt").read_text().partition(f"\n{name}\n")[2].partition("\n\n")[0]
    pairs = []
    for line in text.replace("\n      ", "   ").strip().splitlines():
        gold, *answers = line.strip().split("   ")
        pairs += [(gold.removesuffix(" ::"), answer) for answer in answers]
    assert len(pairs) > 150
    return pairs


@pytest.mark.slow
def test_equal_answers_are_accepted(verifier):
    pairs = listed("right")
    assert [pair for pair, verdict in zip(pairs, grade(verifier, pairs)) if verdict != 1.0] == []


def test_other_answers_are_rejected(verifier):
    pairs = [*listed("wrong"), ("540", ""), ("540", " "), ("", ""), ("5", "5\n6"), ("56", "5\n6"),
             ("540", ", ".join(map(str, range(1000)))), ("540", "x" * 600 + "540")]
    assert [pair for pair, verdict in zip(pairs, grade(verifier, pairs)) if verdict != 0.0] == []


GIVEN_UP = [r"42 \text{ (since } 6\cdot7=42)", r"\log_2 8", "e^0 = 1", r"m+n=33, \frac{16}{17}"]


@needs_shared
@pytest.mark.parametrize("name, wrong", [("round3", []), ("round4", GIVEN_UP)])
def test_the_attacks(verifier, name, wrong):
    cases = [json.loads(line) for line in (SHARED / f"verifier/{name}.jsonl").open()]
    verdicts = grade(verifier, [(case["gold"], case["answer"]) for case in cases])
    assert [c["answer"] for c, v in zip(cases, verdicts) if v != float(c["correct"])] == wrong


def test_two_numbers_side_by_side_are_never_their_sum(verifier):
    forms = ["(@)(#)", "@(#)", "@ #", "@{#}", r"@\frac{#}{1}", r"@(\frac{#}{1})", r"@\binom{#}{1}",
             r"@\sqrt{#}", "@ (#)", r"(@)\frac{#}{1}", r"\frac{@}{1}\frac{#}{1}", r"@\,#", "[@][#]"]
    pairs = [(str(a + b), form.replace("@", str(a)).replace("#", str(b)))
             for form in forms for a in range(1, 10) for b in range(2, 10)
             if a + b not in (a * b, a * math.sqrt(b))]
    assert [pair for pair, verdict in zip(pairs, grade(verifier, pairs)) if verdict] == []


@pytest.mark.parametrize("text, value", [
    ("7^6", 7**6), ("1+8+27", 36), (r"2^{2^4}", 65536), ("2(8)^2", 128), ("-3^2", -9), ("4!", 24),
    (r"1\frac{4}{5}", Fraction(9, 5)), (r"-1\frac{1}{2}", Fraction(-3, 2)), ("1.5", Fraction(3, 2)),
    (r"\binom{9}{2}", 36), (r"\sqrt{1764}", 42), (r"3(\frac82)", 12), (r"2025 \bmod 1000", 25),
    (r"3 \text{ million}", 3 * 10**6), (r"0.1\overline{6}", Fraction(1, 6)), ("045", 45),
    *[(text, None) for text in (
        "", "x", "1 2", r"\sqrt{8}", "5!!", "--5", "1/0", "2^{0.5}", "9^{9^9}", "(200!)^{200}",
        "(" * 300 + "1" + ")" * 300, "5 +", "()", r"\frac{1}", "5[1]", "1e5",
        "0x10", "1_000", "5 if 1 else 6", "__import__('os')", "1,2", r"5\frac{8}{2}", "٤٢")],
])
def test_read_number(text, value):
    found = read_number(verifier_module.clean(text))
    assert (found and found[0]) == value


@pytest.mark.parametrize("answer, picked", [
    *[(a, "A") for a in ("A", "(A)", "A.", r"\text{A}", r"\textbf{(A)}", r"\mathrm{A}", "$A$")],
    *[(a, None) for a in ("ABCD", "A or B", "A, B", "A and C", "AB", "A B C D", "A/B", "(A)(B)",
                          "A: yes, B: no", "A. or B.", r"\text{A or B}", "Apple", "", "A = 5")],
])
def test_multiple_choice(verifier, answer, picked):
    verdicts = grade(verifier, [(letter, answer) for letter in "ABCDEFGHIJ"])
    assert verdicts == [float(letter == picked) for letter in "ABCDEFGHIJ"]


# ------------------------------------------------------------------------------- generated cases
def check_generated(golds, verifier, most):
    """Grade what is made of the golds, print the counts, and list every wrong verdict."""
    rng = random.Random(0)
    for make, expected in ((equivalents, 1.0), (lambda gold: near_misses(gold, rng), 0.0)):
        cases = []
        for gold in golds:
            made = sorted(set(make(gold)))
            few = made if ALL else rng.sample(made, min(len(made), most))
            cases += [(kind, answer, gold) for kind, answer in few]
        verdicts = grade(verifier, [(case[2], case[1]) for case in cases])
        failed = [case for case, verdict in zip(cases, verdicts) if verdict != expected]
        what = "equivalents accepted" if expected else "near misses refused"
        print(f"{what}: {len(cases) - len(failed)} of {len(cases)}, of {len(golds)} golds, "
              f"{len({case[0] for case in cases})} kinds; not: {failed}")
        assert len({case[0] for case in cases}) >= 8
        assert len(failed) <= 0.01 * expected * len(cases), failed


@pytest.mark.slow
def test_generated_answers_to_typical_golds(verifier):
    check_generated([g.strip() for line in GOLDS.strip().splitlines() for g in line.split("|")],
                    verifier, 12)


@pytest.mark.slow
@needs_shared
def test_generated_answers_to_the_benchmarks_golds(verifier):
    golds = []
    for name in ("math500", "aime24", "aime25", "amc23", "dapo_math_17k"):
        answers = [q["answer"] for q in load_questions(SHARED / f"benchmarks/{name}.parquet")]
        golds += random.Random(0).sample(answers, 500) if name == "dapo_math_17k" else answers
    check_generated(list(dict.fromkeys(golds)), verifier, 1)


# ----------------------------------------------------------------------------------- linear time
def pieces(tree):
    """The texts that a parsed pattern's literals make, and a character of each of its classes."""
    found, run = [], ""
    for kind, value in tree:
        if str(kind) == "LITERAL":
            run += chr(value)
            continue
        found, run = [*found, run], ""
        for part in value if isinstance(value, (list, tuple)) else ():
            subtrees = part if isinstance(part, list) else [part]
            for sub in subtrees:
                if type(sub).__name__ == "SubPattern":
                    found += pieces(sub)
        if str(kind) == "IN":
            for inner, argument in value:
                if str(inner) in ("LITERAL", "RANGE"):
                    found.append(chr(argument if str(inner) == "LITERAL" else argument[0]))
    return [*found, run]


def patterns(monkeypatch):
    """Every pattern that verifier.py runs on model text, also those in a line of code."""
    seen, real = set(), re._compile
    monkeypatch.setattr(re, "_compile", lambda pattern, flags: (
        seen.add(pattern) or real(pattern, flags)))
    for gold, answer in (("42", r"x = \text{a} 1.5 \pmod{7}."), (r"\sqrt{5}", "x = 5, y<2"),
                         ("even", "odd"), ("7", "8")):
        settle(gold, answer)
    monkeypatch.undo()
    found = [re.compile(p) for p in seen if isinstance(p, str)]
    for value in vars(verifier_module).values():
        for item in value if isinstance(value, list) else [value]:
            item = item[0] if isinstance(item, tuple) else item
            found += [item] if isinstance(item, re.Pattern) else []
    return [p for p in found if p is not verifier_module.THEIRS]  # that one reads the data


def test_every_pattern_takes_linear_time(monkeypatch):
    found, slow = patterns(monkeypatch), []
    assert len(found) > 45
    for pattern in found:
        parts = sorted({p for p in pieces(re._parser.parse(pattern.pattern, pattern.flags)) if p})
        rng = random.Random(0)
        mixed = ["".join(rng.choices(parts or [""], k=rng.randint(2, 6))) for _ in range(60)]
        for piece in [*parts, *mixed]:
            text = (piece * 500)[:500] + "\0"
            for run in (pattern.fullmatch, lambda t: pattern.sub("", t)):
                began = time.process_time()
                run(text)
                if (took := time.process_time() - began) > 0.010:
                    slow.append((took, pattern.pattern[:60], piece))
    assert not slow, sorted(slow)[::-1][:5]


PIECES = (r"a 9 \ { } ( ) [ ] $ ~ % ² √ = < , . / ^ _ + - ! | : ' and or cm/ x= 9, 999, 1/ {,} \, "
          r"\text{ \text{a} \frac \frac{1}{2} \sqrt \sqrt[ \color{ \pmod 0.\overline{3} ^\circ "
          r"\cos\alpha \Rightarrow \sin \{ \left( \right) \begin{ \approx \equiv \cdot \binom "
          r"\cdots AB f(x) |z| _{1} ^{2} 9 million percent th").split(" ") + [" "]


@pytest.mark.parametrize("gold", ["42", r"\sqrt{51}", "(1,2)", "even"])
def test_what_runs_in_the_trainers_process_is_quick(gold):
    """Random LaTeX, and what made an earlier pattern hang: 102 and 88 characters, 12 s and more."""
    rng, slow = random.Random(0), []
    texts = ["".join(rng.choices(PIECES, k=rng.randint(5, 150)))[:500] for _ in range(500)]
    texts += ["".join(rng.choices(PIECES, k=3)) * 60 for _ in range(500)]
    texts += [r"\Rightarrow" * 8 + "x^2=42", r"\cos\alpha\cos\beta\cos\gamma\cos\delta+\sin\alpha"
              r"\sin\beta\sin\gamma\sin\delta\cdot 1=1", "(200!)^{200}" * 40, "9!^{99}*" * 60]
    for text in texts:
        began = time.process_time()
        settle(gold, text[:500])
        if time.process_time() - began > 0.020:
            slow.append(text)
    assert not slow


# ---------------------------------------------------------------------------------------- workers
def worker_of(verifier):
    (worker,) = verifier._started.values()
    return worker


def gone(pid, within=8.0):
    """True once the process has ended; a zombie (its new parent did not reap it) has ended too."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def children():
    return {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat")
            if path.exists() and int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid()}


@pytest.mark.slow
def test_a_timeout_costs_one_answer():
    with Verifier(workers=2, timeout=4.0) as own:
        pairs = [ALGEBRA, (r"\sqrt{5}", ENDLESS), ("x^2-1", "(x-1)(x+1)"), ("x^2-4", "(x-1)(x+1)")]
        assert grade(own, pairs) == [1.0, 0.0, 1.0, 0.0]
        assert own.stopped == 1
        assert grade(own, [ALGEBRA, ("7", "7")]) == [1.0, 1.0]


@pytest.mark.slow
def test_a_worker_killed_from_outside_costs_one_answer():
    with Verifier(workers=1, timeout=20.0) as own:
        assert grade(own, [ALGEBRA]) == [1.0]
        threading.Timer(0.5, worker_of(own).kill).start()
        assert grade(own, [(r"\sqrt{5}", ENDLESS)]) == [0.0]
        assert own.stopped == 1
        assert grade(own, [ALGEBRA]) == [1.0]
        worker_of(own).kill()  # one that dies between two batches costs nothing
        worker_of(own).wait()
        assert grade(own, [("x+1", "1+x+0")]) == [1.0]
        assert own.stopped == 1


@pytest.mark.slow
def test_a_memory_hog_is_stopped():
    with Verifier(workers=1, timeout=10.0, memory_mb=700) as own:
        assert grade(own, [ALGEBRA]) == [1.0]
        limits = Path(f"/proc/{worker_of(own).pid}/limits").read_text()
        assert int(re.search(r"Max address space +([0-9]+)", limits)[1]) == 700 * 2**20
        assert grade(own, [(r"\sqrt{5}", r"\sqrt{2^{2^{34}}+1}"), ALGEBRA]) == [0.0, 1.0]


@pytest.mark.slow
def test_no_process_is_left_after_close():
    before = children()
    own = Verifier(workers=2, timeout=1.0)
    assert grade(own, [("7", "7"), ("7", "8"), ("7", r"\frac{14}{2}")]) == [1.0, 0.0, 1.0]
    assert children() == before  # numbers need no process
    grade(own, [ALGEBRA, (r"\sqrt{5}", ENDLESS)])
    assert children() > before
    own.close()
    assert children() == before  # no zombie either: a zombie is still a child


@pytest.mark.slow
def test_an_interrupt_leaves_no_late_verdict():
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from verifier import Verifier\n"
            "own = Verifier(workers=1, timeout=8); print('begun', flush=True)\n"
            "try: own.verify([r'\\boxed{%s}'], [r'\\sqrt{5}']); print('nothing', flush=True)\n"
            "except KeyboardInterrupt: print('interrupted', flush=True)\n"
            "print(own.verify([r'\\boxed{1+x+0}'], ['x+1']), flush=True)\n" % ENDLESS)
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "begun\n"
    time.sleep(3)  # the worker starts in one, and would be stopped after eight
    run.send_signal(signal.SIGINT)
    first, then, *_ = run.communicate(timeout=60)[0].split("\n")
    assert then == "[1.0]"  # of its own answer, not the one that the interrupt left
    assert first in ("interrupted", "nothing")  # nothing: a machine that stood still for seconds


@pytest.mark.slow
def test_a_busy_worker_dies_after_its_killed_parent():
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from verifier import Verifier\n"
            "own = Verifier(workers=1, timeout=4); own.verify([r'\\boxed{x+1+0}'], ['1+x'])\n"
            "print(*[w.pid for w in own._started.values()], flush=True)\n"
            "own.verify([r'\\boxed{%s}'], [r'\\sqrt{5}'])" % ENDLESS)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    worker = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.communicate()
    assert gone(worker)


def test_workers_that_cannot_start_stop_the_run(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Verifier(workers=1) as own, pytest.raises(RuntimeError, match="--worker"):
        grade(own, [ALGEBRA])


def test_model_text_is_never_executed():
    """eval and exec are out of reach in a worker; math-verify alone would get to both."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import verifier\n"
            "import math_verify, sympy.physics.units  # their own imports compile\n"
            "seen = []\n"
            "sys.addaudithook(lambda event, args: seen.append(args) if event == 'compile' else 0)\n"
            "verifier._work(30, 4096)\n"
            # sympy's polynomials compile functions on tuples of whole numbers; imports are files.
            "bad = [a for a in seen if not (str(a[1]).endswith('.py')\n"
            "                               or a[0].startswith(b'def monomial_'))]\n"
            "assert not bad, bad\n")
    lines = [[r"x", r"\sum_{n=1}^{\infty} \frac{f(7)^n}{n!}"], ["x/2", "0.5x"], ["1/2", "0.5"]]
    run = subprocess.run([sys.executable, "-c", code], input="\n".join(map(json.dumps, lines)),
                         check=True, timeout=90, text=True, capture_output=True)
    assert run.stdout.split() == ["ready", "0", "1", "1"]


def test_batches(verifier, monkeypatch):
    with pytest.raises(ValueError):
        verifier.verify(["a", "b"], ["a"])
    assert verifier.verify([box("42")] * 3, ["42", 42, None]) == [1.0, 1.0, 0.0]
    sent, real = [], Verifier._ask
    monkeypatch.setattr(Verifier, "_ask", lambda self, line: sent.append(line) or real(self, line))
    assert grade(verifier, [ALGEBRA] * 512) == [1.0] * 512
    assert len(sent) == 1  # a pair is compared once
    long = "9" * 10**6
    assert verifier.verify([box(long), "\ud800" + box("5")], [long + "1", "5"]) == [0.0, 1.0]


def test_import_is_light():
    code = ("import sys; import verifier; heavy = {'sympy', 'math_verify', 'torch', 'numpy'};"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=30)


if __name__ == "__main__":
    with Verifier(timeout=60.0) as every_case:
        test_generated_answers_to_typical_golds(every_case)
        test_generated_answers_to_the_benchmarks_golds(every_case)
