"""Verifications a second, and what hostile answers cost; side by side with another verifier.py.

    python benchmarks/verify.py [--beside old_verifier.py]

Numbers and words are decided in the trainer's own process; formulas go to math-verify in worker
processes that can be killed. Beside them: math-verify called in a loop, as most projects do.
"""
import argparse
import importlib.util
import os
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hostile import corpus


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Verifier


def rate(verifier, pairs, repeats=1):
    """Answers a second, the best of some repeats: other processes only slow it down."""
    golds, answers = zip(*pairs)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        verifier.verify(answers, golds)
        best = min(best, time.perf_counter() - start)
    return len(pairs) / best


def stopped(verifier):
    if hasattr(verifier, "stopped"):
        return verifier.stopped
    return verifier.timeouts + verifier.crashes  # of the verifier.py before this one


def measure(Verifier, args):
    """{what: number} of one verifier."""
    rng, n, found = random.Random(0), args.answers, {}
    cases = {
        "exact matches": [(str(i), f"So \\boxed{{{i}}}") for i in range(n)],
        "wrong integers": [(str(i), f"So \\boxed{{{i + 1}}}") for i in range(n)],
        "right, other spelling": [(str(i), f"\\boxed{{x = {i}\\text{{ cm}}}}") for i in range(n)],
        "wrong, other spelling": [(str(i), f"\\boxed{{\\frac{{{i}}}{{7}}}}") for i in range(1, n)]}
    with Verifier(workers=1) as verifier:
        for name, pairs in cases.items():
            found[f"{name}, a second"] = rate(verifier, pairs, 5)
    formulas = [(f"{a}x + {b}", f"So \\boxed{{{b} + \\frac{{{3 * a}x}}{{3}}}}")
                for a, b in ((rng.randint(2, 99), rng.randint(2, 99)) for _ in range(n))]
    for workers in (1, 2):
        with Verifier(workers=workers, timeout=args.timeout) as verifier:
            rate(verifier, formulas[:50])  # the workers have started
            found[f"formulas, {workers} worker(s), a second"] = rate(verifier, formulas[50:], 3)
    texts = corpus()
    hostile = [(gold, text) for _, text, gold in rng.sample(texts, min(n // 20, len(texts)))]
    with Verifier(workers=2, timeout=args.timeout) as verifier:
        rate(verifier, formulas[:50])
        mixed = rng.sample(formulas[50:] + hostile, n - 50 + len(hostile))
        found[f"s for {len(mixed):,} formulas, {len(hostile)} hostile answers among them"] = (
            len(mixed) / rate(verifier, mixed))
        found["of those stopped"] = stopped(verifier)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--answers", type=int, default=2048, help="of each kind; a step has 2,048")
    parser.add_argument("--timeout", type=float, default=3.0, help="of one answer, seconds")
    parser.add_argument("--beside", help="another verifier.py, measured in the same run")
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    columns = [measure(load(path), args) for path in (ROOT / "verifier.py", args.beside) if path]
    print(f"{'':60}{'this':>10}{'beside':>10}" if args.beside else "")
    for name in columns[0]:
        print(f"{name:60}" + "".join(f"{column[name]:10,.1f}" for column in columns))
    from math_verify import parse, verify
    start = time.perf_counter()
    for i in range(300):
        verify(parse(f"\\boxed{{{i}x + 3}}"), parse(f"So \\boxed{{3 + \\frac{{{3 * i}x}}{{3}}}}"))
    loop = 300 / (time.perf_counter() - start)
    print(f"{'formulas, math-verify in a loop, a second':60}{loop:10,.1f}")
    print(f"load of the machine: {load_before:.1f} before, {os.getloadavg()[0]:.1f} after, "
          f"{os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
