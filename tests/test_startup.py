"""What cannot work is named in one line before any weights are loaded."""
import json
import shutil

import pytest
import torch

import sdpo
from common import ROOT, toy

TOY = ROOT / "toy/model"


@pytest.fixture
def model(tmp_path):
    """The toy's folder without its weights."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOY / name, tmp_path)
    return tmp_path


def refused(model, said, positions=4096):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        sdpo.load_tokenizer(str(model), positions)


def test_the_toy_passes_in_silence(model, capsys):
    path, tokenizer = sdpo.load_tokenizer(str(model), 4096)
    assert path == str(model) and tokenizer.chat_template and capsys.readouterr().out == ""


def test_no_chat_template(model):
    (model / "chat_template.jinja").unlink()
    refused(model, f"--model {model}: its tokenizer has no chat template")


def test_vocabulary_larger_than_the_model(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(dict(config, vocab_size=100)))
    refused(model, "754 tokens, the model only 100")


def test_longer_than_the_positions(model):
    refused(model, f"4,097 together, but {model} has 4,096 positions", 4097)


def test_weights_that_are_missing(model):
    state = toy().state_dict()
    del state["lm_head.weight"]
    import safetensors.torch
    safetensors.torch.save_file(state, model / "model.safetensors", dict(format="pt"))
    with pytest.raises(SystemExit, match=f"weights are missing in {model}: .*lm_head.weight"):
        sdpo.load_model(str(model), torch.device("cpu"))
