"""sft_distill.py: examples, the masked loss, the schedule, whole runs on the toy. No vLLM."""
import json
import math
import os
import random
import re
import sys
from argparse import Namespace

import pytest
import torch

import kill
import sft_distill
from common import (ROOT, assert_same_gradient, gradients_of, lines, needs_tokenizers, on_ranks,
                    refusal, tokenizer_of, toy)

def load(path, tokenizer, **more):
    args = dict(enable_thinking=True, max_prompt_tokens=2048, max_response_tokens=1000)
    return sft_distill.read_examples(path, tokenizer, Namespace(**{**args, **more}))

def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

CHAT = [dict(role="user", content="What is 1 + 1?")]
TRACE = "Wait, 1 + 1 is 2."
RESPONSE = f"<think>\n{TRACE}\n</think>\n\n\\boxed{{2}}"
ASSISTANT = dict(role="assistant", content=RESPONSE)
SPLIT = dict(role="assistant", content="\\boxed{2}", reasoning_content=TRACE)

def test_formats_that_people_have(tmp_path, tokenizer, alone):
    """Messages or text; completion or response; reasoning beside it; a BOM, blank lines."""
    path = write(tmp_path / "d.jsonl", dict(prompt=CHAT, response=RESPONSE, messages=None),
                 dict(prompt=CHAT[0]["content"], response=RESPONSE),
                 dict(prompt=CHAT, completion=[ASSISTANT]),
                 dict(messages=[*CHAT, ASSISTANT], prompt="a title"),
                 dict(prompt=CHAT, response=RESPONSE + "<|im_end|>\n"),
                 dict(messages=[*CHAT, SPLIT]), dict(prompt=CHAT, completion=[SPLIT]),
                 dict(prompt=CHAT, response="\\boxed{2}", reasoning=TRACE),
                 dict(prompt=CHAT, response="\n\n\\boxed{2}", thinking=f"\n{TRACE}\n"),
                 dict(prompt=CHAT, response=RESPONSE, thinking=TRACE))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n"))  # Windows
    first, *others = load(path, tokenizer)
    assert tokenizer.decode(first.prompt_ids) == (
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(first.response_ids) == RESPONSE + "<|im_end|>"
    assert [r.prompt_ids for r in others] == [first.prompt_ids] * 9
    assert [tokenizer.decode(r.response_ids) for r in others] == [RESPONSE + "<|im_end|>"] * 9

def test_too_long_is_dropped_by_prompt_and_by_response(tmp_path, tokenizer, alone):
    rows = [dict(prompt="a", response="b c"), dict(prompt="a " * 50, response="b c"),
            dict(prompt="a", response="b " * 50)]
    path = write(tmp_path / "d.jsonl", *rows)
    everything = short, prompt, response = load(path, tokenizer)
    # the limits themselves are allowed, and the end token is one of the response's
    sizes = dict(max_prompt_tokens=len(short.prompt_ids),
                 max_response_tokens=len(short.response_ids))
    assert load(path, tokenizer, **sizes) == [short]
    sizes["max_prompt_tokens"] = len(prompt.prompt_ids)
    assert load(path, tokenizer, **sizes) == [short, prompt]
    sizes["max_response_tokens"] = len(response.response_ids)
    assert load(path, tokenizer, **sizes) == everything
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=re.escape(f"--data {path}: no example fits")):
        load(path, tokenizer)

@pytest.mark.parametrize("line", [
    "{not json", "3", "{}", '{"prompt": "a"}', '{"response": "b"}',
    *('{"prompt": "a", "response": %s}' % response for response in (
        '" \\n"', "5", '["b"]', '[{"content": "b"}]', '"\\ud83d"', '"\xff"')),
    *('{"prompt": %s, "response": "b"}' % prompt for prompt in (
        '" \\n"', "{}", "[]", '["a"]', '[{"role": "user", "content": ["a"]}]')),
    '{"messages": "a"}', '{"messages": [{"role": "assistant", "content": "b"}]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}'])
def test_a_bad_line_is_named(tmp_path, tokenizer, alone, line):
    path = tmp_path / "d.jsonl"
    path.write_bytes(f'{{"prompt": "a", "response": "b"}}\n\n{line}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: ")):
        load(path, tokenizer)

@needs_tokenizers
@pytest.mark.parametrize("name, thinking, opened, end", [
    ("deepseek-r1-distill-qwen", True, "<think>\n", "<｜end▁of▁sentence｜>"),
    ("qwen3", True, "", "<|im_end|>"), ("olmo-3-instruct", True, "", "<|endoftext|>"),
    ("qwen3", False, "<think>\n\n</think>\n\n", "<|im_end|>")])
def test_what_the_prompt_holds_is_not_trained_and_the_end_is_the_templates(
        tmp_path, alone, name, thinking, opened, end):
    tokenizer = tokenizer_of(name)
    held, rest = (opened, RESPONSE.removeprefix(opened)) if thinking else (opened, "\\boxed{2}")
    forms = [held + rest, held.replace("\n", "") + rest, held + rest + end, rest]
    path = write(tmp_path / "d.jsonl", *(dict(prompt=CHAT, response=form) for form in forms))
    for r in load(path, tokenizer, enable_thinking=thinking):
        assert tokenizer.decode(r.prompt_ids).endswith(held)
        assert tokenizer.decode(r.response_ids) == rest + end

def make_batch(size):
    rng = random.Random(size)

    def draw(low, high):
        return [rng.randrange(5, 400) for _ in range(rng.randint(low, high))]
    return [sft_distill.Example(draw(3, 20), [*draw(1, 60), 2], "") for _ in range(size)]

def measure(size, budget=200):
    """The loss of a batch and this rank's part of its gradient, as update() makes them."""
    args, model, batch = Namespace(tokens_per_micro_batch=budget), toy(), make_batch(size)
    optimizer = sft_distill.MasterAdamW(model, lr=0.0)
    gradient = gradients_of(optimizer)
    metrics = sft_distill.update(model, optimizer, batch, 0.0, args)
    micros = sft_distill.micro_batches_of_rank(batch, budget)
    return dict(metrics, gradient=gradient, micros=len(micros))

@pytest.mark.parametrize("budget, counts", [(10**6, 1), (200, 3)])
def test_loss_is_the_cross_entropy_of_labels_masked_by_hand(alone, budget, counts):
    batch, got = make_batch(9), measure(9, budget)
    assert got["micros"] == counts
    width = max(r.tokens() for r in batch)
    ids, labels, seen = (torch.full((9, width), fill) for fill in (0, -100, 0))
    for i, r in enumerate(batch):
        end = r.tokens()
        ids[i, :end] = torch.tensor(r.prompt_ids + r.response_ids)
        labels[i, len(r.prompt_ids) : end] = ids[i, len(r.prompt_ids) : end]  # and the end token
        seen[i, :end] = 1
    model = toy()
    want = model(input_ids=ids, attention_mask=seen, labels=labels).loss  # shifts them itself
    want.backward()
    assert got["loss"] == pytest.approx(want.item(), rel=1e-5)
    assert got["trained_tokens"] == (labels != -100).sum()
    assert_same_gradient(got["gradient"], {name: p.grad for name, p in model.named_parameters()})

@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_one(tmp_path, alone):
    one, two = measure(25), on_ranks(2, tmp_path, measure, 25)
    assert one["micros"] == 7 and [rank["micros"] for rank in two] == [4, 4]
    assert_same_gradient(two[0]["gradient"] | two[1]["gradient"], one["gradient"])
    assert two[0]["loss"] == pytest.approx(one["loss"], rel=1e-6)

def rates(steps, ratio, lr=1e-5):
    args = Namespace(lr=lr, warmup_ratio=ratio)
    return [sft_distill.learning_rate(step, steps, args) for step in range(1, steps + 1)]

def test_learning_rate_warms_up_linearly_and_falls_in_a_cosine_to_0():
    cosine = [1e-5 * (1 + math.cos(math.pi * step / 68)) / 2 for step in range(1, 68)]
    assert rates(75, 0.1) == pytest.approx([1e-5 * step / 8 for step in range(1, 9)] + cosine)
    for steps, ratio in ((1, 0.0), (1, 1.0), (3, 0.99), (3, 1.0)):
        assert all(0 < rate <= 1e-5 for rate in rates(steps, ratio))

@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(folder, *flags): main() on ten examples, nine steps; what update() was given in each.

    Before step `die_at` it dies.
    """
    real, environment = sft_distill.update, dict(os.environ)
    data = write(tmp_path / "d.jsonl", *(
        dict(prompt=f"{i} + 3?", response=f"Wait. {i + 3}") for i in range(10)))

    def run(folder, *flags, die_at=None):
        seen = []

        def update(model, optimizer, batch, lr, args):
            if len(seen) + 1 == die_at:
                torch.distributed.destroy_process_group()
                raise RuntimeError("it dies")
            seen.append(([e.text for e in batch], lr))
            return real(model, optimizer, batch, lr, args)
        monkeypatch.setattr(sft_distill, "update", update)
        monkeypatch.setattr(os, "environ", dict(environment))  # main() says there that it is alone
        monkeypatch.setattr(sys, "argv", [str(a) for a in (
            "sft_distill.py", "--model", ROOT / "toy/model", "--data", data, "--epochs", 3,
            "--batch_size", 4, "--lr", "1e-3", "--save_every", 4, "--max_response_tokens", 64,
            "--run_dir", tmp_path / folder, *flags)])
        try:
            sft_distill.main()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return seen
    return run

@pytest.mark.slow
def test_a_run_trains_on_all_examples_each_epoch_and_resumes(tmp_path, run, capsys):
    batches, given = zip(*run("whole"))
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    epochs = [sum(batches[i : i + 3], []) for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 10 for epoch in epochs) and epochs[0] != epochs[1]
    metrics = lines(tmp_path / "whole/metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 10))
    assert [m["lr"] for m in metrics] == list(given) == rates(9, 0.1, 1e-3)
    assert all(m["skipped"] == 0 and m["epistemic"] == 1 for m in metrics)  # a wait each
    first, final = (sum(m["loss"] for m in part) for part in (metrics[:3], metrics[-3:]))
    assert final < 0.9 * first  # the very same examples: it learns
    folders = sorted((tmp_path / "whole/checkpoints").iterdir())
    assert [p.name for p in folders] == ["step_4", "step_8", "step_9"]

    with pytest.raises(RuntimeError, match="it dies"):
        run("d", die_at=7)
    assert len(run("d", "--save_every", 3)) == 5  # after step 4, the newest checkpoint
    assert f"{tmp_path}/d resumes after step 4" in capsys.readouterr().out
    assert kill.outcome(tmp_path / "d", 9) == kill.outcome(tmp_path / "whole", 9)
    assert run("d") == []
    assert "holds another run: --lr was 0.001" in refusal(run, "d", "--lr", "1e-4")
    with (tmp_path / "d.jsonl").open("a") as data:  # more of it would be other batches
        data.write('{"prompt": "a", "response": "b"}\n')
    assert "--examples was 10" in refusal(run, "d")

def test_bad_input_is_one_line_and_exit_code_2(tmp_path, run):
    assert "no/such.jsonl" in refusal(run, "d", "--data", "no/such.jsonl")
    assert "no/such/model" in refusal(run, "d", "--model", "no/such/model")
    assert not (tmp_path / "d").exists()
