"""`torchrun --nnodes 2`: two network namespaces joined by a cable stand for two machines."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NODES = ("selfdistill-a", "selfdistill-b")


@pytest.fixture
def nodes():
    """Names of two namespaces, 10.77.0.1 and 10.77.0.2; nothing else can be reached from either."""
    def ip(*words):
        return subprocess.run(["ip", *words], check=True, capture_output=True)
    try:
        for name in NODES:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", NODES[0], "type", "veth", "peer", "name", "eth0",
           "netns", NODES[1])
        for i, name in enumerate(NODES, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode().strip() or error
        pytest.skip(f"no network namespaces here ({said})")
    else:
        yield NODES
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_nodes_train_as_one(tmp_path, nodes):
    small = tmp_path / "few.jsonl"
    small.write_text("".join((ROOT / "toy/data/in.jsonl").read_text().splitlines(True)[:8]))
    env = dict(os.environ, GLOO_SOCKET_IFNAME="eth0", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
               "--master_addr", "10.77.0.1", "--master_port", "29400", "--node_rank"]
    script = ["sdpo.py", "--model", "toy/model", "--data", small, "--eval_data", small,
              "--questions_per_step", "4", "--minibatch_questions", "4", "--rollouts", "4",
              "--max_response_tokens", "400", "--steps", "2", "--run_dir", tmp_path / "run"]
    jobs = [subprocess.Popen(["ip", "netns", "exec", name, *command, str(i), *map(str, script)],
                             cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT) for i, name in enumerate(nodes)]
    try:
        said = [job.communicate(timeout=300)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(said)
    assert json.loads((tmp_path / "run/config.json").read_text())["world_size"] == 2
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in steps] == [1, 2]
    assert all(m["updates"] == 1 and m["mismatch"] < 1e-4 for m in steps)
    rollouts = (tmp_path / "run/rollouts/step_1.jsonl").read_text().splitlines()
    assert sorted({json.loads(r)["row"] for r in rollouts}) == [0, 1, 2, 3]  # of both nodes
