"""Chemistry (Fig. 1a, Sec. 6): SciKnowEval's multiple choice, from the file to the grade."""
import json
from argparse import Namespace

import pytest

import sdpo
from common import ROOT, needs_tokenizers, tokenizer_of
from verifier import Verifier, load_questions

BENCHMARKS = ROOT.parent / "shared/data/benchmarks"
needs_data = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="needs the paper's files beside the project")
FILES = {"chemistry_train.json": 1890, "chemistry_test.json": 210}
# As the real rows are.
SYSTEM = "\nPlease select the right answer. Respond so:\n<answer>\n...\n</answer>\n"
ROW = dict(idx=7, kind="mcq", dataset="sciknoweval", answer="B", system=SYSTEM, tests="-",
           prompt="Which?\n\nA: CC(=O)O\nB: CCO\nC: C\nD: O\nPlease reason step by step.")


def load(tmp_path, row):
    (tmp_path / "data.json").write_text(json.dumps(row))
    (question,) = load_questions(str(tmp_path / "data.json"))
    return question


@pytest.mark.parametrize("row", [
    ROW,
    dict(prompt=[dict(role="system", content=SYSTEM), dict(role="user", content="Which?")],
         reward_model=dict(ground_truth="B")),
    dict(problem="Which? Give the letter between <answer> and </answer>.", answer="B"),
])
def test_a_gold_is_tagged_where_tags_are_asked_for(tmp_path, row):
    question = load(tmp_path, row)
    assert question["answer"] == "<answer>B</answer>"
    assert not any("boxed" in m["content"] for m in question["messages"])


def test_a_system_column_that_asks_for_no_tags(tmp_path):
    question = load(tmp_path, dict(ROW, system="Be brief."))
    assert question["answer"] == "B"
    assert [m["role"] for m in question["messages"]] == ["system", "user"]
    assert question["messages"][-1]["content"].endswith(r"put your final answer within \boxed{}.")


@pytest.mark.slow
@needs_data
@needs_tokenizers
def test_every_row_loads_and_the_prompt_of_olmo_is_table_12s(alone):
    tokenizer = tokenizer_of("olmo-3-instruct")
    args = Namespace(enable_thinking=True, max_prompt_tokens=2048)
    for name in FILES:
        questions = sdpo.read_questions(str(BENCHMARKS / name), tokenizer, args)
        assert len(questions) == FILES[name]  # none is too long
        rows = [json.loads(line) for line in (BENCHMARKS / name).open()]
        for row, question in zip(rows, questions, strict=True):
            assert question["answer"] == f"<answer>{row['answer']}</answer>"
            assert tokenizer.decode(question["prompt_ids"]) == (
                f"<|im_start|>system\n{row['system']}<|im_end|>\n"
                f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n")


RIGHT = ["<answer>B</answer>", "<reasoning>\n2 C\n</reasoning>\n<answer>\nB\n</answer>",
         "<answer>A</answer> Wait. <answer>B</answer>", "\\boxed{A} <answer>B</answer>",
         "I answer between <answer> tags. <answer> B </answer>",
         "<answer><answer>B</answer></answer>",
         "<think> <answer>A</answer> </think> <answer>B</answer> and so on" + " on" * 9999]
# What a policy could try instead of knowing it; the gold is B.
WRONG = [
    "", "B", "The answer is B.", "\\boxed{B}", "\\boxed{<answer>B</answer>} <answer>A</answer>",
    "<answer>A</answer>", "<answer>b</answer>", "<answer></answer>", "<answer>\\boxed{B}</answer>",
    *[f"<answer>{a}</answer>" for a in (
        "A, B, C, D", "ABCD", "A or B", "B or A", "B, not A", "A\nB", "B\nA", "B B", "(B)", "B.",
        "B: CCO", "CCO", "the correct letter", "A|B", "B/A", "<B>", "B\u200b", "\u0412", "B\0",
        "B<answer>", "...", "A" * 10**6)],
    "<answer>B</answer> <answer>A</answer>", "<answer>B</answer> <answer>A<answer>B",
    "<answer>B</answer> <answer>", "<answer>B</answer>" * 1000 + "<answer>A</answer>",
    "<answer>B</answer><answer>B", "<Answer>B</Answer>", "<answer >B</answer>",
    "<answer>B</ answer>", "<answer>B<\\answer>", "</answer>B<answer>",
    "<answer>" * 10**5 + "B", "B" + "</answer>" * 10**5,
    "<think> <answer>B</answer> </think> I do not know", "<answer>B</answer></think>",
    "</think> <answer>B</answer> </think> <answer>", "<answer>B</think></answer>",
    "<answer>A</answer> B</answer>", "&lt;answer&gt;B&lt;/answer&gt;",
]


def test_grades():
    verifier = Verifier(workers=1)
    assert verifier.verify(RIGHT, ["<answer>B</answer>"] * len(RIGHT)) == [1.0] * len(RIGHT)
    grades = verifier.verify(WRONG, ["<answer>B</answer>"] * len(WRONG))
    assert [text[:40] for text, grade in zip(WRONG, grades) if grade] == []
    # where a box is wanted, tags are no answer
    assert verifier.verify(["<answer>7</answer>", "\\boxed{8} <answer>7</answer>"],
                           ["7"] * 2) == [0.0, 0.0]
