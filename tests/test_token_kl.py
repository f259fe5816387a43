"""extras/token_kl.py: the KL of each token, which answers it reads. No vLLM."""
import sys

import pytest
import torch

import sdpo
from common import ROOT, lines, toy
from extras import token_kl


def record(response, correct=1.0, finished=True):
    return dict(response=response, correct=correct, finished=finished)


def write_round(folder, *groups):
    sdpo.write_lines(folder / "round_0000.jsonl", [
        dict(index=i, messages=[dict(role="user", content=f"{i} + 1?")], answer=str(i + 1),
             contexts={"unguided": group} if group else {}) for i, group in enumerate(groups)])
    return folder


def test_c_is_the_first_correct_answer_but_y(tmp_path):
    group = [record("a", correct=0.0), record("b", finished=False), record("c"), record("d")]
    folder = write_round(tmp_path / "rounds", group, [], [record("e"), record("f", correct=0.0)])
    assert [(y, c) for _, y, c in token_kl.read_answers(folder)] == [
        ("a", "c"), ("b", "c"), ("c", "d"), ("d", "c"), ("f", "e")]  # e has nobody else


def test_the_whole_on_the_toy(tmp_path, monkeypatch, tokenizer):
    """Against all logits at once, in float64."""
    monkeypatch.setattr(sdpo, "CHUNK", 5)
    y, c = "<think>\n3? Perhaps: no.\n</think>\n\n4", "<think>\n4? yes.\n</think>\n\n\\boxed{4}"
    folder, out = write_round(tmp_path / "rounds", [record(y, 0.0), record(c)]), tmp_path / "o/kl"
    argv = ["token_kl.py", folder, "--model", ROOT / "toy/model", "--out", out]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    token_kl.main()
    chat, model, ids = [dict(role="user", content="0 + 1?")], toy(), tokenizer.encode(y)
    logs = []
    for messages in (chat, sdpo.teacher_messages(chat, c, "full")):
        prompt = sdpo.render(tokenizer, messages, True)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logs.append(logits.double().log_softmax(-1))
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    (table,) = lines(out)
    assert sum(row["count"] for row in table.values()) == len(ids) and kl.sum() > 1e-3
    for i in set(ids):
        places = torch.tensor(ids) == i
        assert table[str(i)] == dict(text=tokenizer.decode([i]), count=places.sum().item(),
                                     kl=pytest.approx(kl[places].sum().item(), abs=1e-5))
