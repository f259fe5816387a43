"""extras/opsd.py: who sees which solution, the loss on the first tokens, what is refused."""
import json
import math
import random
import sys
from argparse import Namespace
from dataclasses import replace
from unittest import mock

import pytest
import torch

import sdpo
from common import ROOT, assert_same_gradient, gradients_of, on_top, refusal, toy
from extras import opsd


def test_every_teacher_sees_the_datas_solution(tokenizer):
    def shown(**flags):
        args = Namespace(**{**dict(demonstration="full", enable_thinking=False,
                                   teacher_thinking=False), **flags})
        question = dict(messages=[dict(role="user", content="1+1?")], solution="<think>a</think>2.")
        group = [sdpo.Rollout(question, [1], [-1.0], "", True, 0.0) for _ in range(2)]
        opsd.set_teacher_prompts(group, tokenizer, None, args)
        first, second = [tokenizer.decode(r.teacher_prompt_ids) for r in group]
        assert first == second  # nobody has to be right
        return first
    plain, empty = shown(), "<think>\n\n</think>\n\n"
    assert "1+1?\nCorrect solution:\n\n<think>a</think>2.\n\nCorrectly" in plain
    assert plain.endswith(empty)
    assert shown(teacher_thinking=True) == plain.removesuffix(empty)
    assert shown(enable_thinking=True) == plain.removesuffix(empty)
    assert "solution:\n\n2." in shown(demonstration="without_think")


def test_the_loss_is_on_the_first_tokens_only(alone):
    """As if the rest of an answer were not there; the rollouts themselves stay whole."""
    rng = random.Random(0)
    whole = [sdpo.Rollout(dict(prompt_ids=[5, 6]), [rng.randrange(5, 400) for _ in range(n)],
                          [-3.0] * n, "", True, 0.0, [7, 8, 9]) for n in (3, 7, 8, 40, 55)]
    short = [replace(r, response_ids=r.response_ids[:7], logprobs=r.logprobs[:7]) for r in whole]
    args = Namespace(temperature=1.0, top_k=20, alpha=0.5, tokens_per_micro_batch=100,
                     minibatch_questions=5, rollouts=1, loss_tokens=7)
    gradients = []
    for update, rollouts in ((opsd.update, whole), (sdpo.update, short)):
        model = toy()
        optimizer = sdpo.MasterAdamW(model, lr=1e-3)
        gradients.append(gradients_of(optimizer))
        with mock.patch.object(sdpo, "MISMATCH_LIMIT", math.inf):  # nobody sampled these
            metrics = update(model, toy(), optimizer, rollouts, 1e-3, args)
        assert metrics["trained_tokens"] == 3 + 4 * 7 and metrics["trained"] == 1
    assert_same_gradient(*gradients)
    assert [len(r.response_ids) for r in whole] == [3, 7, 8, 40, 55]


@pytest.mark.parametrize("flags, said", [
    ([], "--data is required"),
    (["--data", "bare.jsonl"], "--data bare.jsonl: 2 of 3 questions have no `solution`, or one"),
    (["--data", "solved.jsonl", "--teacher_thinking"], "--teacher_thinking: the student thinks"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, alone, flags, said):
    rows = [dict(problem="1+1?", answer="2", solution="It is 2."), dict(problem="1+2?", answer="3"),
            dict(problem="1+3?", answer="4", solution="4")]  # as open-r1's DAPO
    (tmp_path / "solved.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "bare.jsonl").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["opsd.py", "--model", str(ROOT / "toy/model"), "--eval_data",
                                      "bare.jsonl", *flags])
    main = sdpo.main
    with on_top(opsd, start_process_group=lambda: torch.device("cpu")):
        assert said in refusal(main)
    assert not (tmp_path / "runs").exists()
