"""What a checkpoint holds comes back exactly; it is whole or is not one; the same command goes on.

Whole runs that are killed: test_end_to_end.py, and tests/kill.py for as long as you like.
"""
import json

import pytest
import torch

import grpo
import sdpo
from common import DATA, ROOT, lines, on_ranks, refusal_of_main, toy

def make(dtype=torch.float32):
    """(model, optimizer) before any step."""
    model = toy(dtype)
    return model, sdpo.MasterAdamW(model, lr=1e-3)

def state_of(optimizer):
    return dict(masters=optimizer.masters, moments=optimizer.moments)

def tensors(optimizer):
    """{name: (master, count of steps, moment, moment)} of this rank."""
    return {name: (master, *optimizer.moments[name].values())
            for name, master in optimizer.masters.items()}

def step(model, optimizer):
    for p in model.parameters():
        p.grad = torch.sin(p.detach() * 100)
    optimizer.add_gradients()
    optimizer.step(1e-3, 1.0)

def save(model, optimizer, number, tokenizer, folder):
    sdpo.save_checkpoint(model, tokenizer, number, state_of(optimizer), folder)

def load(folder, dtype=torch.float32):
    """(model, optimizer, the step) as main() makes them."""
    model, optimizer = make(dtype)
    done = sdpo.load_checkpoint(folder, state_of(optimizer))
    optimizer.write_weights(optimizer.masters, model)
    return model, optimizer, done

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_comes_back(tmp_path, alone, tokenizer, dtype):
    """In bfloat16 the masters are finer than what the weights show."""
    from transformers import AutoModelForCausalLM
    trained = make(dtype)
    step(*trained)
    save(*trained, 3, tokenizer, tmp_path)
    model, optimizer, done = load(tmp_path, dtype)
    assert done == 3
    # an ordinary Hugging Face folder
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints/step_3")
    assert saved.dtype == dtype and all(map(torch.equal, saved.parameters(), model.parameters()))
    for _ in range(2):  # the same bits, and still after a step
        assert all(map(torch.equal, model.parameters(), trained[0].parameters()))
        for name, held in tensors(optimizer).items():
            assert all(map(torch.equal, held, tensors(trained[1])[name])), name
        step(*trained)
        step(model, optimizer)

def save_a_step(folder, tokenizer):
    """One of the ranks that train a step and save it; returns what it holds."""
    trained = make()
    step(*trained)
    save(*trained, 1, tokenizer, folder)
    return tensors(trained[1])

def load_on_a_rank(folder):
    model, optimizer, done = load(folder)
    return done, tensors(optimizer), [p.detach() for p in model.parameters()]

@pytest.mark.slow
def test_another_number_of_ranks_goes_on(tmp_path, alone, tokenizer):
    """Each rank's half of the state, taken up by one; and one's by two."""
    halves = on_ranks(2, tmp_path, save_a_step, tmp_path, tokenizer)
    assert halves[0] and halves[1] and not set(halves[0]) & set(halves[1])
    model, optimizer, done = load(tmp_path)
    assert done == 1
    for name, held in (halves[0] | halves[1]).items():
        assert all(map(torch.equal, tensors(optimizer)[name], held)), name
    step(model, optimizer)
    save(model, optimizer, 2, tokenizer, tmp_path)
    for done, held, weights in on_ranks(2, tmp_path, load_on_a_rank, tmp_path):
        assert done == 2 and all(map(torch.equal, weights, model.parameters()))
        assert all(all(map(torch.equal, tensors(optimizer)[n], t)) for n, t in held.items())

def test_the_newest_whole_one_counts_and_all_weights_stay(tmp_path, alone, tokenizer):
    trained = make()
    for number in (8, 9, 10, 11):  # 10 is after 9, whatever the alphabet says
        save(*trained, number, tokenizer, tmp_path)
    folders = [tmp_path / f"checkpoints/step_{number}" for number in (8, 9, 10, 11)]
    assert all((folder / "model.safetensors").exists() for folder in folders)
    assert [(p / "trainer_state").exists() for p in folders] == [False, False, True, True]
    folders[-1].rename(tmp_path / "checkpoints/step_11.part")  # killed before the renaming
    (folders[0] / "trainer_state").mkdir()  # killed while that is removed
    assert sdpo.resumable(tmp_path) == [10] and load(tmp_path)[2] == 10
    save(*trained, 11, tokenizer, tmp_path)
    assert load(tmp_path)[2] == 11
    assert sorted((tmp_path / "checkpoints").iterdir()) == sorted(folders)

# --- the same command, and others ----------------------------------------------------------------

def command(run_dir, *more):
    return ["--model", ROOT / "toy/model", "--data", DATA / "in.jsonl", "--eval_data",
            "--questions_per_step", 128, "--max_response_tokens", 64, "--run_dir", run_dir, *more]

@pytest.fixture(params=[sdpo, grpo])
def begun(request, tmp_path, tokenizer, alone, monkeypatch):
    """(script, the folder of its run that has one checkpoint)."""
    script, run = request.param, tmp_path / "run"
    with pytest.raises(pytest.fail.Exception, match="accepted"):
        refusal_of_main(script, monkeypatch, command(run))
    save(*make(), 1, tokenizer, run)
    return script, run

def test_what_does_not_change_the_result_may_change_on_resume(begun, monkeypatch):
    """Out of memory, for instance, is why people start again."""
    script, run = begun
    for more in ([], ["--tokens_per_micro_batch", 99, "--gpu_memory_utilization", 0.5, "--steps", 7,
                      "--save_every", 3, "--no-recompute_layers", "--adamw_device", "cuda",
                      "--eval_data", DATA / "ood.jsonl"]):
        with pytest.raises(pytest.fail.Exception, match="accepted"):
            refusal_of_main(script, monkeypatch, command(run, *more))
    (config,) = lines(run / "config.json")
    assert config["script"] == f"{script.__name__}.py" and config["save_every"] == 3
    assert config["commit"] and config["versions"]["torch"] == torch.__version__

@pytest.mark.parametrize("more, was", [
    (["--lr", 1e-4], "--lr"), (["--data", DATA / "ood.jsonl"], f"{DATA}/in.jsonl"),
    (["--temperature", 0.9], "--temperature")])
def test_what_changes_it_may_not(begun, monkeypatch, more, was):
    script, run = begun
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    line = refusal_of_main(script, monkeypatch, command(run, *more))
    assert f"--run_dir {run}" in line and was in line
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    (run / "checkpoints/step_1").rename(run / "checkpoints/step_1.part")
    with pytest.raises(pytest.fail.Exception, match="accepted"):  # without a checkpoint: anew
        refusal_of_main(script, monkeypatch, command(run, *more))
