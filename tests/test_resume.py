"""What a checkpoint holds comes back exactly; it is whole or is not one.

Whole runs that are killed: test_end_to_end.py, and tests/kill.py for as long as you like.
"""
import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch

import sdpo
from common import DATA, ROOT, lines, on_ranks, refusal_of_main, toy


def make(dtype=torch.float32):
    """(model, optimizer) before any step."""
    model = toy(dtype)
    return model, sdpo.MasterAdamW(model, lr=1e-3)


def step(model, optimizer):
    for p in model.parameters():
        p.grad = torch.sin(p.detach() * 100)
    optimizer.add_gradients()
    optimizer.step(1e-3, 1.0)


@pytest.fixture
def run(tmp_path, alone):
    """A run's folder with an empty metrics.jsonl."""
    (tmp_path / "metrics.jsonl").write_text("")
    return tmp_path


def save(model, optimizer, number, tokenizer, folder):
    sdpo.save_checkpoint(model, tokenizer, number, optimizer.tensors(), folder)


def load(folder, dtype=torch.float32):
    """(model, optimizer, the step) as main() makes them."""
    model, optimizer = make(dtype)
    done = sdpo.load_checkpoint(folder, optimizer.tensors())
    sdpo.write_weights(optimizer.masters, model)
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


@pytest.mark.parametrize("name, harm", [("__0_0.distcp", type(ROOT).unlink), (".metadata", cut)])
def test_one_that_does_not_load_is_named(run, tokenizer, name, harm):
    trained = make()
    for number in (1, 2):
        save(*trained, number, tokenizer, run)
    newest = run / "checkpoints/step_2"
    harm(newest / "trainer_state" / name)
    with pytest.raises(SystemExit, match=f"error: {newest} does not load: remove it, and the same"):
        load(run)
    newest.rename(run / "removed")  # as that line says
    assert load(run)[2] == 1


def test_the_newest_whole_one_counts_and_all_weights_stay(run, tokenizer):
    trained = make()
    for number in (8, 9, 10, 11):  # 10 is after 9, whatever the alphabet says
        save(*trained, number, tokenizer, run)
    folders = [run / f"checkpoints/step_{number}" for number in (8, 9, 10, 11)]
    assert all((folder / "model.safetensors").exists() for folder in folders)
    assert [(p / "trainer_state").exists() for p in folders] == [False, False, True, True]
    folders[-1].rename(run / "checkpoints/step_11.part")  # killed before the renaming
    (folders[0] / "trainer_state").mkdir()  # killed while that is removed
    assert sdpo.resumable(run) == [10] and load(run)[2] == 10
    save(*trained, 11, tokenizer, run)
    assert load(run)[2] == 11 and sorted((run / "checkpoints").iterdir()) == sorted(folders)


def test_metrics_after_the_checkpoint_go(run, tokenizer):
    rows = [json.dumps(dict(step=n)) + "\n" for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text(rows[0])
    assert load(run)[2] == 0 and lines(run / "metrics.jsonl") == []  # killed before the first one
    save(*make(), 2, tokenizer, run)
    (run / "metrics.jsonl").write_text("".join(rows) + '{"step": 4, "sco')  # killed while writing
    load(run)
    assert (run / "metrics.jsonl").read_text() == "".join(rows[:2])


def save_on_a_full_disk(folder, tokenizer, limit):
    """Saves where no file may grow beyond the limit; returns what that raises."""
    trained = make()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(*trained, 2, tokenizer, folder)
    except BaseException as error:  # torch's CheckpointException is no Exception
        return type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("limit", [100_000, 5_000_000])  # in the weights; in the trainer's state
def test_a_full_disk(run, tokenizer, limit):
    save(*make(), 1, tokenizer, run)
    assert on_ranks(1, run, save_on_a_full_disk, run, tokenizer, limit) != [None]
    assert sdpo.resumable(run) == [1] and load(run)[2] == 1


# --------------------------------------------------------------------- the same command, and others


def command(run_dir, *flags):
    return ["--model", ROOT / "toy/model", "--data", DATA / "in.jsonl", "--eval_data",
            "--max_response_tokens", 64, "--steps", 5, "--run_dir", run_dir, *flags]


def begin(run_dir, *flags):
    """Up to where main() starts a process group."""
    args = sdpo.make_parser().parse_args([*map(str, command(run_dir, *flags))])
    sdpo.begin_run(args, ROOT / "toy/model")
    return lines(run_dir / "config.json")[0]


@pytest.fixture
def begun(tmp_path, tokenizer, alone, monkeypatch):
    """The folder of a run that has one checkpoint."""
    monkeypatch.setattr(sys, "argv", ["sdpo.py"])
    begin(tmp_path / "run")
    save(*make(), 1, tokenizer, tmp_path / "run")
    return tmp_path / "run"


def test_the_same_command_resumes_and_steps_may_grow(begun):
    config = begin(begun)
    assert config["script"] == "sdpo.py" and config["world_size"] == 1 and config["lr"] == 1e-5
    assert begin(begun, "--steps", 7)["steps"] == 7
    (begun / "checkpoints/step_1").rename(begun / "checkpoints/step_1.part")
    assert begin(begun, "--lr", "1e-4")["lr"] == 1e-4  # killed before its first checkpoint: anew


def test_other_flags_are_named_and_nothing_is_overwritten(begun, monkeypatch):
    before = {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()}
    line = refusal_of_main(sdpo, monkeypatch, command(begun, "--lr", "1e-4", "--steps", 4))
    assert f"--run_dir {begun} began with other flags or files: --steps was 5, --lr was 1e-05;" in line
    assert before == {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()}


def test_changed_data_is_refused(begun, monkeypatch):
    config = lines(begun / "config.json")[0]
    sdpo.write_lines(begun / "config.json", [dict(config, files=["d.jsonl 12 34"])])
    line = refusal_of_main(sdpo, monkeypatch, command(begun))
    assert "began with other flags or files: d.jsonl 12 34, in.jsonl " in line


def test_one_process_trains_in_a_folder(tmp_path, monkeypatch):
    hold = ("import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "print(flush=True); input()")
    other = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "run.lock"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    assert "another process trains in it" in refusal_of_main(sdpo, monkeypatch, command(tmp_path))
    other.kill()  # its lock goes with it
    other.communicate()
    monkeypatch.setattr(sys, "argv", ["sdpo.py"])
    assert begin(tmp_path)["steps"] == 5


def test_a_finished_run_says_so(begun, monkeypatch, capsys):
    sdpo.write_lines(begun / "eval/step_5.json", [{}])
    monkeypatch.setattr(sys, "argv", ["sdpo.py", *map(str, command(begun))])
    sdpo.main()
    assert f"{begun} has finished its 5 steps; more --steps continue it" in capsys.readouterr().out


def test_a_folder_of_something_else_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    line = refusal_of_main(sdpo, monkeypatch, command(tmp_path))
    assert f"--run_dir {tmp_path} holds something else" in line
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    line = refusal_of_main(sdpo, monkeypatch, command(tmp_path / "notes.txt/run"))
    assert f"{tmp_path}/notes.txt" in line  # permissions would not hold for root


def test_ranks_that_start_at_once_do_not_refuse_each_other(begun, monkeypatch):
    """One finds the folder while the first writes config.json aside."""
    (begun / "config.json").rename(begun / "config.json.part")
    shutil.rmtree(begun / "checkpoints")
    monkeypatch.setenv("RANK", "1")
    sdpo.begin_run(sdpo.make_parser().parse_args([*map(str, command(begun))]), "model")
