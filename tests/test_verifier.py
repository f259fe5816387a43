"""verifier.py: what is graded, what is equal, and that no model text can harm a run."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from answers import RIGHT, WRONG, pairs
from hostile import TEXTS

from verifier import Verifier, compare, last_boxed

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
ENDLESS = (r"\sqrt{5}", r"\binom{10^9}{5\cdot 10^8}+x")  # math-verify never returns from it
ALGEBRA = (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}")

def grade(cases, **limits):
    verifier = Verifier(**dict(workers=2, timeout=30.0) | limits)
    texts = [rf"Thus the answer is $\boxed{{{answer}}}$." for _, answer in cases]
    return verifier.verify(texts, [gold for gold, _ in cases])

@pytest.mark.parametrize("text, expected", [
    (r"\boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), ("\\boxed {\n7 }", "7"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."), (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{4} and \boxed{never closes", "4"), (r"\boxed{never closes, \boxed{4}", "4"),
    (r"} } \boxed{4} {", "4"), (r"\boxed{6} or \fbox{7}", "7"), (r"\\boxed{8}", "8"),
    (r"\boxed{never closes", ""), ("no box", ""), ("", "")])
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected

def test_what_follows_the_last_think_is_graded():
    texts = [r"<think>\boxed{4}</think>\boxed{5}", r"<think>\boxed{5}</think>so it is 4",
             r"\boxed{5}", "</think>" * 9 + r"\boxed{5}", r"\boxed{5}</think> The answer is 5."]
    assert Verifier().verify(texts, ["5"] * 5) == [1.0, 0.0, 1.0, 1.0, 0.0]

@pytest.mark.parametrize("table, verdict", [(RIGHT, 1.0), (WRONG, 0.0)])
def test_answers(table, verdict):
    cases = pairs(table)
    assert [c for c, said in zip(cases, grade(cases), strict=True) if said != verdict] == []

@needs_shared
@pytest.mark.parametrize("name, refused, accepted", [  # measured
    ("math_qwen2.5-math_nothink", 0, 0), ("qwen3-8b_think-on", 13, 0),  # 5 kilograms of feathers
    ("round3", 4, 1), ("round4", 26, 25)])  # these two are crafted
def test_rates(name, refused, accepted):
    (path,) = SHARED.glob(f"*/{name}.jsonl")
    rows = list(map(json.loads, path.open()))
    answers = [row.get("answer") or row["extracted"] or "" for row in rows]
    verdicts = grade([(row["gold"], answer) for row, answer in zip(rows, answers)])
    errors = [row["correct"] - said for row, said in zip(rows, verdicts, strict=True)]
    print(f"{name}: of {len(rows)} answers {errors.count(1)} right ones are refused and "
          f"{errors.count(-1)} wrong ones accepted")
    assert errors.count(1) <= 1.5 * refused and errors.count(-1) <= 1.5 * accepted

@pytest.mark.slow
def test_hostile_answers():
    start = time.monotonic()
    assert not any(Verifier().verify(TEXTS, ["7"] * len(TEXTS)))  # a number: no process
    assert time.monotonic() - start < 10
    verifier = Verifier(workers=2, timeout=0.5)
    assert not any(verifier.verify(TEXTS, [r"\sqrt{7}+x"] * len(TEXTS)))
    assert not Path("/tmp/owned").exists()

def test_spellings_take_linear_time():
    parts = r"\text{ }  \frac{1}  9,  {,}  9 \,  ^\circ  \approx  x=  (  \color{  a  .  /  -  9"
    for text in [part * 500 for part in [" ", *parts.split("  ")]]:
        start = time.process_time()
        compare(r"\sqrt{2}", text[:500])
        assert time.process_time() - start < 0.1, text[:20]

@pytest.mark.slow
def test_limits_and_kills_cost_one_answer():
    cases = [ALGEBRA, ENDLESS, ("x^2-1", "(x-1)(x+1)"), ("x^2-4", "(x-1)(x+1)")]
    assert grade(cases, timeout=2.0) == [1.0, 0.0, 1.0, 0.0]
    big = (r"\sqrt{5}", r"\sqrt{2^{2^{34}}+1}")
    assert grade([big, ALGEBRA], workers=1, timeout=20.0, memory_mb=700) == [0.0, 1.0]

def test_a_broken_installation_stops_the_run(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="broken installation"):
        grade([ALGEBRA])

def test_model_text_is_never_executed():
    code = ("import sys, verifier; assert not {'sympy', 'torch'} & set(sys.modules)\n"  # light
            "import math_verify, sympy.physics.units; seen = []\n"
            "sys.addaudithook(lambda event, args: seen.append(args) if event == 'compile' else 0)\n"
            "verifier.work(30, 4096)\n"  # sympy's polynomials compile monomial_..., imports files
            "assert all(str(a[1]).endswith('.py') or a[0].startswith(b'def monomial_')\n"
            "           for a in seen), seen")
    lines = [[r"x", r"\sum_{n=1}^{\infty} \frac{f(7)^n}{n!}"], ["x/2", "0.5x"], ["1/2", "0.5"]]
    run = subprocess.run([sys.executable, "-c", code], input="\n".join(map(json.dumps, lines)),
                         check=True, timeout=90, text=True, capture_output=True, cwd=ROOT)
    assert run.stdout.split() == ["ready", "0", "1", "1"]
