"""An explicit, counted cap on the instances of a bag; without one, bags are always whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from bigbag.bags import Adjacency, Bag
from bigbag.data.plan import derive_seed


def capped_sizes(sizes: Sequence[int], max_instances: int | None) -> tuple[int, ...]:
    """Sizes of the bags under a cap, for planning; None: no cap."""
    return tuple(sizes) if max_instances is None else tuple(min(size, max_instances) for size in sizes)


def count_capped(sizes: Sequence[int], max_instances: int | None) -> tuple[int, int]:
    """``(bags cut by the cap, instances left out of them)``, to be listed in the results."""
    over = [size - max_instances for size in sizes if max_instances is not None and size > max_instances]
    return len(over), sum(over)


def cap_instances(
    size: int, max_instances: int | None, *, seed: int, epoch: int, bag: int, draw: int = 0
) -> np.ndarray | None:
    """Rows of a random subsample of a bag, ascending, without replacement; None where the bag fits whole.

    Args:
        size: instances of the bag.
        max_instances: the cap, or None.
        seed: seed of the run.
        epoch: number of the epoch: each one has another subsample.
        bag: index of the bag.
        draw: how often the bag has been drawn before in this epoch.

    Returns:
        ``(max_instances,)`` int64, or None.

    Raises:
        ValueError: a cap below 1.
    """
    if max_instances is not None and max_instances < 1:
        raise ValueError(f"max_instances is {max_instances}, expected at least 1, or None for whole bags")
    if max_instances is None or size <= max_instances:
        return None
    generator = np.random.default_rng(derive_seed(seed, epoch, bag, *((draw,) if draw else ())))
    return np.sort(generator.choice(size, max_instances, replace=False, shuffle=False))


def take_rows(bag: Bag, rows: np.ndarray) -> Bag:
    """The bag of the instances ``rows`` (ascending), with the graph among them."""
    return replace(
        bag,
        x=bag.x[rows],
        coords=None if bag.coords is None else bag.coords[rows],
        positions=None if bag.positions is None else bag.positions[rows],
        y_inst=None if bag.y_inst is None else bag.y_inst[rows],
        adj=None if bag.adj is None else _induced(bag.adj, rows),
    )


def _induced(adj: Adjacency, rows: np.ndarray) -> Adjacency:
    place = np.full(adj.num_nodes, -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    row, col = place[adj.rows().numpy()], place[adj.col.numpy()]
    kept = (row >= 0) & (col >= 0)
    crow = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(np.bincount(row[kept], minlength=len(rows)), out=crow[1:])
    weight = None if adj.weight is None else torch.from_numpy(adj.weight.numpy()[kept])
    return Adjacency(torch.from_numpy(crow), torch.from_numpy(col[kept]).to(adj.col.dtype), weight, adj.symmetric)
