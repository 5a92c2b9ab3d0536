"""A small data set that a pooling model learns in seconds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bigbag import Bag
from bigbag.data import pack
from bigbag.data.sources.base import SourceEntry

WIDTH = 6


class Blobs:
    """Normal instances; in bags labelled 1 about a tenth of them is shifted, and labelled 1 too."""

    patch_shape = None

    def __init__(self, sizes: dict[str, Sequence[int]], seed: int = 0) -> None:
        self.sizes, self.seed = sizes, seed

    def entries(self) -> list[SourceEntry]:
        return [
            SourceEntry(f"{split}.{i}", split, label=i % 2)
            for split, sizes in self.sizes.items()
            for i in range(len(sizes))
        ]

    def load(self, entry: SourceEntry) -> Bag:
        number = int(entry.name.split(".")[1])
        size = self.sizes[entry.split][number]
        rng = np.random.default_rng([self.seed, number, sum(map(ord, entry.split))])
        y_inst = (rng.permutation(size) < max(1, size // 10)) * entry.label
        x = rng.normal(size=(size, WIDTH)) + 3.0 * y_inst[:, None] * np.array([1, 0, 0, 0, 1, 0])
        coords = np.stack(np.divmod(np.arange(size), 8), 1)
        return Bag(x.astype(np.float32), entry.label, entry.name, coords.astype(np.int32), y_inst.astype(np.int8))

    def description(self) -> dict[str, Any]:
        return {"sizes": {k: list(v) for k, v in self.sizes.items()}, "seed": self.seed}


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    """7 training, 6 validation and 9 test bags, among them one larger than the budget of ``run_settings``."""
    sizes = {
        "train": [50, 31, 120, 1, 44, 67, 29],
        "val": [40, 30, 25, 60, 33, 21],
        "test": [20, 30, 25, 41, 9, 33, 5, 8, 64],
    }
    folder = tmp_path_factory.mktemp("blobs") / "shards"
    pack(Blobs(sizes), folder, progress=False, shard_bytes=8192)
    return str(folder)


@pytest.fixture
def run_settings(shards, tmp_path) -> dict:
    """Settings of a run of 4 epochs on ``shards``: 3 steps an epoch, several packs a step."""
    return {
        "name": "run",
        "out": str(tmp_path / "runs"),
        "data": {"shards": shards, "budget_instances": 100, "num_workers": 0},
        "model": {
            "name": "ABMIL",
            "gated": True,
            "att_dim": 8,
            "feat_ext": {"name": "MLP", "linear_sizes": [8], "activations": ["relu"], "dropout": 0.1},
        },
        "optim": {"lr": 0.02, "warmup_epochs": 0.5},
        "train": {"epochs": 4, "batch_bags": 3},
        "report": {"num_slides": 2},
    }
