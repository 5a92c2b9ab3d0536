from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from bigbag import Adjacency, Bag


def make_bag(key: str, size: int, seed: int, graph: bool = True, width: int = 6) -> Bag:
    rng = np.random.default_rng(seed)
    adj = None
    if graph:
        row = torch.arange(size - 1)
        weight = torch.from_numpy(rng.random(2 * (size - 1), dtype=np.float32))
        adj = Adjacency.from_edges(torch.cat([row, row + 1]), torch.cat([row + 1, row]), weight, size, symmetric=False)
    y_inst = rng.integers(-1, 2, size)
    return Bag(
        x=rng.normal(size=(size, width)).astype(np.float32),
        y=int(y_inst.max() > 0),
        key=key,
        coords=rng.integers(0, 300, (size, 2)).astype(np.int32),
        y_inst=y_inst,
        adj=adj,
    )


@pytest.fixture
def make_bags() -> Callable[..., list[Bag]]:
    def make(count: int = 9, graph: bool = True) -> list[Bag]:
        return [make_bag(f"slide-{i}", 3 + 5 * i, i, graph) for i in range(count)]

    return make
