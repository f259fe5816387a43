"""Verifications a second, and what hostile answers cost.

    python benchmarks/verify.py

Exact matches are decided in the trainer's own process; the others go to math-verify in worker
processes that can be killed. Beside them: math-verify called in a loop, as most projects do.
"""
import argparse
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hostile import corpus
from verifier import Verifier

def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start

def answers(n, rng):
    """(responses, golds) of equal expressions in another form: only a worker sees that."""
    pairs = [(rng.randint(2, 99), rng.randint(2, 99)) for _ in range(n)]
    return ([f"So \\boxed{{{b} + \\frac{{{3 * a}x}}{{3}}}}" for a, b in pairs],
            [f"{a}x + {b}" for a, b in pairs])

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--answers", type=int, default=2048)
    parser.add_argument("--timeout", type=float, default=3.0, help="of one answer, seconds")
    args = parser.parse_args()
    rng, n = random.Random(0), args.answers
    with Verifier(workers=1) as verifier:
        exact = [f"So \\boxed{{{i}}}" for i in range(n)]
        s = seconds(lambda: verifier.verify(exact, [str(i) for i in range(n)]))
        print(f"exact matches                     {n / s:9,.0f} a second")
    responses, golds = answers(n, rng)
    for workers in (1, 2):
        with Verifier(workers=workers) as verifier:
            verifier.verify(responses[:50], golds[:50])  # the workers have started
            s = seconds(lambda: verifier.verify(responses, golds))
            print(f"math-verify, {workers} worker(s)          {n / s:9,.0f} a second")
    from math_verify import parse, verify
    s = seconds(lambda: [verify(parse(f"\\boxed{{{g}}}"), parse(r))
                         for r, g in zip(responses[:500], golds)])
    print(f"math-verify in a loop             {500 / s:9,.0f} a second")
    hostile = rng.sample(corpus(), n // 20)
    places = dict(zip(rng.sample(range(n), len(hostile)), hostile))
    mixed = [places.get(i, ("", responses[i], golds[i]))[1:] for i in range(n)]
    with Verifier(workers=2, timeout=args.timeout) as verifier:
        verifier.verify(responses[:50], golds[:50])
        clean = seconds(lambda: verifier.verify(responses, golds))
        dirty = seconds(lambda: verifier.verify(*zip(*mixed)))
        stopped = verifier.timeouts + verifier.crashes
    allowed = 1.5 * clean + len(hostile) * args.timeout / 2
    print(f"{n:,} harmless answers {clean:.1f} s; with {len(hostile)} hostile ones {dirty:.1f} s "
          f"({stopped} had to be stopped); allowed: {allowed:.1f} s")

if __name__ == "__main__":
    main()
