"""What cannot work ends in one line with exit code 2, before vLLM starts; nothing is written."""
import json
import shutil

import pytest
import safetensors.torch

import grpo
import sdpo
from common import DATA, ROOT, Job, refusal_of_main

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where good.jsonl lies, and other/good.jsonl, bad.parquet, and an empty model."""
    question = json.dumps(dict(problem="1+1?", answer="2"))
    for path in ("empty", "other"):
        (tmp_path / path).mkdir()
    for path in ("good.jsonl", "other/good.jsonl"):
        (tmp_path / path).write_text(question)
    (tmp_path / "bad.parquet").write_text("no parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.mark.parametrize("script", [sdpo, grpo])
@pytest.mark.parametrize("more, said", [
    ("--data no/such.jsonl", "no/such.jsonl"),
    ("--data bad.parquet", "bad.parquet"),
    ("--model no/such/folder", "no/such/folder"),
    ("--model empty", "empty"),
    ("--questions_per_step 128 --max_prompt_tokens 3", "good.jsonl"),
    ("--num_questions 5", "good.jsonl"),
    ("--eval_data good.jsonl other/good.jsonl", "--eval_data"),
])
def test_bad_input(folder, alone, monkeypatch, script, more, said):
    assert said in refusal_of_main(script, monkeypatch, [
        "--model", ROOT / "toy/model", "--data", "good.jsonl", "--eval_data", "good.jsonl",
        "--max_response_tokens", "64", *more.split()])  # of a flag given twice the last counts
    assert not (folder / "runs").exists()

def pointer(weights):
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")

def half(weights):
    weights.write_bytes(weights.read_bytes()[:100_000])

def without_a_matrix(weights):
    tensors = safetensors.torch.load_file(weights)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    safetensors.torch.save_file(tensors, weights, dict(format="pt"))

@pytest.mark.slow
@pytest.mark.parametrize("harm, said", [
    (pointer, ""), (half, ""), (without_a_matrix, "layers.1.mlp.down_proj.weight")])
def test_weights_that_are_missing_or_unreadable(tmp_path, harm, said):
    """As a command: all that transformers has to say on the way would stand above the line."""
    model = shutil.copytree(ROOT / "toy/model", tmp_path / "model")
    harm(model / "model.safetensors")
    job = Job(tmp_path / "log", "sdpo.py", 1, "--model", model, "--data", DATA / "in.jsonl",
              "--eval_data", "--max_response_tokens", 64, "--run_dir", tmp_path / "run")
    data, error = job.end(code=2).splitlines()
    assert error.startswith("sdpo.py: error: ") and str(model) in error and said in error
    assert "200 questions" in data and not (tmp_path / "run").exists()
