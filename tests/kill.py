"""Kills a run with SIGKILL again and again, each time repeats its command, and compares the end
with that of a run that nobody touched: the same metrics (all but times and memory) and the same
weights, byte for byte.

    python tests/kill.py                      # sdpo.py, 20 kills, 1 rank and 2 ranks
    python tests/kill.py --script grpo.py --kills 6 --ranks 2

A kill's moment is drawn: a phase of a step (sampling with its grading, update, weight sync, saving)
and a time from its beginning.
"""
import argparse
import collections
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHASES = {  # the function that is the phase, and its length on the toy, seconds
    "saving": ("save_checkpoint", 0.1),
    "update": ("update", 0.3),
    "weight sync": ("sync_weights", 0.01),
    "sampling": ("generate", 0.6),
}

def trainer():
    """The script's main(), in a process of its own. Where the argument `plan` names a function, a
    number and seconds, SIGKILL comes so long after the call of that number."""
    script, plan, *argv = sys.argv[2:]
    sys.path.insert(0, str(ROOT))
    module = __import__(Path(script).stem)
    job = os.getppid() if "RANK" in os.environ else os.getpid()  # torchrun, and all below it
    name, number, delay = plan.split(",")
    calls, function = itertools.count(1), getattr(module, name, None)

    def call(*args, **kwargs):
        if next(calls) == int(number):
            # looked for before, since that takes time; this process goes last
            members = sorted(family(job), key=lambda pid: pid == os.getpid())
            threading.Timer(float(delay), kill, [members]).start()
        return function(*args, **kwargs)
    if function and os.environ.get("RANK", "0") == "0":
        setattr(module, name, call)
    if os.environ.get("MASTERS"):  # the weights of a GPU, on CPU, and a round a micro-batch
        module.DTYPE, module.MISMATCH_LIMIT, module.ROUND = module.torch.bfloat16, 0.1, 1
    sys.argv = [script, *argv]
    module.main()

def start(script, ranks, log, argv, masters, plan):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone",
              "--nproc_per_node", str(ranks)] if ranks > 1 else [sys.executable]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore",
               TORCH_CPP_LOG_LEVEL="ERROR", MASTERS="yes" if masters else "")
    command = [*launch, __file__, "trainer", script, plan, *map(str, argv)]
    with open(log, "a") as file:
        return subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=file).returncode

def family(pid):
    """A process and all below it."""
    children = collections.defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # gone meanwhile
        children[int(fields[1])].append(int(stat.parent.name))
    found, look = [], [pid]
    while look:
        found.append(look.pop())
        look += children[found[-1]]
    return found

def kill(members):
    """SIGKILL for these processes, none of which gets to say a word."""
    for member in members:
        try:
            os.kill(member, signal.SIGKILL)
        except ProcessLookupError:
            pass

def kill_family(pid):
    kill(family(pid))

def outcome(run_dir, steps):
    """(metrics without times and memory, SHA-256 of the last weights)."""
    kept = [{k: v for k, v in json.loads(line).items()
             if k not in ("seconds", "tokens_per_second", "peak_memory_gb")}
            for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    weights = (run_dir / f"checkpoints/step_{steps}/model.safetensors").read_bytes()
    return kept, hashlib.sha256(weights).hexdigest()

def killed_run(folder, script, ranks, kills, steps, argv, masters):
    """Runs to the end through `kills` kills; returns how many were meant for which phase."""
    rng, log = random.Random(0), folder / "log"
    of_script = ["update", "saving"] if script == "sft_distill.py" else PHASES
    phases = list(itertools.islice(itertools.cycle(of_script), kills))
    hit = collections.Counter(phases)
    rng.shuffle(phases)
    while True:
        plan = ",0,0"
        if phases:  # mostly the first time that the phase comes, or the steps would not last
            saved = max([int(p.name[5:]) for p in folder.glob("run/checkpoints/step_*[0-9]")],
                        default=0)
            name, length = PHASES[phases[-1]]
            plan = f"{name},{min(rng.choice([1, 1, 2]), steps - saved)},{rng.random() * length}"
        code = start(script, ranks, log, argv, masters, plan)
        if code == 0:
            return hit
        if code != -signal.SIGKILL:
            raise RuntimeError(log.read_text()[-3000:])
        phases.pop()

def arguments(script, steps, folder):
    """Its flags for a run of so many short steps, each of them saved."""
    argv = ["--model", "toy/model", "--lr", "1e-4", "--max_response_tokens", 300, "--save_every", 1,
            "--tokens_per_micro_batch", 800]
    if script == "sft_distill.py":
        lines = (ROOT / "toy/data/train.jsonl").read_text().splitlines()[: 4 * steps]
        (folder / "d.jsonl").write_text("".join(json.dumps(dict(
            prompt=q["prompt"], response=f"So x = {q['reward_model']['ground_truth']}.")) + "\n"
            for q in map(json.loads, lines)))
        return [*argv, "--data", folder / "d.jsonl", "--batch_size", 4, "--epochs", 1]
    few = folder / "few.jsonl"
    few.write_text("".join((ROOT / "toy/data/in.jsonl").read_text().splitlines(True)[:4]))
    return [*argv, "--data", "toy/data/train.jsonl", "--eval_data", few,
            "--questions_per_step", 4, "--rollouts", 4, "--minibatch_questions", 2,
            "--warmup_steps", 2, "--steps", steps,
            *(["--ema", 0.05] if script == "sdpo.py" else [])]

def compare(folder, script, ranks, kills, steps, masters):
    """(phases hit, whether metrics and weights agree) of folder/whole and folder/killed."""
    argv, hits, ends = [*arguments(script, steps, folder), "--run_dir"], [], []
    for name, number in (("whole", 0), ("killed", kills)):
        run = folder / name / "run"
        run.parent.mkdir()
        hits.append(killed_run(run.parent, script, ranks, number, steps, [*argv, run], masters))
        ends.append(outcome(run, steps))
    return hits[1], ends[0] == ends[1]

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--script", choices=["sdpo.py", "grpo.py", "sft_distill.py"], default="sdpo.py")
    add("--kills", type=int, default=20)
    add("--steps", type=int, default=12)
    add("--ranks", type=int, nargs="+", default=[1, 2])
    add("--masters", action="store_true", help="as on a GPU: bfloat16 weights, float32 masters")
    args = parser.parse_args()
    all_same = True
    for ranks in args.ranks:
        started, folder = time.time(), Path(tempfile.mkdtemp())
        hit, same = compare(folder, args.script, ranks, args.kills, args.steps, args.masters)
        all_same &= same
        counts = ", ".join(f"{n} {phase}" for phase, n in hit.most_common())
        print(f"{args.script}, {ranks} rank(s), {args.steps} steps, {sum(hit.values())} kills in "
              f"{time.time() - started:.0f} s: {counts}\n  metrics and weights "
              f"{'the same' if same else 'DIFFER'}: {folder}", flush=True)
    sys.exit(not all_same)

if __name__ == "__main__":
    trainer() if sys.argv[1:2] == ["trainer"] else main()
