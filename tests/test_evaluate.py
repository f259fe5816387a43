"""evaluate.py: pass@k against enumeration, the summary by hand, Table 11, the names of models."""
import itertools
import json
import shutil

import pytest

import evaluate
from common import ROOT, refusal_of_main


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_against_enumeration(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        marks = [1] * correct + [0] * (n - correct)
        draws = [any(draw) for draw in itertools.combinations(marks, k)]
        assert evaluate.pass_at_k(n, correct, k) == pytest.approx(sum(draws) / len(draws))


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_of_too_few_answers(k):
    with pytest.raises(ValueError):
        evaluate.pass_at_k(3, 1, k)


def test_summary_and_table_by_hand():
    records = [dict(index=i, correct=c, tokens=t, finished=f, epistemic=e) for i, c, t, f, e in [
        (0, 1.0, 10, True, 1), (0, 1.0, 20, True, 2), (1, 0.0, 30, False, 3),
        (1, 1.0, 40, True, 6)]]
    s = evaluate.summarise(records, 2)
    assert s["questions"] == 2 and s["score"] == 0.75 and s["pass_at"] == {1: 0.75, 2: 1.0}
    assert s["length"] == 25 and s["truncated"] == 0.25 and s["epistemic"] == 3
    assert s["standard_error"] == pytest.approx(0.25)  # accuracies 1 and .5, over 2 questions
    alone = evaluate.summarise(records[:2], 2)
    assert alone["standard_error"] is None  # the spread of one question is unknown
    lines = evaluate.table({"base": dict(amc23=s, aime24=alone),
                            "sdpo/step_10": dict(amc23=alone, aime24=s)}).splitlines()
    assert [line.split() for line in lines] == [
        ["amc23,", "2", "questions", "score", "pass@2", "length", "cut", "epistemic"],
        ["base", "0.750", "±", "0.250", "1.000", "25", "25.0%", "3.0"],
        ["sdpo/step_10", "1.000", "1.000", "15", "0.0%", "1.5"],
        ["aime24,", "1", "questions", "score", "pass@2", "length", "cut", "epistemic"],
        ["base", "1.000", "1.000", "15", "0.0%", "1.5"],
        ["sdpo/step_10", "0.750", "±", "0.250", "1.000", "25", "25.0%", "3.0"]]
    assert len(set(map(len, lines))) == 1  # in columns


@pytest.mark.parametrize("model, name", [
    ("Qwen/Qwen3-8B", "Qwen3-8B"), ("toy/model/", "model"), ("model", "model"),
    ("runs/sdpo/checkpoints/step_10", "sdpo/step_10"),
    ("/r/d_ug/checkpoints/step_9/", "d_ug/step_9")])
def test_a_checkpoint_is_named_after_its_run(model, name):
    assert evaluate.result_names([model]) == {name: model}


def test_two_models_of_one_name_get_two_folders_and_steps_their_order():
    seeds = [f"runs/seed_{i}/sdpo/checkpoints/step_6" for i in (0, 1)]
    assert evaluate.result_names(seeds) == dict(zip(seeds, seeds))
    steps = [f"r/checkpoints/step_{n}" for n in (100, 20)]
    assert list(evaluate.result_names([*steps, "base"])) == ["base", "r/step_20", "r/step_100"]


@pytest.mark.parametrize("model_type, template, thinking, expected", [
    ("qwen2", "<｜Assistant｜><think>\n", True, (0.6, 0.95, 20)),
    ("qwen3", "<|im_start|>", True, (0.6, 0.95, 20)),
    ("qwen3", "<|im_start|>", False, (0.7, 0.8, 20)),
    ("olmo3", "<|im_start|>", False, (0.6, 0.95, 20)),
])
def test_sampling_of_table_11(model_type, template, thinking, expected):
    assert evaluate.SAMPLING[evaluate.family(model_type, template, thinking)] == expected


def test_defaults_are_the_papers():
    args = evaluate.make_parser().parse_args(["--model", "x", "y"])
    assert args.model == ["x", "y"]
    assert (args.samples, args.max_response_tokens) == (16, 38912)
    assert args.data == ["aime24", "aime25", "amc23", "math500"]


@pytest.mark.parametrize("flags, said", [
    (["--model", "no/such/folder"], "no/such/folder"),
    (["--model", "a/model", "larger"], "--model larger: another shape"),
    (["--data", "no/such.parquet"], "no/such.parquet"),
    (["--data", "a/in.jsonl", "b/in.jsonl"], "--data: two benchmarks have one name"),
    (["--samples", "0"], "--samples: 0"), (["--top_p", "2"], "--top_p: 2"),
    (["--top_p", "0"], "--top_p 0"), (["--temperature", "0"], "--temperature 0"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, flags, said):
    for folder in ("a/model", "larger"):
        shutil.copytree(ROOT / "toy/model", tmp_path / folder,
                        ignore=shutil.ignore_patterns("*.safetensors"))
    config = tmp_path / "larger/config.json"
    config.write_text(json.dumps(dict(json.loads(config.read_text()), vocab_size=800)))
    for name in ("a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(ROOT / "toy/data/in.jsonl", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert said in refusal_of_main(evaluate, monkeypatch, [
        "--model", ROOT / "toy/model", "--data", ROOT / "toy/data/in.jsonl", *flags])
    assert not (tmp_path / "runs").exists()


def test_a_result_belongs_to_weights_data_and_flags(tmp_path, capsys):
    """Another model, or other data, under the same path never gets the score found there."""
    model, data = tmp_path / "model", tmp_path / "d.jsonl"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"a" * 3_000_000)
    data.write_text("1")

    def key(flags="16 samples"):
        return evaluate.fingerprint(model, data, flags)
    first = key()
    path = tmp_path / "out/d.jsonl"
    evaluate.write_lines(path, [dict(index=0)])
    path.with_suffix(".key").write_text(first + evaluate.fingerprint(path))
    assert evaluate.read_result(path, key()) == [dict(index=0)]
    assert evaluate.read_result(path, key("4 samples")) is None
    (model / "model.safetensors").write_bytes(b"a" * 2_999_999 + b"b")
    assert evaluate.read_result(path, key()) is None
    (model / "model.safetensors").write_bytes(b"a" * 3_000_000)
    assert evaluate.read_result(path, key()) == [dict(index=0)]
    data.write_text("2")
    assert evaluate.read_result(path, key()) is None
    assert capsys.readouterr().out.count("evaluated again") == 3
    assert evaluate.read_result(tmp_path / "none.jsonl", first) is None
    data.write_text("1")
    path.write_text("")  # cut since, at a line's end
    assert evaluate.read_result(path, key()) is None
