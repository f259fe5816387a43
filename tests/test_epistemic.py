"""The ten markers: the authors' way of counting, the averages, the command as a user calls it."""
import json
import sys
from types import SimpleNamespace

import pytest

import epistemic
from common import refusal
from epistemic import MARKERS, count, responses_of

EVAL = [  # two benchmarks, as the evaluation writes them
    dict(benchmark="aime24", response="Wait. Unlikely!", tokens=10, correct=1),
    dict(benchmark="aime24", response="hmm, hmm, check", tokens=21, correct=0),
    dict(benchmark="math500", response="So x = 4.", tokens=5, correct=1),
]

@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(*arguments): what the command prints, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["epistemic.py", *map(str, args)])
        epistemic.main()
        return capsys.readouterr().out
    return call

def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

def rows(printed):
    """{label: cells} of the table's rows."""
    lines = [line.split() for line in printed.splitlines()]
    return {line[0]: line[1:] for line in lines if line}

def test_markers_are_counted_as_substrings():
    assert " ".join(MARKERS) == (
        "wait hmm perhaps maybe actually alternatively seems might likely check")
    for text, number in {"checking, double-check": 2, "seemseems": 1, "factually, Actually": 2,
                         "WAIT\u2014Wait\ud83dwait": 3, "unlikely": 1, "": 0}.items():
        assert count(text) == number

@pytest.mark.parametrize("record, expected", [
    (dict(response="wait", text="the question: check"), ["wait"]),
    (dict(generated_responses=["wait", ""]), ["wait", ""]),
    (dict(messages=[dict(role="user", content="check?"), dict(content="wait")]), ["wait"]),
    # a server's reasoning beside the text, in the row, in the message, of each response
    (dict(response="\n4", reasoning_content="Hmm.\n"), ["<think>\nHmm.\n</think>\n\n4"]),
    (dict(messages=[dict(content="4", reasoning="Hmm.")]), ["<think>\nHmm.\n</think>\n\n4"]),
    (dict(responses=["4", "5"], thinking=["Hmm.", ""]), ["<think>\nHmm.\n</think>\n\n4", "5"]),
    (dict(response="<think>Hmm.</think>4", reasoning="Hmm."), ["<think>Hmm.</think>4"]),
    (dict(response="4", thinking=True, reasoning=dict(effort="high")), ["4"]),
])
def test_responses_of_records_that_people_have(record, expected):
    assert responses_of(record) == expected

@pytest.mark.parametrize("record, total, tokens, accuracy", [
    ({"response": "wait", "tokens": 7, "reward": 1.0}, 1, 7, 1),
    ({"responses": ["wait", "hmm maybe so"], "correct": [True, False]}, 1.5, None, 0.5),
    ({"generated_responses": ["wait", "", ""], "response_token_lengths": [1, 2, 6],
      "answers_correctness": [True, False, False]}, 1 / 3, 3, 1 / 3),
    # One number for two responses could be their sum or their mean; None is no number.
    ({"responses": ["wait", "wait"], "tokens": 12, "correct": [1, None]}, 1, None, None),
])
def test_means_by_hand(record, total, tokens, accuracy):
    means = epistemic.means_of(epistemic.measure(record))
    assert (means["total"], means["tokens"], means["accuracy"]) == (total, tokens, accuracy)

def test_records_averages_and_their_line():
    def rollout(text, reward, length, finished):
        return SimpleNamespace(text=text, reward=reward, response_ids=[1] * length,
                               finished=finished)
    records = [epistemic.record(rollout("Wait, maybe 4.", 1.0, 10, True), index=7),
               epistemic.record(rollout("So 4.", 0.0, 1010, False))]
    assert records[0] == dict(index=7, correct=1.0, tokens=10, finished=True, epistemic=2,
                              response="Wait, maybe 4.")
    means = epistemic.averages(records)
    assert means == dict(score=0.5, length=510, epistemic=1, truncated=0.5)
    assert epistemic.line(means) == "score 0.500  len 510  epistemic 1.0"

def test_a_column_for_each_benchmark_of_each_file(tmp_path, run):
    write(tmp_path / "a.jsonl", *EVAL)
    write(tmp_path / "b.jsonl", {"text": "waiting to check"}, {"text": "hmm"})
    got = rows(run("a.jsonl", "b.jsonl"))
    assert got["hmm"] == ["1.00", "0.00", "0.50"] and got["accuracy"] == ["0.500", "1.000"]
    assert got["benchmark"] == ["aime24", "math500"] and got["total"] == ["2.50", "0.00", "1.50"]
    assert got["responses"] == ["2", "1", "2"]
    assert got["tokens"] == ["15.5", "5.0"]  # b.jsonl states none: its cell is empty
    assert rows(run("a.jsonl", "--field", "benchmark"))["total"] == ["0.00", "0.00"]

@pytest.mark.parametrize("content, message", [
    (b"\n \n", "bad.jsonl: no responses"),
    (b'{"response": "wait"}\n\n{"response": "wa', "bad.jsonl:3: "),
    (b"[" * 100_000 + b"\n", "bad.jsonl:1: "), (b"\x1f\x8b\x08\x00\n", "bad.jsonl:1: "),
    (b'{"response": "wait"}\n{"output": "a"}\n', "bad.jsonl:2: no field response or"),
    (b'{"responses": ["wait", null]}\n', "bad.jsonl:1: field responses is not text"),
    (b'{"responses": []}\n', "bad.jsonl:1: field responses is not text"),
])
def test_bad_files_are_named_in_one_line(tmp_path, run, content, message):
    write(tmp_path / "good.jsonl", {"text": "wait"})
    (tmp_path / "bad.jsonl").write_bytes(content)
    assert message in refusal(run, "good.jsonl", "bad.jsonl")
    assert "No such file" in refusal(run, "good.jsonl", "nowhere.jsonl")
