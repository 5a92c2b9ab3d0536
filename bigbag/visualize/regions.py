"""Regions of high score: cells of a grid, joined to polygons with holes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bigbag.visualize.placement import Placement

_MAX_CELLS = 1 << 26
_PHASE_ROUNDING = 0.01

Ring = np.ndarray
"""``(M + 1, 2)`` corners, the last one the first again."""


@dataclass(frozen=True)
class Region:
    """Cells that share sides, as one polygon.

    Attributes:
        shell: the outer ring, counterclockwise as RFC 7946 counts (x to the right, y up).
        holes: inner rings, clockwise.
        num_instances: instances in its cells.
        mean: mean value of these instances.
        maximum: their highest value.
    """

    shell: Ring
    holes: tuple[Ring, ...]
    num_instances: int
    mean: float
    maximum: float


def find_regions(placement: Placement, values: np.ndarray, threshold: float, min_instances: int = 1) -> list[Region]:
    """The connected regions whose cells have a mean value of at least ``threshold``, largest first.

    A cell is a patch's share of the lattice: a square of side ``stride`` around the patch's centre, so that neighbours
    touch, whether or not patches overlap. Pieces of tissue whose lattices are not aligned have regions of their own.
    Instances on no lattice are counted in cells of four of them on average. Cells are connected where they share a
    side. O(N log N + cells).

    Args:
        placement: where the instances are.
        values: ``(N,)``.
        threshold: lowest mean value of a cell of a region.
        min_instances: smaller regions are left out.

    Returns:
        The regions, in level-0 pixels.

    Raises:
        ValueError: so few instances so far apart that the lattice between them has more than 2**26 cells.
    """
    values = np.asarray(values, np.float64)
    found = [
        region
        for aligned in _lattices(placement)
        for region in _on_one_lattice(placement.take(aligned), values[aligned], threshold)
        if region.num_instances >= min_instances
    ]
    return sorted(found, key=lambda region: -region.num_instances)


def _on_one_lattice(placement: Placement, values: np.ndarray, threshold: float) -> list[Region]:
    from scipy.ndimage import label

    cells, origin, side = _grid(placement)
    columns, rows = (cells.max(0) + 1).tolist()
    if rows * columns > _MAX_CELLS:
        raise ValueError(f"{rows} x {columns} cells of {side:g} pixels, expected at most {_MAX_CELLS} in all")
    flat = cells[:, 1] * columns + cells[:, 0]
    count = np.bincount(flat, minlength=rows * columns)
    total = np.bincount(flat, values, minlength=rows * columns)
    inside = (count > 0) & (total >= threshold * np.maximum(count, 1) - 1e-12)
    names, num = label(inside.reshape(rows, columns))
    region_of = names.reshape(-1)[flat]
    order = np.argsort(region_of, kind="stable")
    numbers = np.arange(1, num + 1)
    starts, ends = (np.searchsorted(region_of[order], numbers, side=s) for s in ("left", "right"))
    rings = _rings(names)
    found = []
    for number, start, end in zip(numbers.tolist(), starts.tolist(), ends.tolist()):
        of_region = values[order[start:end]]
        shell, *holes = (ring * side + origin for ring in (rings[number][0], *rings[number][1]))
        found.append(Region(shell, tuple(holes), end - start, float(of_region.mean()), float(of_region.max())))
    return found


def _lattices(placement: Placement) -> list[np.ndarray]:
    """Numbers of the instances of each lattice: those whose corners are whole strides apart, but for rounding."""
    if placement.stride is None or len(placement) < 2:
        return [np.arange(len(placement))] if len(placement) else []
    stride = placement.stride
    phases = [_clusters(placement.corners[:, axis] % stride, stride) for axis in (0, 1)]
    _, group = np.unique(phases[0] * (phases[1].max() + 1) + phases[1], return_inverse=True)
    order = np.argsort(group.reshape(-1), kind="stable")
    return np.split(order, np.cumsum(np.bincount(group.reshape(-1)))[:-1])


def _clusters(phases: np.ndarray, period: float) -> np.ndarray:
    """Cluster of each number on a circle of ``period``: a gap of more than a pixel and 1 % of it parts two clusters."""
    order = np.argsort(phases, kind="stable")
    gaps = np.diff(phases[order], append=phases[order[0]] + period)
    parted = gaps > 1 + _PHASE_ROUNDING * period
    result = np.empty(len(phases), np.int64)
    # What lies behind the last gap belongs to what lies before the first one.
    result[order] = np.concatenate([[0], np.cumsum(parted[:-1])]) % max(int(parted.sum()), 1)
    return result


def _grid(placement: Placement) -> tuple[np.ndarray, np.ndarray, float]:
    """Cell of each instance, the corner of cell (0, 0) and the side of a cell."""
    if placement.stride is not None:
        low, side = placement.corners.min(0), placement.stride
        cells = np.rint((placement.corners - low) / side).astype(np.int64)
        return cells, low + (placement.size - side) / 2, side
    centres = placement.centres
    low = centres.min(0)
    # A square of ``size`` is four times what an instance has for itself.
    return np.floor((centres - low) / placement.size).astype(np.int64), low, placement.size


def _rings(names: np.ndarray) -> dict[int, tuple[Ring, list[Ring]]]:
    """Shell and holes of each region of ``names``, ``(rows, columns)`` with 0 outside, in corners of cells.

    Sides between a region and its outside are walked with the region on the left of a viewer whose y grows upwards,
    around one cell where two cells of one region meet at a corner. A walk that comes to a corner again closes a ring
    there, so that no ring touches itself. Rings that run counterclockwise are shells, the others holes; a region has
    one shell, since its cells share sides.
    """
    x, y, dx, dy, name = _sides(names)
    follower = _followers(x, y, dx, dy, names.shape[1] + 1)
    start = (x * 1.0, y * 1.0)
    rings: dict[int, tuple[list[Ring], list[Ring]]] = {}
    unseen = np.ones(len(x), bool)
    next_side, corner = follower.tolist(), (y * (names.shape[1] + 1) + x).tolist()
    for first in range(len(x)):
        if not unseen[first]:
            continue
        walk, side = [], first
        while unseen[side]:
            unseen[side] = False
            walk.append(side)
            side = next_side[side]
        for loop in _simple(walk, corner):
            ring = _straightened(np.stack([start[0][loop], start[1][loop]], axis=1))
            shells, holes = rings.setdefault(int(name[first]), ([], []))
            (shells if _doubled_area(ring) > 0 else holes).append(ring)
    for shells, _ in rings.values():
        assert len(shells) == 1, "cells that share sides have one shell"
    return {number: (shells[0], holes) for number, (shells, holes) in rings.items()}


def _sides(names: np.ndarray) -> tuple[np.ndarray, ...]:
    """Start, direction and region of the sides between a region and what is not that region."""
    padded = np.pad(names, 1)
    parts = []
    # (row and column of the other cell, corner where the side starts, its direction): counterclockwise about a cell.
    for (down, right), (x0, y0), (dx, dy) in (
        ((-1, 0), (0, 0), (1, 0)),
        ((0, 1), (1, 0), (0, 1)),
        ((1, 0), (1, 1), (-1, 0)),
        ((0, -1), (0, 1), (0, -1)),
    ):
        other = padded[1 + down : 1 + down + names.shape[0], 1 + right : 1 + right + names.shape[1]]
        row, column = np.nonzero((names > 0) & (other != names))
        of_part = np.stack([column + x0, row + y0, np.full_like(row, dx), np.full_like(row, dy), names[row, column]])
        parts.append(of_part)
    return tuple(np.concatenate(parts, axis=1))


def _followers(x: np.ndarray, y: np.ndarray, dx: np.ndarray, dy: np.ndarray, width: int) -> np.ndarray:
    """Number of the side that follows each side about the same cell or along the same region."""
    # At a corner a side of each of the four directions may start, so that corner and direction name a side.
    direction = np.select([dx == 1, dy == 1, dx == -1], [0, 1, 2], 3)
    key = (y * width + x) * 4 + direction
    order = np.argsort(key)
    end = ((y + dy) * width + x + dx) * 4
    result = np.full(len(x), -1)
    # The sharpest turn towards the cell first: it keeps cells apart that meet at a corner only.
    for turn in (1, 0, -1):
        wanted = end + (direction + turn) % 4
        place = np.minimum(np.searchsorted(key[order], wanted), len(key) - 1)
        hit = (result < 0) & (key[order][place] == wanted)
        result[hit] = order[place[hit]]
    return result


def _simple(walk: list[int], corner: list[int]) -> list[list[int]]:
    """A closed walk cut into closed walks that come to no corner twice."""
    loops, open_walk, place = [], list[int](), dict[int, int]()
    for side in walk:
        at = place.get(corner[side])
        if at is not None:
            loops.append(open_walk[at:])
            for closed in open_walk[at:]:
                del place[corner[closed]]
            del open_walk[at:]
        place[corner[side]] = len(open_walk)
        open_walk.append(side)
    return [*loops, open_walk]


def _straightened(ring: np.ndarray) -> Ring:
    """The ring without corners between sides of one direction, closed."""
    ahead, behind = np.roll(ring, -1, axis=0) - ring, ring - np.roll(ring, 1, axis=0)
    turns = ring[ahead[:, 0] * behind[:, 1] != ahead[:, 1] * behind[:, 0]]
    return np.concatenate([turns, turns[:1]])


def _doubled_area(ring: Ring) -> float:
    """Twice the area, positive where the ring runs counterclockwise with y upwards."""
    x, y = ring[:, 0], ring[:, 1]
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())
