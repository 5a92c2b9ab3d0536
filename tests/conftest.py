"""One thread per process, those that tests start included: tests run side by side, and their tensors are small."""

import gc
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: a test that starts processes mostly waits for them."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_finish() -> None:
    """What is there when the tests begin stays there: without this, each of the collections of garbage by which a run
    plans its memory would walk a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Whatever number of threads a run in this process took before."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def in_full() -> bool:
    """Whether tests that repeat one thing do so as often as they can; the gate takes a few of the repetitions."""
    return os.environ.get("BIGBAG_TEST_FULL", "0") == "1"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data; a test skips where what it needs is not there."""
    return Path(os.environ.get("BIGBAG_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
