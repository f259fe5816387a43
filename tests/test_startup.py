"""What cannot work is named in one line before any weights are loaded."""
import json
import shutil

import pytest

import sdpo
from common import ROOT, refusal

TOY = ROOT / "toy/model"


@pytest.fixture
def model(tmp_path):
    """The toy's folder without its weights."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOY / name, tmp_path)
    return tmp_path


def load(model, longest=4096):
    return sdpo.load_tokenizer(str(model), longest)


def test_the_toy_passes_in_silence(model, capsys):
    tokenizer, config = load(model)
    assert len(tokenizer) <= config.vocab_size and config.max_position_embeddings == 4096
    assert capsys.readouterr().out == ""


def test_no_chat_template(model):
    (model / "chat_template.jinja").unlink()
    assert f"--model {model}: its tokenizer has no chat template" in refusal(load, model)


def test_vocabulary_larger_than_the_model(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(dict(config, vocab_size=100)))
    assert "754 tokens and the model 100" in refusal(load, model)


def test_longer_than_the_positions(model):
    assert f"4,097, more than the 4,096 positions of {model}" in refusal(load, model, 4097)


def test_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert f"--model {tmp_path}: no model folder" in refusal(load, tmp_path)
