"""Several bags as one: the slides of a patient, or parts of two bags that are mixed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bigbag.adjacency import Adjacency
from bigbag.bags import Bag, Label


def join_bags(bags: Sequence[Bag], *, key: str, y: Label | None) -> Bag:
    """One bag of the instances of all ``bags``, in their order; optional fields are kept where every bag has them.

    Graphs stay apart. Coordinates are laid side by side along their first axis with an empty column between two bags,
    so that instances of different slides are never neighbours.

    Args:
        bags: at least one; with the same features.
        key: name of the new bag.
        y: its label.
    """
    assert bags
    coords = [bag.coords for bag in bags if bag.coords is not None]
    y_inst = [bag.y_inst for bag in bags if bag.y_inst is not None]
    graphs = [bag.adj for bag in bags if bag.adj is not None]
    return Bag(
        x=bags[0].x if len(bags) == 1 else np.concatenate([bag.x for bag in bags]),
        y=y,
        key=key,
        coords=_side_by_side(coords) if len(coords) == len(bags) else None,
        y_inst=np.concatenate(y_inst) if len(y_inst) == len(bags) else None,
        adj=Adjacency.block_diagonal(graphs) if len(graphs) == len(bags) else None,
    )


def _side_by_side(coords: Sequence[np.ndarray]) -> np.ndarray:
    if len(coords) == 1:
        return coords[0]
    placed, column = [], 0
    for of_bag in coords:
        if len(of_bag):
            moved = of_bag.copy()
            moved[:, 0] += np.asarray(column - of_bag[:, 0].min()).astype(of_bag.dtype)
            column = int(np.ceil(moved[:, 0].max())) + 2
            of_bag = moved
        placed.append(of_bag)
    return np.concatenate(placed)
