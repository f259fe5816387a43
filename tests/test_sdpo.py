"""sdpo.py: the loss, the prompts, the batches, against brute force. No vLLM, no model but random."""
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import sdpo

ROOT = Path(__file__).resolve().parent.parent
TOKENIZERS = ROOT.parent / "shared/data/tokenizers"
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
    got, _ = losses(parts, 50, alpha)
    grads = torch.autograd.grad(got.sum(), [hidden, head.weight])
    want = reference(head(hidden), teacher_head(teacher_hidden).detach(), alpha)
    wanted = torch.autograd.grad(want.sum(), [hidden, head.weight])
    # abs: the empty tail bucket is clamped to 1e-7 of probability, not 0
    torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=1e-5)
    for g, w in zip(grads, wanted):
        torch.testing.assert_close(g, w, atol=5e-5, rtol=1e-4)


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
        loss, logprobs = losses(parts, 10, 0.5, temperature=0.7)
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
    loss, logprobs = sdpo.token_losses(hidden, head, targets, 1.0)
    assert loss.abs().max() == 0 and logprobs.shape == (37,)


def test_importance_weight_is_cut_and_detached():
    now = torch.tensor([0.0, 0.5, 3.0, 100.0, -100.0], requires_grad=True)
    weight = sdpo.importance_weight(now, torch.zeros(5))
    assert not weight.requires_grad
    assert weight.tolist() == pytest.approx([1, math.exp(0.5), 2, 2, math.exp(-20)])


def rollout(prompt, response, teacher=None, row=0, reward=0.0):
    return sdpo.Rollout(row, prompt, response, np.full(len(response), -1.0, np.float32), "", True,
                        reward, teacher)


def test_loss_weights_count_sequences_without_demonstration():
    batch = [rollout([1], [1, 2], [3]), rollout([1], [1] * 5, [3]), rollout([1], [1] * 7)]
    weights = sdpo.loss_weights(batch, "sequence")
    assert [weights.get(id(r)) for r in batch] == [1 / 6, 1 / 15, None]
    assert list(sdpo.loss_weights(batch, "token").values()) == [1 / 7, 1 / 7]


def test_a_demonstration_is_a_correct_sibling_at_random():
    rng = random.Random(0)
    assert sdpo.choose_demonstration([0, 1, 0], 1, rng) is None  # its group's only success
    assert sdpo.choose_demonstration([0, 0], 0, rng) is None
    drawn = {sdpo.choose_demonstration([1, 1, 0, 1], 0, rng) for _ in range(100)}
    assert drawn == {1, 3}


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


def test_hands_are_even_and_micro_batches_keep_the_budget():
    rng = random.Random(0)
    batch = [rollout([1] * 10, [1] * rng.randint(1, 400), [1] * 30) for _ in range(203)]
    hands = sdpo.deal(batch, 4)
    loads = [sum(r.tokens() for r in hand) for hand in hands]
    assert max(loads) <= 1.1 * min(loads)
    assert sorted(map(id, itertools.chain(*hands))) == sorted(map(id, batch))
    micros = sdpo.micro_batches(batch, 2000)
    assert sorted(map(id, itertools.chain(*micros))) == sorted(map(id, batch))
    assert all(len(m) * max(r.tokens() for r in m) <= 2000 for m in micros)
    assert [len(m) for m in sdpo.micro_batches(batch[:2], 1)] == [1, 1]  # too long goes alone


def test_padding_changes_nothing():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ROOT / "toy/model", dtype=torch.float32)
    prompts, responses = [[5, 6, 7], [8, 9], [10] * 9], [[11, 12], [13] * 6, [14]]
    together = sdpo.response_hidden(model, prompts, responses, "cpu")
    alone = [sdpo.response_hidden(model, [p], [y], "cpu") for p, y in zip(prompts, responses)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


TWO_RANKS = """
import sys, random, json, numpy as np, torch
from argparse import Namespace
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
import sdpo
torch.manual_seed(0)
device = sdpo.start_process_group()
rank, world_size = sdpo.dist.get_rank(), sdpo.dist.get_world_size()
results = []
for loss_mean, budget, size in json.loads(sys.argv[2]):
    args = Namespace(temperature=1.0, top_k=20, alpha=0.5, loss_mean=loss_mean,
                     tokens_per_micro_batch=budget)
    model, teacher = (AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
                      for _ in range(2))
    rng = random.Random(1)
    draw = lambda n: [rng.randrange(5, 400) for _ in range(n)]
    batch = [sdpo.Rollout(i, draw(4), y := draw(rng.randint(1, 60)),
                          np.array([-3.0 + rng.random() for _ in y], np.float32), "", True, 0.0,
                          draw(30) if i % 3 else None) for i in range(size)]
    ddp = DistributedDataParallel(sdpo.Student(model, args, device))
    hand = sdpo.deal([r for r in batch if r.teacher_prompt_ids], world_size)[rank]
    stats = sdpo.backward(ddp, teacher, None, batch, hand, None)
    results.append(dict(grads={n: p.grad for n, p in model.named_parameters()},
                        loss=sum(s["loss"] for s in stats),
                        counts=sdpo.exchange([len(sdpo.micro_batches(hand, budget))])))
if rank == 0:
    torch.save(results, sys.argv[3])
del ddp  # freed after the group is gone, it can hang (gloo, torch 2.13)
sdpo.dist.destroy_process_group()
"""
CASES = [("sequence", 200, 23), ("token", 200, 23),
         ("sequence", 200, 2)]  # one distilled rollout: the second rank's hand is empty


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """The results of CASES on one rank and on two."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "job.py").write_text(TWO_RANKS)
    for ranks in (1, 2):
        result = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
             str(ranks), folder / "job.py", ROOT / "toy/model", json.dumps(CASES),
             folder / f"{ranks}.pt"],
            env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
    return [torch.load(folder / f"{ranks}.pt") for ranks in (1, 2)]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_ranks_give_the_gradient_of_one(gradients, case):
    one, two = (results[case] for results in gradients)
    assert two["counts"][0] != two["counts"][1]  # unequal numbers of micro-batches, as intended
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5) and one["loss"] > 0
    scale = max(g.abs().max() for g in one["grads"].values())
    for name, g in one["grads"].items():
        assert (g - two["grads"][name]).abs().max() <= 1e-5 * scale, name


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
    "deepseek-r1-distill-qwen": ("<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜><think>\n", None),
    "qwen3": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
              "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "olmo-3-instruct": (
        "<|im_start|>system\nYou are a helpful function-calling AI assistant. You do not currently "
        "have access to any functions. <functions></functions><|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n", None),
}


@pytest.mark.skipif(not TOKENIZERS.exists(), reason="needs the real tokenizers beside the project")
@pytest.mark.parametrize("name", TABLE_12)
def test_prompts_of_the_papers_models(name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / name)
    before, thinking, off = TABLE_12[name]
    chat = [dict(role="user", content=QUESTION)]
    for messages, text in ((chat, QUESTION), (sdpo.teacher_messages(chat, "S"), REPROMPT)):
        for enabled, after in ((True, thinking), (False, off or thinking)):
            ids = sdpo.render(tokenizer, messages, enabled)
            assert tokenizer.decode(ids) == before + text + after
            if tokenizer.bos_token_id is not None:
                assert ids.count(tokenizer.bos_token_id) == before.count(tokenizer.bos_token)


def test_prompts_of_the_toy():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/model")
    chat = [dict(role="system", content="Be brief."), dict(role="user", content=QUESTION)]
    text = tokenizer.decode(sdpo.render(tokenizer, sdpo.teacher_messages(chat, "S"), False))
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n" + REPROMPT
                    + "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    answer = "<think>\nHmm.\n</think>\n\n\\boxed{4}"  # the think tags must survive decoding
    assert tokenizer.decode(tokenizer.encode(answer), skip_special_tokens=True) == answer


# ---------------------------------------------------------------------------------------- command


def test_help_is_quick_and_needs_no_vllm():
    start = time.time()
    code = "import sys, sdpo; assert 'vllm' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert "--questions_per_step" in subprocess.run(
        [sys.executable, "sdpo.py", "--help"], cwd=ROOT, check=True, capture_output=True,
        text=True).stdout
    assert time.time() - start < 10  # two starts of at most 5 s each


def test_defaults_are_the_papers():
    args = sdpo.parse_args(["--model", "x"])
    table_8_and_10 = dict(
        max_prompt_tokens=2048, max_response_tokens=20480, questions_per_step=256,
        minibatch_questions=128, rollouts=8, temperature=1.0, warmup_steps=10, alpha=0.5, top_k=100,
        ema=0.0, lr=1e-5)
    assert {name: getattr(args, name) for name in table_8_and_10} == table_8_and_10


GOOD = dict(prompt=[dict(role="user", content="1+1?")], reward_model=dict(ground_truth="2"))


@pytest.mark.parametrize("flags, said", [
    (["--data", "no/such.jsonl"], "no/such.jsonl"),
    (["--data", "bad.parquet"], "bad.parquet"),
    (["--data", "broken.jsonl"], "broken.jsonl, line 2"),
    (["--data", "no_answer.jsonl"], "no_answer.jsonl, row 2: no answer"),
    (["--data", "no_question.jsonl"], "no_question.jsonl, row 1: no question"),
    (["--data", "good.jsonl", "--max_prompt_tokens", "3"], "--max_prompt_tokens 3"),
    (["--model", "no/such/folder"], "--model no/such/folder"),
    (["--model", "empty"], "--model empty"),
    (["--minibatch_questions", "100"], "--minibatch_questions 100 does not divide"),
    (["--top_k", "0"], "--top_k"),
    (["--alpha", "2"], "--alpha"),
    (["--temperature", "0"], "--temperature"),
    (["--run_dir", "full"], "--run_dir full already holds results"),
    (["--eval_data", "no/such.json"], "no/such.json"),
    (["--max_response_tokens", "9999"], "positions"),
    (["--nonsense"], "--nonsense"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, flags, said):
    rows = [json.dumps(row) for row in (GOOD, dict(GOOD, reward_model=None), dict(answer="2"))]
    (tmp_path / "good.jsonl").write_text(rows[0])
    (tmp_path / "broken.jsonl").write_text(rows[0] + "\n{not json\n")
    (tmp_path / "no_answer.jsonl").write_text(rows[0] + "\n" + rows[1])
    (tmp_path / "no_question.jsonl").write_text(rows[2])
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/metrics.jsonl").write_text("precious")
    defaults = {"--model": str(ROOT / "toy/model"), "--data": "good.jsonl", "--eval_data": "good.jsonl",
                "--max_response_tokens": "64"}
    for name, value in defaults.items():
        flags = flags if name in flags else [*flags, name, value]
    result = subprocess.run([sys.executable, ROOT / "sdpo.py", *flags], cwd=tmp_path,
                            env=dict(os.environ, HF_HUB_OFFLINE="1"), capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert said in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert (tmp_path / "full/metrics.jsonl").read_text() == "precious"
    assert not (tmp_path / "runs").exists()
