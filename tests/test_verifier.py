"""verifier.py: what is extracted, what is equal, and that no model text can harm a run.

Of the answers generated from the benchmarks' golds a fixed sample is graded; all of them, for
minutes, with `python tests/test_verifier.py --all` or VERIFIER_CASES=all in the environment.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import verifier as verifier_module  # noqa: E402
from verifier import Verifier, answer_part, last_boxed, load_questions  # noqa: E402

SHARED = ROOT.parent / "shared/data/verifier"  # third-party cases, not part of the repository
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
ALL = os.environ.get("VERIFIER_CASES") == "all"
ENDLESS = r"\prod_{n=1}^{10^{9}} n!"
ALGEBRA = (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}")  # equal, and only a worker sees it


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, timeout=30.0) as shared:
        yield shared
    assert shared.crashes == shared.timeouts == 0


def gone(pid: int, within: float = 5.0) -> bool:
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


def children() -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def when_busy(pool_of: Verifier, act) -> threading.Thread:
    """Call act(pid) 0.3 s after a worker has taken a request."""
    def watch():
        end = time.monotonic() + 60
        while time.monotonic() < end:
            busy = [w for w in list(pool_of._pool) if w.task is not None]
            if busy:
                time.sleep(0.3)
                return act(busy[0].pid)
            time.sleep(0.01)
    thread = threading.Thread(target=watch)
    thread.start()
    return thread


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
    for case in map(json.loads, (SHARED / "boxed_extraction.jsonl").read_text().splitlines()):
        expected = case["expected"]
        if case["function"] == "last_boxed_only_string" and expected is not None:
            expected = expected[expected.index("{") + 1 : -1]  # theirs keeps the wrapper
        assert last_boxed(case["text"]) == expected, case


def test_answer_part():
    assert answer_part("<think>a</think>b") == "b"
    assert answer_part("a</think>b</think>c") == "c"  # DeepSeek-R1-Distill opens no <think>
    assert answer_part("no think part") == "no think part"


def test_after_think(verifier):
    texts = [r"<think>\boxed{4}</think>\boxed{5}", r"<think>\boxed{5}</think>so it is 4",
             r"\boxed{5}", "</think>" * 10 + r"\boxed{5}", r"\boxed{5}" + "</think>" * 10]
    assert verifier.verify(texts, ["5"] * 5, after_think=True) == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert verifier.verify(texts, ["5"] * 5) == [1.0] * 5


# -------------------------------------------------------------------------------------- equality
ACCEPTED = [
    ("540", "540"), ("540", " 540. "), ("540", "$540$"), ("540", "540.0"), ("45", "045"),
    ("5400", "5{,}400"), ("5400", "5,400"), ("5400", r"5\,400"), ("1000", "1 000"),
    ("540", r"\text{540}"), ("540", r"\mathbf{540}"), ("540", r"\frac{1080}{2}"),
    ("540", "x = 540"), ("540", r"540^\circ"), ("540", r"540 \text{ cm}"),
    ("540", r"2^2 \cdot 3^3 \cdot 5"), (r"\frac{14}{3}", r"\dfrac{14}{3}"), (r"\frac12", "0.5"),
    (r"\frac12", "1/2"), (r"\left(3,\frac{\pi}{2}\right)", r"\left( 3, \dfrac{\pi}{2} \right)"),
    ("(1,2)", "(1, 2)"), ("-2,1", r"1 \text{ or } -2"), ("-2,1", r"\{-2, 1\}"),
    ("[0,1)", r"\left[0, 1\right)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)"), ("x^2+2x+1", "(x+1)^2"),
    (r"11\sqrt2", r"11\sqrt{2}"), ("6-5i", "6 - 5i"), ("y=2x+3", "2x+3"), (r"\$18.90", "18.9"),
    (r"\text{Evelyn}", "Evelyn"), ("Evelyn", r"\text{Evelyn}"), (r"\text{no roots}", "No roots"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
    ("1", r"\sum_{n=1}^{\infty} 2^{-n}"), ("10", r"\binom{5}{2}"), ("204_5", "204_{5}"),
    (r"\boxed{42}", "42"), (r"\tan^2(y)+1", r"\sec^2(y)"), ("1 - 1/e", r"\frac{e-1}{e}"),
    ("24", "24 km/h"), ("24", "24 cm^2"), ("5", r"\approx 5"), ("12", r"12^{\text{th}}"),
    ("90", "90°"), (r"\frac{\pi}{6}", r"30^\circ"), ("(3,4]", r"3 < \lambda \leq 4"),
    (r"3 < \lambda \leq 4", "(3,4]"), ("(3,4]", r"\{x \mid 3 < x \le 4\}"),
    (r"(-\infty,2)\cup(3,\infty)", r"x<2 \text{ or } x>3"), (r"\frac{a+1}{c}", r"\frac{a+1}c"),
    (r"\sqrt{2}", "√2"), (r"(-\infty,-2)\cup(2,\infty)", "(-∞, -2) ∪ (2, ∞)"),
    ("2", r"17 \bmod 5 = 2"), ("16,3,1,1", "w=16, d=3, a=1, b=1"), ("1010", "1010_2"),
    (r"\emptyset", r"\varnothing"), (r"\frac{1}{3}", r"0.\overline{3}"),
    ("7,4", r"7 \text{ goats and } 4 \text{ toys}"), ("2000000", r"2 \text{ million}"),
    ("5", r"\color{red}{5}"), ("3+2t", "2t+3"),
    (r"\frac{3}{2}n + \frac{1}{2}m", r"\dfrac{3n + m}{2}"), ("x=5", "5"), ("5", "x=5"),
    ("y = 2x + 3", "2x-y+3=0"), ("y=2x+3", "2x+3"), ("5x - 7y + 11z + 4 = 0", "-5x+7y-11z=4"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt5"), (r"x \in [-2,7]", r"-2 \le x \le 7"),
    (r"x \in [-2,7]", "[-2,7]"), (r"137 \frac{1}{2}", "137.5"),
    (r"137 \frac{1}{2}", r"\frac{275}{2}"), ("50", r"50\%"), ("0.5", r"50\%"),
    (r"\frac12", r"50\%"), (r"5.4 \text{ cents}", "5.4"), (r"\$18.90", "18.9"),
    (r"\$18.90", r"18.90 \text{ dollars}"), (r"15\mbox{ cm}^2", r"15 \text{ square centimeters}"),
    ("3.14", r"\pi"), ("5.33", r"\frac{16}{3} \approx 5.33"),
    (r"\frac{16}{3}", r"\frac{16}{3} \approx 5.33"), ("33", "m+n=33"), ("2k", r"k\cdot2"),
    (r"\text{even}", "even"), ("(a+5)(b+2)", "(b+2)(a+5)"), (r"30^\circ", r"\frac{\pi}{6}"),
    (r"\frac{\sqrt3}{3}", r"\frac{1}{\sqrt3}"), ("58,500", r"\$58,500"),
    ("5", r"5 \text{ (units)}"), ("(1,2)", "x=1, y=2"), ("3", r"3 \pmod 7"), ("1024", "2^{10}"),
    (r"\frac{\ln 2}{2}", r"\frac12\ln 2"), ("x^2+y^2=25", "y^2+x^2=25"),
    (r"y=-\frac12x+3", "x+2y=6"), ("(1,2),(3,4)", "(3,4), (1,2)"), ("5", r"5\,\text{cm}^{2}"),
    (r"\left\lfloor \frac{n}{2}\right\rfloor", r"\lfloor n/2 \rfloor"), (r"\sqrt[3]{4}", "2^{2/3}"),
    ("5", "AB = 5"), ("1,2", "x_1=1, x_2=2"), (r"\frac{11}{2}", "5.5"),
    (r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt2}"), (r"(-\infty,\infty)", r"\mathbb{R}"),
    ("x>3", "3<x"), (r"\frac{1}{2}+\frac{\sqrt3}{2}i", r"e^{i\pi/3}"), ("5", r"\frac{10}{2} = 5"),
    (r"\frac{1}{2}", r"\frac{2}{4} = \frac{1}{2}"), ("5", r"5\text{ sq. units}"),
    ("60", r"60\text{ km/hr}"), ("1:2", "1 : 2"), ("yes", r"\textbf{Yes}"),
    (r"\frac{x+1}{x-1}", r"\frac{1+x}{x-1}"), (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"),
    (r"4\pi", r"4 \pi \text{ square units}"), (r"4\pi", r"4\pi \approx 12.57"), (r"75\%", "0.75"),
    ("0.333", r"\frac13"), (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac{1}{x}", "x^{-1}"),
    ("2e", r"2 \cdot e"), (r"\frac{\pi}{4}", r"45^\circ"), (r"\langle 1,2\rangle", "(1,2)"),
    ("7", r"7 \text{ different colors}"), ("540", r"\,540\,"), ("10", r"10 \text{ hours}"),
    ("10", r"10 \text{ hours per day}"), ("2,3", r"2\text{ and }3"), ("-2", "x=-2"), ("5", "(5)"),
    ("5", r"\underline{5}"), ("5", r"\mathbf{5}."), (r"A\cup B", r"B\cup A"),
    (r"10\sqrt{3}", r"10\sqrt3\text{ cm}"), ("f(x)=2x+3", "2x+3"), ("3", r"\lfloor \pi \rfloor"),
]
REJECTED = [
    ("540", "541"), ("540", "-540"), ("540", "5.4"), ("540", "54000"), ("540", ""), ("540", " "),
    ("540", r"\text{the answer}"), ("540", r"\text{not } 540"), ("540", "???"), ("540", "NaN"),
    ("2", r"1 \text{ or } 2 \text{ or } 3"), ("540", "540, 541"), ("540", "540; 541"),
    ("540", "540 541"), ("541", "540 or 541"), ("540", r"540 \text{ (or 541)}"), ("6", "2 3"),
    ("540", r"540 \text{, not } 541"), ("540", r"\{540, 541\}"), ("540", r"540 \pm 1"),
    ("540", "540 = 541"), ("541", "540 = 541"), ("540", r"540 \approx 541"), ("540", "[0, 1000]"),
    ("540", "x > 540"), ("540", r"540 \neq 541"), ("540", "540_7"), ("204_5", "204_7"),
    ("540", r"\undefined 540"), ("2", r"2\sqrt{2}"), ("540", ", ".join(map(str, range(1000)))),
    ("7", " ".join(map(str, range(10)))), (r"\frac13", "0.33"), (r"\pi", "3.14"), ("0", "0/0"),
    ("(1,2)", "(2,1)"), ("(1,2)", "1"), ("1,2", "1"), ("1,2", "1,2,3"), ("[0,1)", "[0,1]"),
    (r"\text{even}", r"\text{odd or even}"), (r"\text{east}", "seat"), ("", ""), ("x", "y"),
    # as a policy that wants rewards would try
    ("2", r"2 \text{ hours } 30 \text{ minutes}"), ("6", r"6 \text{ apples}, 7 \text{ oranges}"),
    ("6", r"6 \text{ if } n \text{ even}, 7 \text{ if odd}"),
    (r"40 \text{ a}, 60 \text{ b}", r"40 \text{ c}, 50 \text{ d}"), ("3", r"3 \text{ thousand}"),
    ("6", r"6\text{ cm} \times 7\text{ cm}"), (r"\pi r^2 h", r"\pi r^2"), ("3+2t", "3+2"),
    ("2t", "2s"), ("40_9", "40_{10}"), ("6", "6_{a}"), ("10^{-7}", "0.0000002"),
    (r"1.6 \times 10^{-19}", r"1.7 \times 10^{-19}"), (r"\frac13", "0.333333"),
    (r"\pi", "3.14159265"), ("10:30", "1/3"), ("5", r"5 \text{ or six}"), ("5", "x=5 or x=6"),
    ("5", "2=3=5"), ("5", r"5 \neq 6"), ("5", r"\{5,6\}"), ("5", "5, 6"), ("5", r"5 \pm 0"),
    ("5", "[5,6]"), ("5", "(5,6)"), ("3R^2", "3r^2"), ("5", r"5\%x"), ("5", "5%6"),
    (r"\$36", r"36 \text{ cents}"), (r"15\mbox{ cm}^2", r"15\text{ cm}"), ("204_5", "204_6"),
    ("3", r"3 \text{ dozen}"), ("5", "x-1=5"), ("5", "2x=5"), ("5", r"5 \text{ squared}"),
    (r"\frac12", r"\frac12\%"), ("x=5", "y=5"), ("2k", "2k=3k"), ("p-q", "p-q=p+q"), ("p-q", "q-p"),
    ("540", "540_7"), (r"\text{(C)}", "C or D"), ("5", r"5\phantom{2}"), ("5", "5'"), ("7", "5{2}"),
    ("10", "5{2}"), ("(3,4]", "[3,4]"), ("(3,4]", r"3\le x\le4"), ("(3,4]", "(3,4)"),
    (r"(-\infty,2)\cup(3,\infty)", r"x<2 \text{ and } x>3"), ("540", "540.0000001"),
    ("2^{10}", "1024.5"), ("0", "10^{-30}"), ("5", "five or 5"), ("5", "5!"), ("120", "5!!"),
    ("540", r"540\text{ to }541"), ("540", "540-541"),
    (r"\pi", "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899"),
    ("5", "5,"), ("5", r"5, \ldots"), ("5", "5 / 6"), ("5", "5 - 6"), ("5", "5 vs 6"),
    ("5", "5 | 6"), ("5", "5 & 6"), ("5", r"5 \mid 6"), ("5", r"5 \\ 6"), ("5", r"5\text{ }6"),
    ("5", "5{,}6"), ("5", r"5 \& 6"), ("5", r"\frac{5}{6}|5"), ("5", r"\{5\} \cup \{6\}"),
    ("5", r"5 \in \{5,6\}"), ("5", r"x \in \{5,6\}"), ("5", "x = 5, y = 6"),
    ("5", r"n=5 \implies m=6"), ("5", r"5 \Rightarrow 6"), ("5", "a = 5 = b = 6"),
    ("5", "6 = x = 5"), ("5", r"x=5 \approx 6"), ("5", "5^{6}"), ("5", "5_6"), ("5", "5_{10}6"),
    ("25", "5^2=25=26"), ("5", r"\pm 5"), ("5", r"\mp 5"), ("-5", r"\pm 5"), ("5", r"\text{five}"),
    ("5", r"\text{5 or six}"), ("5", r"5 \text{ (alternatively six)}"), ("5", "5 alternatively 6"),
    ("5", r"5 \text{ alternatively } 6"), ("5", "[5,5]"), ("5", "(5,5)"), ("5", r"5 \text{ tens}"),
    ("5", r"5 \text{ hundredth}"), ("5", r"5 \text{ percent of } 10"), ("0.05", r"5\%\%"),
    ("5", r"5 \text{ k}"), ("5", "5k"), ("5", r"5 \text{ cm and } 6 \text{ cm}"),
    ("5", r"5 \text{ minus } 1"), ("5", r"\text{Either 5 or 6}"),
    ("5", r"\begin{cases}5\\6\end{cases}"), ("5", r"\begin{pmatrix}5\\6\end{pmatrix}"),
    ("5", r"\substack{5\\6}"), ("5", r"5 \color{white}{6}"), ("5", r"\color{white}{6} 5"),
    ("5", r"5\hspace{1cm}6"), ("5", r"5 \phantom{6}"), ("5", r"5\llap{6}"), ("5", r"5\not=6"),
    ("5", r"5 \ne 6"), ("5", r"x \ne 5"), ("5", r"x \le 5"), ("5", r"5 \le x"), ("5", r"x \geq 5"),
    ("5", "5..6"), ("5", "5...6"), ("5", r"5\ldots6"), ("5", "5-6"), ("5", "5–6"), ("5", "5 to 6"),
    ("5", "5~6"), ("56", "5~6"), ("5", "5.6"), ("5", "5:6"), ("5", "5 of 6"), (r"\frac12", "1:2"),
    (r"\frac12", "0.50001"), (r"\frac13", "0.3333333333333333333333333333333333333333333333333"),
    (r"\sqrt2", "1.41421356237309504880168872420969807856967187537694"), ("3", r"\sqrt{9}, 4"),
    ("2", "1+1, 3"), ("2", "x=1+1=3"), ("2", r"x=1+1 \text{ or } 3"), ("2", "f(x)=2, g(x)=3"),
    ("2", "f=2;3"), ("2k", "k=2k"), ("2k+2", "2k+2=2m+2"), ("2k", "2K"), ("x=5", "x=5, 6"),
    ("x=5", r"x=5 \text{ or } 6"), ("y=2x", r"y=2x \text{ or } y=3x"), ("y=2x", "x=2y"),
    ("y = 2x+3", "y=2x+4"), ("y=2x+3", "0=0"), ("y=2x+3", "y=y"), ("y=2x+3", "2x+3=2x+3"),
    ("5x - 7y + 11z + 4 = 0", "0=0"), ("5x - 7y + 11z + 4 = 0", "5x-7y+11z+4"),
    ("5x - 7y + 11z + 4 = 0", "x(5x - 7y + 11z + 4) = 0"), ("(2,4)", "(2,4),(3,5)"),
    ("(2,4)", "2,4,6"), ("(2,4)", "4,2"), ("(2,4)", r"\{2,4\}\cup\{5\}"), ("(2,4)", "[2,4]"),
    ("(2,4)", "(2,4]"), ("(2,4)", r"\{4,2\}"), ("1,-2", "1"), ("1,-2", "1,-2,1"), ("1,-2", "1,1"),
    ("1,-2", "-2"), ("3, 5, 7", "3,5,7,9"), ("3, 5, 7", "3,5,5"), ("3, 5, 7", "(3,7,5)"),
    (r"90^\circ", r"90 \text{ radians}"), (r"90^\circ", r"90\%"), (r"90^\circ", r"\pi"),
    (r"90^\circ", r"90^\circ C"), (r"30^\circ", r"30 \text{ minutes}"), (r"\$36", r"36\%"),
    (r"\$36", r"36 \text{ euros}"), (r"864 \mbox{ inches}^2", r"864 \text{ inches}"),
    (r"864 \mbox{ inches}^2", r"864 \text{ cm}^2"), (r"5.4 \text{ cents}", r"\$5.40"),
    (r"5.4 \text{ cents}", r"5.4 \text{ dollars}"), (r"\text{even}", "even, odd"),
    (r"\text{even}", "even/odd"), (r"\text{even}", "neven"), (r"\text{even}", "not even"),
    (r"\text{even}", r"\text{even}\text{odd}"), (r"\text{Evelyn}", "Evelyn and Navin"),
    (r"\text{(C)}", "(C),(D)"), (r"\text{(C)}", "C D"), (r"\text{(C)}", "C:D"),
    (r"\text{(C)}", "(C) or maybe (D)"), (r"\text{(C)}", "C. D."), (r"\text{(C)}", "C) D)"),
    (r"\text{(C)}", "(C) not (D)"), ("(3,4]", "(3,4"), ("(3,4]", "3,4]"),
    ("(3,4]", r"3<x\le 4 \text{ or } x=5"), ("(3,4]", r"3<4\le 4"), ("(3,4]", "x>3"),
    ("(3,4]", r"x>3, x\le 4"), (r"x \in [-2,7]", r"y \in [-2,7]"), (r"x \in [-2,7]", r"-2\le x<7"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2)\cap(3,\infty)"),
    (r"(-\infty,2)\cup(3,\infty)", "x<2"), (r"(-\infty,2)\cup(3,\infty)", "2<x<3"),
    (r"(-\infty,2)\cup(3,\infty)", r"x \ne 2"), (r"\emptyset", r"\{0\}"), (r"\emptyset", "0"),
    ("0", r"\emptyset"), (r"\infty", r"-\infty"), ("0", r"\infty-\infty"),
    ("1", r"\frac{\infty}{\infty}"), ("1", r"1^{\infty}"), ("0", r"0\cdot\infty"),
    ("5", r"5\cdot\frac{0}{0}"), ("0", r"\lim_{x\to 0} y"), ("1", r"\sum_{n=1}^{1} n, 2"),
    ("540", "540^{1}_{7}"), ("540", "540_{}"), ("540", "540_{10}, 541"), ("16", "F_{16}"),
    ("15", "F_{16}"), ("10", "1010_2"), ("5", "101_2"), ("101", "101_3"), ("5", "5''"),
    ("5", r"5\text{'}"), ("5", r"5\#"), ("5", "5?"), ("5", "5(6)"), ("30", "5(6)7"),
    ("5", "(5)(6)"), ("5", "5[6]"), ("5", r"\overline{5}6"), ("55", r"\overline{5}5"),
    ("5", r"\cancel{6}5"), ("5", r"\sout{6} 5"), ("5", r"\text{\sout{6}} 5"), ("5", r"\def\a{6}5"),
    ("5", r"\verb|6|5"), ("5", "% 6\n5"), ("5", "5 % 6"), ("5", "5\n6"), ("56", "5\n6"),
    ("5", "5\t6"), ("5", "5\u200b6"), ("56", "5\u200b6"), ("5", "५"), ("5", "⑤"), ("5", "5⁰"),
    ("1", "5⁰6"), ("5", "５"), ("1000", "1e3"), ("1000", "1.000"), ("1000", "1,00"),
    ("1234", "12,34"), ("1234", "1,2,3,4"), ("100200", "100, 200"), ("5", r"5\cdot 10^{0}\cdot 1x"),
    ("5", "e=5=6"), ("3", r"\pi=3"), ("3", "e=3=4"), ("5", "i=5=6"), ("5", "x^2=5"), ("5", "-x=5"),
    ("5", r"\frac{1}{x}=5"), ("5", "3x+1=5"), ("5", "x-y=5=6"), ("5", r"\text{not } x = 5"),
    ("5", r"x = \text{not } 5"), ("5", r"\lnot 5"), ("5", r"\sim 5"), ("5", "<5"), ("5", ">5"),
    ("5", r"\le 5"), ("5", "5+"), ("5", "5-"), ("-5", "5-"), ("5", "+-5"), ("5", "--5x"),
    ("5", r"5\text{ or more}"), ("5", r"\ge 5"), ("5", "at least 5"), ("5", "no more than 5"),
    ("5", r"5 \text{ at most}"), ("5", r"5 \text{ and above}"), ("5", r"5 \text{ through } 8"),
    ("5", r"\text{between } 5 \text{ and } 6"), ("2", r"\sqrt[3]{8}, \sqrt[3]{9}"),
    ("5", r"5 \vee 6"), ("5", r"5\lor6"), ("5", r"5\wedge6"), ("5", r"5\land 5"),
    ("1", r"\text{True}"), ("5", "5==6"), ("5", "5=5=6"), ("5", "5<6"), ("5", "4<5"),
    ("5", "4<5<6"), ("5", "x=5<6"), ("5", r"x=5\neq6"), ("5", r"5 \to 6"), ("5", r"x \to 5"),
    ("5", r"x \mapsto 5"), ("5", r"5 \equiv 6"), ("5", r"5 \cong 6"), ("5", r"5 \sim 6"),
    ("5", r"5 \propto 6"), ("5", r"5 \pmod 6 = 6"), ("5", r"5 \div 1 x"), ("5", "gcd(5,10),6"),
    ("5", r"5\text{ hours}6"), ("5", r"5\text{hr }6\text{min}"), ("5", "5' 6''"),
    ("5", r"5^\circ 6'"), ("5", "5 ft 6 in"), ("5", r"5\text{ million}"), ("5", "5 hundred"),
    ("5", "5M"), ("5", "5K"), ("5", r"5 \times"), ("5", r"\times 5"), ("5", r"\text{minus } 5"),
    ("5", "negative 5"), ("-5", r"\text{minus } 5 x"),
]


def box(content: str) -> str:
    return rf"Thus the answer is $\boxed{{{content}}}$."


@pytest.mark.slow
def test_equal_answers_are_accepted(verifier):
    golds, answers = zip(*ACCEPTED)
    verdicts = verifier.verify([box(a) for a in answers], list(golds))
    assert [pair for pair, verdict in zip(ACCEPTED, verdicts) if verdict != 1.0] == []


def test_other_answers_are_rejected(verifier):
    golds, answers = zip(*REJECTED)
    verdicts = verifier.verify([box(a) for a in answers], list(golds))
    assert [pair for pair, verdict in zip(REJECTED, verdicts) if verdict != 0.0] == []


def test_no_box_is_wrong(verifier):
    assert verifier.verify(["the answer is 42", "42", "", r"\boxed{42"], ["42"] * 4) == [0.0] * 4


def test_the_box_may_stand_anywhere(verifier):
    assert verifier.verify([box("42") + " and so on" * 500], ["42"]) == [1.0]


@pytest.mark.parametrize("answer, picked", [
    *[(a, "A") for a in ("A", "(A)", "A.", r"\text{A}", r"\textbf{(A)}", "A: something", "A) 5",
                         r"\text{(A) } 5", r"\mathrm{A}", "$A$")],
    ("B", "B"), ("(C) 12", "C"),
    *[(a, None) for a in ("ABCD", "A or B", "A, B", "A and C", "AB", "A B C D", "A/B", "(A)(B)",
                          "A: yes, B: no", "A. or B.", r"\text{A or B}", "Apple", "", "A = 5")],
])
def test_multiple_choice(verifier, answer, picked):
    verdicts = verifier.verify([box(answer)] * 10, list("ABCDEFGHIJ"))
    assert verdicts == [float(letter == picked) for letter in "ABCDEFGHIJ"]


def test_equal_reads_sentences(verifier):
    pairs = [("$9$", r"Answer \[ 9 \]"), ("42", "Long solution. Answer: 42"), ("2/3", "it is 2/3."),
             (r"$2$", r"there are $\boxed{2}$ values for $B$"), ("A", r"so \(\boxed{\text{(A)}}\)"),
             ("$4$", r"$4\sqrt{2}$"), ("4", r"4\sqrt{2}"), ("42", r"\boxed{41}"), ("7", "")]
    assert verifier.equal(pairs) == [1.0] * 5 + [0.0] * 4


@needs_shared
@pytest.mark.slow
def test_published_cases_at_least_as_often_right_as_math_verify():
    cases = [json.loads(line) for line in (SHARED / "cases.jsonl").read_text().splitlines()]
    boxed = [c for c in cases if c["kind"] == "response_boxed_required"]
    other = [c for c in cases if c["kind"] != "response_boxed_required"]
    with Verifier(workers=2, timeout=20.0) as own:
        verdicts = own.verify([c["response_or_answer"] for c in boxed], [c["gold"] for c in boxed])
        verdicts += own.equal([(c["gold"], c["response_or_answer"]) for c in other])
        assert own.timeouts == own.crashes == 0
    ours = sum(v == c["expected"] for v, c in zip(verdicts, boxed + other))
    # math-verify 0.9.0's verify(parse(gold), parse(answer)) is right on 360 of the 444.  What ours
    # gets wrong on purpose: an order that matters in a list without brackets, 2/4 for 1/2, a comma
    # as the decimal point, 0.33 for 1/3.
    print(f"agreement with {len(cases)} published verdicts: ours {ours}, math-verify's default 360")
    assert ours >= 430


# ------------------------------------------------------------------------------- generated cases
BENCHMARKS = ROOT.parent / "shared/data/benchmarks"
# Golds in the manner of MATH, for a clone without ../shared.
GOLDS = r"""
    0 | 7 | 42 | 540 | -3 | 2019 | 58,500 | 10,\!080 | 3.21 | .0000672 | \$18.90 | \$36
    5.4 \text{ cents} | 2k | 3R^2 | p - q | 2k+2 | 1-12i | 6 - 5i | 18+2\pi | 8 \pi | \pi
    \cot x | x=5 | y = 2x + 3 | (a+5)(b+2) | 6r^2-4r-24 | x^3+3x-6 | 3+2t | \pi r^2 h
    8n^2 + 4n + 1 | \frac{11+9a}{20} | \frac43 | \frac 59 | \frac9{19} | \frac{14}{3}
    -\frac{3}{8} | \dfrac{17}{50} | -\frac{\pi}{6} | 1\frac{4}{5} | 137 \frac{1}{2} | 11\sqrt2
    \sqrt{66} | 1+2\sqrt{3} | \frac{\sqrt{3}}{3} | 70 \sqrt{2} | 30^\circ
    \frac{270}7\text{ degrees} | 15\mbox{ cm}^2 | 864 \mbox{ inches}^2 | 204_5 | 4210_{5} | 40_9
    1,-2 | 3, 5, 7 | 1 \pm \sqrt{19} | \{1\pm\sqrt{5},-2\} | (2,4) | (1,-16,-4,43)
    \left( \frac{3}{2}, -13 \right) | (3,4] | (-\infty, 0] | (5,\infty)
    \left(\frac{3}{5},\frac{8}{3}\right] | x \in [-2,7] | (0,9) \cup (9,36)
    (-\infty, 2) \cup (3, \infty) | 5x - 7y + 11z + 4 = 0 | \text{even} | \text{Evelyn}
    \text{ellipse} | \text{(C)} | \begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}
    \begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} | \begin{pmatrix} -7 \\ 16 \\ 5 \end{pmatrix}
"""
INTEGER = re.compile(r"-?\d+")
DECIMAL = re.compile(r"-?\d*\.\d+")
FRACTION = re.compile(r"(-?)\\[dt]?frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?")
RANGE = re.compile(r"(?:x \\in )?(?:\\left)?([(\[])(.+?),(.+?)(?:\\right)?([)\]])")
UNICODE = [("-", "−"), (r"\pi", "π"), (r"\infty", "∞"), (r"\cup", "∪"), (r"^\circ", "°"),
           (r"\pm", "±")]


def inequality(gold, letter):
    """`3 < x \\leq 4` for `(3,4]`, or None."""
    match = RANGE.fullmatch(gold)
    if not match or r"\cup" in gold:
        return None
    left, low, high, right = match.groups()
    low, high = low.strip(), high.strip()
    text = letter if "infty" in low else f"{low} {'<' if left == '(' else chr(92) + 'leq'} {letter}"
    return text if "infty" in high else f"{text} {'<' if right == ')' else chr(92) + 'leq'} {high}"


def terms(gold):
    """The terms of a sum with their signs, or []: no brackets, relations, lists or words."""
    if re.search(r"[(\[=,]|\\(?:pm|text|mbox|begin|in)", gold):
        return []
    found, depth, start = [], 0, 0
    for i, c in enumerate(gold + "+"):
        depth += (c == "{") - (c == "}")
        if c in "+-" and depth == 0 and gold[start:i].strip():
            found.append(gold[start:i].strip())
            start = i
    return found if len(found) > 1 else []


def items(gold):
    """(opening, items, closing) of a list, a set, a tuple, an interval; else None."""
    match = re.fullmatch(r"(\\left\(|\\left\[|\\\{|[(\[]|)([^()\[\]=]+,[^()\[\]=]+)"
                         r"(\\right[)\]]|\\\}|[)\]]|)", gold)
    if not match or "text" in gold or "infty" in gold or re.search(r",\d{3}|,\\!", gold):
        return None
    return match[1], [item.strip() for item in match[2].split(",")], match[3]


def equivalents(gold):
    """[(kind, another way to write the gold)]"""
    made = []

    def add(kind, templates, text=gold, other=""):
        made.extend((kind, t.replace("@", text).replace("#", other)) for t in templates.split("  "))

    plain = not re.search(r"text|mbox|begin|=|\\in ", gold)
    add("wrapper", r"$@$  @.  \boxed{@}   @ ")
    for sign, other in UNICODE:
        if sign in gold:
            add("spelling", gold.replace(sign, other))
    add("spelling", "@", re.sub(r"\\[dt]?frac", r"\\dfrac", gold))
    if "text" not in gold and "matrix" not in gold:
        add("spelling", "@", re.sub(r"(?<!frac) ", r"\, ", gold))
        add("spelling", re.sub(r"(?<=[+=-]) | (?=[+=-])", "", gold))
    if r"\sqrt{" in gold:
        add("spelling", re.sub(r"\\sqrt\{(\w+)\}", r"√\1", gold))
    if "(" in gold and "frac" not in gold and "text" not in gold and r"\left" not in gold:
        add("spelling", re.sub(r"([(\[])", r"\\left\1", re.sub(r"([)\]])", r"\\right\1", gold)))
    if plain:
        add("wrapper", r"\displaystyle @  \color{red}{@}  \textcolor{blue}{@}  \mathbf{@}")
    if plain and not items(gold) and "cup" not in gold and not RANGE.fullmatch(gold):
        add("name", r"# = @  f(#) = @  \approx @  = @", other="w" if "w" not in gold else "u")
    if parts := terms(gold):
        turned = [part if part[0] in "+-" else "+" + part for part in parts[::-1]]
        add("order of a sum", " ".join(turned).lstrip("+"))
    if INTEGER.fullmatch(gold):
        n = int(gold)
        add("fraction", r"\frac{#}{3}", other=str(3 * n))
        add("decimal", "@.0  @.00", str(n))
        add("unit", r"@ \text{ cm}  @\text{ square units}  @ km/h  @ cm^2  @\ \mathrm{kg}  "
            r"@ \text{ apples}  \$@  @ \text{ miles per hour}", str(n))
        add("degrees", r"@^\circ  @^{\circ}  @°", str(n))
        add("wrapper", r"\text{@}  \mathrm{@}", str(n))
        add("arithmetic", "# + 4 = @", str(n), str(n - 4))
        if n > 0:
            add("ordinal", r"@^{\text{th}}  @\text{th}  @th", str(n))
            add("percent", r"@\%  @ \text{ percent}", str(n))
        for mark in (",", "{,}", r",\!", r"\,", " ") if n >= 10_000 else ():
            add("thousands", f"{n:,}".replace(",", mark))
        if n and n % 1000 == 0:
            add("scale", r"@ \text{ thousand}  @ \times 10^3", str(n // 1000))
    if DECIMAL.fullmatch(gold):
        value = Fraction(gold)
        add("fraction", rf"\frac{{{value.numerator}}}{{{value.denominator}}}  @0  @3")
        add("unit", r"@ \text{ grams}  \$@")
    if match := FRACTION.fullmatch(gold):
        sign, top, bottom = match[1], int(match[2]), int(match[3])
        add("fraction", f"{sign}{top}/{bottom}  {sign}\\frac{{{2 * top}}}{{{2 * bottom}}}  "
            rf"\frac{{{sign}{top}}}{{{bottom}}}  {sign}{top} \cdot \frac{{1}}{{{bottom}}}")
        if top > bottom:
            add("mixed", rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}")
        if top < 10 and bottom < 10:
            add("spelling", rf"{sign}\frac{top}{bottom}  {sign}\frac{{{top}}}{bottom}")
        if bottom in (4, 8, 16, 50, 100):
            add("decimal", f"{sign}{top / bottom}")
        if bottom in (3, 9) and top < bottom:
            add("decimal", rf"{sign}0.\overline{{{top * 9 // bottom}}}")
        add("unit", r"@ \text{ hours}")
    if match := re.fullmatch(r"(.+?)(?:\^\\circ|\\text\{ degrees\})", gold):
        add("degrees", r"@  @^{\circ}  @ \text{ degrees}  \frac{@\pi}{180}", match[1])
    if match := re.fullmatch(r"\\\$(.*)", gold):
        add("unit", r"@  @ \text{ dollars}", match[1])
    if match := re.fullmatch(r"(.*?)\s*\\mbox\{ (\w+)\}\^2", gold):
        add("unit", r"@  @ \text{ square #}  @ \text{ #}^2", *match.groups())
    if match := re.fullmatch(r"(\d+)_\{?(\d)\}?", gold):
        add("base", "@_#  @_{#}  @", *match.groups())
    if match := re.fullmatch(r"\\text\{(\w+)\}", gold):
        add("words", r"@  \textbf{@}", match[1])
        add("words", match[1].capitalize())
    if (found := items(gold)) and r"\pm" not in gold:
        opening, members, closing = found
        add("spelling", f"{opening}{' , '.join(members)}{closing}")
        if opening in ("", r"\{"):
            add("list", r"\{@\}", ", ".join(members))
            add("list", ", ".join(f"{name}={m}" for name, m in zip("abcd", members)))
            for mark in (", ", r" \text{ and } ", " or "):
                add("list", mark.join(members[::-1]))
            add("list", r" \text{ or } ".join(f"x={m}" for m in members))
    if r"\pm" in gold and gold[0] != "\\":
        add("list", f"{gold.replace(chr(92) + 'pm', '+')}, {gold.replace(chr(92) + 'pm', '-')}")
    written = inequality(gold, "x")
    if written and (not items(gold) or gold[-1] == "]" or gold[0] == "["):  # (2,4) may be a point
        add("inequality", r"@  \{x \mid @\}  x \in #", written, gold.replace(r"x \in ", ""))
        if "x" not in gold:
            add("inequality", inequality(gold, r"\lambda"))
    if r"\cup" in gold:
        left, right = gold.split(r" \cup ")
        add("union", r"@ \cup #  @\cup#", right, left)
        add("union", r"@ \text{ or } #  \{x : @ \text{ or } #\}", *(
            inequality(side, "x") for side in (left, right)))
    if "matrix" in gold:
        add("matrix", gold.replace("pmatrix", "bmatrix"))
        add("matrix", gold.replace(" ", ""))
    if re.fullmatch(r"[a-z]\s*=.*", gold):
        add("name", gold.partition("=")[2].strip())
    return [(kind, answer) for kind, answer in made if answer != gold]


# Two guesses, one of them right: @ and #, in both orders.
GUESSES = [
    ("guess in words", r"@ \text{ or } #  @ or #  @ \text{ and } #  @ \text{ (or } #)  "
     r"@\text{, not } #  \text{either } @ \text{ or } #  @ \lor #  "
     r"@ \text{ if } n \text{ even}, # \text{ if } n \text{ odd}"),
    ("guess as a list", r"@, #  @; #  \{@, #\}  (@, #)  [@, #]  @ \quad #  @ \cup #"),
    ("guess as an equation", r"@ \neq #  @ : #  w = @ \text{ or } w = #"),
    ("guess in text", r"@ \text{ or #}  @ \text{ (#)}  @ \text{ to } #"),
]


def near_misses(gold, rng):
    """[(kind, an answer that is not the gold)]"""
    made = []

    def add(kind, templates, text=gold, other=""):
        made.extend((kind, t.replace("@", text).replace("#", other)) for t in templates.split("  "))

    if re.fullmatch(r"\\text\{\([A-J]\)\}", gold):
        add("second guess", r"\text{(#)}  @ or #  @, #  \text{(@) or (#)}  @#", gold[7],
            rng.choice([c for c in "ABCDE" if c != gold[7]]))
        return made
    words, integer = re.fullmatch(r"\\text\{.*\}", gold), INTEGER.fullmatch(gold)
    digits = [m.start() for m in re.finditer(r"\d", gold)]
    changed = [gold[:i] + str((int(gold[i]) + rng.randint(1, 9)) % 10) + gold[i + 1:]
               for i in rng.sample(digits, min(3, len(digits)))]
    for answer in changed:
        add("digit", answer)
    if integer and gold != "0":
        add("digit", "@0  @1  #  @.5  @.0001  @/7", other=gold[:-1])
    signs = [m.start() for m in re.finditer(r"[+-](?=[^+-]*[1-9a-z])", gold)]
    for i in rng.sample(signs, min(2, len(signs))):
        add("sign", gold[:i] + ("-" if gold[i] == "+" else "+") + gold[i + 1:])
    if not re.search(r"text|begin|=|,|\\in|pm", gold) and gold != "0":
        add("sign", "-(@)" if gold[0] != "-" else gold[1:])
    letters = [m.start() for m in re.finditer(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", gold)]
    for i in letters if not re.search(r"text|mbox|=|\\in", gold) else ():
        before, after = gold[:i], gold[i + 1:]
        for letter in (rng.choice([c for c in "abkmnptxyzRS" if c not in gold]),
                       gold[i].swapcase()):
            add("exchanged letter", before + letter + after)
        if re.search(r"[A-Za-z0-9)]\s*$", before):
            add("dropped letter", before + re.sub(r"^\^\{?\d+\}?", "", after))
    if match := re.fullmatch(r"(\d+)_\{?(\d)\}?", gold):
        add("base", "@_{#}  @_{10}  @_{12}  @_{a}  @_{2}", match[1], str(int(match[2]) + 1))
    if found := items(gold):
        opening, members, closing = found
        i, inner = rng.randrange(len(members)), ",".join(members)
        add("item dropped", ", ".join(members[:i] + members[i + 1:]))
        add("item dropped", f"{opening}{','.join(members[:-1])}{closing}")
        add("item more", f"{opening}{inner},77{closing}  {opening}{inner},{members[0]}{closing}")
        add("item changed", f"{opening}{','.join(members[:i] + ['77'] + members[i + 1:])}{closing}")
        if opening[-1:] in ("(", "["):
            add("item order", f"{opening}{','.join(members[::-1])}{closing}")
    if RANGE.search(gold) and "(a" not in gold:
        for i in [m.start() for m in re.finditer(r"[\[\]()]", gold)]:
            add("bracket", gold[:i] + dict(zip("[]()", "()[]"))[gold[i]] + gold[i + 1:])
    if (written := inequality(gold, "x")) and not (items(gold) and gold[0] + gold[-1] == "()"):
        turned = written.replace("<", "@").replace(r"\leq", "<").replace("@", r"\leq")
        add("bracket", r"@  \{x \mid @\}", turned)
    if r"\cup" in gold:
        left, right = gold.split(r" \cup ")
        add("item dropped", "@  #", left, right)
        add("words", r"@ \text{ and } #", inequality(left, "x"), inequality(right, "x"))
        add("words", gold.replace("cup", "cap"))
    guess = rng.choice([changed[0] if changed else "77", "x+3" if "x" not in gold else "y+3", "13"])
    for kind, templates in GUESSES if guess != gold else ():
        add(kind, templates, gold, guess)
        add(kind, templates, guess, gold)
        if kind == "guess as an equation" and "=" not in gold and "\\in" not in gold:
            for first, second in ((gold, guess), (guess, gold)):
                add(kind, r"@ = #  w = @ = #  @ \equiv #  @ \to #", first, second)
    if words:
        add("words", r"@ \text{ or } \text{odd}  \text{other}  not #  " + gold[6:-1][::-1],
            other=gold[6:-1])
    else:
        add("changed in text", r"@ \text{ hundredths}  \text{not } @  @ \text{ or more}  "
            r"@ \text{ or seven}  \text{at least } @  @ \text{ squared}")
        add("range", r"@ \pm 1  x > @  \le @")
    if integer and int(gold) > 1:
        add("base", "@_{7}  @_9  @_{a}  @_{n}")
        add("changed in text", r"@ \text{ thousand}  @ \text{ dozen}  @ \text{ million}  "
            r"@ \text{ hours } 30 \text{ minutes}  @\text{ cm} \times 7\text{ cm}")
        add("letter", "@x  @ m  @t  x - 1 = @  2x = @" + ("  @!" if int(gold) > 2 else ""))
        add("rounded", "#.9999999  @.0000001", other=str(int(gold) - 1))
    if match := FRACTION.fullmatch(gold):
        value = Fraction(int(match[2]), int(match[3])) * (-1 if match[1] else 1)
        add("rounded", f"{float(value) + 1e-7 * ((10**7 * value).denominator == 1):.7f}")
        add("sign", rf"\frac{{{match[3]}}}{{{match[2]}}}")
    if match := re.fullmatch(r"(\d*) ?\\pi", gold):
        add("rounded", f"{math.pi * int(match[1] or 1):.9f}")
    return made


def check_generated(golds, own, most):
    """Grade what is made of the golds, print the counts, and list every wrong verdict."""
    rng, kinds = random.Random(0), []
    for make, expected in ((equivalents, 1.0), (lambda gold: near_misses(gold, rng), 0.0)):
        cases = []
        for gold in golds:
            made = sorted(set(make(gold)))
            few = made if ALL else rng.sample(made, min(len(made), most))
            cases += [(kind, answer, gold) for kind, answer in few]
        verdicts = own.verify([box(case[1]) for case in cases], [case[2] for case in cases])
        failed = [case for case, verdict in zip(cases, verdicts) if verdict != expected]
        kinds.append({case[0] for case in cases})
        what = "equivalents accepted" if expected else "near misses refused"
        print(f"{what}: {len(cases) - len(failed)} of {len(cases)}, of {len(golds)} golds, "
              f"{len(kinds[-1])} kinds; not: {failed}")
        assert len(failed) <= 0.005 * expected * len(cases), failed
    assert own.timeouts == own.crashes == 0
    return kinds


@pytest.mark.slow
def test_generated_answers_to_typical_golds(verifier):
    golds = [gold.strip() for line in GOLDS.strip().splitlines() for gold in line.split("|")]
    right, wrong = check_generated(golds, verifier, 12)
    assert right >= {"spelling", "order of a sum", "fraction", "inequality", "union", "unit",
                     "wrapper", "list", "name", "base", "degrees", "ordinal", "percent", "mixed",
                     "matrix"}
    assert wrong >= {"digit", "sign", "dropped letter", "exchanged letter", "base", "item dropped",
                     "item changed", "item order", "bracket", "guess in words", "guess as a list",
                     "guess as an equation", "guess in text", "changed in text", "rounded"}


@pytest.mark.slow
@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason=f"no {BENCHMARKS}")
def test_generated_answers_to_the_benchmarks_golds(verifier):
    golds = []
    for name in ("math500", "aime24", "aime25", "amc23", "dapo_math_17k"):
        answers = [q["answer"] for q in load_questions(str(BENCHMARKS / f"{name}.parquet"))]
        golds += random.Random(0).sample(answers, 500) if name == "dapo_math_17k" else answers
    check_generated(list(dict.fromkeys(golds)), verifier, 1)


PIECES = ["a", "9", " ", "\\", "{", "}", "(", "[", "$", "~", "%", "²", "√", "x=", "<", "9,", "9 ",
          "999,", "9.", "1/", "^", "_", "ab ", "and ", "A'", "cm/", "9cm/", "a.", "\n", "{,}",
          r"\,9", r"\text{", r"\text{a}", r"\text{a}/", r"9\text{th}", r"\sqrt", r"\sqrt[",
          r"\sqrt(", r"\frac", r"1\frac", r"\color{", r"\pmod ", r"9.\overline{", r"^{\circ",
          r"\sin 9", r"\$9", r"\$9\cdot 10^{", r"\{ ", r"\begin{", r"(\text{a}", "9 thousand",
          r"\mbox {a "]


@pytest.mark.parametrize("start", ["", r"\text{"])
def test_the_rules_take_linear_time(start):
    """The trainer's own process brings answers to normal form: no pattern may be quadratic."""
    for piece in PIECES:
        text = (start + piece * 15_000)[:15_000]  # the limit of a gold and a text
        began = time.process_time()
        verifier_module._normal(text)
        assert time.process_time() - began < 0.5, piece  # quadratic would take seconds


# ----------------------------------------------------------------------------------- hostile text
HOSTILE = [
    ENDLESS, "9^{9^{9^{9}}}", "(((10^{10})!)!)!", "9" * 100_000, "9" * 900,
    "{" * 500_000 + "}" * 500_000,
    "(" * 300 + "540" + ")" * 300, r"\sum_{n=1}^{\infty} \frac{\sin n}{n^{1/7}}",
    r"\prod_{n=1}^{10^{12}} n", r"\sum_{n=1}^{10^{12}} \frac{1}{n}", r"\def\x{\x\x}\x",
    "540\x00", "\ud800540", "\u202e045", "\u200f540\u200f541", "५४१", "²", "1" + "!" * 200,
    ", ".join(map(str, range(1000))), r"\frac{" * 150 + "1" + "}{2}" * 150,
    r"\lim_{x\to\infty} x^{x!}", "x^{" * 100 + "2" + "}" * 100,
    r"\operatorname{exit}(1)", r"\sum_{n=1}^{\infty} \frac{f(7)^n}{n!}", "__import__('os')",
    "$" * 900, r"\text{" * 100 + "540" + "}" * 99, "1e999999999", r"0.\overline{3}" * 50,
]


@pytest.mark.slow
def test_hostile_answers_get_a_verdict():
    with Verifier(workers=2, timeout=0.5) as own:
        start = time.monotonic()
        responses = [rf"\boxed{{{h}}}" for h in HOSTILE] + [ALGEBRA[1]]
        verdicts = own.verify(responses, ["540"] * len(HOSTILE) + [ALGEBRA[0]])
        assert time.monotonic() - start < 30
    assert [h[:40] for h, v in zip(HOSTILE, verdicts) if v != 0.0] == []
    assert verdicts[-1] == 1.0
    assert own.timeouts >= 1


def test_think_tags_and_unbalanced_boxes(verifier):
    responses = ["</think>" * 10 + r"\boxed{540", r"\boxed{" * 5_000 + "540", r"\boxed{1}" * 5_000,
                 r"\boxed{" + "{" * 1_000_000]
    assert verifier.verify(responses, ["540"] * 4) == [0.0] * 4


def test_hostile_whole_texts(verifier):
    texts = ["x" * 1_000_000, "9" * 100_000, r"\boxed{" * 100_000, " " * 1_000_000, "\ud800 is 5"]
    start = time.monotonic()
    assert verifier.equal([("5401", text) for text in texts]) == [0.0] * 5
    assert time.monotonic() - start < 5


def test_model_text_is_never_executed():
    """eval and exec are out of reach in a worker; math-verify alone would get to both."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import verifier\n"
            "same = verifier._comparer()\n"
            "seen = []\n"
            "sys.addaudithook(lambda event, args: seen.append(args) if event == 'compile' else 0)\n"
            r"same('3', r'\sum_{n=1}^{\infty} \frac{f(7)^n}{n!}', True)" "\n"
            "assert same('1/2', 'it is 2/4.', False) and same('0.5', '1/2', True)\n"
            # sympy's polynomials compile functions on tuples of whole numbers; imports are files.
            "bad = [a for a in seen if not (str(a[1]).endswith('.py')\n"
            "                               or a[0].startswith(b'def monomial_'))]\n"
            "assert not bad, bad\n")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------------------------------- workers
def test_a_timeout_costs_one_answer():
    with Verifier(workers=2, timeout=1.0) as own:
        pairs = [ALGEBRA, ("540", rf"\boxed{{{ENDLESS}}}"), ("x^2-1", r"\boxed{(x-1)(x+1)}"),
                 ("x^2-4", r"\boxed{(x-1)(x+1)}"), ("7", r"\boxed{7}")]
        assert own.equal(pairs) == [1.0, 0.0, 1.0, 0.0, 1.0]
        assert (own.timeouts, own.crashes) == (1, 0)
        assert own.equal([ALGEBRA]) == [1.0]


@pytest.mark.slow
def test_a_worker_killed_from_outside_costs_one_answer():
    with Verifier(workers=1, timeout=20.0) as own:
        killer = when_busy(own, lambda pid: os.kill(pid, signal.SIGKILL))
        assert own.equal([("540", rf"\boxed{{{ENDLESS}}}"), ALGEBRA]) == [0.0, 1.0]
        killer.join()
        assert (own.timeouts, own.crashes) == (0, 1)
        own._pool[0].kill()  # and one that dies between two batches costs nothing
        own._pool[0].wait()
        assert own.equal([ALGEBRA]) == [1.0]
        assert own.crashes == 1


@pytest.mark.slow
def test_a_memory_hog_is_stopped():
    with Verifier(workers=1, timeout=10.0, memory_mb=64) as own:
        seen = []

        def look(pid):
            status = Path(f"/proc/{pid}/limits").read_text().splitlines()
            seen.append(next(line for line in status if line.startswith("Max address space")))

        watcher = when_busy(own, look)
        hog = r"\boxed{2^{2^{34}}}"  # an integer of 2 GiB
        assert own.equal([("540", hog), ALGEBRA]) == [0.0, 1.0]
        watcher.join()
        if seen:  # the hog may be refused its memory at once
            assert int(seen[0].split()[3]) < 512 * 2**20
        own.equal([("3", r"\boxed{1+1}")])
        look(own._pool[0].pid)
        assert int(seen[-1].split()[3]) < 512 * 2**20
        assert own.timeouts == 0


@pytest.mark.slow
def test_no_process_is_left_after_close():
    before = children()
    own = Verifier(workers=2, timeout=1.0)
    assert children() == before  # none until one is needed
    own.verify([r"\boxed{7}", r"\boxed{8}"], ["7", "7"])
    assert children() == before  # and plain numbers need none
    own.equal([ALGEBRA, ("540", rf"\boxed{{{ENDLESS}}}")])
    assert children() > before
    own.close()
    assert children() == before  # no zombie either: a zombie is still a child


@pytest.mark.slow
def test_an_interrupt_leaves_no_late_verdict(monkeypatch):
    with Verifier(workers=1, timeout=20.0) as own:
        assert own.equal([ALGEBRA]) == [1.0]
        real = own._selector.select

        def interrupted(pause):
            monkeypatch.setattr(own._selector, "select", real)
            raise KeyboardInterrupt

        monkeypatch.setattr(own._selector, "select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            own.equal([("540", rf"\boxed{{{ENDLESS}}}")])
        assert own.equal([ALGEBRA]) == [1.0]
        assert own.timeouts == 0  # nobody waited for the request that was interrupted


def test_a_busy_worker_dies_with_a_killed_parent():
    code = (f"import sys, threading, time; sys.path.insert(0, {str(ROOT)!r})\n"
            "from verifier import Verifier\n"
            "own = Verifier(workers=1, timeout=300)\n"
            "def tell():\n"
            "    while not any(w.task is not None for w in own._pool): time.sleep(0.01)\n"
            "    time.sleep(0.5); print(own._pool[0].pid, flush=True)\n"
            "threading.Thread(target=tell).start()\n"
            rf"own.equal([('540', r'\boxed{{{ENDLESS}}}')])")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    worker = int(parent.stdout.readline())
    assert not gone(worker, within=0.2)
    parent.kill()
    parent.communicate()
    assert gone(worker)


def test_workers_that_cannot_start_stop_the_run(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Verifier(workers=1) as own, pytest.raises(RuntimeError, match="broken installation"):
        own.equal([ALGEBRA])


def test_a_worker_is_replaced_at_no_cost(monkeypatch):
    monkeypatch.setattr(verifier_module, "LIFETIME", 2)
    with Verifier(workers=1) as own:
        pairs = [(rf"\sqrt{{{n}}}", rf"\boxed{{\frac{{{n}}}{{\sqrt{{{n}}}}}}}") for n in (2, 3, 5)]
        assert own.equal(pairs) == [1.0] * 3
        assert own.crashes == own.timeouts == 0


def test_lengths_must_agree(verifier):
    with pytest.raises(ValueError):
        verifier.verify(["a", "b"], ["a"])


def test_duplicates_are_verified_once(monkeypatch):
    sent = []
    real = Verifier._run
    monkeypatch.setattr(
        Verifier, "_run", lambda self, lines: sent.append(lines) or real(self, lines))
    with Verifier(workers=1) as own:
        own.equal([ALGEBRA])
        start = time.monotonic()
        spaced = ALGEBRA[1].replace("boxed{", "boxed{ ")  # the same answer, another string
        responses = [ALGEBRA[1], "so " + spaced] * 256
        assert own.verify(responses, [ALGEBRA[0]] * 512) == [1.0] * 512
        assert time.monotonic() - start < 1.0
    assert [len(lines) for lines in sent] == [1, 1]


def test_import_is_light():
    code = ("import sys; import verifier; heavy = {'sympy', 'math_verify', 'torch', 'numpy'};"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=30)


if __name__ == "__main__":
    ALL = "--all" in sys.argv
    with Verifier(timeout=60.0) as every_case:
        test_generated_answers_to_typical_golds(every_case)
        test_generated_answers_to_the_benchmarks_golds(every_case)
