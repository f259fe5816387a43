"""The embedded default: right problems, files as the generator writes them, a small model."""
import importlib.util
import json
import random
import re
from pathlib import Path

import pytest

import epistemic

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("problems", ROOT / "toy/problems.py")
problems = importlib.util.module_from_spec(spec)
spec.loader.exec_module(problems)


def test_answers_are_the_smallest_x():
    rng = random.Random(0)
    for low, high in problems.SPLITS.values():
        for p in rng.sample(problems.all_problems(low, high), 300):
            assert low <= p["x"] <= high and problems.MODULI[0] <= p["m"] <= problems.MODULI[1]
            assert p["x"] == next(
                x for x in range(p["m"]) if (p["b"] + p["a"] * x) % p["m"] == p["r"])


@pytest.mark.parametrize("style", problems.STYLE)
def test_traces_compute_what_they_say(style):
    rng = random.Random(1)
    for _ in range(300):
        p = problems.make_problem(rng, 4, 22)
        text = problems.trace(rng, p, style)
        assert text.endswith(f"\\boxed{{{p['x']}}}") and text.startswith("<think>\n")
        for k, value in re.findall(r"x = (\d+): (?:\d+ \+ \d+(?: - \d+)? = )?(\d+)", text):
            assert int(value) == (p["b"] + p["a"] * int(k)) % p["m"]


def test_richer_contexts_are_surer():
    rng = random.Random(2)
    counts = {style: sum(
        epistemic.count(problems.trace(rng, problems.make_problem(rng, 16, 22), style))
        for _ in range(300)) for style in problems.STYLE}
    order = ["unguided", "without_think", "uncertain", "regenerated", "full"]
    assert sorted(counts, key=counts.get, reverse=True) == order


def test_data_files_are_what_the_generator_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["problems.py", "--out", str(tmp_path)])
    problems.main()
    seen = set()
    for split in ("train", "in", "ood"):
        text = (tmp_path / f"{split}.jsonl").read_text()
        assert text == (ROOT / f"toy/data/{split}.jsonl").read_text()
        questions = [json.loads(line)["prompt"][0]["content"] for line in text.splitlines()]
        assert len(set(questions)) == len(questions) and not seen & set(questions)
        seen |= set(questions)


def test_model_folder_is_small():
    assert sum(p.stat().st_size for p in (ROOT / "toy/model").iterdir()) <= 3e6
