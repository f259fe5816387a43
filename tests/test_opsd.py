"""opsd.py: who sees which solution, the loss on the first tokens, what is refused. No vLLM."""
import json
import math
import random
from argparse import Namespace
from unittest import mock

import pytest

import opsd
import sdpo
from common import ROOT, assert_same_gradient, gradients_of, learner, refusal_of_main, toy


@pytest.fixture(autouse=True)
def on_top(monkeypatch):
    """sdpo.py as opsd.main() leaves it, for one test."""
    for name, function in opsd.REPLACED.items():
        monkeypatch.setattr(sdpo, name, function)


def rollouts(lengths, teacher=(7, 8, 9)):
    rng = random.Random(0)
    return [sdpo.Rollout(i, [5, 6], [rng.randrange(5, 400) for _ in range(n)], [-3.0] * n, "", True,
                         0.0, [*teacher]) for i, n in enumerate(lengths)]


def teacher_prompts(tokenizer, **flags):
    args = Namespace(**{**dict(demonstration="full", enable_thinking=False, teacher_thinking=False),
                        **flags})
    question = dict(messages=[dict(role="user", content="1+1?")], solution="<think>a</think>2.")
    group = rollouts([1, 1])
    sdpo.set_teacher_prompts(question, group, tokenizer, None, args)
    first, second = [tokenizer.decode(r.teacher_prompt_ids) for r in group]
    assert first == second  # nobody has to be right
    return first


def test_every_teacher_sees_the_datas_solution(tokenizer):
    plain, empty = teacher_prompts(tokenizer), "<think>\n\n</think>\n\n"
    assert "1+1?\nCorrect solution:\n\n<think>a</think>2.\n\nCorrectly" in plain
    assert plain.endswith(empty)
    assert teacher_prompts(tokenizer, teacher_thinking=True) == plain.removesuffix(empty)
    assert teacher_prompts(tokenizer, enable_thinking=True) == plain.removesuffix(empty)
    without = teacher_prompts(tokenizer, demonstration="without_think")
    assert "solution:\n\n2." in without


def test_the_loss_is_on_the_first_tokens_only(alone):
    """As if the rest of an answer were not there; the rollouts themselves stay whole."""
    gradients, lengths = [], [3, 7, 8, 40, 55]
    for batch in (rollouts(lengths), [
            opsd.replace(r, response_ids=r.response_ids[:7], logprobs=r.logprobs[:7])
            for r in rollouts(lengths)]):
        args = Namespace(temperature=1.0, top_k=20, alpha=0.5, tokens_per_micro_batch=100,
                         questions_per_step=5, minibatch_questions=5, loss_tokens=7)
        ddp, optimizer = learner(sdpo, args)
        gradients.append(gradients_of(optimizer))
        before = [len(r.response_ids) for r in batch]
        with mock.patch.object(sdpo, "MISMATCH_LIMIT", math.inf):  # nobody sampled these
            metrics = sdpo.update(ddp, toy(), optimizer, batch, 1e-3)
        assert metrics["trained_tokens"] == 3 + 4 * 7 and metrics["trained"] == 1
        assert [len(r.response_ids) for r in batch] == before
    assert_same_gradient(*gradients)


def test_defaults_are_app_es():
    args = sdpo.make_parser().parse_args(["--model", "m"])
    assert (args.loss_tokens, args.lr, args.questions_per_step) == (1024, 1e-6, 32)
    assert args.run_dir == "runs/opsd" and args.alpha == 0.5


@pytest.mark.parametrize("flags, said", [
    (["--data", "bare.jsonl"], "--data bare.jsonl: 1 of 2 questions have no `solution` text"),
    (["--teacher_thinking"], "--teacher_thinking: the student thinks too"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, flags, said):
    rows = [dict(problem="1+1?", answer="2", solution="It is 2."), dict(problem="1+2?", answer="3")]
    (tmp_path / "solved.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "bare.jsonl").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    argv = ["--model", ROOT / "toy/model", "--data", "solved.jsonl", "--eval_data", "bare.jsonl",
            "--max_response_tokens", "64", *flags]
    assert said in refusal_of_main(sdpo, monkeypatch, argv)
    assert not (tmp_path / "runs").exists()
