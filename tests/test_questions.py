"""load_questions: every schema of the paper's files, and golds that no response could give."""
import json
from pathlib import Path

import pytest

from verifier import INSTRUCTION, load_questions

BENCHMARKS = Path(__file__).resolve().parents[2] / "shared/data/benchmarks"
DAPO = ("Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        "\n\nWhat is 1 + 1?\n\nRemember to put your answer on its own line after \"Answer:\".")
CHAT = [dict(role="user", content="What is 1 + 1?")]

def load(path, *rows):
    if path.suffix == ".parquet":
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    return load_questions(str(path))

@pytest.mark.parametrize("row", [
    dict(prompt=CHAT, reward_model=dict(ground_truth="2")),
    dict(prompt=json.dumps(CHAT), reward_model=json.dumps(dict(ground_truth="2"))),  # aime25
    dict(prompt=[dict(role="user", content=DAPO)], reward_model=dict(ground_truth="2")),
    dict(prompt="What is 1 + 1?\nPlease reason step by step.", answer="2"),
    dict(Problem="What is 1 + 1?" + INSTRUCTION, Answer=2),
    dict(problem="What is 1 + 1?", final_answer="2", answer=None, solution="So"),
    dict(problem="What is 1 + 1?", solution="Adding, $1+1=\\boxed 2$.", level="1")])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_schema(tmp_path, row, suffix):
    solution = dict(solution=row["solution"]) if "solution" in row else {}
    messages = [dict(role="user", content="What is 1 + 1?" + INSTRUCTION)]
    wanted = dict(messages=messages, answer="2", **solution)
    assert load(tmp_path / f"data{suffix}", row) == [wanted]

def test_golds_that_people_have(tmp_path):
    golds = ["2", 2, 2.0, " 2 ", ["2"], '["2"]', [2], "['2']", "[2]", "Answer: 2", "\\boxed{2}",
             "The answer is \\boxed{2}", "so " * 99 + "\\boxed{2}", "1+1 <<2>>\n#### 2"]
    rows = [dict(problem="a", answer=gold) for gold in [*golds, 1e16, "[1, 2]", "even"]]
    answers = [question["answer"] for question in load(tmp_path / "data.json", *rows)]
    assert answers == ["2"] * len(golds) + ["10000000000000000", "[1, 2]", "even"]

@pytest.mark.parametrize("text, said", [
    *[('{"problem": "a", "answer": 1}\n\n{"problem": "b", "answer": %s}' % json.dumps(gold),
       "row 2: answer") for gold in ("proof", "notfound", "N/A", "null", "None", None, "", " ",
                                     float("nan"), float("inf"), [1, 2], {"value": 1}, "a" * 201)],
    ('{"problem": "a", "answer": "1"}\n{"problem": " ", "answer": "1"}', "row 2: .*no question"),
    ('{"answer": "1"}', "row 1: .*no question"), ("", "no question"), ('{"problem": 3}', "row 1"),
    ('{"prompt": [{"role": "system", "content": "a"}], "answer": "1"}', "row 1: .*no question"),
    ('{"problem": "a", "answer": "1"}\n\n{"problem": ', "line 3"),
    ('[{"problem": "a"},\n nonsense]', "line 2"), ("[" * 100_000, "data.jsonl")])
def test_what_no_response_could_answer_is_named(tmp_path, text, said):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        load_questions(str(tmp_path / "data.jsonl"))
    assert "data.jsonl" in str(caught.value) and "\n" not in str(caught.value)

@pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the paper's files beside the project")
@pytest.mark.parametrize("name, rows", [
    ("aime24", 30), ("aime25", 30), ("amc23", 40), ("math500", 500), ("dapo_math_17k", 17917)])
def test_the_papers_files(name, rows):
    questions = load_questions(str(BENCHMARKS / f"{name}.parquet"))
    texts = [question["messages"][-1]["content"] for question in questions]
    assert len(questions) == rows and all(text.endswith(INSTRUCTION.strip()) for text in texts)
    assert not any("own line after" in text or text.count("step by step.") > 2 for text in texts)
