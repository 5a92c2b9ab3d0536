"""Coordinates that count patches, whatever unit the source's coordinates are in."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from bigbag.bags import Bag
from bigbag.graphs import infer_stride


def on_lattice(bag: Bag, stride: float | Literal["infer"] | None = None) -> Bag:
    """The bag with ``coords`` that count patches and its own coordinates as ``positions``.

        coords = round((positions - min(positions)) / stride)

    Rounded, not floored: level-0 coordinates of a stride that is no whole number have been cut to integers.

    Args:
        bag: with ``coords`` in the source's unit, and their ``stride`` where it is known.
        stride: instead of that of the bag; "infer" measures it.

    Returns:
        The bag itself where it has no coordinates, no stride, or ``positions`` already.

    Raises:
        ValueError: a stride that is not positive, or cannot be measured.
    """
    if bag.coords is None or bag.positions is not None:
        return bag
    step = bag.stride if stride is None else infer_stride(bag.coords) if stride == "infer" else stride
    if step is None:
        return bag
    return replace(bag, coords=count_patches(bag.coords, step), positions=bag.coords, stride=float(step))


def count_patches(coords: np.ndarray, stride: float) -> np.ndarray:
    """``round((coords - min) / stride)``: ``(N, c)`` int32.

    Raises:
        ValueError: a stride that is not positive, or coordinates that are not ``(N, c)`` and finite.
    """
    if not stride > 0 or not np.isfinite(stride):
        raise ValueError(f"stride is {stride}, expected a positive number in the unit of the coordinates")
    if coords.ndim != 2:
        raise ValueError(f"coords has shape {coords.shape}, expected (N, c) positions")
    if not len(coords):
        return np.zeros(coords.shape, np.int32)
    places = coords.astype(np.float64)
    places -= places.min(0)
    places /= stride
    largest = places.max()
    if not largest < 2**31:
        raise ValueError(f"coords reach {largest:.3g} strides of {stride:g}, expected finite ones, below 2**31")
    return np.rint(places, out=places).astype(np.int32)
