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
from common import (ROOT, assert_same_gradient, gradients_of, learner, lines, needs_tokenizers,
                    on_ranks, refusal, refusal_of_main, tokenizer_of, toy)
from test_sdpo import assert_same_on_two_ranks


def load(path, tokenizer, **more):
    args = dict(enable_thinking=True, max_prompt_tokens=2048, max_response_tokens=1000)
    return sft_distill.read_examples(path, tokenizer, Namespace(**{**args, **more}))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CHAT = [dict(role="user", content="What is 1 + 1?")]
ANSWER = "<think>\nWait, 1 + 1 is 2.\n</think>\n\n\\boxed{2}"


def test_an_example(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", dict(prompt=CHAT, response=ANSWER, answer="2", index=7),
                 dict(prompt=[dict(role="system", content="Be brief."), *CHAT], response="é ∑"))
    first, second = load(path, tokenizer)
    user = "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(first.prompt_ids) == user
    assert tokenizer.decode(second.prompt_ids) == "<|im_start|>system\nBe brief.<|im_end|>\n" + user
    assert tokenizer.decode(first.response_ids) == ANSWER + "<|im_end|>" and first.text == ANSWER
    assert tokenizer.decode(second.response_ids) == "é ∑<|im_end|>"


def test_too_long_is_dropped_by_prompt_and_by_response(tmp_path, tokenizer, capsys):
    rows = [dict(prompt="a", response="b c"), dict(prompt="a " * 50, response="b c"),
            dict(prompt="a", response="b " * 50)]
    path = write(tmp_path / "d.jsonl", *rows)
    everything = short, prompt, response = load(path, tokenizer)
    # the limits themselves are allowed, and the end token is one of the response's
    sizes = dict(max_prompt_tokens=len(short.prompt_ids),
                 max_response_tokens=len(short.response_ids))
    assert load(path, tokenizer, **sizes) == [short]
    assert "1 of 3 examples fit" in capsys.readouterr().out
    sizes["max_prompt_tokens"] = len(prompt.prompt_ids)
    assert load(path, tokenizer, **sizes) == [short, prompt]
    sizes["max_response_tokens"] = len(response.response_ids)
    assert load(path, tokenizer, **sizes) == everything
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=re.escape(f"--data {path}: no example fits")):
        load(path, tokenizer)


GOOD = '{"prompt": "a", "response": "b"}'


@pytest.mark.parametrize("line", [
    "{not json", "3", "[]", "null", "{}", '{"prompt": "a"}', '{"response": "b"}',
    *('{"prompt": "a", "response": %s}' % response for response in (
        '" \\n"', "5", "null", '["b"]', '[{"content": "b"}]', '"\\ud83d"', '"\xff"')),
    *('{"prompt": %s, "response": "b"}' % prompt for prompt in (
        '" \\n"', "{}", "null", "[]", '["a"]', '{"role": "user", "content": "a"}',
        '[{"content": "a"}]', '[{"role": "user"}]', '[{"role": "user", "content": ["a"]}]')),
    '{"messages": []}', '{"messages": "a"}',
    '{"messages": [{"role": "assistant", "content": "b"}]}'])
def test_a_bad_line_is_named_whatever_the_template(tmp_path, monkeypatch, tokenizer, line):
    # Qwen's and DeepSeek's let most of the prompts pass, without a question in them
    monkeypatch.setattr(sft_distill, "render", lambda *arguments: [1, 2, 3])
    path = tmp_path / "d.jsonl"
    path.write_bytes(f"{GOOD}\n\n{line}\n".encode("latin-1"))  # \xff alone is no UTF-8
    said = re.escape(f"--data {path}, line 3: needs a prompt and a response")
    with pytest.raises(ValueError, match=said):
        load(path, tokenizer)


def test_other_formats_that_people_have(tmp_path, tokenizer):
    """The user's text; completion for response; messages; a byte order mark, blank lines."""
    answer = dict(role="assistant", content=ANSWER)
    path = write(tmp_path / "d.jsonl", dict(prompt=CHAT, response=ANSWER, messages=None),
                 dict(prompt=CHAT[0]["content"], response=ANSWER),
                 dict(prompt=CHAT, completion=ANSWER), dict(prompt=CHAT, completion=[answer]),
                 dict(messages=[*CHAT, answer], prompt="a title"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n"))  # Windows
    first, *others = load(path, tokenizer)
    assert others == [first] * 4
    write(path, dict(messages=[*CHAT, answer, *CHAT]))
    with pytest.raises(ValueError, match="line 1.*the last message is not the assistant's"):
        load(path, tokenizer)


@needs_tokenizers
@pytest.mark.parametrize("name, end", [
    ("deepseek-r1-distill-qwen", "<｜end▁of▁sentence｜>"), ("qwen3", "<|im_end|>"),
    ("olmo-3-instruct", "<|endoftext|>")])
def test_examples_of_the_papers_models(tmp_path, name, end):
    """The response ends with the very token that the template puts after an answer."""
    tokenizer = tokenizer_of(name)
    (r,) = load(write(tmp_path / "d.jsonl", dict(prompt=CHAT, response=ANSWER)), tokenizer)
    # a prompt that ends with <think> takes it from the answer, or it would stand there twice
    both = tokenizer.decode(r.prompt_ids + r.response_ids)
    assert both.count("<think>") == 1 and both.endswith(ANSWER + end)
    assert r.response_ids.count(tokenizer.eos_token_id) == 1
    chat = [*CHAT, dict(role="assistant", content="2")]
    turn = tokenizer.apply_chat_template(chat, tokenize=False)
    assert turn.rstrip("\n").endswith("2" + end)


def make_batch(size):
    rng = random.Random(size)

    def draw(low, high):
        return [rng.randrange(5, 400) for _ in range(rng.randint(low, high))]
    return [sft_distill.Example(draw(3, 20), [*draw(1, 60), 2], "") for _ in range(size)]


def measure(size, budget=200):
    """The loss of a mini-batch and this rank's share of its gradient, as update() makes them."""
    batch = make_batch(size)
    ddp, optimizer = learner(sft_distill, Namespace(tokens_per_micro_batch=budget))
    gradient = gradients_of(optimizer)
    metrics = sft_distill.update(ddp, optimizer, batch, 0.0)
    micros = sft_distill.my_micro_batches(batch, budget)
    return dict(metrics, gradient=gradient, micros=len(micros),
                fillers=sum(not r.weight for m in micros for r in m))


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


def test_two_ranks_give_the_gradient_of_one(tmp_path, alone):
    one, two = measure(25), on_ranks(2, tmp_path, measure, 25)
    assert one["micros"] == 7
    assert_same_on_two_ranks(one, two)


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
    """run(folder): main() on ten examples, nine steps; what update() was given in each.

    Before step `die_at` it dies.
    """
    real, environment = sft_distill.update, dict(os.environ)
    data = write(tmp_path / "d.jsonl", *(
        dict(prompt=f"{i} + 3?", response=f"Wait. {i + 3}") for i in range(10)))

    def run(folder, die_at=None):
        seen = []

        def update(ddp, optimizer, batch, lr):
            if len(seen) + 1 == die_at:
                torch.distributed.destroy_process_group()
                raise RuntimeError("it dies")
            seen.append(([e.text for e in batch], lr))
            return real(ddp, optimizer, batch, lr)
        monkeypatch.setattr(sft_distill, "update", update)
        monkeypatch.setattr(os, "environ", dict(environment))  # main() says there that it is alone
        monkeypatch.setattr(sys, "argv", [str(a) for a in (
            "sft_distill.py", "--model", ROOT / "toy/model", "--data", data, "--epochs", 3,
            "--batch_size", 4, "--lr", "1e-3", "--save_every", 4, "--max_response_tokens", 64,
            "--run_dir", tmp_path / folder)])
        sft_distill.main()
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
    for m in metrics:
        assert m["updates"] == 1 and m["skipped"] == 0 and m["epistemic"] == 1  # a wait each
    first, final = (sum(m["loss"] for m in part) for part in (metrics[:3], metrics[-3:]))
    assert final < 0.9 * first  # the very same examples: it learns
    folders = sorted((tmp_path / "whole/checkpoints").iterdir())
    assert [p.name for p in folders] == ["step_4", "step_8", "step_9"]

    with pytest.raises(RuntimeError, match="it dies"):
        run("d", die_at=7)
    assert [m["step"] for m in lines(tmp_path / "d/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert len(run("d")) == 5  # after step 4, the newest checkpoint
    assert f"{tmp_path}/d resumes after step 4" in capsys.readouterr().out
    assert kill.outcome(tmp_path / "d", 9) == kill.outcome(tmp_path / "whole", 9)
    assert run("d") == []
    assert "has finished its 9 steps" in capsys.readouterr().out
    with (tmp_path / "d.jsonl").open("a") as data:  # more of it would be other batches
        data.write(GOOD + "\n")
    assert "--examples was 10" in refusal(run, "d")


def test_defaults():
    args = sft_distill.make_parser().parse_args(["--model", "x", "--data", "y"])
    assert (args.epochs, args.batch_size, args.lr, args.warmup_ratio) == (3, 32, 1e-5, 0.1)


@pytest.mark.parametrize("flags, said", [
    (["--max_response_tokens", "9999"], "positions"),
    (["--data", "no/such.jsonl"], "no/such.jsonl"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, flags, said):
    write(tmp_path / "d.jsonl", dict(prompt="1+1?", response="\\boxed{2}"))
    monkeypatch.chdir(tmp_path)
    assert said in refusal_of_main(sft_distill, monkeypatch, [
        "--model", ROOT / "toy/model", "--data", "d.jsonl",
        "--max_response_tokens", "64", *flags])  # of a flag given twice the last counts
    assert not (tmp_path / "runs").exists()
