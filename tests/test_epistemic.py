"""The ten markers: the authors' way of counting, the averages, the command as a user calls it."""
import json
import random
import re
import subprocess
import sys

import pytest

import epistemic
from common import ROOT, refusal
from epistemic import MARKERS, count, count_by_marker, summarize
from extras.judge import JUDGE_PROMPT

# In the manner of Qwen3-8B's thinking, with five times its markers: the slow case.
TRACE = ("Okay, let's see. So first I need to figure out how many boxes are there. 43 crates with "
         "11 boxes is 473. Wait, maybe I should check that: 43 * 11 = 430 + 43. It seems right. ")
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
    """{label: cells} of the table's numeric rows."""
    lines = [line.split() for line in printed.splitlines()]
    return {line[0]: line[1:] for line in lines if line and line[0] in (
        *MARKERS, "benchmark", "total", "responses", "tokens", "accuracy")}


@pytest.mark.parametrize("text, substrings, words", [
    ("checking, double-check, checkerboard", 3, 1),
    ("seemseems", 1, 0),  # the second begins inside no other: non-overlapping leaves one
    ("factually, actually", 2, 1),
    ("wait's wait-wait wait", 4, 4),
    ("wait_ _wait wait2 2wait \u00e9wait wait\u00e9", 6, 0),
    ("WAIT\u2014Wait\u2026wait\U0001f914wait", 4, 4),
    ("wait\0wait \ud83d wait", 3, 3),  # half an emoji: what is left when the token limit cuts one
])
def test_substrings_and_whole_words(text, substrings, words):
    assert count(text) == substrings
    assert count(text, whole_word=True) == words


def test_counts_are_the_authors_one_line_and_the_ordinary_regex():
    pieces = [piece + glue for glue in ("", " ", "_", "9", ".", "\u00c9", "\u212a", "\ud800", "s")
              for piece in (*MARKERS, "un", "Wait", "CHECK", "chec\u212a", "m\u0130ght")]
    text = "".join(random.Random(0).choices(pieces, k=6000))
    lower = text.lower()
    assert " ".join(MARKERS) == (
        "wait hmm perhaps maybe actually alternatively seems might likely check")
    assert count_by_marker(text) == {marker: lower.count(marker) for marker in MARKERS}
    words = count_by_marker(text, whole_word=True)
    assert words == {marker: len(re.findall(rf"\b{marker}\b", lower)) for marker in MARKERS}
    assert 0 < min(words.values()) and sum(words.values()) < count(text)


def test_the_judge_prompt_is_appendix_b5s():
    assert JUDGE_PROMPT.startswith("You are an expert linguistic annotator. Your task is to count ")
    for phrase in ("• Hedging expressions: ", "• Doubt markers: ", "Do NOT count:", "if x=0, then…",
                   '{ "count": <integer, total number of uncertainty expressions>, "examples": '):
        assert phrase in JUDGE_PROMPT


def test_summary_by_hand():
    got = summarize(EVAL)
    assert got["responses"] == 3
    assert got["markers"] == {marker: 0 for marker in MARKERS} | {
        "wait": 1 / 3, "likely": 1 / 3, "hmm": 2 / 3, "check": 1 / 3}
    assert (got["total"], got["tokens"], got["accuracy"]) == (5 / 3, 12, 2 / 3)
    assert summarize(text for text in ["wait", "Wait, maybe", ""])["total"] == 1
    # over the responses that state a number
    got = summarize([dict(response="", tokens=4), dict(response=""), dict(response="", correct=1)])
    assert (got["responses"], got["tokens"], got["accuracy"]) == (3, 4, 1)


@pytest.mark.parametrize("record, responses, total, tokens, accuracy", [
    ({"response": "wait", "tokens": 7, "reward": 1.0, "text": "the question: check"}, 1, 1, 7, 1),
    ({"responses": ["wait", "hmm maybe so"], "correct": [True, False]}, 2, 1.5, None, 0.5),
    ({"generated_responses": ["wait", "", ""], "response_token_lengths": [1, 2, 6],
      "answers_correctness": [True, False, False]}, 3, 1 / 3, 3, 1 / 3),
    # One number for two responses could be their sum or their mean; None is no number.
    ({"responses": ["wait", "wait"], "tokens": 12, "correct": [1, None]}, 2, 1, None, None),
    ({"text": "wait", "tokens": "7", "correct": None}, 1, 1, None, None),
])
def test_record_shapes(record, responses, total, tokens, accuracy):
    got = summarize([record])
    assert (got["responses"], got["total"], got["tokens"], got["accuracy"]) == (
        responses, total, tokens, accuracy)


def test_records_averages_and_their_line():
    records = [epistemic.record("Wait, maybe 4.", 1.0, 10, True, index=7),
               epistemic.record("So 4.", 0.0, 1010, False)]
    assert records[0] == dict(index=7, correct=1.0, tokens=10, finished=True, epistemic=2,
                              response="Wait, maybe 4.")
    means = epistemic.averages(records)
    assert means == dict(score=0.5, length=510, epistemic=1, truncated=0.5)
    assert epistemic.line(means) == "score 0.500  len 510  epistemic 1.0"


def test_a_column_for_each_benchmark_of_each_file(tmp_path, run):
    write(tmp_path / "a.jsonl", *EVAL)
    write(tmp_path / "b.jsonl", {"text": "waiting to check"}, {"text": "hmm"})
    said = run("a.jsonl", "b.jsonl")
    got = rows(said)
    assert "a.jsonl  " in said and "substrings" in said
    assert [label for label in got if label in MARKERS] == list(MARKERS)
    assert got["hmm"] == ["1.00", "0.00", "0.50"] and got["accuracy"] == ["0.500", "1.000"]
    assert got["benchmark"] == ["aime24", "math500"]
    assert got["total"] == ["2.50", "0.00", "1.50"]
    assert got["responses"] == ["2", "1", "2"]
    assert got["tokens"] == ["15.5", "5.0"]  # b.jsonl states none: its cell is empty
    whole = run("a.jsonl", "b.jsonl", "--whole_word")
    assert rows(whole)["total"] == ["2.00", "0.00", "1.00"] and "not the paper's" in whole
    assert rows(run("a.jsonl", "--field", "benchmark"))["total"] == ["0.00", "0.00"]
    names = [f"{name * 30}/eval/step_40.jsonl" for name in "abcd"]
    lines = epistemic.grid(names, [("total", ["12,345.00"] * 4)]).splitlines()
    assert max(map(len, lines)) <= 80 and lines[:4] == names  # in full, in the columns' order
    assert lines[5].split() == ["..tep_40.jsonl"] * 4 and len({*map(len, lines[5:])}) == 1


@pytest.mark.parametrize("content, message", [
    (b"\n \n", "bad.jsonl: no responses"),
    (b'{"response": "wait"}\n\n{"response": "wa', "bad.jsonl:3: not JSON"),
    (b"[" * 100_000 + b"\n", "bad.jsonl:1: not JSON"),
    (b"\x1f\x8b\x08\x00\n", "bad.jsonl:1: not JSON"),
    (b'{"response": "wait"}\n{"output\\n": "a"}\n', r"bad.jsonl:2: no field response or responses "
     r"or generated_responses or text among ['output\n']; name the responses' field with --field"),
    (b'{"responses": ["wait", null]}\n', "bad.jsonl:1: field responses is not text"),
    (b"[1, 2]\n", "bad.jsonl:1: a list, not an object"),
])
def test_bad_files_are_named_in_one_line(tmp_path, run, capsys, content, message):
    write(tmp_path / "good.jsonl", {"text": "wait"})
    (tmp_path / "bad.jsonl").write_bytes(content)
    said = refusal(run, "good.jsonl", "bad.jsonl")
    assert message in said and len(said) < 500 and capsys.readouterr().out == ""
    assert "No such file" in refusal(run, "good.jsonl", "nowhere.jsonl")


def test_odd_text_does_not_stop_it(tmp_path, run):
    (tmp_path / "odd.jsonl").write_bytes(
        b'\xef\xbb\xbf{"response": "wait \\ud83d \\u0000 wait"}\r\n'  # a BOM, half an emoji, NUL
        b'{"response": "wait \xed\xa0\xbd \0\x1b wait"}\n'
        + '{"response": "Wait\u2028wait\u0085é", "benchmark": null}'.encode())  # no last newline
    assert "2.00" in run("odd.jsonl")


def test_20_mb_take_a_tenth_of_200_mb_in_10_s_and_no_memory(tmp_path):
    text = TRACE * 260  # 45 kB, a long response; 450 of them
    path = write(tmp_path / "large.jsonl", *[dict(response=text)] * (20_000_000 // len(text)))
    code = """
import resource, sys, time, epistemic
epistemic.main(sys.argv[1:])
kB = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.process_time(), kB, len({"torch", "numpy", "transformers", "asyncio"} & {*sys.modules}))
"""
    # by way of sh: what this process holds would count as its child's peak
    said = subprocess.run(["sh", "-c", '"$@"; exit', "sh", sys.executable, "-c", code, path,
                           "--whole_word"], capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, peak, heavy = map(float, said.stdout.splitlines()[-1].split())
    assert seconds < 2.0  # of CPU: twice the promise, against a busy machine; about 0.4 here
    assert peak < 25_000  # kB; about 12,000 here, to which a file that is held would add 20,000
    assert heavy == 0  # the import is light
