"""Coordinates that count patches, whatever unit the source's coordinates are in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from bigbag.bags import Bag
from bigbag.graphs import infer_stride

# Stated and true stride differ by no more than this where only their rounding differs.
_ROUNDING = 0.02
# Patches from the end of one slide to the start of the next: more than the radius of any sensible graph.
_GAP = 10


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
    step: float | None = bag.stride if stride is None else infer_stride(bag.coords) if stride == "infer" else stride
    if step is None:
        return bag
    return replace(bag, coords=count_patches(bag.coords, step), positions=_narrow(bag.coords), stride=float(step))


def _narrow(coords: np.ndarray) -> np.ndarray:
    """Integers as int32 where they fit: shards hold them for every instance."""
    if coords.dtype.kind not in "iu" or coords.itemsize <= 4:
        return coords
    fits = not len(coords) or (coords.min() >= -(2**31) and coords.max() < 2**31)
    return coords.astype(np.int32) if fits else coords


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


def settled_stride(coords: np.ndarray, stated: float | None) -> float | None:
    """The stride that is stated, unless the coordinates show a smaller one; the measured one where nothing is stated.

    What is stated may be rounded otherwise than the coordinates were, and the pixels add up over a slide; or it may be
    the size of patches that overlap. A larger stride than the stated one only shows that tissue is sparse.

    Returns:
        The stride, or None where nothing is stated and nothing can be measured.
    """
    if len(coords) < 2:
        return stated
    try:
        measured = infer_stride(coords)
    except ValueError:
        return stated
    return measured if stated is None or measured <= (1 + _ROUNDING) * stated else stated


def join_slides(bags: Sequence[Bag], names: Sequence[str]) -> Bag:
    """One bag of several slides, laid side by side on the lattice, too far apart to be joined by a graph.

    Args:
        bags: the slides, each with ``stride`` where it has coordinates.
        names: what they are called; kept in ``attributes`` with their sizes, strides and own attributes.

    Raises:
        ValueError: widths or types of features that differ, or coordinates whose stride is not known.
    """
    placed = [on_lattice(bag) for bag in bags]
    first = placed[0]
    for bag, name in zip(placed, names):
        if bag.num_instances and (bag.x.shape[1:], bag.x.dtype) != (first.x.shape[1:], first.x.dtype):
            raise ValueError(
                f"slide {name!r} has features {bag.x.shape[1:]} {bag.x.dtype}, slide {names[0]!r} {first.x.shape[1:]} "
                f"{first.x.dtype}: the slides of a patient need the same extractor and precision"
            )
    filled = [bag for bag in placed if bag.num_instances]
    about = facts_of_slides(bags, names)
    strides = {bag.stride for bag in filled}
    if not filled:
        return replace(first, attributes=about)
    coords = None
    if all(bag.coords is not None for bag in filled):
        unknown = [name for bag, name in zip(placed, names) if bag.num_instances and bag.positions is None]
        if unknown:
            raise ValueError(
                f"slide {unknown[0]!r}: the stride of its coordinates is not known, so that it cannot be laid "
                "beside the other slides of its patient: state it (stride=), or pack a bag for each slide (bags=slide)"
            )
        coords = _side_by_side([bag.coords for bag in filled if bag.coords is not None])
    return Bag(
        x=np.concatenate([bag.x for bag in filled]),
        coords=coords,
        positions=None if coords is None else np.concatenate([bag.positions for bag in filled]),
        stride=strides.pop() if len(strides) == 1 else None,
        attributes={**first.attributes, **about},
    )


def facts_of_slides(bags: Sequence[Bag], names: Sequence[str]) -> dict[str, list]:
    """What a bag of several slides keeps of each of them in its ``attributes``."""
    return {
        "slides": list(names),
        "sizes": [bag.num_instances for bag in bags],
        "strides": [bag.stride for bag in bags],
        "attributes_of_slides": [dict(bag.attributes) for bag in bags],
    }


def _side_by_side(places: Sequence[np.ndarray]) -> np.ndarray:
    shifted, end = [], 0
    for part in places:
        shift = np.zeros(part.shape[1], part.dtype)
        shift[0] = end
        shifted.append(part + shift)
        end = int(shifted[-1][:, 0].max()) + _GAP
    return np.concatenate(shifted)
