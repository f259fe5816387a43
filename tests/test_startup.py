"""What cannot work is named in one line before any weights are loaded."""
import json
import shutil

import pytest
import safetensors.torch
import torch

import sdpo
from common import ROOT, toy


@pytest.fixture
def model(tmp_path):
    """The toy's folder without its weights."""
    return shutil.copytree(ROOT / "toy/model", tmp_path / "model",
                           ignore=shutil.ignore_patterns("*.safetensors"))


def test_a_model_that_does_not_fit(model, capsys):
    def refused(said, positions=4096):
        with pytest.raises(ValueError, match=f"(?s){said}"):
            sdpo.load_tokenizer(str(model), positions)
    assert sdpo.load_tokenizer(str(model), 4096)[0] == str(model)  # in silence
    assert capsys.readouterr().out == ""
    refused(f"4,097 together, but {model} has 4,096 positions", 4097)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(dict(config, vocab_size=100)))
    refused("754 tokens, the model only 100")
    (model / "chat_template.jinja").unlink()
    refused(f"--model {model}: its tokenizer has no chat template")


def test_weights_that_are_missing(model):
    state = toy().state_dict()
    del state["lm_head.weight"]
    safetensors.torch.save_file(state, model / "model.safetensors", dict(format="pt"))
    with pytest.raises(SystemExit, match=f"weights are missing in {model}: .*lm_head.weight"):
        sdpo.load_model(str(model), torch.device("cpu"))
