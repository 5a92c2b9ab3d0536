"""What only a CUDA device can show. ``make gpu`` runs these after the proof of the operators (``tests/ops``) there.

BIGBAG_TEST_DEVICE=cpu runs the same code on the CPU, small, where that has a meaning: so it can be tried without one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.gpu.device import DEVICE

# What tells most in the shortest time comes first.
ORDER = ("test_syncs", "test_models", "test_attention", "test_compiled", "test_repeated", "test_memory", "test_large")
ORDER += ("test_training",)
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if _HERE in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if not (torch.cuda.is_available() or DEVICE == "cpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here (BIGBAG_TEST_DEVICE=cpu runs it on CPU)"))
    chosen, in_order = set(ours), iter(sorted(ours, key=lambda item: ORDER.index(item.path.stem)))
    items[:] = [next(in_order) if item in chosen else item for item in items]


@pytest.fixture(scope="session")
def launcher_environment() -> dict[str, str]:
    """Of processes that a launcher starts: they find this checkout, and no device but the one under test."""
    root = str(_HERE.parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(":")}
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if DEVICE == "cpu" else {})


@pytest.fixture(autouse=True)
def memory_given_back() -> None:
    """Tests of several processes share one device."""
    if DEVICE == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()
