"""generate_conditions.py: the five prompts, who is asked what, the tables, by scripts. No vLLM."""
import json
import re
import sys
from argparse import Namespace

import pytest
import torch

import epistemic
import generate_conditions as conditions
from common import DATA, ROOT, few, refusal

CHAT = [dict(role="user", content="What is 1 + 1?")]

def response(text, correct=1.0, finished=True, tokens=10):
    return dict(correct=correct, tokens=tokens, finished=finished, response=text,
                epistemic=epistemic.count(text))

def group(name, correct, cut=""):
    """Responses in one context, named after their place: "1" is correct, "0" not."""
    return [response(f"{name}{i}", float(c), str(i) not in cut) for i, c in enumerate(correct)]

def test_first_correct():
    assert conditions.first_correct(group("a", "0011")) == "a2"
    assert conditions.first_correct(group("a", "0000")) == "a0"  # authors' code
    assert conditions.first_correct(group("a", "0111", cut="12")) == "a3"  # a cut one is never s

def test_pairs_are_as_many_of_each_a_question_in_the_same_order():
    contexts = [
        dict(unguided=group("u", "01100"), full=group("f", "11111")),
        {},
        dict(unguided=group("?", "11111")),
        dict(unguided=group("u", "11110", cut="02"), full=group("f", "10100")),
        dict(unguided=group("u", "10000", cut="0"), full=group("f", "11111")),
        dict(unguided=group("u", "11100"), full=group("f", "11100", cut="01")),
    ]
    questions = [dict(index=i, messages=CHAT, answer=str(i), contexts=responses)
                 for i, responses in enumerate(contexts)]
    d_ug, d_sg = conditions.sft_pairs(questions, 800)
    assert [(row["index"], row["response"]) for row in d_ug] == [
        (0, "u1"), (0, "u2"), (3, "u1"), (3, "u3"), (5, "u0")]
    assert [(row["index"], row["response"]) for row in d_sg] == [
        (0, "f0"), (0, "f1"), (3, "f0"), (3, "f2"), (5, "f2")]
    for row in d_ug + d_sg:  # both under the plain prompt, as sft_distill.py takes it
        assert row["prompt"] == CHAT and row["answer"] == str(row["index"])
    assert conditions.sft_pairs(questions, 3) == (d_ug[:3], d_sg[:3])

def test_summary_and_table_by_hand():
    texts = {context: "Wait, maybe. " * n + "Check: 2."
             for context, n in zip(conditions.CONTEXTS, (5, 1, 4, 2, 3))}
    studied = [dict(contexts={
        context: [response(text, 1.0, True, 100 * (i + 1)),
                  response(text, 0.0, i == 0, 300 * (i + 1))]
        for context, text in texts.items()}) for i in range(2)]
    studied[1]["contexts"]["full"][1]["correct"] = 1.0
    rows = conditions.summarise(studied)
    full = rows["full"]
    assert (full["score"], full["score_error"]) == pytest.approx((0.75, 0.25))
    assert (full["length"], full["length_error"]) == pytest.approx((300, 100))  # of 200 and 400
    assert (full["epistemic"], full["epistemic_error"], full["truncated"]) == (3, 0, 0.25)
    table = [line.split() for line in conditions.table(rows).splitlines()]
    assert ["wait", "5.00", "1.00", "4.00", "2.00", "3.00"] in table

UNGUIDED = ["00000000", "00000001", "01100000", "00001111", "11110100", "01000100", "11111111"]
GUIDED = ["11111111", "00100000", "00000000", "11111111", "11111111", "00000011", "11111111"]
ARGS = Namespace(accuracy=[0.125, 0.5], samples=8, seed=0, temperature=0.6, top_p=0.95, top_k=20,
                 max_response_tokens=640, enable_thinking=True)
CLOSE = "Correctly solve the original question."
UNCERTAIN = (  # App. C
    "Solve the original question from scratch with a full, detailed reasoning trace, without "
    "skipping any steps, and include as much uncertainty or ambiguity in the explanation.")

def question(i):
    chat = [dict(role="user", content=f"Question {i}?")]
    return dict(index=i, answer=f"gold{i}", messages=chat, prompt_ids=[1])

@pytest.fixture
def asked(monkeypatch, alone):
    """Every prompt that `generate` gets, as (question, its text after it): the responses are
    scripted."""
    seen = []

    def generate(llm, verifier, questions, seed, **sampling):
        assert sampling["n"] == 8 and sampling["max_tokens"] == 640
        rollouts = []
        for q in questions:
            i, rest = re.fullmatch(r"Question (\d+)\?(.*)", q["prompt_ids"], re.S).groups()
            assert q["answer"] == f"gold{i}"
            seen.append((int(i), rest))
            grades = (GUIDED if rest else UNGUIDED)[int(i) % 7]
            # what was shown is part of the response, so that (2) can be told from the others
            name = "plain" if not rest else "sure" if rest.endswith(CLOSE) else "doubtful"
            rollouts += [conditions.Rollout(q, [1] * r["tokens"], None, r["response"],
                                            r["finished"], r["correct"])
                         for r in group(f"<think>hm</think>\n{name} response to {i}, number ",
                                        grades)]
        return rollouts

    monkeypatch.setattr(conditions, "generate", generate)
    monkeypatch.setattr(conditions, "render", lambda _, messages, thinking: messages[-1]["content"])
    return seen

def ask_round(to_study, want_pairs):
    return conditions.ask_round(None, None, None, [question(i) for i in range(7)], 0, to_study,
                                want_pairs, ARGS)

def test_the_band_includes_its_bounds(asked):
    questions = ask_round(100, True)
    assert [q["index"] for q in questions] == list(range(7))  # all, for the count and the record
    assert [q["accuracy"] for q in questions] == [0, 0.125, 0.25, 0.5, 0.625, 0.25, 1]
    studied = [q for q in questions if q["contexts"]]
    assert [q["index"] for q in studied] == [1, 2, 3, 5]
    for q in studied:
        assert list(q["contexts"]) == list(conditions.CONTEXTS)
        assert all(len(responses) == 8 for responses in q["contexts"].values())
        assert q["messages"] == question(q["index"])["messages"]  # without a solution
    assert len(asked) == 7 + 4 * 4

def test_what_stands_in_each_context(asked):
    """As Sec. 3 and App. C print it."""
    ask_round(100, True)
    s = {1: 7, 2: 1, 3: 4, 5: 1}  # the first correct of (1)
    y = {1: 2, 2: 0, 3: 0, 5: 6}  # the first correct of (2), or its first
    for i in s:
        plain, sure = (f"{name} response to {i}, number {n}" for name, n in
                       (("plain", s[i]), ("sure", y[i])))
        think = "<think>hm</think>\n"
        assert [rest for number, rest in asked if number == i] == ["", *(
            f"\n\nCorrect solution: {shown}\n\n{close}" for shown, close in (
                (think + plain, CLOSE), (plain, CLOSE), (think + sure, CLOSE),
                (think + plain, UNCERTAIN)))]

@pytest.fixture
def run(tmp_path, monkeypatch, alone):
    """run(folder, *flags): main() up to its end; what vLLM would do is nothing."""
    engine = Namespace(llm_engine=Namespace(engine_core=Namespace(shutdown=lambda: None)))
    for name, value in dict(
            start_process_group=lambda: torch.device("cpu"), Verifier=lambda: None,
            sync_weights=lambda *_: None, make_engine=lambda *_: engine).items():
        monkeypatch.setattr(conditions, name, value)

    def run(folder, *flags):
        monkeypatch.setattr(sys, "argv", ["generate_conditions.py", *map(str, (
            "--model", ROOT / "toy/model", "--data", few(DATA / "in.jsonl", 1, tmp_path),
            "--num_questions", 6, "--sft_examples", 16, "--questions_per_round", 7,
            "--max_response_tokens", 640, "--out", tmp_path / folder, *flags))])
        conditions.main()
        return {path.name: path.read_text() for path in (tmp_path / folder).rglob("*.jsonl")}
    return run

def test_a_run_that_was_killed_resumes_and_ends_alike(asked, run, tmp_path, monkeypatch):
    generate, limit = conditions.generate, None

    def limited(*arguments, **settings):
        if limit is not None and len(asked) >= limit:
            raise KeyboardInterrupt
        return generate(*arguments, **settings)
    monkeypatch.setattr(conditions, "generate", limited)
    monkeypatch.setattr(conditions, "read_questions", lambda *_: [question(i) for i in range(35)])
    whole = run("whole")
    # four of seven questions are in the band, with 7 pairs: rounds 0 and 1 hold 6 to study, and
    # round 2 is for the pairs alone; the data's last two rounds are never asked for
    assert len(asked) == (7 + 4 * 4) + (7 + 2 * 4 + 2 * 1) + (7 + 4)
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in whole.items()}
    for context in conditions.CONTEXTS:
        assert [r["index"] for r in rows[f"{context}.jsonl"][::8]] == [1, 2, 3, 5, 8, 9]
    for name in ("d_ug.jsonl", "d_sg.jsonl"):
        assert [r["index"] for r in rows[name]] == [
            1, 3, 3, 3, 3, 5, 5, 8, 10, 10, 10, 10, 12, 12, 15, 17]

    asked.clear()
    limit = 30  # within the second round
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    limit = None
    asked.clear()
    assert run("cut", "--gpu_memory_utilization", 0.5) == whole
    assert len(asked) == (7 + 2 * 4 + 2 * 1) + (7 + 4)  # the first round is not asked again
    asked.clear()
    assert run("cut") == whole and not asked
    assert "holds other results: --accuracy was [0.125, 0.5]" in refusal(
        run, "cut", "--accuracy", 0.25, 0.5)
