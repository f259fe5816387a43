"""Fixtures of several test files. Those of finished runs hold one run each, for all tests of it."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: for matrices as small as the toy's the quickest
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: it reads it once
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

def pytest_configure(config):
    config.addinivalue_line("markers", "vllm: starts vLLM; `make quick` leaves it out")
    config.addinivalue_line("markers", "slow: seconds each; so does it these")

def pytest_collection_finish(session):
    """Forks come with vLLM where a test needs it."""
    if any(item.get_closest_marker("vllm") for item in session.items):
        from common import FORKS, PRELOADED
        FORKS.set_forkserver_preload([*PRELOADED, "vllm.entrypoints.llm",
                                      "vllm.v1.worker.cpu_worker"])

@pytest.fixture
def alone():
    """A process group of one."""
    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()

@pytest.fixture(scope="session")
def tokenizer():
    from common import tokenizer_of
    return tokenizer_of("toy")
