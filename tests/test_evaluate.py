"""evaluate.py: pass@k against enumeration, the summary by hand, Table 11, the names of models, and
to what a result belongs. With real vLLM: test_end_to_end.py."""
import itertools
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import epistemic
import evaluate
from common import DATA, ROOT, few, refusal_of_main


def test_pass_at_k_against_enumeration():
    for n in (1, 2, 5):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            marks = [1] * correct + [0] * (n - correct)
            draws = [any(draw) for draw in itertools.combinations(marks, k)]
            assert evaluate.pass_at_k(n, correct, k) == pytest.approx(sum(draws) / len(draws))
    with pytest.raises(ValueError):
        evaluate.pass_at_k(3, 1, 4)


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
    assert [line.split() for line in lines[:4]] == [
        ["amc23,", "2", "questions", "score", "pass@2", "length", "cut", "epistemic"],
        ["base", "0.750", "±", "0.250", "1.000", "25", "25.0%", "3.0"],
        ["sdpo/step_10", "1.000", "1.000", "15", "0.0%", "1.5"],
        ["aime24,", "1", "questions", "score", "pass@2", "length", "cut", "epistemic"]]
    assert len(lines) == 6 and len(set(map(len, lines))) == 1  # in columns


def test_results_are_named_after_runs_and_come_in_the_order_of_steps():
    for model, name in (("Qwen/Qwen3-8B", "Qwen3-8B"), ("toy/model/", "model"),
                        ("/r/d_ug/checkpoints/step_9/", "d_ug/step_9")):
        assert evaluate.result_names([model]) == {name: model}
    seeds = [f"runs/seed_{i}/sdpo/checkpoints/step_6" for i in (0, 1)]  # of one name
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


@pytest.mark.parametrize("flags, said", [
    (["--model", "no/such/folder"], "no/such/folder"),
    (["--model", ROOT / "toy/model", "larger"], "--model larger: another shape"),
    (["--data", "no/such.parquet"], "no/such.parquet"),
    (["--data", DATA / "in.jsonl", f"{DATA}/./in.jsonl"], "--data: two benchmarks have one name"),
    (["--samples", "0"], "--samples: 0"), (["--top_p", "0"], "--top_p 0"),
    (["--temperature", "0"], "--temperature 0"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, flags, said):
    shutil.copytree(ROOT / "toy/model", tmp_path / "larger")
    config = tmp_path / "larger/config.json"
    config.write_text(json.dumps(dict(json.loads(config.read_text()), vocab_size=800)))
    monkeypatch.chdir(tmp_path)
    assert said in refusal_of_main(evaluate, monkeypatch, [
        "--model", ROOT / "toy/model", "--data", DATA / "in.jsonl", *flags])
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*flags): ([whose weights vLLM gets, then what it is asked], what is printed)."""
    asked = []
    engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))

    def sample(llm, verifier, questions, name, sampling, args):
        asked.append(name)
        return [epistemic.record("So 4.", 1.0, 5, True, index=i) for i in range(len(questions))]

    def start():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return torch.device("cpu")
    for name, replacement in dict(
            start_process_group=start, make_engine=lambda *_: SimpleNamespace(llm_engine=engine),
            load_model=lambda path, _: asked.append(path), sync_weights=lambda *_: None,
            sample_benchmark=sample).items():
        monkeypatch.setattr(evaluate, name, replacement)

    def call(*flags):
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, (
            "--samples", 1, "--out", tmp_path / "out", "--model", "a", "b", "--data",
            tmp_path / "few_in.jsonl", tmp_path / "few_ood.jsonl", *flags))])
        evaluate.main()
        return asked, capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    return call


def test_a_result_belongs_to_weights_data_and_flags(tmp_path, run):
    """Another model, or other data, under the same path never gets the score found there."""
    for name in "ab":
        shutil.copytree(ROOT / "toy/model", name)
    few(DATA / "in.jsonl", 2, tmp_path)
    few(DATA / "ood.jsonl", 1, tmp_path)
    everything = ["a", "few_in", "few_ood", "b", "few_in", "few_ood"]
    assert run()[0] == everything
    assert run()[0] == []  # and no engine
    (tmp_path / "out/b/few_ood.jsonl").write_text("")  # cut at a line's end
    asked, said = run()
    assert asked == ["b", "few_ood"] and said.count("b/few_ood.jsonl is of other weights") == 1
    weights = (tmp_path / "a/model.safetensors").read_bytes()
    (tmp_path / "a/model.safetensors").write_bytes(weights[:-1] + b"?")
    assert run()[0] == ["a", "few_in", "few_ood"]
    few(DATA / "in.jsonl", 1, tmp_path)
    asked, said = run()
    assert asked == ["a", "few_in", "b", "few_in"] and said.count("evaluated again") == 2
    assert run("--max_response_tokens", 9)[0] == everything
