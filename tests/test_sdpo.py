"""sdpo.py: the loss, the prompts, the batches, against brute force. No vLLM, only the toy."""
import itertools
import json
import math
import random
import signal
import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import generate_conditions
import sdpo
from common import (CPU, ROOT, assert_same_gradient, learner, lines, needs_tokenizers, on_ranks,
                    refusal, refusal_of_main, tokenizer_of, toy)

torch.manual_seed(0)


def reference(student_logits, teacher_logits, alpha):
    """Eq. 1 and its relatives over the full vocabulary, float64, term by term."""
    p, q = student_logits.double().softmax(-1), teacher_logits.double().softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if alpha == 0:
        return kl(q, p)
    if alpha == 1:
        return kl(p, q)
    m = (1 - alpha) * p + alpha * q
    return (1 - alpha) * kl(p, m) + alpha * kl(q, m)


def setup(n=37, d=16, v=50, scale=2.0):
    head, teacher_head = torch.nn.Linear(d, v, bias=False), torch.nn.Linear(d, v, bias=False)
    for h in (head, teacher_head):
        torch.nn.init.normal_(h.weight, std=scale / d**0.5)
    hidden = torch.randn(n, d, requires_grad=True)
    return hidden, head, torch.randint(v, (n,)), torch.randn(n, d), teacher_head


def losses(parts, k, alpha, temperature=1.0):
    hidden, head, targets, teacher_hidden, teacher_head = parts
    return sdpo.token_losses(hidden, head, targets, temperature, (teacher_hidden, teacher_head), k,
                             alpha)


@pytest.mark.parametrize("alpha, expected", [
    (0.5, 0.132918006), (0.25, 0.102814570), (0.0, 0.583814703), (1.0, 0.537176458)])
def test_divergence_matches_the_authors_formula(alpha, expected):
    # numbers of the authors' formula, run on its own (paper/semantics)
    student, teacher = torch.tensor([0.5, 0.3]).log(), torch.tensor([0.2, 0.1]).log()
    got = sdpo.divergence(sdpo.with_tail(student), sdpo.with_tail(teacher), alpha)
    assert got.item() == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_full_k_equals_full_vocabulary_in_value_and_gradient(alpha):
    parts = setup()
    hidden, head, _, teacher_hidden, teacher_head = parts
    got, _, kl = losses(parts, 50, alpha)
    grads = torch.autograd.grad(got.sum(), [hidden, head.weight])
    want = reference(head(hidden), teacher_head(teacher_hidden).detach(), alpha)
    wanted = torch.autograd.grad(want.sum(), [hidden, head.weight])
    # abs: the empty tail bucket is clamped to 1e-7 of probability, not 0
    torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=1e-5)
    for g, w in zip(grads, wanted):
        torch.testing.assert_close(g, w, atol=5e-5, rtol=1e-4)
    # Table 6's is KL(student || teacher), whatever the loss
    want = reference(head(hidden), teacher_head(teacher_hidden), 1)
    torch.testing.assert_close(kl.double(), want, atol=5e-6, rtol=1e-5)
    assert not kl.requires_grad


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_fewer_k_is_a_lower_bound_that_closes(alpha):
    # merging tokens into one bucket can only lose divergence (data processing), and loses at most
    # what the tail's own tokens contribute
    parts = setup(scale=4.0)
    hidden, head, _, teacher_hidden, teacher_head = parts
    full = reference(head(hidden), teacher_head(teacher_hidden), alpha)
    gaps = [(full - losses(parts, k, alpha)[0].double()) for k in (1, 5, 20, 40, 50)]
    assert all((gap > -1e-5).all() for gap in gaps)
    assert gaps[0].mean() > 1e-2  # k = 1 does lose something: the test could fail
    means = [gap.mean().item() for gap in gaps]
    assert means == sorted(means, reverse=True) and means[-1] < 1e-5


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_gradient_by_finite_differences(alpha):
    hidden, head, targets, teacher_hidden, teacher_head = setup(n=3, d=4, v=12)
    student = head(hidden).detach().double().log_softmax(-1)
    top, ids = student.topk(5)
    teacher = sdpo.with_tail(
        teacher_head(teacher_hidden).detach().double().log_softmax(-1).gather(-1, ids))
    top.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda t: sdpo.divergence(sdpo.with_tail(t), teacher, alpha), top, eps=1e-6, atol=1e-7)


def test_chunked_equals_naive_in_value_and_gradient(monkeypatch):
    parts = setup(n=37)
    hidden, head, targets, teacher_hidden, teacher_head = parts
    results = []
    for size in (5, 1000):
        monkeypatch.setattr(sdpo, "CHUNK", size)
        loss, logprobs, _ = losses(parts, 10, 0.5, temperature=0.7)
        weight = torch.linspace(0, 1, 37)
        grads = torch.autograd.grad((loss * weight + logprobs * weight**2).sum(),
                                    [hidden, head.weight])
        results.append([loss, logprobs, *grads])
    for chunked, whole in zip(*results):
        torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-5)
    naive = (head(hidden) / 0.7).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(results[0][1], naive, atol=1e-6, rtol=1e-5)


def test_no_teacher_gives_log_probabilities_only():
    hidden, head, targets, *_ = setup()
    loss, logprobs, kl = sdpo.token_losses(hidden, head, targets, 1.0)
    assert loss.abs().max() == kl.abs().max() == 0 and logprobs.shape == (37,)


def test_importance_weight_is_cut_and_detached():
    now = torch.tensor([0.0, 0.5, 3.0, 100.0, -100.0], requires_grad=True)
    weight = sdpo.importance_weight(now, torch.zeros(5))
    assert not weight.requires_grad
    assert weight.tolist() == pytest.approx([1, math.exp(0.5), 2, 2, math.exp(-20)])


def rollout(prompt, response, teacher=None, row=0, reward=0.0, finished=True):
    return sdpo.Rollout(row, prompt, response, np.full(len(response), -1.0, np.float32), "",
                        finished, reward, teacher)


def test_loss_weights_count_sequences_without_demonstration():
    batch = [rollout([1], [1, 2], [3]), rollout([1], [1] * 5, [3]), rollout([1], [1] * 7)]
    sdpo.set_loss_weights(batch)
    assert [r.weight for r in batch] == [1 / 6, 1 / 15, 0]


def sampled(monkeypatch, tokenizer, *flags):
    """sample_groups of one question with two answers, one of them right, without vLLM."""
    args = sdpo.parse_args(["--model", "m", *flags])
    question = dict(messages=[dict(role="user", content="1+1?")], answer="2", solution="It is 2.")
    group = [rollout([1], [1]), rollout([1], [2])]
    group[1].reward, group[1].text = 1.0, "<think>Two.</think> 2"
    monkeypatch.setattr(sdpo, "generate", lambda *_, **__: [group])
    monkeypatch.setattr(sdpo, "grade", lambda *_: group)
    return [r.teacher_prompt_ids and tokenizer.decode(r.teacher_prompt_ids)
            for r in sdpo.sample_groups(None, None, tokenizer, [question], 0, 1, args)]


def test_who_sees_which_solution(monkeypatch, tokenizer):
    wrong, right = sampled(monkeypatch, tokenizer, "--demonstration", "without_think")
    assert "Correct solution:\n\n2\n\nCorrectly" in wrong and right is None
    assert wrong.endswith("assistant\n")
    # gold: everybody sees it; nobody has to be right
    wrong, right = sampled(monkeypatch, tokenizer, "--context", "gold", "--no-enable_thinking")
    assert wrong == right and "Correct solution:\n\nIt is 2.\n\nCorrectly" in wrong
    assert wrong.endswith("<think>\n\n</think>\n\n")
    hybrid, _ = sampled(monkeypatch, tokenizer, "--context", "gold", "--no-enable_thinking",
                        "--teacher_thinking")
    assert hybrid == wrong.removesuffix("<think>\n\n</think>\n\n")


def test_a_demonstration_is_a_correct_finished_sibling_at_random():
    rng = random.Random(0)

    def choose(rewards, i, cut=()):
        """What 100 draws for rollout i give; {None} where it has no demonstration."""
        group = [rollout([1], [1], row=j, reward=float(reward), finished=j not in cut)
                 for j, reward in enumerate(rewards)]
        drawn = [sdpo.choose_demonstration(group, i, rng) for _ in range(100)]
        return {demonstration and demonstration.row for demonstration in drawn}
    assert choose([0, 1, 0], 1) == {None}  # its group's only success
    assert choose([0, 0], 0) == {None}
    assert choose([1, 1, 0, 1], 0) == {1, 3}
    # a cut answer earns 1 where a box stands early in its think part: it must not be shown
    assert choose([1, 1, 0, 1], 0, cut=[1]) == {3}
    assert choose([0, 1, 1], 0, cut=[1, 2]) == {None}
    assert choose([1, 1], 0, cut=[0]) == {1}  # the one that learns may be cut


@pytest.mark.parametrize("response, shown", [
    ("<think>\na\n</think>\n\nSo 4.", "So 4."),
    ("a\n</think>\n\nSo 4.", "So 4."),  # DeepSeek: the template opened it
    ("<think>a</think> b <think>c</think> d", "b d"),
    ("no think part", "no think part"),
    ("<think>never closed", "<think>never closed"),
])
def test_without_think(response, shown):
    assert sdpo.demonstration_text(response, "without_think") == shown
    assert sdpo.demonstration_text(response, "full") == response
    assert sdpo.demonstration_text(response, "uncertain") == response


def test_the_uncertain_demonstration_is_app_c():
    (chat,) = sdpo.teacher_messages([dict(role="user", content="Q")], "S", "uncertain")
    shown = "Q\nCorrect solution:\n\nS\n\n"
    assert chat["content"] == shown + generate_conditions.CLOSE_UNCERTAIN
    (chat,) = sdpo.teacher_messages([dict(role="user", content="Q")], "a</think>S", "without_think")
    assert chat["content"] == shown + generate_conditions.CLOSE


def test_micro_batches_keep_the_budget():
    rng = random.Random(0)
    batch = [rollout([1] * 10, [1] * rng.randint(1, 400), [1] * 30) for _ in range(203)]
    micros = sdpo.micro_batches(batch, 2000)
    assert sorted(map(id, itertools.chain(*micros))) == sorted(map(id, batch))
    assert all(len(m) * max(r.tokens() for r in m) <= 2000 for m in micros)
    assert [len(m) for m in sdpo.micro_batches(batch[:2], 1)] == [1, 1]  # too long goes alone


def test_padding_changes_nothing():
    model = toy()
    prompts, responses = [[5, 6, 7], [8, 9], [10] * 9], [[11, 12], [13] * 6, [14]]
    together = sdpo.response_hidden(model, prompts, responses, "cpu")
    alone = [sdpo.response_hidden(model, [p], [y], "cpu") for p, y in zip(prompts, responses)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------- the update


ARGS = Namespace(temperature=1.0, top_k=20, alpha=0.5, tokens_per_micro_batch=200,
                 questions_per_step=23, minibatch_questions=23, loss_tokens=None)


def make_batch(size):
    """Rollouts of which two thirds have a teacher: the same in every process."""
    rng = random.Random(1)

    def draw(n):
        return [rng.randrange(5, 400) for _ in range(n)]
    batch = []
    for i in range(size):
        r = rollout(draw(4), draw(rng.randint(1, 60)), draw(30) if i % 3 else None, row=i)
        r.logprobs = np.array([-3.0 + rng.random() for _ in r.response_ids], np.float32)
        batch.append(r)
    return batch


def measure(size, folded=sdpo.ROUND, recompute=False):
    """This rank's share of the gradient of a mini-batch, and what else an update makes of it."""
    sdpo.ROUND = folded
    ddp, optimizer = learner(sdpo, ARGS)
    if recompute:  # as main() does
        ddp.module.model.train().gradient_checkpointing_enable(dict(use_reentrant=False))
    batch = make_batch(size)
    sdpo.set_loss_weights(batch)
    micros = sdpo.my_micro_batches([r for r in batch if r.weight], ARGS.tokens_per_micro_batch)
    optimizer.zero_grad()
    stats = sdpo.backward(ddp, toy(), optimizer, micros)
    gradient = {name: total.clone() for name, total in zip(optimizer.names, optimizer.sums)}
    return dict(
        gradient=gradient, loss=sum(s["loss"] for s in stats), micros=len(micros),
        computed=[r.response_ids for m in micros for r in m if r.weight],
        fillers=sum(not r.weight for m in micros for r in m), token_kl=ddp.module.token_kl,
        norm=optimizer.step(1e-3, 1.0), weights=[w.detach().clone() for w in optimizer.weights])


def whole(results):
    return {name: g for result in results for name, g in result["gradient"].items()}


@pytest.mark.parametrize("size", [23, 2])  # of the two one has a teacher: rank 1 has a filler
@pytest.mark.parametrize("folded", [sdpo.ROUND, 2])  # one round of micro-batches, or several
def test_two_ranks_give_the_gradient_of_one(tmp_path, alone, monkeypatch, size, folded):
    monkeypatch.setattr(sdpo, "ROUND", sdpo.ROUND)
    one, two = measure(size), on_ranks(2, tmp_path, measure, size, folded)
    assert two[0]["micros"] == two[1]["micros"] == (one["micros"] + 1) // 2
    assert sum(r["fillers"] for r in two) == one["micros"] % 2 and one["fillers"] == 0
    assert size < 23 or two[0]["micros"] > 2  # folded several times
    assert sorted(one["computed"]) == sorted(two[0]["computed"] + two[1]["computed"])
    assert_same_gradient(whole(two), whole([one]))
    assert one["loss"] == pytest.approx(two[0]["loss"], rel=1e-5) and one["loss"] > 0
    norm = torch.stack([g.norm() for g in one["gradient"].values()]).norm().item()
    assert [r["norm"] for r in (one, *two)] == pytest.approx([norm] * 3, rel=1e-4)
    assert all(map(torch.equal, two[0]["weights"], two[1]["weights"]))
    # Table 6: every trained token once, whichever rank it was on; a filler's not
    assert torch.equal(two[0]["token_kl"], two[1]["token_kl"])
    assert torch.equal(two[0]["token_kl"][1], torch.bincount(
        torch.tensor(sum(one["computed"], [])), minlength=one["token_kl"].shape[1]).double())
    torch.testing.assert_close(one["token_kl"], two[0]["token_kl"], atol=1e-6, rtol=1e-4)


def test_recomputing_layers_changes_no_bit(alone):
    kept, recomputed = measure(23), measure(23, recompute=True)
    assert kept["loss"] == recomputed["loss"]
    assert all(map(torch.equal, kept["weights"], recomputed["weights"]))
    for name, g in kept["gradient"].items():
        assert torch.equal(g, recomputed["gradient"][name]), name


def test_update_trains_the_student_towards_the_teacher(alone):
    """The loss on the very same rollouts falls; without a teacher nothing is computed at all."""
    ddp, optimizer = learner(sdpo, ARGS)
    batch, teacher, metrics = make_batch(23), toy(), []
    for _ in range(2):
        sdpo.remember_logprobs(ddp.module, sdpo.micro_batches(batch, 200))
        for r in batch:  # the engine is fresh
            r.logprobs, r.old_logprobs = r.old_logprobs.numpy(), None
        metrics.append(sdpo.update(ddp, teacher, optimizer, batch, 1e-3))
    first, second = metrics
    assert 0 < second["loss"] < 0.9 * first["loss"]
    assert first["updates"] == 1 and first["skipped"] == 0 and first["grad_norm"] > 0
    assert first["mismatch"] < 1e-5 and first["mismatch_max"] < 1e-3
    assert first["trained_tokens"] == sum(
        len(r.response_ids) for r in batch if r.teacher_prompt_ids)
    for r in batch:
        r.teacher_prompt_ids = None
    before = [p.detach().clone() for p in ddp.parameters()]
    nothing = sdpo.update(ddp, teacher, optimizer, batch, 1e-3)
    assert nothing["updates"] == nothing["loss"] == nothing["trained_tokens"] == 0
    assert all(map(torch.equal, before, ddp.parameters()))


def test_loss_on_the_first_tokens_alone(alone, monkeypatch):
    """App. E: as if the rest of the answer were not there, but for its length in the metrics."""
    gradients = []
    monkeypatch.setattr(sdpo, "check_engine", lambda *_: None)  # nobody sampled these
    for loss_tokens in (7, None):
        ddp, optimizer = learner(sdpo, Namespace(**{**vars(ARGS), "loss_tokens": loss_tokens}))
        batch = make_batch(23)
        if loss_tokens is None:
            for r in batch:
                r.response_ids, r.logprobs = r.response_ids[:7], r.logprobs[:7]
        optimizer.step = lambda lr, max_norm: 0.0
        metrics = sdpo.update(ddp, toy(), optimizer, batch, 1e-3)
        assert metrics["trained_tokens"] == sum(
            min(7, len(r.response_ids)) for r in batch if r.teacher_prompt_ids)
        gradients.append(dict(zip(optimizer.names, (s.clone() for s in optimizer.sums))))
    assert max(len(r.response_ids) for r in make_batch(23)) > 7
    assert_same_gradient(*gradients)


def test_the_teacher_comes_back_and_follows():
    model, teacher = toy(), toy()
    initial = [p.clone() for p in model.parameters()]
    args = Namespace(model=str(ROOT / "toy/model"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)

    def emptied():  # as main() does while vLLM samples
        for t in teacher.parameters():
            t.data = t.data.new_empty(0)
        return teacher
    sdpo.load_teacher(emptied(), [], args, CPU)  # without --ema: the initial weights, for ever
    assert all(map(torch.equal, teacher.parameters(), initial))
    averaged = [t.detach().clone() for t in teacher.parameters()]
    for _ in range(2):
        sdpo.follow(averaged, model, 0.25)
    sdpo.load_teacher(emptied(), averaged, args, CPU)
    for t, start in zip(teacher.parameters(), initial, strict=True):
        torch.testing.assert_close(t.data, start + 1 - 0.75**2, atol=1e-6, rtol=1e-6)


def test_the_first_signal_breaks_off_the_sampling_and_nothing_else():
    before = signal.signal(signal.SIGTERM, sdpo.on_signal)
    try:
        def sample(n):
            signal.raise_signal(signal.SIGTERM)
            return [n]
        assert sdpo.until_stopped(lambda n: [n], 1) == [1] and not sdpo.stop["asked"]
        signal.raise_signal(signal.SIGTERM)  # in an update, say: it comes to its end
        assert sdpo.stop["asked"] and sdpo.until_stopped(sample, 1) == []  # not even begun
        sdpo.stop["asked"] = False
        assert sdpo.until_stopped(sample, 1) == [] and sdpo.stop["asked"]
        signal.raise_signal(signal.SIGTERM)
        assert sdpo.stop == dict(asked=True, sampling=False)
    finally:
        signal.signal(signal.SIGTERM, before)
        sdpo.stop["asked"] = False


def test_stale_engine_is_noticed():
    fresh, stale = dict(gap=1e-4, tokens=100), dict(gap=20.0, tokens=100)  # 0.2 a token: trap 4
    sdpo.check_engine([fresh], torch.device("cpu"))
    with pytest.raises(SystemExit, match="stale"):
        sdpo.check_engine([stale], torch.device("cpu"))
    # a NaN says nothing about the engine: its gradient is NaN too, and that update is skipped
    sdpo.check_engine([dict(gap=math.nan, tokens=1)], torch.device("cpu"))


# ---------------------------------------------------------------------------------------- prompts

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


# ---------------------------------------------------------------------------------------- command


def test_defaults_are_the_papers():
    args = sdpo.parse_args(["--model", "x"])
    table_8_and_10 = dict(
        max_prompt_tokens=2048, max_response_tokens=20480, questions_per_step=256,
        minibatch_questions=128, rollouts=8, temperature=1.0, warmup_steps=10, alpha=0.5, top_k=100,
        ema=0.0, lr=1e-5)
    assert {name: getattr(args, name) for name in table_8_and_10} == table_8_and_10


GOOD = dict(prompt=[dict(role="user", content="1+1?")], reward_model=dict(ground_truth="2"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with good and bad input, the current one."""
    rows = [json.dumps(row) for row in (GOOD, dict(GOOD, reward_model=None), dict(answer="2"))]
    (tmp_path / "good.jsonl").write_text(rows[0])
    (tmp_path / "broken.jsonl").write_text(rows[0] + "\n{not json\n")
    (tmp_path / "no_answer.jsonl").write_text(rows[0] + "\n" + rows[1])
    (tmp_path / "no_question.jsonl").write_text(rows[2])
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


FLAGS = ["--model", ROOT / "toy/model", "--data", "good.jsonl", "--eval_data", "good.jsonl",
         "--max_response_tokens", "64"]  # of a flag given twice the last counts


@pytest.mark.parametrize("flags, said", [
    (["--data", "no/such.jsonl"], "no/such.jsonl"),
    (["--data", "bad.parquet"], "bad.parquet"),
    (["--data", "broken.jsonl"], "broken.jsonl, line 2"),
    (["--data", "no_answer.jsonl"], "no_answer.jsonl, row 2: no answer"),
    (["--data", "no_question.jsonl"], "no_question.jsonl, row 1: no question"),
    (["--max_prompt_tokens", "3"], "--max_prompt_tokens 3"),
    (["--model", "no/such/folder"], "--model no/such/folder"),
    (["--model", "empty"], "--model empty"),
    (["--minibatch_questions", "100"], "--minibatch_questions, 100, must divide"),
    (["--top_k", "0"], "--top_k 0 must be at least 1"),
    (["--alpha", "2"], "--alpha 2.0 must lie between 0 and 1"),
    (["--lr", "-1"], "--lr -1.0 must lie between 0 and 1"),
    (["--ema", "-1"], "--ema -1.0 must lie between 0 and 1"),
    (["--gpu_memory_utilization", "1.1"], "--gpu_memory_utilization 1.1"),
    (["--temperature", "0"], "--temperature"),
    (["--eval_data", "no/such.json"], "no/such.json"),
    (["--eval_data", "good.jsonl", "other/good.parquet"], "two benchmarks have one name"),
    (["--max_response_tokens", "9999"], "positions"),
    (["--context", "gold"], "1 of 1 questions in good.jsonl have no `solution`"),
    (["--teacher_thinking"], "--teacher_thinking: the student thinks too"),
    (["--loss_tokens", "0"], "--loss_tokens 0 must be at least 1"),
    (["--nonsense"], "--nonsense"),
])
def test_bad_input_is_one_line_and_exit_code_2(here, monkeypatch, flags, said):
    assert said in refusal_of_main(sdpo, monkeypatch, [*FLAGS, *flags])
    assert not (here / "runs").exists()


def test_the_ranks_must_divide_the_questions(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "the ranks, 3, must divide" in refusal_of_main(sdpo, monkeypatch, FLAGS)


def test_an_untouched_model_is_measured_with_a_rate_of_0(here):
    sdpo.check_args(sdpo.parse_args([*map(str, FLAGS), "--lr", "0", "--steps", "1"]))


def test_token_kl_names_each_token(tmp_path, tokenizer):
    table = torch.zeros(2, 50, dtype=torch.float64)
    table[:, 7] = torch.tensor([1.5, 3.0])
    sdpo.write_token_kl(tmp_path, table, tokenizer)
    assert json.loads((tmp_path / "token_kl.json").read_text()) == {
        "7": dict(text=tokenizer.decode([7]), kl=1.5, count=3)}


def test_wandb_gets_the_metrics_and_is_asked_for_before_a_model_loads(tmp_path, alone, monkeypatch):
    args = sdpo.parse_args(["--model", "m", "--run_dir", str(tmp_path / "run"), "--wandb"])
    sent = []
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    assert "--wandb: ModuleNotFoundError" in refusal(sdpo.begin_run, args)
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        init=lambda **how: sent.append(how), log=lambda m, step: sent.append((step, m))))
    sdpo.begin_run(args)
    times = [("start", 0.0), ("rollout", 1.0), ("update", 2.0)]
    sdpo.log(args, 3, [rollout([1], [1, 2])], dict(loss=0.5, skipped=0), times)
    (begun, (step, metrics)) = sent
    assert begun["config"]["lr"] == 1e-5 and step == 3 and metrics["length"] == 2
    assert lines(tmp_path / "run/metrics.jsonl") == [metrics]
