"""toy/controls.py: what each changes in the loss, the demonstrations, the sampling. No vLLM."""
import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch

import evaluate
import sdpo
from common import ROOT, lines

sys.path.append(str(ROOT / "toy"))
import controls  # noqa: E402


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Whatever a control replaces is there again after the test."""
    for script in (sdpo, evaluate):
        for name in ("token_losses", "teacher_buckets", "choose_demonstration", "generate",
                     "load_tokenizer", "make_parser"):
            if hasattr(script, name):
                monkeypatch.setattr(script, name, getattr(script, name))


def losses(targets, vocabulary, k=10):
    """(student's logits, the loss and log p of each target), for random student and teacher."""
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, len(targets), 8)
    head, teacher_head = (torch.nn.Linear(8, vocabulary, bias=False) for _ in range(2))
    logits = head(hidden).detach().requires_grad_()
    student = (logits, lambda chunk: chunk * 1.0)
    buckets = sdpo.teacher_buckets(student, (teacher_hidden, teacher_head), k, 1.0)
    return logits, *sdpo.token_losses(*student, torch.tensor(targets), 1.0, *buckets, alpha=0.5)


def test_no_markers_moves_no_markers_logit(tokenizer):
    ids = controls.marker_ids(tokenizer)
    words = {tokenizer.decode([i]).strip().lower() for i in ids}
    assert "wait" in words and "yes" not in words
    targets = [ids[0], *[i for i in range(30) if i not in ids][:20]]
    _, loss, plain = losses(targets, len(tokenizer))
    controls.no_markers(tokenizer)
    logits, without, logprobs = losses(targets, len(tokenizer))
    assert torch.equal(logprobs, plain)  # the importance weights are of the whole distribution
    assert without[0] == 0 and (without[1:] > 0).all() and not torch.equal(without, loss)
    (gradient,) = torch.autograd.grad(without.sum(), logits)
    assert gradient[:, ids].abs().max() == 0 and gradient[1:].abs().max() > 1e-4


def test_no_marker_loss_is_by_the_sampled_token(tokenizer):
    ids = controls.marker_ids(tokenizer)
    targets = [ids[0], 5, ids[-1], 6]
    _, loss, _ = losses(targets, len(tokenizer))
    controls.no_marker_loss(tokenizer)
    logits, without, _ = losses(targets, len(tokenizer))
    assert without.tolist() == pytest.approx([0, loss[1].item(), 0, loss[3].item()])
    (gradient,) = torch.autograd.grad(without.sum(), logits)
    assert gradient[1, ids].abs().max() > 0  # unlike no_markers


def test_no_answer_loss_is_up_to_the_end_of_thinking(tokenizer):
    close, end = tokenizer.convert_tokens_to_ids("</think>"), tokenizer.eos_token_id
    targets = [5, close, 6, end, 7, 8, end, 9, close, 6]  # the second never closes
    controls.no_answer_loss(tokenizer)
    _, without, _ = losses(targets, len(tokenizer))
    assert [*map(int, without > 0)] == [1, 1, 0, 0, 1, 1, 1, 1, 1, 0]


def test_other_question_shows_the_group_before(tokenizer):
    controls.other_question(tokenizer)

    def shown(rewards, name):
        group = [SimpleNamespace(reward=float(r), finished=True, name=f"{name}{i}")
                 for i, r in enumerate(rewards)]
        drawn = [sdpo.choose_demonstration(group, i, random.Random(0)) for i in range(len(group))]
        return [r and r.name for r in drawn]
    assert shown([1, 1], "a") == [None, None]  # the first group has none before it
    assert shown([0, 1, 0], "b") == ["a0", None, "a0"]  # who would have none still has none
    assert shown([0, 0], "c") == [None, None]
    assert shown([1, 1], "d") == ["b1", "b1"]  # the last that had a right answer


def test_banned_reaches_the_sampling_of_every_model(monkeypatch, tokenizer):
    asked = []
    evaluate.generate = lambda *args, **sampling: asked.append(sampling)
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda *_: ("folder", tokenizer))

    def main():  # of two models
        assert evaluate.make_parser().parse_args(["--model", "m"]).control == "banned"
        for _ in range(2):
            evaluate.load_tokenizer("m", 0)
            evaluate.generate(None, None, [], 0, after_think=True, n=2)
    monkeypatch.setattr(evaluate, "main", main)
    monkeypatch.setattr(sys, "argv", ["controls.py", "banned"])
    controls.main()
    bias = dict.fromkeys(controls.marker_ids(tokenizer), -100)
    assert bias and asked == [dict(after_think=True, n=2, logit_bias=bias)] * 2


def test_errors_are_sorted_by_kind(tmp_path):
    folder = tmp_path / "seed_0/sdpo/eval"
    row = lines(ROOT / "toy/data/in.jsonl")[0]
    for step, correct in ((0, 1.0), (20, 0.0)):
        answer = dict(benchmark="in", index=0, question=row["prompt"][0]["content"],
                      correct=correct, response=f"\\boxed{{{row['extra_info']['x'] + 1}}}")
        other = dict(answer, benchmark="ood", index=700, question="of another ood.jsonl")
        sdpo.write_lines(folder / f"step_{step}.jsonl", [answer, other])
    controls.errors([tmp_path / "seed_0"])
    found = json.loads((tmp_path / "seed_0/errors.json").read_text())
    assert found["base, in"] == {} and sum(found["sdpo, in"].values()) == 1
    assert {*found} == {"base, in", "sdpo, in"}
