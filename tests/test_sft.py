"""sft_distill.py: examples, the masked loss, the schedule. No vLLM, no model but the toy."""
import itertools
import json
import multiprocessing
import random
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import sft_distill

ROOT = Path(__file__).resolve().parent.parent
TOKENIZERS = ROOT.parent / "shared/data/tokenizers"
CPU = torch.device("cpu")
# Ranks come from a server that has imported once: torch forbids backward in forks of this process.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "transformers.models.qwen3.modeling_qwen3"])


def load(path, tokenizer, **more):
    args = dict(enable_thinking=True, max_prompt_tokens=2048, max_response_tokens=1000)
    return sft_distill.load_examples(path, tokenizer, Namespace(**{**args, **more}))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "toy/model")


# --------------------------------------------------------------------------------------- examples

CHAT = [dict(role="user", content="What is 1 + 1?")]
ANSWER = "<think>\nWait, 1 + 1 is 2.\n</think>\n\n\\boxed{2}"


def test_a_prompt_is_messages_or_the_users_text(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", dict(prompt=CHAT, response=ANSWER, answer="2", index=7),
                 dict(prompt=CHAT[0]["content"], response=ANSWER),
                 dict(prompt=[dict(role="system", content="Be brief."), *CHAT], response="é ∑"))
    path.write_text(path.read_text().replace("\n", "\n\n"))  # blank lines are no examples
    first, second, third = load(path, tokenizer)
    assert tokenizer.decode(first.prompt_ids) == (
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n")
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert tokenizer.decode(third.prompt_ids) == system + tokenizer.decode(first.prompt_ids)
    assert first.prompt_ids == second.prompt_ids and first.response_ids == second.response_ids
    assert tokenizer.decode(first.response_ids) == ANSWER + "<|im_end|>"
    assert tokenizer.decode(third.response_ids) == "é ∑<|im_end|>"
    assert [r.row for r in (first, second, third)] == [1, 3, 5] and first.text == ANSWER
    for r in (first, second, third):
        assert r.response_ids.count(tokenizer.eos_token_id) == 1


def test_too_long_is_left_out_by_prompt_and_by_response(tmp_path, tokenizer, capsys):
    rows = [dict(prompt="a", response="b c"), dict(prompt="a " * 50, response="b c"),
            dict(prompt="a", response="b " * 50)]
    path = write(tmp_path / "d.jsonl", *rows)
    everything = load(path, tokenizer)
    assert len(everything) == 3 and not capsys.readouterr().out
    short, prompt, response = everything
    # the limits themselves are allowed, and the end token is one of the response's
    sizes = dict(max_prompt_tokens=len(short.prompt_ids),
                 max_response_tokens=len(short.response_ids))
    assert [r.row for r in load(path, tokenizer, **sizes)] == [1]
    assert "2 of 3 examples left out" in capsys.readouterr().out
    sizes["max_prompt_tokens"] = len(prompt.prompt_ids)
    assert [r.row for r in load(path, tokenizer, **sizes)] == [1, 2]
    sizes["max_response_tokens"] = len(response.response_ids)
    assert [r.row for r in load(path, tokenizer, **sizes)] == [1, 2, 3]


GOOD = '{"prompt": "a", "response": "b"}'


@pytest.mark.parametrize("line", [
    "{not json", "3", "[]", '"text"', "null", "{}", '{"prompt": "a"}', '{"response": "b"}',
    '{"prompt": "a", "response": ""}', '{"prompt": "a", "response": " \\n"}',
    '{"prompt": "a", "response": 5}', '{"prompt": "a", "response": null}',
    '{"prompt": "a", "response": ["b"]}', '{"prompt": null, "response": "b"}',
    '{"prompt": [], "response": "b"}', '{"prompt": [{"role": "user"}], "response": "b"}',
])
def test_a_bad_line_is_named(tmp_path, tokenizer, capsys, line):
    path = tmp_path / "d.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(SystemExit) as caught:
        load(path, tokenizer)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"error: --data {path}, line 3: needs a prompt and a response")


@pytest.mark.parametrize("prompt", [
    "", " \n", 5, {}, [[]], ["a"], [{}], dict(role="user", content="a"), [dict(content="a")],
    [dict(role="user")], [dict(role="user", content=None)], [dict(role="user", content=["a"])],
    [dict(role="user", content="")]])
def test_a_bad_prompt_is_named_whatever_the_template(tmp_path, monkeypatch, tokenizer, capsys,
                                                     prompt):
    # Qwen's and DeepSeek's let most of these pass, with no question in the prompt
    monkeypatch.setattr(sft_distill, "render", lambda *arguments: [1, 2, 3])
    path = write(tmp_path / "d.jsonl", *(dict(prompt=p, response="b") for p in ("a", prompt)))
    with pytest.raises(SystemExit) as caught:
        load(path, tokenizer)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and len(err.splitlines()) == 1 and f"{path}, line 2" in err


@pytest.mark.parametrize("content, limit, said", [
    (None, 9, "cannot be read"), (b"\xff\xfe", 9, "cannot be read"), (b"\n\n", 9, "none of 0"),
    (GOOD.encode(), 1, "none of 1 examples within --max_prompt_tokens 2048"),
])
def test_a_bad_file_is_named(tmp_path, tokenizer, capsys, content, limit, said):
    path = tmp_path / "d.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        load(path, tokenizer, max_response_tokens=limit)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"error: --data {path}: ") and said in err


THINKING = "What is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
SPEAKS = {  # model: (where the template lets it speak with thinking, without, end token)
    "deepseek-r1-distill-qwen": (
        "<｜begin▁of▁sentence｜><｜User｜>What is 1 + 1?<｜Assistant｜><think>\n", None,
        "<｜end▁of▁sentence｜>"),
    "qwen3": ("<|im_start|>user\n" + THINKING,
              "<|im_start|>user\n" + THINKING + "<think>\n\n</think>\n\n", "<|im_end|>"),
    "olmo-3-instruct": (
        "<|im_start|>system\nYou are a helpful function-calling AI assistant. You do not currently "
        "have access to any functions. <functions></functions><|im_end|>\n<|im_start|>user\n"
        + THINKING, None, "<|endoftext|>"),
}


@pytest.mark.skipif(not TOKENIZERS.exists(), reason="needs the real tokenizers beside the project")
@pytest.mark.parametrize("name", SPEAKS)
def test_examples_of_the_papers_models(tmp_path, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / name)
    thinking, off, end = SPEAKS[name]
    path = write(tmp_path / "d.jsonl", dict(prompt=CHAT, response=ANSWER))
    for enabled, prompt in ((True, thinking), (False, off or thinking)):
        (r,) = load(path, tokenizer, enable_thinking=enabled)
        assert tokenizer.decode(r.prompt_ids) == prompt
        assert tokenizer.decode(r.response_ids) == ANSWER + end
        ids = r.prompt_ids + r.response_ids
        assert ids.count(tokenizer.eos_token_id) == 1 + prompt.count(end)
    # the very token that the template puts behind an answer
    chat = [*CHAT, dict(role="assistant", content="2")]
    turn = tokenizer.apply_chat_template(chat, tokenize=False)
    assert turn.rstrip("\n").endswith("2" + end)


# --------------------------------------------------------------------------------------- the loss


def toy():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ROOT / "toy/model", dtype=torch.float32)


def make_batch(size):
    rng = random.Random(size)

    def draw(low, high):
        return [rng.randrange(5, 400) for _ in range(rng.randint(low, high))]

    return [sft_distill.Rollout(i, draw(3, 20), [*draw(1, 60), 2], None, "", True)
            for i in range(size)]


def wrap(budget):
    args = Namespace(tokens_per_micro_batch=budget)
    return torch.nn.parallel.DistributedDataParallel(sft_distill.Student(toy(), args, CPU))


@pytest.fixture
def alone():
    """A process group of one."""
    sft_distill.dist.init_process_group("gloo", store=sft_distill.dist.HashStore(), rank=0,
                                        world_size=1)
    yield
    sft_distill.dist.destroy_process_group()


def assert_same_gradient(got, wanted):
    scale = max(g.abs().max() for g in wanted.values())
    assert scale > 0 and got.keys() == wanted.keys()
    for name, g in wanted.items():
        assert (got[name] - g).abs().max() <= 2e-5 * scale, name


def gradient(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("budget, counts", [(10**6, 1), (200, 3), (1, 9)])
def test_loss_is_the_cross_entropy_of_labels_masked_by_hand(alone, budget, counts):
    batch = make_batch(9)
    assert len(sft_distill.micro_batches(batch, budget)) == counts
    ddp = wrap(budget)
    loss = sft_distill.backward(ddp, None, batch, batch)

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
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert_same_gradient(gradient(ddp.module.model), gradient(model))


def test_only_response_and_end_token_are_labels(alone, monkeypatch):
    asked, whole = [], sft_distill.token_logprobs

    def spy(hidden, head, targets, temperature):
        assert len(hidden) == len(targets) and temperature == 1
        asked.extend(targets.tolist())
        return whole(hidden, head, targets, temperature)

    monkeypatch.setattr(sft_distill, "token_logprobs", spy)
    batch = make_batch(9)
    sft_distill.backward(wrap(200), None, batch, batch)
    in_order = sorted(batch, key=lambda r: r.tokens())  # as micro_batches has them
    assert asked == [t for r in in_order for t in r.response_ids] and asked.count(2) == 9


def test_end_token_counts_and_only_for_itself(alone):
    batch, ddp = make_batch(3), wrap(10**6)
    before = sft_distill.backward(ddp, None, batch, batch)
    r = batch[0]
    with torch.no_grad():
        logits = ddp.module.model(torch.tensor([r.prompt_ids + r.response_ids])).logits[0, -2]
    r.response_ids[-1] = 7
    after = sft_distill.backward(ddp, None, batch, batch)
    logprobs, tokens = logits.log_softmax(-1), sum(len(r.response_ids) for r in batch)
    assert after - before == pytest.approx(((logprobs[2] - logprobs[7]) / tokens).item(), rel=1e-3)
    assert abs(after - before) > 1e-3


SIZES = [24, 1]  # examples in the mini-batch: with one, the second rank's hand is empty


def measure(size, rank, world_size):
    """The gradient and the loss of a mini-batch, and how it was split."""
    batch, ddp = make_batch(size), wrap(200)
    hands = sft_distill.deal(batch, world_size)
    loss = sft_distill.backward(ddp, None, batch, hands[rank])
    return dict(loss=loss, grads=gradient(ddp.module.model),
                counts=[len(sft_distill.micro_batches(hand, 200)) for hand in hands])


def job(rank, world_size, folder):
    """Measures mini-batches of all SIZES as one of the ranks; the first one writes it down."""
    torch.set_num_threads(1)
    sft_distill.dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{world_size}_ranks_meet", rank=rank,
        world_size=world_size)
    # DDP goes before the group: else it holds Python and waits for gloo, which waits for Python
    results = [measure(size, rank, world_size) for size in SIZES]
    if rank == 0:
        torch.save(results, folder / f"{world_size}.pt")
    sft_distill.dist.destroy_process_group()


def test_two_ranks_give_the_gradient_of_one(tmp_path):
    for world_size in (1, 2):
        ranks = [FORKS.Process(target=job, args=(rank, world_size, tmp_path), daemon=True)
                 for rank in range(world_size)]
        for p in ranks:
            p.start()
        for p in ranks:
            p.join(timeout=300)
        assert [p.exitcode for p in ranks] == [0] * world_size
    for one, two in zip(*(torch.load(tmp_path / f"{n}.pt") for n in (1, 2))):
        assert two["counts"][0] != two["counts"][1]  # unequal numbers of micro-batches, as intended
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5) and one["loss"] > 0
        assert_same_gradient(two["grads"], one["grads"])
    assert 0 in two["counts"]


# --------------------------------------------------------------------------------------- training


def rates(steps, ratio, lr=1e-5):
    args = Namespace(lr=lr, warmup_ratio=ratio)
    return [sft_distill.learning_rate(step, steps, args) for step in range(1, steps + 1)]


def test_learning_rate_rises_in_a_line_and_falls_in_a_cosine_to_0():
    got = rates(75, 0.1)  # the default's 800 examples
    assert got[:8] == pytest.approx([1e-5 * step / 8 for step in range(1, 9)])
    assert max(got) == got[7] == 1e-5
    falling = [a - b for a, b in itertools.pairwise(got[7:])]
    assert min(falling) > 0 and falling.index(max(falling)) == pytest.approx(33, abs=1)
    assert 0 < got[-1] < 1e-3 * 1e-5
    assert (got[40] + got[41]) / 2 == pytest.approx(5e-6, rel=0.05)  # half way down at half time


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 75])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_every_update_has_a_rate(steps, ratio):
    got = rates(steps, ratio)
    assert all(0 < rate <= 1e-5 for rate in got)
    if ratio == 1:
        assert got == pytest.approx([1e-5 * step / steps for step in range(1, steps + 1)])
    if ratio == 0:
        assert got == sorted(got, reverse=True)


def test_training_goes_through_all_examples_each_epoch(tmp_path, monkeypatch, alone, tokenizer):
    seen, calls = [], []
    real = sft_distill.update

    def update(ddp, optimizer, minibatch):
        seen.append([r.row for r in minibatch])
        calls.append(optimizer.param_groups[0]["lr"])
        return real(ddp, optimizer, minibatch)

    monkeypatch.setattr(sft_distill, "update", update)
    monkeypatch.setattr(sft_distill, "sync_weights", lambda llm, model: calls.append("sync"))
    monkeypatch.setattr(sft_distill, "evaluate", lambda *a: calls.append("eval") or dict(step=a[3]))
    args = sft_distill.parse_args([
        "--model", str(ROOT / "toy/model"), "--data", "d.jsonl", "--epochs", "3", "--batch_size",
        "4", "--lr", "1e-3", "--eval_every", "4", "--save_every", "9", "--run_dir",
        str(tmp_path / "d")])
    args.data = "d.jsonl"
    last = sft_distill.train(make_batch(10), None, None, tokenizer, {}, CPU, False, args)
    assert last == dict(step=9) and [len(rows) for rows in seen] == [4, 4, 2] * 3
    epochs = [sum(seen[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(rows) == list(range(10)) for rows in epochs) and epochs[0] != epochs[1]
    lr = rates(9, 0.1, 1e-3)
    evaluated = ["sync", "eval"]
    assert calls == [*lr[:4], *evaluated, *lr[4:8], *evaluated, lr[8], *evaluated]
    lines = [json.loads(line) for line in (tmp_path / "d/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == list(range(1, 10)) and [m["lr"] for m in lines] == lr
    assert all(m["updates"] == 1 for m in lines)
    first, final = (sum(m["loss"] * m["trained_tokens"] for m in part) / sum(
        m["trained_tokens"] for m in part) for part in (lines[:3], lines[-3:]))
    assert final < 0.9 * first  # the very same examples: it learns
    assert [p.name for p in (tmp_path / "d/checkpoints").iterdir()] == ["step_9"]
    config = json.loads((tmp_path / "d/config.json").read_text())
    assert (config["script"], config["data"], config["epochs"]) == ("sft_distill.py", "d.jsonl", 3)


# ---------------------------------------------------------------------------------------- command


def test_table_prints_its_rows_and_benchmarks():
    rows = {name: {b: dict(score=s + i, length=12345.6 + i, epistemic=8.25 + i) for i, b in
                   enumerate(("aime24", "a_long_benchmark"))}
            for name, s in (("base", 0.5), ("SFT on d_ug", 0.25))}
    lines = sft_distill.table(rows).splitlines()
    assert [line.split() for line in lines] == [
        ["score", "aime24", "a_long_benc"],
        ["base", "0.500", "1.500"], ["SFT", "on", "d_ug", "0.250", "1.250"],
        ["response", "tokens", "aime24", "a_long_benc"],
        ["base", "12,346", "12,347"], ["SFT", "on", "d_ug", "12,346", "12,347"],
        ["epistemic", "tokens", "aime24", "a_long_benc"],
        ["base", "8.2", "9.2"], ["SFT", "on", "d_ug", "8.2", "9.2"]]
    assert len(set(map(len, lines))) == 1  # in columns


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        sft_distill.parse_args(["--help"])
    assert caught.value.code == 0 and "--warmup_ratio" in capsys.readouterr().out


def test_defaults_are_what_the_docstring_says():
    args = sft_distill.parse_args(["--model", "x", "--data", "y"])
    said = dict(epochs=3, batch_size=32, lr=1e-5, warmup_ratio=0.1, eval_rollouts=16,
                eval_data=["aime24", "aime25", "amc23", "math500"])
    assert {name: getattr(args, name) for name in said} == said
    assert "3 epochs, 32 examples a step (75 steps), AdamW at 1e-5" in sft_distill.__doc__


@pytest.mark.parametrize("flags, said", [
    (["--data", "d.jsonl", "other/d.jsonl"], "--data: two have one name (d d)"),
    (["--data", "d.jsonl", "base.jsonl"], "base is the untrained model's"),
    (["--eval_data", "d.jsonl", "other/d.jsonl"], "--eval_data: two have one name (d d)"),
    (["--warmup_ratio", "1.5"], "--warmup_ratio 1.5 must lie between 0 and 1"),
    (["--warmup_ratio", "-0.1"], "--warmup_ratio -0.1"),
    (["--run_dir", "full"], "--run_dir full already holds results"),
    (["--run_dir", "d.jsonl"], "--run_dir d.jsonl already holds results"),
    (["--batch_size", "0"], "0 must be at least 1"),
    (["--data", "broken.jsonl"], "broken.jsonl, line 2"),
    (["--data", "no/such.jsonl"], "no/such.jsonl"),
    (["--eval_data", "no/such.jsonl"], "no/such.jsonl"),
    (["--max_response_tokens", "9999"], "positions"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, said):
    row = dict(prompt="1+1?", response="\\boxed{2}", answer="2")
    for folder in (tmp_path, tmp_path / "other", tmp_path / "full"):
        folder.mkdir(exist_ok=True)
        write(folder / "d.jsonl", row)
    write(tmp_path / "base.jsonl", row)
    (tmp_path / "broken.jsonl").write_text(json.dumps(row) + "\n{not json\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [
        "sft_distill.py", "--model", str(ROOT / "toy/model"), "--data", "d.jsonl", "--eval_data",
        "d.jsonl", "--max_response_tokens", "64", *flags])  # of one given twice the last counts
    went_on = "all of it was accepted"
    monkeypatch.setattr(sft_distill, "start_process_group", lambda: pytest.fail(went_on))
    with pytest.raises(SystemExit) as caught:
        sft_distill.main()
    err = capsys.readouterr().err
    assert caught.value.code == 2 and said in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "runs").exists() and len(list((tmp_path / "full").iterdir())) == 1


def test_good_input_is_accepted(tmp_path):
    (tmp_path / "empty").mkdir()
    for flags in (["--run_dir", str(tmp_path / "empty")], ["--run_dir", str(tmp_path / "new")],
                  ["--run_dir", str(tmp_path / "new"), "--eval_data"]):
        sft_distill.check_args(sft_distill.parse_args(
            ["--model", "x", "--data", "d_ug.jsonl", "d_sg.jsonl", *flags]))
