"""What only a GPU runs, as far as a CPU can show it: the order of sleeping, waking and freeing with
a recording engine in vLLM's place, and compiled layers. With vLLM itself: test_gpu.py. bfloat16
weights with their masters, killed and resumed: python tests/kill.py --masters
"""
import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

import grpo
import sdpo
from common import DATA, ROOT, few, tokenizer_of, toy

sys.path.append(str(ROOT / "benchmarks"))

import update as bench


class Recorder:
    """Stands for vllm.LLM: notes its calls, and what the trainer holds while it samples."""

    def __init__(self, models, gone):
        self.models, self.gone = models, gone
        self.calls, self.weights = [], None
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))

    def sleep(self, **how):
        self.calls.append(("sleep", how))

    def wake_up(self, **how):
        self.calls.append(("wake_up", how))

    def collective_rpc(self, method, kwargs):
        self.calls.append((method, [*kwargs]))
        self.weights = {name: w.clone() for name, w in kwargs["weights_iterator"]}

    def reset_prefix_cache(self):
        pass

    def get_tokenizer(self):
        return tokenizer_of("toy")

    def generate(self, prompts, sampling, use_tqdm):
        (student,) = self.models  # no teacher
        assert all(torch.equal(w, self.weights[n]) for n, w in student.named_parameters())
        assert all(w.grad is None for w in student.parameters())
        assert all(storage.expired() for storage in self.gone)
        self.calls.append("generate")
        return [SimpleNamespace(outputs=[SimpleNamespace(
            token_ids=[5, 6, 7, 8 + i], logprobs=SimpleNamespace(logprobs=[-1.0] * 4),
            finish_reason="stop") for i in range(sampling.get("n", 1))]) for _ in prompts]


@pytest.fixture(scope="module", params=[sdpo, grpo], ids=["sdpo", "grpo"])
def recorded(request, tmp_path_factory):
    """The recording engine of a run of two steps, as it goes on a GPU."""
    script, folder = request.param, tmp_path_factory.mktemp("recorded")
    engines, models, gone, empty = [], [], [], torch.empty

    def make_llm(model, **settings):
        engines.append(Recorder(models, gone))
        return engines[0]

    def start():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return torch.device("cuda")

    def load_model(path, load=script.load_model):
        model = load(path)
        if not models:
            models.append(model)
        else:  # the teacher of a step
            gone.extend(StorageWeakRef(w.untyped_storage()) for w in model.parameters())
        return model

    def add_gradients(optimizer, add=script.MasterAdamW.add_gradients):
        gone.extend(StorageWeakRef(w.grad.untyped_storage()) for w in optimizer.owned.values())
        return add(optimizer)

    def update(*args, original=script.update):
        engines[0].calls.append("update")
        return original(*args)
    vllm = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = make_llm, lambda **how: how
    verify = SimpleNamespace(verify=lambda texts, _: [float(i % 2) for i in range(len(texts))])
    questions = few(DATA / "in.jsonl", 2, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", vllm)
        patch.setattr(torch.cuda, "is_available", lambda: True)  # what would go there stays
        patch.setattr(torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how))
        patch.setattr(PreTrainedModel, "to", lambda model, device: model)
        for name, replacement in dict(start_process_group=start, load_model=load_model,
                                      update=update, save_checkpoint=lambda *_: None,
                                      Verifier=lambda: verify, MISMATCH_LIMIT=math.inf).items():
            patch.setattr(script, name, replacement)
        patch.setattr(script.MasterAdamW, "add_gradients", add_gradients)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, (
            "--model", ROOT / "toy/model", "--data", questions, "--eval_data", questions,
            "--max_response_tokens", 64, "--questions_per_step", 2, "--minibatch_questions", 1,
            "--rollouts", 2, "--steps", 2, "--run_dir", folder / "run", "--lr", "1e-3"))])
        try:
            script.main()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return engines[0]


def test_vllm_sleeps_while_the_trainer_works_and_wakes_in_two_steps(recorded):
    """Weights, then the KV cache: with both at once the old weights would lie beside it. Teacher
    and gradients are gone before it samples."""
    slept, woken = ("sleep", dict(level=2)), [
        ("wake_up", dict(tags=["weights"])), ("reload_weights", ["weights_iterator"]),
        ("wake_up", dict(tags=["kv_cache"]))]
    step = ["generate", slept, "update", *woken]
    assert recorded.calls == [*woken, "generate", *step, *step, "generate"]
    assert recorded.gone


@pytest.mark.slow
def test_compiled_layers_give_the_gradient_of_eager_ones(alone, monkeypatch):
    """Under DDP and gradient checkpointing, with other lengths and a new teacher each time; the
    number of graphs does not grow with the updates."""
    from torch._dynamo.testing import CompileCounterWithBackend
    moments, counts, counter = [], [], CompileCounterWithBackend("aot_eager")
    compile_one = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda layer, **how: compile_one(layer, backend=counter, **how))
    monkeypatch.setattr(sdpo, "MISMATCH_LIMIT", math.inf)

    def load(on_gpu):
        with monkeypatch.context() as patch:  # a large model's layers are compiled
            patch.setattr(torch.cuda, "is_available", lambda: on_gpu)
            patch.setattr(PreTrainedModel, "num_parameters", lambda _: 8e9)
            return sdpo.load_model(ROOT / "toy/model")
    for compiled in (False, True):
        with torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True):  # load_model's own
            model = load(compiled).train()
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
            optimizer = sdpo.MasterAdamW(model, lr=1e-3)
            for size, shortest in ((9, 20), (6, 30), (7, 10)):
                args = SimpleNamespace(sequences=size, shortest=shortest, longest=60,
                                       demonstration_tokens=30, algorithm="sdpo")
                rollouts = bench.make_rollouts(sdpo, args, model.config.vocab_size)
                settings = sdpo.make_parser().parse_args([
                    "--model", "x", "--minibatch_questions", "1", "--rollouts", str(size),
                    "--tokens_per_micro_batch", "250"])
                sdpo.update(model, load(compiled), optimizer, rollouts, 1e-3, settings)
                counts.append(counter.frame_count)
            moments.append(torch.cat([m["exp_avg"].flatten() for m in optimizer.moments.values()]))
    eager, compiled = moments
    assert (compiled - eager).abs().max() < 1e-4 * eager.abs().max()
    assert counts[:3] == [0, 0, 0] and 0 < counts[4] == counts[5] < 10  # one answer, and several
