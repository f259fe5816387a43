"""What a checkpoint holds comes back exactly; it is whole or is not one.

Whole runs that are killed: test_end_to_end.py, and tests/kill.py for as long as you like.
"""
import json
import resource
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

import sdpo
from common import ROOT, lines, on_ranks, refusal, toy

# what ends a run with one line: the last lines of sdpo.py
NOT_WRITTEN = (OSError, SafetensorError, sdpo.dcp.api.CheckpointException)


def make(dtype=torch.float32):
    """(model, optimizer) before any step."""
    model = toy(dtype)
    return model, sdpo.MasterAdamW(model.named_parameters(), "cpu", lr=1e-3)


def step(model, optimizer):
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad += torch.sin(p.detach() * 100)
    optimizer.fold()
    optimizer.step(1e-3, 1.0)


@pytest.fixture
def run(tmp_path, alone):
    """A run's folder with an empty metrics.jsonl."""
    (tmp_path / "metrics.jsonl").write_text("")
    return tmp_path


def save(model, optimizer, number, tokenizer, folder):
    sdpo.save_checkpoint(model, tokenizer, number, optimizer.tensors(), folder)


def load(folder, dtype=torch.float32):
    """(model, optimizer, the step) as main() makes them at --resume."""
    model, optimizer = make(dtype)
    done = sdpo.load_checkpoint(folder, optimizer.tensors())
    optimizer.write_weights()
    return model, optimizer, done


def assert_same(one, other):
    """Two (model, optimizer) hold the same bits, and still do after a step."""
    for _ in range(2):
        assert all(map(torch.equal, one[0].parameters(), other[0].parameters()))
        for name, tensor in one[1].tensors().items():
            assert torch.equal(tensor, other[1].tensors()[name]), name
        step(*one)
        step(*other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_comes_back(run, tokenizer, dtype):
    """In bfloat16 the masters are finer than what the weights show."""
    from transformers import AutoModelForCausalLM
    trained = make(dtype)
    step(*trained)
    save(*trained, 3, tokenizer, run)
    model, optimizer, done = load(run, dtype)
    assert done == 3
    assert_same(trained, (model, optimizer))
    save(model, optimizer, 4, tokenizer, run)
    # an ordinary Hugging Face folder
    again = AutoModelForCausalLM.from_pretrained(run / "checkpoints/step_4")
    assert again.dtype == dtype and all(map(torch.equal, again.parameters(), model.parameters()))


def save_a_step(folder, tokenizer):
    """One of the ranks that train a step and save it; returns what it holds."""
    trained = make()
    step(*trained)
    save(*trained, 1, tokenizer, folder)
    return trained[1].tensors()


def load_on_a_rank(folder):
    model, optimizer, done = load(folder)
    return done, optimizer.tensors(), [p.detach() for p in model.parameters()]


def test_another_number_of_ranks_goes_on(run, tokenizer):
    """Each rank's half of the state, taken up by one; and one's by two."""
    halves = on_ranks(2, run, save_a_step, run, tokenizer)
    assert halves[0] and halves[1] and not set(halves[0]) & set(halves[1])
    model, optimizer, done = load(run)
    assert done == 1
    for name, tensor in (halves[0] | halves[1]).items():
        assert torch.equal(optimizer.tensors()[name], tensor), name
    step(model, optimizer)
    save(model, optimizer, 2, tokenizer, run)
    for done, held, weights in on_ranks(2, run, load_on_a_rank, run):
        assert done == 2 and all(map(torch.equal, weights, model.parameters()))
        assert all(torch.equal(optimizer.tensors()[name], t) for name, t in held.items())


def cut(path):
    path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize("name, harm", [
    ("__0_0.distcp", cut), ("__0_0.distcp", type(ROOT).unlink), (".metadata", cut)])
def test_one_that_does_not_load_is_named_and_passed_over(run, tokenizer, capsys, name, harm):
    trained = make()
    for number in (1, 2):
        step(*trained)
        (run / "metrics.jsonl").write_text(f'{{"step": {number}}}\n')
        save(*trained, number, tokenizer, run)
        if number == 1:
            first = [p.detach().clone() for p in trained[0].parameters()]
    harm(run / "checkpoints/step_2/trainer_state" / name)
    model, _, done = load(run)
    said = capsys.readouterr().out.splitlines()
    assert done == 1 and all(map(torch.equal, model.parameters(), first))
    assert said[0].startswith(f"{run}/checkpoints/step_2 does not load (")
    assert said[0].endswith("): the one before it is used")
    assert said[1:] == [f"{run}: goes on after step_1"]
    assert lines(run / "metrics.jsonl") == [dict(step=1)]
    save(*trained, 2, tokenizer, run)  # the run comes here again, and replaces it
    assert load(run)[2] == 2


def test_none_that_loads_ends_the_run(run, tokenizer):
    save(*make(), 1, tokenizer, run)
    cut(run / "checkpoints/step_1/trainer_state/__0_0.distcp")
    with pytest.raises(SystemExit, match=f"error: no checkpoint in {run} loads"):
        load(run)


def test_a_half_written_one_is_none(run, tokenizer):
    trained = make()
    save(*trained, 1, tokenizer, run)
    saved = run / "checkpoints/step_1"
    (run / "checkpoints/step_3.part").mkdir()
    for part in saved.iterdir():  # killed between the last byte and the renaming
        (run / "checkpoints/step_3.part" / part.name).symlink_to(part)
    (run / "checkpoints/step_2").mkdir()  # killed while the trainer's state is removed
    (run / "checkpoints/step_2/trainer_state").mkdir()
    assert sdpo.resumable(run) == [saved] and load(run)[2] == 1
    save(*trained, 3, tokenizer, run)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_1", "step_2", "step_3"]
    assert load(run)[2] == 3


def test_weights_of_all_checkpoints_stay_and_the_state_of_two(run, tokenizer):
    trained = make()
    for number in (8, 9, 10, 11):  # 10 is after 9, whatever the alphabet says
        save(*trained, number, tokenizer, run)
    folders = sorted((run / "checkpoints").iterdir(), key=lambda p: int(p.name[5:]))
    assert [p.name for p in folders] == ["step_8", "step_9", "step_10", "step_11"]
    assert all((p / "model.safetensors").exists() for p in folders)
    assert [(p / "trainer_state").exists() for p in folders] == [False, False, True, True]


def test_metrics_after_the_checkpoint_go(run, tokenizer):
    rows = [json.dumps(dict(step=n)) + "\n" for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(rows[:2]))
    save(*make(), 2, tokenizer, run)
    (run / "metrics.jsonl").write_text("".join(rows) + '{"step": 4, "sco')  # killed while writing
    load(run)
    assert (run / "metrics.jsonl").read_text() == "".join(rows[:2])


def test_metrics_of_a_run_without_a_checkpoint_go(run):
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert load(run)[2] == 0 and not (run / "metrics.jsonl").exists()


def save_on_a_full_disk(folder, tokenizer, limit):
    """Saves where no file may grow beyond the limit; returns the line that comes of it."""
    trained = make()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(*trained, 2, tokenizer, folder)
    except NOT_WRITTEN as error:
        return sdpo.reason(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("limit", [100_000, 5_000_000])  # in the weights; in the trainer's state
def test_a_full_disk(run, tokenizer, limit):
    save(*make(), 1, tokenizer, run)
    (line,) = on_ranks(1, run, save_on_a_full_disk, run, tokenizer, limit)
    assert line and "\n" not in line
    assert [p.name for p in sdpo.resumable(run)] == ["step_1"] and load(run)[2] == 1


def test_nothing_begins_anew_where_the_runs_folder_is_gone(tmp_path):
    with pytest.raises(FileNotFoundError):
        sdpo.write_lines(tmp_path / "run/eval/step_1.json", [{}])
    assert not list(tmp_path.iterdir())


def test_a_read_only_folder(tmp_path):
    """A read-only mount in a namespace of its own: its permissions hold for root as well."""
    (tmp_path / "run").mkdir()
    mount = f"mount -t tmpfs none {tmp_path}/run && mount -o remount,ro {tmp_path}/run"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable,
         ROOT / "sdpo.py", "--model", ROOT / "toy/model", "--data", ROOT / "toy/data/in.jsonl",
         "--eval_data", "--max_response_tokens", "64", "--run_dir", tmp_path / "run/new"],
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"--run_dir {tmp_path}/run/new" in line and "Traceback" not in done.stderr


def parse(*flags):
    return sdpo.parse_args(["--model", "toy/model", *map(str, flags)])


def test_flags_of_a_resumed_run_are_its_own_unless_given(tmp_path, capsys):
    began = parse("--run_dir", tmp_path, "--lr", "1e-4", "--steps", 7, "--no-recompute_layers",
                  "--eval_data", "a", "b")
    (tmp_path / "config.json").write_text(json.dumps(dict(vars(began), commit="0", world_size=2)))
    again = parse("--run_dir", tmp_path, "--resume")
    assert vars(again) == dict(vars(began), resume=True) and not capsys.readouterr().out
    again = parse("--run_dir", tmp_path, "--resume", "--steps", 9, "--lr", "1e-4")
    assert vars(again) == dict(vars(began), resume=True, steps=9)
    assert capsys.readouterr().out == "--steps 9: the run began with 7\n"
    assert parse("--run_dir", tmp_path / "new", "--resume").steps == 100  # nothing to go on with


def test_a_new_run_wants_a_new_folder(run):
    config = ["--run_dir", run]
    assert f"--run_dir {run} already holds results" in refusal(sdpo.begin_run, parse(*config))
    sdpo.begin_run(parse(*config, "--resume"))
    (config,) = lines(run / "config.json")
    assert config["script"] == "sdpo.py" and config["world_size"] == 1 and config["lr"] == 1e-5
