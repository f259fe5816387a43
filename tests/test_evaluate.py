"""evaluate.py: pass@k against enumeration, the summary by hand, Table 11, which models share an
engine, to what a result belongs. With real vLLM: test_end_to_end.py."""
import itertools
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers

import epistemic
import evaluate
from common import DATA, ROOT, few, lines, refusal, tokenizer_of, toy

def test_pass_at_k_against_enumeration():
    for n in (1, 2, 5):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            grades = [1] * correct + [0] * (n - correct)
            draws = [any(draw) for draw in itertools.combinations(grades, k)]
            assert evaluate.pass_at_k(n, correct, k) == pytest.approx(sum(draws) / len(draws))

def test_summary_by_hand():
    records = [dict(index=i, correct=c, tokens=t, finished=f, epistemic=e) for i, c, t, f, e in [
        (0, 1.0, 10, True, 1), (0, 1.0, 20, True, 2), (1, 0.0, 30, False, 3),
        (1, 1.0, 40, True, 6)]]
    row = evaluate.summarise(records, 2)
    assert row["questions"] == 2 and row["score"] == 0.75 and row["pass_at"] == {"1": 0.75, "2": 1}
    assert row["length"] == 25 and row["truncated"] == 0.25 and row["epistemic"] == 3
    assert row["standard_error"] == pytest.approx(0.25)  # scores 1 and .5, over 2 questions
    one = evaluate.summarise(records[:2], 2)
    assert one["standard_error"] is None  # the spread of one question is unknown
    table = evaluate.table({"base": dict(amc23=row), "sdpo/step_10": dict(amc23=one)})
    assert "0.750 ± 0.250   1.000       25  25.0%        3.0" in table

@pytest.mark.parametrize("template, flags, expected", [
    ("<｜Assistant｜><think>\n", [], (0.6, 0.95, 20)),
    ("enable_thinking", [], (0.6, 0.95, 20)),
    ("enable_thinking", ["--no-enable_thinking"], (0.7, 0.8, 20)),
    ("<|im_start|>", ["--no-enable_thinking"], (0.6, 0.95, 20)),  # OLMo knows no such mode
    ("enable_thinking", ["--temperature", "0", "--top_k", "0"], (0, 0.95, 0)),
])
def test_sampling_of_table_11(template, flags, expected):
    args = evaluate.make_parser().parse_args(["--model", "x", *flags])
    assert tuple(evaluate.choose_sampling(template, args).values()) == expected

@pytest.fixture
def run(tmp_path, monkeypatch, capsys, alone):
    """run(models, *flags): (whose weights vLLM gets and what it is asked, what is printed).

    In a folder with copies a and b of the toy. The engine is none; everything before it is real.
    """
    asked = []
    engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))

    def sample(llm, verifier, questions, sampling, args):
        asked.append(questions[0]["benchmark"])
        answer = SimpleNamespace(text="So 4.", reward=1.0, response_ids=[5], finished=True)
        return [epistemic.record(answer, index=q["index"]) for q in questions]
    for name, replacement in dict(
            start_process_group=lambda: torch.device("cpu"), sample_benchmark=sample,
            make_engine=lambda *_: SimpleNamespace(llm_engine=engine),
            sync_weights=lambda llm, model: asked.append(model.config._name_or_path)).items():
        monkeypatch.setattr(evaluate, name, replacement)
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        shutil.copytree(ROOT / "toy/model", name)
    few(DATA / "in.jsonl", 2, tmp_path)
    few(DATA / "ood.jsonl", 1, tmp_path)

    def call(models, *flags):
        asked.clear()
        monkeypatch.setattr(sys, "argv", [
            "evaluate.py", "--samples", "1", "--model", *models, "--data", "few_in.jsonl",
            "few_ood.jsonl", "--out", "out", *map(str, flags)])
        evaluate.main()
        return asked, capsys.readouterr().out
    return call

def change(file, **more):
    file.write_text(json.dumps(json.loads(file.read_text()) | more))

def test_a_result_belongs_to_model_data_and_flags(tmp_path, run):
    """Nothing that changes the answers leaves the score of before."""
    everything = ["a", "few_in", "few_ood", "b", "few_in", "few_ood"]
    assert run("ab")[0] == everything
    assert run("ab")[0] == []  # and no engine
    for name in ("model.safetensors", "config.json", "chat_template.jinja", "tokenizer.json",
                 "generation_config.json", "weights.bin"):
        file = tmp_path / "a" / name
        file.write_bytes(file.read_bytes() if file.exists() else b"")  # the time alone
        assert run("ab")[0] == everything[:3], name
    few(DATA / "in.jsonl", 1, tmp_path)
    assert run("ab")[0] == ["a", "few_in", "b", "few_in"]
    assert run("ab", "--max_response_tokens", 9)[0] == everything
    (answers,) = lines(tmp_path / "out/a/few_in.jsonl")
    assert answers["index"] == 0
    (result,) = lines(tmp_path / "out/a/few_in.json")
    assert result["model"] == "a" and result["row"]["score"] == 1

def test_two_evaluations_stay_in_one_summary(tmp_path, run):
    shutil.copytree(ROOT / "toy/model", "sdpo/checkpoints/step_6")
    run("a")
    _, said = run(["sdpo/checkpoints/step_6"])
    (summary,) = lines(tmp_path / "out/summary.json")
    assert {name: [*rows] for name, rows in summary["models"].items()} == {
        "a": ["few_in", "few_ood"], "sdpo/step_6": ["few_in", "few_ood"]}
    assert said.count("1.000") >= 4

@pytest.mark.parametrize("file, more", [
    ("config.json", dict(rope_parameters=dict(rope_theta=1e6, rope_type="default"))),
    ("config.json", dict(rms_norm_eps=1e-5)), ("config.json", dict(max_position_embeddings=512)),
    ("generation_config.json", dict(eos_token_id=[2, 3])), ("tokenizer.json", dict(normalizer=dict(
        type="Lowercase")))])
def test_models_that_differ_in_more_than_weights_share_no_engine(tmp_path, run, file, more):
    change(tmp_path / "b" / file, **more)
    assert "--model b: it differs from the first in more than weights" in refusal(run, "ab")
    assert not (tmp_path / "out").exists()

def test_a_base_and_its_checkpoint_share_an_engine(tmp_path, run):
    (tmp_path / "a/generation_config.json").unlink()  # a base may have none, a checkpoint has it
    toy().save_pretrained("c")  # in float32
    tokenizer_of("toy").save_pretrained("c")
    assert run("ac")[0] == ["a", "few_in", "few_ood", "c", "few_in", "few_ood"]

def test_weights_that_cannot_be_read_end_in_one_line_before_vllm_starts(tmp_path, run):
    weights = tmp_path / "b/model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "b: Error while deserializing header" in refusal(run, "ab")
    state = toy().state_dict()
    del state["model.layers.1.mlp.down_proj.weight"]
    transformers.logging.set_verbosity_error()  # its own table would come before the line
    safetensors.torch.save_file(state, weights, dict(format="pt"))
    assert "b: weights are missing: ['model.layers.1.mlp.down_proj" in refusal(run, "ab")
    assert not (tmp_path / "out").exists()

def test_bad_input_is_one_line(tmp_path, run):
    assert "no/such/folder" in refusal(run, ["no/such/folder"])
    shutil.copytree("a", "sdpo/checkpoints/step_40.part")
    assert "half a checkpoint" in refusal(run, ["sdpo/checkpoints/step_40.part"])
    assert "have one name" in refusal(run, ["a", "./a"])
    for name in "ab":
        change(tmp_path / name / "config.json", max_position_embeddings=30)
    assert "few_in.jsonl: no prompt within 29 tokens" in refusal(run, "a")
    change(tmp_path / "b/tokenizer.json", normalizer=dict(type="Lowercase"))
    assert "--model b: its tokenizer loses text" in refusal(run, "b")
    assert not (tmp_path / "out").exists()
