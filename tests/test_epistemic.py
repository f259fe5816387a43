"""The ten markers: the authors' way of counting, the averages, the command as a user calls it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import epistemic
from epistemic import MARKERS, count, count_by_marker, summarize
from judge import JUDGE_PROMPT

ROOT = Path(epistemic.__file__).parent
REAL = sorted((ROOT.parent / "shared/data/responses").glob("*.jsonl"))
# In the manner of Qwen3-8B's thinking, with five times its markers: the slow case.
TRACE = ("Okay, let's see. So first I need to figure out how many boxes are there. 43 crates with "
         "11 boxes is 473. Wait, maybe I should check that: 43 * 11 = 430 + 43. It seems right. ")


def run(*args, cwd=None):
    command = [sys.executable, str(ROOT / "epistemic.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rows(printed):
    """{label: cells} of the table's numeric rows."""
    lines = [line.split() for line in printed.splitlines()]
    return {line[0]: line[1:] for line in lines if line and line[0] in (
        *MARKERS, "benchmark", "total", "responses", "tokens", "accuracy")}


# ---------------------------------------------------------------------------------- counting


def test_the_markers_are_the_papers_in_its_order():
    paper = "wait hmm perhaps maybe actually alternatively seems might likely check"
    assert list(MARKERS) == paper.split()
    assert list(count_by_marker("")) == list(count_by_marker("", whole_word=True)) == list(MARKERS)


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("whole_word", [False, True])
def test_each_marker_counts_once_in_any_case(marker, whole_word):
    for form in (marker, marker.upper(), marker.capitalize()):
        for text in (form, f"So, {form}... no", f"<think>\n{form},", f'("{form}")'):
            assert count_by_marker(text, whole_word) == {m: int(m == marker) for m in MARKERS}
            assert count(text, whole_word) == 1


@pytest.mark.parametrize("text, substrings, words", [
    ("That is unlikely.", 1, 0),
    ("checking, double-check, checkerboard", 3, 1),
    ("waiting; awaits", 2, 0),
    ("waitwait", 2, 0),
    ("seemseems", 1, 0),  # the second begins inside no other: non-overlapping leaves one
    ("hmmm Hmmhmm", 3, 0),
    ("it seems that it seemed, seemingly", 1, 1),
    ("factually, actually", 2, 1),
    ("wait's wait-wait wait", 4, 4),
    ("wait_ _wait wait2 2wait \u00e9wait wait\u00e9", 6, 0),
    ("mightymight might", 3, 1),
    ("WAIT\u2014Wait\u2026wait\U0001f914wait", 4, 4),
    ("wai t, may be, chek, perhap s", 0, 0),
    ("", 0, 0),
    ("wait\0wait \ud83d wait", 3, 3),  # half an emoji: what is left when the token limit cuts one
])
def test_substrings_and_whole_words(text, substrings, words):
    assert count(text) == substrings
    assert count(text, whole_word=True) == words


def test_counts_are_the_authors_one_line_and_the_ordinary_regex():
    pieces = [piece + glue for glue in ("", " ", "_", "9", ".", "\u00c9", "\u212a", "\ud800", "s")
              for piece in (*MARKERS, "un", "Wait", "CHECK", "chec\u212a", "m\u0130ght")]
    text = "".join(pieces[i * i * 7 % len(pieces)] + pieces[i % len(pieces)] for i in range(3000))
    lower = text.lower()
    assert count_by_marker(text) == {marker: lower.count(marker) for marker in MARKERS}
    words = count_by_marker(text, whole_word=True)
    assert words == {marker: len(re.findall(rf"\b{marker}\b", lower)) for marker in MARKERS}
    assert 0 < sum(words.values()) < count(text)


def test_the_judge_prompt_is_appendix_b5s():
    assert JUDGE_PROMPT.startswith("You are an expert linguistic annotator. Your task is to count ")
    for phrase in ("• Hedging expressions: ", "• Doubt markers: ", "Do NOT count:", "if x=0, then…",
                   '{ "count": <integer, total number of uncertainty expressions>, "examples": '):
        assert phrase in JUDGE_PROMPT


# ---------------------------------------------------------------------------------- averages

EVAL = [  # two benchmarks, as the evaluation writes them
    dict(benchmark="aime24", question="q", answer="4", response="Wait. Unlikely!", tokens=10,
         correct=1),
    dict(benchmark="aime24", question="q", answer="4", response="hmm, hmm, check", tokens=21,
         correct=0),
    dict(benchmark="math500", question="q", answer="4", response="So x = 4.", tokens=5, correct=1),
]


def test_summary_by_hand():
    got = summarize(EVAL)
    assert got["responses"] == 3
    assert got["markers"] == {marker: 0 for marker in MARKERS} | {
        "wait": 1 / 3, "likely": 1 / 3, "hmm": 2 / 3, "check": 1 / 3}
    assert (got["total"], got["tokens"], got["accuracy"]) == (5 / 3, 12, 2 / 3)
    assert summarize(EVAL, whole_word=True)["total"] == 4 / 3


def test_summary_takes_texts_and_a_stream():
    got = summarize(text for text in ["wait", "Wait, maybe", ""])
    assert (got["responses"], got["total"], got["tokens"], got["accuracy"]) == (3, 1, None, None)
    with pytest.raises(ValueError, match="no responses"):
        summarize([])


@pytest.mark.parametrize("record, responses, total, tokens, accuracy", [
    ({"response": "wait"}, 1, 1, None, None),
    ({"response": "wait", "tokens": 7, "reward": 1.0, "text": "the question: check"}, 1, 1, 7, 1),
    ({"responses": ["wait", "hmm maybe so"], "correct": [True, False]}, 2, 1.5, None, 0.5),
    ({"text": "wait wait"}, 1, 2, None, None),
    ({"generated_responses": ["wait", "", ""], "response_token_lengths": [1, 2, 6],
      "answers_correctness": [True, False, False]}, 3, 1 / 3, 3, 1 / 3),
    # One number for two responses could be their sum or their mean; None is no number.
    ({"responses": ["wait", "wait"], "tokens": 12, "correct": [1, None]}, 2, 1, None, None),
    ({"response": "wait", "tokens": "7", "correct": None}, 1, 1, None, None),
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


def test_numbers_are_averaged_over_the_responses_that_have_them():
    got = summarize([dict(response="", tokens=4), dict(response=""), dict(response="", correct=1)])
    assert (got["responses"], got["tokens"], got["accuracy"]) == (3, 4, 1)


def test_field_names_where_the_responses_are():
    record = {"response": "wait", "thinking": ["hmm", "hmm hmm"]}
    assert summarize([record], field="thinking")["total"] == 1.5
    with pytest.raises(ValueError, match="no field draft among .*thinking.*--field"):
        summarize([record], field="draft")


# ---------------------------------------------------------------------------------- the command


def test_table_by_hand(tmp_path):
    done = run(write(tmp_path / "a.jsonl", *EVAL[:2]), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done.stdout) == {marker: ["0.00"] for marker in MARKERS} | {
        "benchmark": ["aime24"], "wait": ["0.50"], "likely": ["0.50"], "hmm": ["1.00"],
        "check": ["0.50"], "total": ["2.50"], "responses": ["2"], "tokens": ["15.5"],
        "accuracy": ["0.500"]}
    assert [label for label in rows(done.stdout) if label in MARKERS] == list(MARKERS)
    assert "substrings" in done.stdout


def test_a_column_for_each_benchmark_of_each_file(tmp_path):
    write(tmp_path / "a.jsonl", *EVAL)
    write(tmp_path / "b.jsonl", {"text": "waiting to check"}, {"text": "hmm"})
    done = run("a.jsonl", "b.jsonl", cwd=tmp_path)
    got = rows(done.stdout)
    assert done.returncode == 0 and "a.jsonl  " in done.stdout
    assert got["benchmark"] == ["aime24", "math500"]
    assert got["total"] == ["2.50", "0.00", "1.50"]
    assert got["responses"] == ["2", "1", "2"]
    assert got["tokens"] == ["15.5", "5.0"]  # b.jsonl states none: its cell is empty
    whole = run("a.jsonl", "b.jsonl", "--whole_word", cwd=tmp_path)
    assert rows(whole.stdout)["total"] == ["2.00", "0.00", "1.00"]
    assert "not the paper's" in whole.stdout
    other = run("a.jsonl", "--field", "question", cwd=tmp_path)
    assert rows(other.stdout)["total"] == ["0.00", "0.00"]


def test_four_long_names_stay_within_80_columns_and_can_be_told_apart(tmp_path):
    names = [f"runs/{name}_lr1e-5_seed0/eval/step_40.jsonl" for name in ("grpo", "sdpo", "a", "b")]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        write(tmp_path / name, dict(response="Maybe " * 12345, tokens=38912, correct=1))
    lines = run(*names, cwd=tmp_path).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2:6] == names  # in full, in the order of the columns
    assert lines[7].split() == ["..tep_40.jsonl"] * 4
    assert len({len(line) for line in lines[7:]}) == 1  # aligned on the right


@pytest.mark.parametrize("content, message", [
    (b"", "bad.jsonl: no responses"),
    (b"\n \n", "bad.jsonl: no responses"),
    (b'{"responses": []}\n', "bad.jsonl: no responses"),
    (b'{"response": "wait"}\n\n{"response": "wa', "bad.jsonl:3: not JSON"),
    (b"not json\n", "bad.jsonl:1: not JSON"),
    (b"[" * 100_000 + b"\n", "bad.jsonl:1: not JSON"),
    (b'{"response": "\xff"}\n', "bad.jsonl:1: not JSON"),
    (b"\x1f\x8b\x08\x00\n", "bad.jsonl:1: not JSON"),
    (b'{"response": "wait"}\n{"question": "q", "output": "a"}\n', "bad.jsonl:2: no field response"),
    (b'{"response": {"text": "wait"}}\n', "bad.jsonl:1: field response is not text"),
    (b'{"responses": ["wait", null]}\n', "bad.jsonl:1: field responses is not text"),
    (b"[1, 2]\n", "bad.jsonl:1: a list, not an object"),
    (b"12\n", "bad.jsonl:1: a int, not an object"),
])
def test_bad_files_are_named_in_one_line(tmp_path, content, message):
    good = write(tmp_path / "good.jsonl", {"text": "wait"})
    (tmp_path / "bad.jsonl").write_bytes(content)
    done = run(good, tmp_path / "bad.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert len(done.stderr) < 500


def test_missing_field_says_what_is_there_and_what_to_do(tmp_path):
    done = run(write(tmp_path / "bad.jsonl", {"question": "q", "output\n": "a"}))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "['question', 'output\\n']" in done.stderr and "--field" in done.stderr


@pytest.mark.parametrize("name, message", [
    ("nowhere.jsonl", "No such file"), (".", "Is a directory")])
def test_missing_file_and_directory(tmp_path, name, message):
    done = run(name, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and f"'{name}'" in done.stderr and done.stderr.count("\n") == 1


def test_odd_text_does_not_stop_it(tmp_path):
    (tmp_path / "odd.jsonl").write_bytes(
        b'\xef\xbb\xbf{"response": "wait \\ud83d \\u0000 wait"}\r\n'  # a BOM, half an emoji, NUL
        b'{"response": "wait \xed\xa0\xbd \0\x1b wait"}\n'
        + '{"response": "Wait\u2028wait\u0085é", "benchmark": null}'.encode())  # no last newline
    done = run(tmp_path / "odd.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2.00" in done.stdout


# ---------------------------------------------------------------------------------- cost


def child(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          timeout=120, check=True)
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


@pytest.mark.parametrize("whole_word", [False, True])
def test_20_mb_take_a_tenth_of_200_mb_in_10_s_and_no_memory(tmp_path, whole_word):
    text = TRACE * 260  # 45 kB, a long response; 450 of them
    small = write(tmp_path / "small.jsonl", *[dict(response=text)] * 3)
    large = write(tmp_path / "large.jsonl", *[dict(response=text)] * (20_000_000 // len(text)))

    def cost(path):
        flags = ["--whole_word"] if whole_word else []
        return child(f"import epistemic, time; epistemic.main({[str(path), *flags]!r});"
                     "kb = open('/proc/self/status').read().split('VmHWM:')[1].split()[0];"
                     "print(time.process_time(), kb)")
    (_, before), (seconds, after) = cost(small), cost(large)
    assert seconds < 2.0  # of CPU: twice the promise, against a busy machine; about 0.4 here
    assert after - before < 5_000  # kB: a file that is held would be 20,000


def test_import_is_light():
    heavy = child("import sys; import epistemic;"
                  "print(len({'torch', 'numpy', 'transformers', 'asyncio'} & set(sys.modules)))")
    assert heavy == [0]


@pytest.mark.skipif(not REAL, reason="no ../shared/data/responses beside this checkout")
def test_real_answers_thinking_doubts_more():
    done = run(*REAL)
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80
    got = rows(done.stdout)
    by_file = dict(zip((path.stem for path in REAL), map(float, got["total"])))
    assert by_file["qwen3-8b_think-on"] > 10 * by_file["qwen3-8b_think-off"]  # Figure 10
    texts = [json.loads(line)["response"].lower() for line in REAL[-1].open()]
    mean = sum(text.count(marker) for text in texts for marker in MARKERS) / len(texts)
    assert float(got["total"][-1]) == pytest.approx(mean, abs=0.005)
