"""verifier.load_questions: every schema of the paper's files, and what it says of others."""
import json
from pathlib import Path

import pytest

from verifier import INSTRUCTION, load_questions

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "shared/data/benchmarks"
DAPO = ("Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        "\n\nWhat is 1 + 1?\n\nRemember to put your answer on its own line after \"Answer:\".")
CHAT = [dict(role="user", content="What is 1 + 1?")]
ASKED = "What is 1 + 1?" + INSTRUCTION


@pytest.mark.parametrize("row", [
    dict(prompt=CHAT, reward_model=dict(ground_truth="2")),
    dict(prompt=json.dumps(CHAT), reward_model=json.dumps(dict(ground_truth="2"))),
    dict(prompt=[dict(role="user", content=ASKED)], reward_model=dict(ground_truth=2)),
    dict(prompt=[dict(role="user", content=DAPO)], reward_model=dict(ground_truth="2")),
    dict(problem="What is 1 + 1?", answer=2),
    dict(question="What is 1 + 1?", answer=" 2 ", solution="1 + 1 is 2, so \\boxed{2}"),
    dict(prompt="What is 1 + 1?\nPlease reason step by step.", answer="2"),
    dict(prompt="What is 1 + 1?", solution="2", reward_model=None),
    dict(prompt=CHAT, reward_model=dict(ground_truth=["2"])),
    dict(prompt=CHAT, reward_model=dict(ground_truth='["2"]')),  # DAPO, as some copies have it
    dict(Problem="What is 1 + 1?", Answer=2),  # AIME
    dict(question="What is 1 + 1?", answer="One and one <<1+1=2>>2 apples.\n#### 2"),  # GSM8K
    dict(problem="What is 1 + 1?", solution="Adding, $1+1=\\boxed{2}$.", level="1"),  # MATH
    dict(question="What is 1 + 1?", final_answer="2", r1_solution_1="Well..."),  # DeepMath
    dict(source="cn_k12", problem="What is 1 + 1?", solution="It is $\\boxed{2}$.",  # NuminaMath
         messages=[dict(role="user", content="What is 1 + 1?"),
                   dict(role="assistant", content="It is $\\boxed{2}$.")]),
    dict(problem="What is 1 + 1?", answer="so " * 99 + "\\boxed{2}"),
])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_schema(tmp_path, row, suffix):
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if suffix == ".json" else row))
    (question,) = load_questions(str(path))
    beside = row["solution"] if row.get("answer") == " 2 " else None
    assert question.pop("solution", None) == beside
    assert question == dict(messages=[dict(role="user", content=ASKED)], answer="2")


def test_json_lines_under_the_name_json_and_a_question_that_starts_with_a_bracket(tmp_path):
    rows = [dict(problem="[1, 2] has how many elements?", answer="2"), dict(problem="b", answer=3)]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = load_questions(str(tmp_path / "data.json"))
    assert first["messages"][0]["content"] == "[1, 2] has how many elements?" + INSTRUCTION
    assert second["answer"] == "3"


def test_a_byte_order_mark_is_read(tmp_path):
    row = json.dumps(dict(problem="a", answer="1"))
    (tmp_path / "data.jsonl").write_text(row, encoding="utf-8-sig")
    assert load_questions(str(tmp_path / "data.jsonl"))[0]["answer"] == "1"


def test_a_list_as_a_gold_stays_a_text(tmp_path):
    row = json.dumps(dict(problem="a", answer="[1, 2]"))
    (tmp_path / "data.jsonl").write_text(row)
    assert load_questions(str(tmp_path / "data.jsonl"))[0]["answer"] == "[1, 2]"


def test_a_system_message_stays(tmp_path):
    chat = [dict(role="system", content="Be brief."), *CHAT]
    (tmp_path / "data.jsonl").write_text(json.dumps(dict(prompt=chat, answer="2")))
    (question,) = load_questions(str(tmp_path / "data.jsonl"))
    assert [m["content"] for m in question["messages"]] == ["Be brief.", ASKED]


@pytest.mark.parametrize("text, said", [
    ('{"problem": "a", "answer": "1"}\n{"problem": "b"}', "row 2: no answer"),
    ('{"problem": "a", "answer": ""}', "row 1: answer: no answer"),
    ('{"problem": " ", "answer": "1"}', "row 1: problem: no question"),
    ('{"problem": "a", "answer": ["1", "2"]}', "row 1: answer: one text or number"),
    ('{"problem": "a", "answer": []}', "row 1: answer: one text or number"),
    ('{"problem": "a", "answer": {"value": 1}}', "row 1: answer: one text or number"),
    ('{"problem": "a", "answer": "%s"}' % ("so " * 99), "row 1: answer: no answer, but 296 char"),
    ('{"problem": "a", "solution": "%s"}' % ("so " * 99), "row 1: solution: no answer"),
    ('{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
     '"answer": "1"}', "row 1: prompt: no question .the last message must be the user's"),
    ('{"prompt": [{"role": "system", "content": "a"}], "answer": "1"}', "row 1: prompt: no quest"),
    ('{"prompt": [{"content": "a"}], "answer": "1"}', "row 1: prompt: each message needs a role"),
    ('{"prompt": [{"role": "user"}], "answer": "1"}', "row 1: prompt: each message needs a role"),
    ('{"prompt": [{"role": "user", "content": [{"text": "a"}]}], "answer": "1"}', "row 1: prompt"),
    ('{"prompt": [{"role": "system", "content": null}, {"role": "user", "content": "a"}], '
     '"answer": "1"}', "row 1: prompt: each message needs a role"),
    ('{"prompt": [{"role": "user", "content": "a"}, "b"], "answer": "1"}', "row 1: prompt"),
    ('{"problem": 3, "answer": "1"}', "row 1: problem"),
    ('{"problem": "a", "answer": "1"}\n{"problem": "a \\ud83d", "answer": "1"}', "row 2: .*surrog"),
    ("[" * 100_000, "line 1: not JSON"),
    ('{"answer": "1"}', "row 1: no question"),
    ('{"problem": "a", "answer": "1"}\n\n[nonsense', "line 3: not JSON"),
    ("3", "row 1"), ("", "no questions"), ('"text"', "row 1"),
])
def test_bad_rows_are_named(tmp_path, text, said):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        load_questions(str(tmp_path / "data.jsonl"))
    assert "data.jsonl" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the paper's files beside the project")
@pytest.mark.parametrize("name, rows", [
    ("aime24.parquet", 30), ("aime25.parquet", 30), ("amc23.parquet", 40), ("math500.parquet", 500),
    ("seen_1x64.parquet", 64), ("seen_512.parquet", 512), ("dapo_math_17k.parquet", 17917)])
def test_the_papers_files(name, rows):
    questions = load_questions(str(BENCHMARKS / name))
    assert len(questions) == rows
    for q in questions:
        text = q["messages"][-1]["content"]
        assert text.endswith(INSTRUCTION.strip()) and text.count("Please reason step by step") == 1
        assert "Remember to put your answer" not in text and q["answer"]
