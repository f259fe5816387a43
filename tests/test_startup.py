"""What cannot work, or will not end, is named in one line before any weights are loaded."""
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

import sdpo

TOY = Path(__file__).resolve().parent.parent / "toy/model"


@pytest.fixture
def model(tmp_path):
    """The toy's folder without its weights."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOY / name, tmp_path)
    return tmp_path


def change(path, **values):
    path.write_text(json.dumps(dict(json.loads(path.read_text()), **values)))


def load(model):
    return sdpo.load_tokenizer(Namespace(model=str(model), enable_thinking=True))


def refusal(model, capsys):
    with pytest.raises(SystemExit) as end:
        load(model)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --model {model}: ")
    return line


def test_the_toy_passes_in_silence(model, capsys):
    load(model)
    assert capsys.readouterr().out == ""


def test_no_chat_template(model, capsys):
    (model / "chat_template.jinja").unlink()
    assert "no chat template" in refusal(model, capsys)


def test_vocabulary_larger_than_the_model(model, capsys):
    change(model / "config.json", vocab_size=100)
    assert "487 tokens and the model 100" in refusal(model, capsys)


def test_no_end_token(model, capsys):
    change(model / "tokenizer_config.json", eos_token=None)
    assert "no end token" in refusal(model, capsys)


def test_no_model(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert "no model folder" in refusal(tmp_path, capsys)


def test_thinking_that_the_template_lacks(model, capsys):
    template = (model / "chat_template.jinja").read_text().replace("<think>", "")
    (model / "chat_template.jinja").write_text(template.replace("enable_thinking", "false"))
    load(model)
    assert "no thinking to switch on" in capsys.readouterr().out


def test_an_end_token_that_no_answer_has(model, capsys):
    """A base model: its template closes a turn with <|im_end|>, vLLM waits for another token."""
    change(model / "tokenizer_config.json", eos_token="<|im_start|>")
    load(model)
    assert "ends no answer with <|im_start|>" in capsys.readouterr().out
    shutil.copy(TOY / "generation_config.json", model)
    load(model)  # the model's own end tokens have it
    assert capsys.readouterr().out == ""
