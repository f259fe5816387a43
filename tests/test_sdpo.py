"""sdpo.py: questions, prompts, loss and update, against brute force. No vLLM, only the toy."""
import itertools
import json
import math
import random
from unittest import mock

import pytest
import torch

import sdpo
from common import (ROOT, assert_same_gradient, gradients_of, learner, needs_tokenizers, on_ranks,
                    tokenizer_of, toy)

torch.manual_seed(0)

def flags(*more):
    """Those of the toy's updates: mini-batches of 20 rollouts."""
    return sdpo.make_parser().parse_args([
        "--model", str(ROOT / "toy/model"), "--rollouts", "1", "--minibatch_questions", "20",
        "--temperature", "0.7", "--top_k", "20", "--tokens_per_micro_batch", "200", *more])

# --- questions and prompts -----------------------------------------------------------------------

def write_questions(path, n, long=0):
    """A file of n questions, of which the last `long` have prompts of over 200 tokens."""
    path.write_text("".join(json.dumps(dict(problem=f"{i} + 1?" + " 1" * 200 * (i >= n - long),
                                            answer=str(i + 1))) + "\n" for i in range(n)))
    return path

def test_question_sets_are_nested_and_by_seed(tmp_path, alone, tokenizer):
    data = write_questions(tmp_path / "d.jsonl", 60, long=20)

    def draw(*more, **how):
        args = flags("--max_prompt_tokens", "200", *more)
        return [q["answer"] for q in sdpo.read_questions(str(data), tokenizer, args, **how)]
    few, more, everything = (draw(*n, draw=True) for n in (
        ["--num_questions", "3"], ["--num_questions", "30"], []))
    assert few == more[:3] == everything[:3] and sorted(everything, key=int) != everything
    assert sorted(map(int, everything)) == list(range(1, 41))  # the long ones are dropped
    assert draw("--num_questions", "3", "--seed", "1", draw=True) != few
    assert draw("--num_questions", "3") == [str(i + 1) for i in range(40)]  # an evaluation's: all

def test_epochs_are_complete_and_differ():
    """So a small set repeats evenly within a step."""
    stream = sdpo.question_stream(list(range(10)), seed=0)
    epochs = [list(itertools.islice(stream, 10)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3

QUESTION = "What is 1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
REPROMPT = QUESTION + "\nCorrect solution:\n\nS\n\nCorrectly solve the original question."
TABLE_12 = {  # model: (what comes before the user's text, what comes after with thinking, without)
    "deepseek-r1-distill-qwen": (
        "<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜><think>\n", None),
    "qwen3": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
              "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "toy": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "olmo-3-instruct": (
        "<|im_start|>system\nYou are a helpful function-calling AI assistant. You do not currently "
        "have access to any functions. <functions></functions><|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n", None),
}

@pytest.mark.parametrize("name", ["toy", *(
    pytest.param(name, marks=needs_tokenizers) for name in TABLE_12 if name != "toy")])
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

@pytest.mark.parametrize("form, response, shown", [
    ("full", "<think>\na\n</think>\n\nSo 4.", "<think>\na\n</think>\n\nSo 4."),
    ("uncertain", "<think>a</think> b", "<think>a</think> b"),
    ("without_think", "<think>\na\n</think>\n\nSo 4.", "So 4."),
    ("without_think", "a\n</think>\n\nSo 4.", "So 4."),  # DeepSeek: the template opened it
    ("without_think", "no think part", "no think part"),
])
def test_what_a_teacher_reads(form, response, shown):
    (chat,) = sdpo.teacher_messages([dict(role="user", content="Q")], response, form)
    closing = "Correctly solve the original question." if form != "uncertain" else sdpo.UNCERTAIN
    assert chat["content"] == f"Q\nCorrect solution:\n\n{shown}\n\n{closing}"

def rollout(prompt, response, teacher=None, row=0, reward=0.0, text="", finished=True):
    question = dict(prompt_ids=prompt, row=row, messages=[dict(role="user", content="1+1?")])
    return sdpo.Rollout(question, response, [-1.0] * len(response), text, finished, reward, teacher)

def test_a_demonstration_is_a_correct_sibling_at_random(alone, monkeypatch, tokenizer):
    """Never the rollout itself, nor one that was cut, whatever it has boxed."""
    def sampled(llm, verifier, questions, seed, **sampling):
        rewards = dict(A=0.0, B=1.0, C=1.0, D=1.0)
        return [rollout([1], [1], None, q["row"], reward, text, text != "D")
                for q in questions for text, reward in rewards.items()]
    monkeypatch.setattr(sdpo, "generate", sampled)
    args, shown = flags("--rollouts", "4"), {text: set() for text in "ABCD"}
    rollouts = sdpo.sample_groups(None, None, tokenizer, [{}] * 40, 1, args)
    assert [r.question["row"] for r in rollouts] == sorted([*range(40)] * 4)
    for r in rollouts:
        assert r.reward == (r.text in "BC")
        prompt = tokenizer.decode(r.teacher_prompt_ids)
        shown[r.text].add(prompt.partition("Correct solution:\n\n")[2][0])
    assert shown == dict(A={"B", "C"}, B={"C"}, C={"B"}, D={"B", "C"})
    group = [rollout([1], [1], reward=reward) for reward in (0.0, 1.0)]
    sdpo.set_teacher_prompts(group, tokenizer, random.Random(0), args)
    assert group[0].teacher_prompt_ids and group[1].teacher_prompt_ids is None

# --- loss ----------------------------------------------------------------------------------------

def reference(student_logits, teacher_logits, alpha, top):
    """Eq. 1 and its relatives over the tokens `top` and all others as one, float64, by terms."""
    def buckets(logits):
        p = logits.double().softmax(-1)
        others = p.scatter(-1, top, 0).sum(-1, keepdim=True)
        return torch.cat([p.gather(-1, top), others], -1).clamp(min=1e-30)
    p, q = buckets(student_logits), buckets(teacher_logits)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)
    if alpha in (0, 1):
        return kl(p, q) if alpha else kl(q, p)
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
    targets = torch.randint(50, (37,))
    args = flags("--alpha", str(alpha), "--top_k", str(k))
    got, logprobs = sdpo.token_losses((hidden, head), (teacher_hidden, teacher_head), targets, args)
    logits, teacher_logits = head(hidden) / 0.7, teacher_head(teacher_hidden).detach() / 0.7
    want = reference(logits, teacher_logits, alpha, logits.topk(k).indices)
    # abs: the empty tail bucket is clamped to 1e-7 of probability, not 0
    torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[range(37), targets])
    for g, w in zip(*(torch.autograd.grad(loss.sum(), [hidden, head.weight])
                      for loss in (got, want))):
        torch.testing.assert_close(g, w, atol=5e-5, rtol=1e-4)

# --- update --------------------------------------------------------------------------------------

def make_batch(size):
    """Rollouts of which two thirds have a teacher, the same in every process. vLLM's
    log-probabilities are far enough from the trainer's for the importance weight's cut."""
    batch, student = [], sdpo.Student(toy(), flags())
    for row in range(size):
        rng = random.Random(row)
        prompt, response, teacher = ([rng.randrange(5, 400) for _ in range(n)]
                                     for n in (4, rng.randint(1, 60), 30))
        batch.append(rollout(prompt, response, teacher if row % 3 else None, row))
        with torch.no_grad():
            logprobs = student(batch[-1:])[1].tolist()
        batch[-1].logprobs = [p + rng.uniform(-1.2, 1.2) for p in logprobs]
    return batch

def update_of(script, batch, args, lr, *teacher, recompute=False):
    """What an update makes of a batch: metrics, this rank's gradient of the last mini-batch."""
    with mock.patch.multiple(script, CHUNK=16, MISMATCH_LIMIT=math.inf):
        model, optimizer = learner(script)
        gradient = gradients_of(optimizer)
        storages = []  # of gradients, before each micro-batch
        model.get_decoder().register_forward_pre_hook(lambda *_: storages.append(len(
            {w.grad.untyped_storage()._cdata for w in model.parameters() if w.grad is not None})))
        if recompute:  # as main() does
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        metrics = script.update(model, *teacher, optimizer, batch, lr, args)
        micros = script.micro_batches_of_rank(batch[-20:], args.tokens_per_micro_batch)
        assert all(len(m) * max(r.tokens() for r in m) <= args.tokens_per_micro_batch
                   for m in micros if len(m) > 1)  # what is too long goes alone
        return dict(metrics, gradient=gradient, micros=len(micros), weights=[*model.parameters()],
                    fillers=sum(not r.weight for m in micros for r in m), storages=max(storages))

def measure(size, lr=1e-6, rounds=sdpo.ROUND, recompute=False):
    with mock.patch.multiple(sdpo, ROUND=rounds, CHUNK=16):
        return update_of(sdpo, make_batch(size), flags(), lr, toy(), recompute=recompute)

def brute_force(model, batch):
    """(loss, tokens, tokens cut, sum of mismatches) of a mini-batch: each rollout alone, all logits
    at once; one without a teacher adds nothing and counts."""
    first, total, tokens, cut, gap = toy(), 0.0, 0, 0, 0.0
    for r in batch:
        if r.teacher_prompt_ids is None:
            continue
        now, start, teacher = (asked(input_ids=torch.tensor([prompt + r.response_ids])).logits[
            0, len(prompt) - 1 : -1] / 0.7 for asked, prompt in (
                (model, r.question["prompt_ids"]), (first, r.question["prompt_ids"]),
                (first, r.teacher_prompt_ids)))
        loss = reference(now, teacher.detach(), 0.5, now.topk(20).indices)
        p_now, p_start = (logits.detach().log_softmax(-1)[range(len(loss)), r.response_ids]
                          for logits in (now, start))
        p_vllm = torch.tensor(r.logprobs)
        ratio, correction = (p_now - p_start).exp(), (p_start - p_vllm).exp()
        total = total + (loss * ratio.clamp(max=2) * correction.clamp(max=2)).mean() / len(batch)
        tokens, gap = tokens + len(loss), gap + (p_start - p_vllm).abs().sum().item()
        cut += ((ratio >= 2) | (correction >= 2)).sum().item()
    return total, tokens, cut, gap

@pytest.mark.parametrize("minibatches", [1, 2])  # at the second the weights have moved
def test_one_rank_gives_the_gradient_of_brute_force(alone, minibatches):
    model, batch, lr = toy(), make_batch(20 * minibatches), 1e-2
    parts = [brute_force(model, batch[:20])]
    if minibatches == 2:
        for w, moved in zip(model.parameters(), measure(20, lr)["weights"]):
            w.data.copy_(moved)
        parts.append(brute_force(model, batch[20:]))
    parts[-1][0].backward()
    loss, tokens, cut, gap = map(sum, zip(*parts))
    got = measure(20 * minibatches, lr)
    assert got["loss"] == pytest.approx(loss.item() / minibatches, rel=1e-4)
    assert got["trained_tokens"] == tokens and got["mismatch"] == pytest.approx(gap / tokens)
    assert got["clipped"] == cut / tokens > 0.1
    assert_same_gradient(got["gradient"], {n: p.grad for n, p in model.named_parameters()}, 1e-3)
    assert got["storages"] <= 2  # DDP's buckets: beside them gradients would be a second copy
    if minibatches == 1:
        norm = torch.stack([g.norm() for g in got["gradient"].values()]).norm().item()
        assert got["grad_norm"] == pytest.approx(norm, rel=1e-4)

def assert_same_on_two_ranks(one, two):
    """What measure() says on one rank is what it says on two, and both of them take their part."""
    assert two[0]["micros"] == two[1]["micros"] == (one["micros"] + 1) // 2
    assert sum(r["fillers"] for r in two) == one["micros"] % 2 and one["fillers"] == 0
    assert_same_gradient(two[0]["gradient"] | two[1]["gradient"], one["gradient"])
    for r in two:  # the statistics are every rank's, and are of all
        for key in {"loss", "grad_norm", "mismatch"} & one.keys():
            assert r[key] == pytest.approx(one[key], rel=1e-4, abs=1e-7) and one[key] != 0
        for key in {"trained_tokens", "clipped", "trained"} & one.keys():
            assert r[key] == one[key]

@pytest.mark.slow
@pytest.mark.parametrize("size, rounds", [
    (40, sdpo.ROUND), (20, 2),  # micro-batches summed in one round, or in several
    (2, 2)])  # of the two one has a teacher: rank 1 has a filler
def test_two_ranks_give_the_gradient_of_one(tmp_path, alone, size, rounds):
    one, two = measure(size), on_ranks(2, tmp_path, measure, size, 1e-6, rounds)
    assert_same_on_two_ranks(one, two)
    assert size == 2 or two[0]["micros"] > 2  # several rounds
    assert all(map(torch.equal, two[0]["weights"], two[1]["weights"]))

def test_recomputing_layers_changes_no_bit(alone):
    kept, recomputed = measure(20), measure(20, recompute=True)
    assert kept["loss"] == recomputed["loss"]
    assert all(map(torch.equal, kept["weights"], recomputed["weights"]))

def test_an_engine_with_old_weights_ends_the_run(alone):
    (model, optimizer), batch = learner(sdpo), make_batch(20)
    before = [w.detach().clone() for w in model.parameters()]
    with pytest.raises(SystemExit, match=r"error: .* a token off .* old weights"):
        sdpo.update(model, toy(), optimizer, batch, 1e-3, flags())
    assert all(map(torch.equal, before, model.parameters()))
