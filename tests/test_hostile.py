"""No answer of hostile.py stops the verifier, crashes it, or passes for right."""
import resource
import time
from pathlib import Path

import hostile
import pytest
from verifier import Verifier

LIMIT, WORKERS = 0.5, 2
START = 10.0  # seconds for a worker that takes the place of a killed one, on a busy machine


def test_there_are_enough():
    assert len(hostile.corpus()) >= 200 and len({c[1] for c in hostile.corpus()}) >= 200


@pytest.mark.slow
def test_hostile_answers():
    cases = hostile.corpus()  # to numbers, which no worker sees; and all of it to a formula
    cases += [(name, response, r"\sqrt{7}+x") for name, response, _ in cases]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with Verifier(workers=WORKERS, timeout=LIMIT) as verifier:
        verdicts = verifier.verify([c[1] for c in cases], [c[2] for c in cases])
        fooled = [(name, response[:60], gold) for (name, response, gold), verdict
                  in zip(cases, verdicts, strict=True) if verdict]
        assert not fooled
        assert verifier.verify(["\\boxed{7}", "\\boxed{8}"], ["7", "7"]) == [1.0, 0.0]  # it lives
    seconds = time.monotonic() - start
    stopped = verifier.stopped
    assert stopped >= 5  # or they would not be hostile
    assert seconds < stopped * (LIMIT + START) / WORKERS + 30  # the others take no time to speak of
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500 * 1024  # KiB, of this process: the workers have a limit of their own
    assert not Path("/tmp/owned").exists()
