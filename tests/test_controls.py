"""toy/controls.py: what each changes in the loss and the demonstrations. No vLLM."""
import sys
from argparse import Namespace
from unittest import mock

import pytest
import torch

import sdpo
from common import ROOT, toy

sys.path.append(str(ROOT / "toy"))
import controls  # noqa: E402

ARGS = Namespace(temperature=1.0, top_k=10, alpha=0.5, demonstration="full", enable_thinking=True,
                 seed=0)


@pytest.fixture(autouse=True)
def restored():
    """Whatever a control replaces is there again after the test."""
    with mock.patch.dict(vars(sdpo)):
        yield


def losses(targets, vocabulary):
    """(student's logits, the loss and log p of each target), for random student and teacher."""
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, len(targets), 8)
    head, teacher_head = (torch.nn.Linear(8, vocabulary, bias=False) for _ in range(2))
    logits = head(hidden).detach().requires_grad_()
    return logits, *sdpo.token_losses((logits, lambda chunk: chunk * 1.0),
                                      (teacher_hidden, teacher_head), torch.tensor(targets), ARGS)


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


@pytest.mark.parametrize("control", ["no_marker_loss", "no_answer_loss"])
def test_where_there_is_no_loss(tokenizer, control):
    """The answer in the middle is cut after </think>: the next one's thinking has a loss."""
    close, end = tokenizer.convert_tokens_to_ids("</think>"), tokenizer.eos_token_id
    marker = controls.marker_ids(tokenizer)[0]
    answers = [[5, marker, close, 6, end], [7, close, marker, 8], [9, marker, 10, close, 11, end],
               [12, marker, 13]]  # the last is cut while it thinks
    batch = [sdpo.Rollout(dict(prompt_ids=[5, 6]), ids, [], "", True, 0.0, [7, 8, 9])
             for ids in answers]
    plain, _ = sdpo.Student(toy(), ARGS)(batch, toy())
    getattr(controls, control)(tokenizer)
    without, _ = sdpo.Student(toy(), ARGS)(batch, toy())
    kept = [1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    if control == "no_marker_loss":
        kept = [i != marker for ids in answers for i in ids]
    assert plain.min() > 0 and without.tolist() == (plain * torch.tensor(kept)).tolist()


def test_other_question_shows_a_correct_answer_to_another(tokenizer):
    """Whatever was sampled before; a question that stands twice in a step is no other one."""
    def group(question, *rewards):
        messages = [dict(role="user", content=question)]
        return [sdpo.Rollout(dict(messages=messages), [], [], f"{question}{i}", True, float(reward),
                             [1] if i else None) for i, reward in enumerate(rewards)]
    step = [*group("a", 1, 1), *group("b", 0, 0), *group("a", 1, 0), *group("c", 0, 1)]
    sdpo.sample_groups = lambda *_: step
    controls.other_question(tokenizer)

    def shown():
        prompts = [r.teacher_prompt_ids
                   for r in sdpo.sample_groups(None, None, tokenizer, [], 3, ARGS)]
        return [ids and tokenizer.decode(ids).split("solution:\n\n")[1][:2] for ids in prompts]
    first = shown()
    assert first[::2] == [None] * 4  # who would have none still has none
    assert first[1] == first[5] == "c1" and first[3] in ("a0", "a1", "c1") and first[7] != "c1"
    assert shown() == first
    del step[2:4], step[-2:]  # only one question is left
    assert shown() == [None] * 4
