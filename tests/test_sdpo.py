"""sdpo.py: the loss, the prompts, the batches, against brute force. No vLLM, only the toy."""
import json
import math
import random
import shutil
import sys
from argparse import Namespace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import sdpo
from common import (ROOT, assert_same_gradient, gradients_of, learner, lines, needs_tokenizers,
                    on_ranks, refusal_of_main, tokenizer_of, toy)

torch.manual_seed(0)


def reference(student_logits, teacher_logits, alpha, top):
    """Eq. 1 and its relatives over the tokens `top` and all others as one, float64, by terms."""
    def buckets(logits):
        p = logits.double().softmax(-1)
        others = p.scatter(-1, top, 0).sum(-1, keepdim=True)
        return torch.cat([p.gather(-1, top), others], -1).clamp(min=1e-30)
    p, q = buckets(student_logits), buckets(teacher_logits)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if alpha == 0:
        return kl(q, p)
    if alpha == 1:
        return kl(p, q)
    m = (1 - alpha) * p + alpha * q
    return (1 - alpha) * kl(p, m) + alpha * kl(q, m)


@pytest.mark.parametrize("alpha, expected", [
    (0.5, 0.132918006), (0.25, 0.102814570), (0.0, 0.583814703), (1.0, 0.537176458)])
def test_divergence_matches_the_authors_formula(alpha, expected):
    # numbers of the authors' formula, run on its own
    student, teacher = torch.tensor([0.5, 0.3]).log(), torch.tensor([0.2, 0.1]).log()
    got = sdpo.divergence(sdpo.with_tail(student), sdpo.with_tail(teacher), alpha)
    assert got.item() == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("k", [50, 8])  # the full vocabulary, and fewer
def test_loss_equals_naive_in_value_and_gradient(monkeypatch, alpha, k):
    monkeypatch.setattr(sdpo, "CHUNK", 16)
    head, teacher_head = (torch.nn.Linear(16, 50, bias=False) for _ in range(2))
    hidden, teacher_hidden = torch.randn(37, 16, requires_grad=True), 2 * torch.randn(37, 16)
    buckets = sdpo.teacher_buckets((hidden, head), (teacher_hidden, teacher_head), k, 0.7)
    targets = torch.randint(50, (37,))
    got, _ = sdpo.token_losses(hidden, head, targets, 0.7, *buckets, alpha=alpha)
    grads = torch.autograd.grad(got.sum(), [hidden, head.weight])
    logits, teacher_logits = head(hidden) / 0.7, teacher_head(teacher_hidden).detach() / 0.7
    want = reference(logits, teacher_logits, alpha, logits.topk(k).indices)
    wanted = torch.autograd.grad(want.sum(), [hidden, head.weight])
    # abs: the empty tail bucket is clamped to 1e-7 of probability, not 0
    torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=1e-5)
    for g, w in zip(grads, wanted):
        torch.testing.assert_close(g, w, atol=5e-5, rtol=1e-4)


def rollout(prompt, response, teacher=None, row=0, reward=0.0, finished=True):
    logprobs = [-1.0] * len(response)
    return sdpo.Rollout(row, prompt, response, logprobs, "", finished, reward, teacher)


@pytest.mark.parametrize("flags, shown", [
    (["--demonstration", "without_think"], "2"), ([], "<think>Two.</think> 2"),
    (["--no-enable_thinking"], "<think>Two.</think> 2")])
def test_who_sees_which_solution(alone, monkeypatch, tokenizer, flags, shown):
    args = sdpo.make_parser().parse_args(["--model", "m", *flags])
    question = dict(messages=[dict(role="user", content="1+1?")], prompt_ids=[1], answer="2")
    # a cut answer earns nothing and is no demonstration, whatever box stands in its think part
    answers = [SimpleNamespace(token_ids=(7, i), logprobs=SimpleNamespace(logprobs=[-1.0, -2.0]),
                               text=text, finish_reason=reason, reward=reward)
               for i, (text, reason, reward) in enumerate([
                   ("3", "stop", 0), ("<think>Two.</think> 2", "stop", 1), ("2", "length", 1)])]
    monkeypatch.setattr(sdpo, "generate", lambda *_, **__: [answers])
    wrong, right, cut = sdpo.sample_groups(None, None, tokenizer, [question], 1, args)
    prompt = tokenizer.decode(wrong.teacher_prompt_ids)
    assert f"1+1?\nCorrect solution:\n\n{shown}\n\nCorrectly solve" in prompt
    assert prompt.endswith("assistant\n" if args.enable_thinking else "<think>\n\n</think>\n\n")
    assert right.teacher_prompt_ids is None  # its group's only success
    assert (right.response_ids, right.logprobs, right.finished) == ([7, 1], [-1.0, -2.0], True)
    assert cut.reward == 0 and cut.teacher_prompt_ids == wrong.teacher_prompt_ids


def test_a_demonstration_is_a_correct_sibling_at_random():
    rng = random.Random(0)

    def choose(rewards, i):
        """What 100 draws for rollout i give; {None} where it has no demonstration."""
        group = [rollout([1], [1], row=j, reward=float(reward)) for j, reward in enumerate(rewards)]
        drawn = [sdpo.choose_demonstration(group, i, rng) for _ in range(100)]
        return {demonstration and demonstration.row for demonstration in drawn}
    assert choose([0, 1, 0], 1) == {None}  # its group's only success
    assert choose([1, 1, 0, 1], 0) == {1, 3}


@pytest.mark.parametrize("response, shown", [
    ("<think>\na\n</think>\n\nSo 4.", "So 4."),
    ("a\n</think>\n\nSo 4.", "So 4."),  # DeepSeek: the template opened it
    ("<think>a</think> b <think>c</think> d", "b d"),
    ("no think part", "no think part"),
    ("<think>never closed", "<think>never closed"),
])
def test_what_a_teacher_reads(response, shown):
    for form, text, closing in (("without_think", shown, sdpo.CLOSING),
                                ("full", response, sdpo.CLOSING),
                                ("uncertain", response, sdpo.CLOSING_UNCERTAIN)):
        (chat,) = sdpo.teacher_messages([dict(role="user", content="Q")], response, form)
        assert chat["content"] == f"Q\nCorrect solution:\n\n{text}\n\n{closing}"


def test_micro_batches_keep_the_budget(monkeypatch):
    rng = random.Random(0)
    batch = [rollout([1] * 10, [1] * rng.randint(1, 400), [1] * 30) for _ in range(203)]
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rollouts, budget in ((batch, 2000), (batch[:3], 1)):  # too long goes alone
        dealt = []
        for rank in range(2):
            monkeypatch.setattr(dist, "get_rank", lambda: rank)
            dealt.append(sdpo.my_micro_batches(rollouts, budget))
        micros = sum(dealt, [])
        assert len(dealt[0]) == len(dealt[1])
        assert {id(r) for m in micros for r in m} >= {*map(id, rollouts)}
        assert sum(map(len, micros)) - len(rollouts) <= 1  # a copy; its weight: on two ranks, below
        assert all(len(m) == 1 or len(m) * max(r.tokens() for r in m) <= budget for m in micros)


def flags(size=23):
    """Those of an update of one mini-batch."""
    return Namespace(temperature=0.7, top_k=20, alpha=0.5, tokens_per_micro_batch=200,
                     questions_per_step=size, minibatch_questions=size)


def make_batch(size, moved=False):
    """Rollouts of which two thirds have a teacher: the same in every process.

    vLLM's log-probabilities are far enough from the trainer's for the importance weight's cut; so
    are, if the weights have `moved`, those at the step's start from those now.
    """
    rng = random.Random(1)

    def draw(n):
        return [rng.randrange(5, 400) for _ in range(n)]

    def shake(logprobs):
        return logprobs + torch.tensor([rng.uniform(-1.2, 1.2) for _ in logprobs])
    batch = [rollout(draw(4), draw(rng.randint(1, 60)), draw(30) if i % 3 else None, row=i)
             for i in range(size)]
    sdpo.remember_logprobs(sdpo.Student(toy(), flags()), [[r] for r in batch])
    for r in batch:
        start = shake(r.old_logprobs) if moved else r.old_logprobs
        r.logprobs, r.old_logprobs = shake(start).tolist(), start if moved else None
    return batch


def sampled_now(ddp, batch):
    """Gives the batch the trainer's own log-probabilities as vLLM's: the engine is fresh."""
    sdpo.remember_logprobs(ddp.module, [[r] for r in batch])
    for r in batch:
        r.logprobs, r.old_logprobs = r.old_logprobs.tolist(), None


def measure(size, moved=False, rounds=sdpo.ROUND, recompute=False):
    """This rank's share of the gradient of a mini-batch, and what else an update makes of it."""
    with mock.patch.multiple(sdpo, ROUND=rounds, MISMATCH_LIMIT=math.inf, CHUNK=16):
        ddp, optimizer = learner(sdpo, flags(size))
        if recompute:  # as main() does
            ddp.module.model.train().gradient_checkpointing_enable(dict(use_reentrant=False))
        batch, gradient = make_batch(size, moved), gradients_of(optimizer)
        metrics = sdpo.update(ddp, toy(), optimizer, batch, 1e-3)
        (micros,) = sdpo.split_into_minibatches(batch, flags(size))
        return dict(metrics, gradient=gradient, micros=len(micros),
                    fillers=sum(not r.weight for m in micros for r in m),
                    weights=[w.detach().clone() for w in ddp.parameters()])


@pytest.mark.parametrize("moved", [False, True])
def test_one_rank_gives_the_gradient_of_brute_force(alone, moved):
    model, teacher, total, tokens, cut, gap = toy(), toy(), 0.0, 0, 0, 0.0
    batch = make_batch(23, moved)
    for r in batch:  # alone, all logits at once; one without a teacher adds nothing and counts
        if r.teacher_prompt_ids is None:
            continue
        mine, others = (asked(input_ids=torch.tensor([prompt + r.response_ids])).logits[
            0, len(prompt) - 1 : -1] / 0.7 for asked, prompt in (
                (model, r.prompt_ids), (teacher, r.teacher_prompt_ids)))
        loss = reference(mine, others.detach(), 0.5, mine.topk(20).indices)
        now, vllm = mine.log_softmax(-1)[range(len(mine)), r.response_ids], torch.tensor(r.logprobs)
        start = r.old_logprobs if moved else now.detach()
        ratio, correction = (now.detach() - start).exp(), (start - vllm).exp()
        total = total + (loss * ratio.clamp(max=2) * correction.clamp(max=2)).mean() / len(batch)
        tokens, gap = tokens + len(vllm), gap + (start - vllm).abs().sum().item()
        cut += ((ratio >= 2) | (correction >= 2)).sum().item()
    total.backward()
    one = measure(23, moved)
    assert one["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert one["trained_tokens"] == tokens and one["mismatch"] == pytest.approx(gap / tokens)
    assert one["clipped"] == cut / tokens > 0.1
    assert_same_gradient(one["gradient"], {n: p.grad for n, p in model.named_parameters()}, 1e-3)
    norm = torch.stack([g.norm() for g in one["gradient"].values()]).norm().item()
    assert one["grad_norm"] == pytest.approx(norm, rel=1e-4)


def assert_same_on_two_ranks(one, two):
    """What measure() says on one rank is what it says on two, and both of them take their part."""
    assert two[0]["micros"] == two[1]["micros"] == (one["micros"] + 1) // 2
    assert sum(r["fillers"] for r in two) == one["micros"] % 2 and one["fillers"] == 0
    assert_same_gradient(two[0]["gradient"] | two[1]["gradient"], one["gradient"])
    for r in two:  # the statistics are every rank's, and are of all
        for key in {"loss", "grad_norm", "mismatch", "mismatch_max"} & one.keys():
            assert r[key] == pytest.approx(one[key], rel=1e-4, abs=1e-7) and one[key] != 0
        for key in {"trained_tokens", "clipped", "trained"} & one.keys():
            assert r[key] == one[key]


@pytest.mark.slow
@pytest.mark.parametrize("size, rounds", [
    (23, sdpo.ROUND), (23, 2),  # one round of micro-batches, or several
    (2, 2)])  # of the two one has a teacher: rank 1 has a filler
def test_two_ranks_give_the_gradient_of_one(tmp_path, alone, size, rounds):
    one, two = measure(size), on_ranks(2, tmp_path, measure, size, False, rounds)
    assert_same_on_two_ranks(one, two)
    assert size < 23 or two[0]["micros"] > 2  # several rounds
    assert all(map(torch.equal, two[0]["weights"], two[1]["weights"]))


def test_recomputing_layers_changes_no_bit(alone):
    kept, recomputed = measure(23), measure(23, recompute=True)
    assert kept["loss"] == recomputed["loss"]
    assert all(map(torch.equal, kept["weights"], recomputed["weights"]))


def test_an_engine_with_old_weights_ends_the_run(alone):
    ddp, optimizer = learner(sdpo, flags())
    batch, before = make_batch(23), [p.detach().clone() for p in ddp.parameters()]
    sampled_now(ddp, batch)
    for r in batch:
        r.logprobs = [p - 0.2 for p in r.logprobs]  # as measured where vLLM kept an old LM head
    with pytest.raises(SystemExit, match=r"error: .* 0\.2 a token off .* old weights"):
        sdpo.update(ddp, toy(), optimizer, batch, 1e-3)
    assert all(map(torch.equal, before, ddp.parameters()))


def test_gradients_lie_in_ddps_buckets(alone):
    ddp, optimizer = learner(sdpo, flags())
    model, batch = ddp.module.model, make_batch(23)
    sampled_now(ddp, batch)

    def storages():
        return {w.grad.untyped_storage()._cdata: w.grad for w in model.parameters()}.values()
    held = [len(storages())]
    for _ in range(2):  # DDP makes its buckets anew after the first
        sdpo.update(ddp, toy(), optimizer, batch, 0.0)
        held.append(len(storages()))
    assert max(held) <= 2 and len(list(model.parameters())) > 20


def test_the_teacher_comes_back(alone):
    model, teacher, path = toy(), toy(), ROOT / "toy/model"
    initial = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    sdpo.free(teacher)
    assert not any(t.untyped_storage().nbytes() for t in teacher.parameters())
    sdpo.load_teacher(teacher, {}, model, path)  # without --ema: the initial weights, for ever
    assert all(map(torch.equal, teacher.parameters(), initial))
    sdpo.free(teacher)
    averages = {f"{i}.average": p + 0.5 for i, p in enumerate(initial)}
    sdpo.load_teacher(teacher, averages, model, path)
    assert all(map(torch.equal, teacher.parameters(), averages.values()))


QUESTION = "What is 1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
REPROMPT = QUESTION + "\nCorrect solution:\n\nS\n\nCorrectly solve the original question."
TABLE_12 = {  # model: (what comes before the user's text, what comes after with thinking, without)
    "deepseek-r1-distill-qwen": (
        "<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜><think>\n", None),
    "qwen3": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
              "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "olmo-3-instruct": (
        "<|im_start|>system\nYou are a helpful function-calling AI assistant. You do not currently "
        "have access to any functions. <functions></functions><|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n", None),
}


@needs_tokenizers
@pytest.mark.parametrize("name", TABLE_12)
def test_prompts_of_the_papers_models(name):
    tokenizer = tokenizer_of(name)
    before, thinking, off = TABLE_12[name]
    chat = [dict(role="user", content=QUESTION)]
    for messages, text in ((chat, QUESTION), (sdpo.teacher_messages(chat, "S", "full"), REPROMPT)):
        for enabled, after in ((True, thinking), (False, off or thinking)):
            ids = sdpo.render(tokenizer, messages, enabled)
            assert tokenizer.decode(ids) == before + text + after
            if tokenizer.bos_token_id is not None:
                assert ids.count(tokenizer.bos_token_id) == before.count(tokenizer.bos_token)


def test_prompts_of_the_toy(tokenizer):
    chat = [dict(role="system", content="Be brief."), dict(role="user", content=QUESTION)]
    text = tokenizer.decode(sdpo.render(tokenizer, sdpo.teacher_messages(chat, "S", "full"), False))
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n" + REPROMPT
                    + "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    answer = "<think>\nHmm.\n</think>\n\n\\boxed{4}"  # the think tags must survive decoding
    assert tokenizer.decode(tokenizer.encode(answer), skip_special_tokens=True) == answer


def test_defaults_are_the_papers():
    args = sdpo.make_parser().parse_args(["--model", "x"])
    table_8_and_10 = dict(
        max_prompt_tokens=2048, max_response_tokens=20480, questions_per_step=256,
        minibatch_questions=128, rollouts=8, temperature=1.0, warmup_steps=10, alpha=0.5, top_k=100,
        ema=0.0, lr=1e-5)
    assert {name: getattr(args, name) for name in table_8_and_10} == table_8_and_10


@pytest.mark.parametrize("flags, said", [
    (["--data", "no/such.jsonl"], "no/such.jsonl"),
    (["--data", "bad.parquet"], "bad.parquet"),
    (["--max_prompt_tokens", "3"], "good.jsonl: no prompt fits --max_prompt_tokens 3"),
    (["--model", "no/such/folder"], "no/such/folder"),
    (["--model", "empty"], "empty"),
    (["--minibatch_questions", "100"], "--questions_per_step 256 is not divisible by 100"),
    (["--lr", "nan"], "--lr: nan does not lie between 0 and 1"),
    (["--num_questions", "5"], "--num_questions 5: the data has 1"),
    (["--eval_data", "good.jsonl", "other/good.parquet"], "two benchmarks have one name"),
    (["--max_response_tokens", "9999"], "has 4,096 positions"),
    ("3 ranks", "256 is not divisible by 3 "),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, flags, said):
    (tmp_path / "good.jsonl").write_text(json.dumps(dict(problem="1+1?", answer="2")))
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    if flags == "3 ranks":
        monkeypatch.setenv("WORLD_SIZE", "3")
        flags = []
    assert said in refusal_of_main(sdpo, monkeypatch, [
        "--model", ROOT / "toy/model", "--data", "good.jsonl", "--eval_data", "good.jsonl",
        "--max_response_tokens", "64", *flags])  # of a flag given twice the last counts
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["toy", *map(lambda name: pytest.param(
    name, marks=needs_tokenizers), ("qwen3", "deepseek-r1-distill-qwen", "olmo-3-instruct"))])
def test_a_control_token_that_an_answer_spells_stays_text(name):
    tokenizer, answer = tokenizer_of(name), "<think>\nhm\n</think>\n\n4"
    control = [t.content for t in tokenizer.added_tokens_decoder.values()
               if t.special or "|" in t.content or "｜" in t.content]
    plain, spelt = (sdpo.render(tokenizer, sdpo.teacher_messages(
        [dict(role="user", content="2 + 2?")], text, "full"), True)
        for text in (answer, answer + "".join(control)))
    ids = set(tokenizer.convert_tokens_to_ids(control))
    assert control and [i for i in spelt if i in ids] == [i for i in plain if i in ids]
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert spelt.count(think) == plain.count(think)


def test_steps_without_an_update_say_so_and_ten_say_why(tmp_path, alone, capsys):
    args = sdpo.make_parser().parse_args(["--model", "m", "--run_dir", str(tmp_path)])
    for step in range(1, 11):
        sdpo.log(args, step, [rollout([1], [1, 2])], dict(loss=0.0, skipped=0, trained=0),
                 dict(rollout=4000.0, update=1.0))
    said = capsys.readouterr().out.splitlines()
    assert sum("no update: no rollout of this step" in line for line in said) == 10
    assert [line for line in said if "no correct rollout in ten steps" in line] == said[-1:]
    assert max(map(len, said)) <= 80 and "step 10/100  score" in said[-3]


def test_a_temperature_that_transformers_would_not_save_is_saved(tmp_path):
    shutil.copytree(ROOT / "toy/model", tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    sdpo.load_model(tmp_path / "m", "cpu").save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["temperature"] == 0.6


def test_wandb_gets_the_metrics(tmp_path, alone, monkeypatch):
    args, other = (sdpo.make_parser().parse_args(
        ["--model", "m", "--run_dir", str(tmp_path / name), "--wandb"]) for name in "ab")
    sent = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        init=lambda **how: sent.append(how), log=lambda m, step: sent.append((step, m))))
    sdpo.begin_run(args, "m")
    sdpo.log(args, 3, [rollout([1], [1, 2])], dict(loss=0.5, skipped=0, trained=1),
             dict(rollout=1.0, update=1.0))
    sdpo.begin_run(args, "m")  # the same command again: the same run there
    sdpo.begin_run(other, "m")
    (begun, (step, metrics), again, another) = sent
    assert begun["id"] == again["id"] != another["id"] and begun["resume"] == "allow"
    assert begun["config"]["lr"] == 1e-5 and step == 3 and metrics["length"] == 2
    assert lines(tmp_path / "a/metrics.jsonl") == [metrics]
