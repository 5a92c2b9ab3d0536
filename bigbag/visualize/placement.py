"""Where the instances of a slide lie, in pixels of its level 0, and what they add up to on any grid of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bigbag.data.sources.clam import clam_stride
from bigbag.graphs import infer_stride

_SAMPLE = 20_000
# Residues of running sums over a picture stay far below this share of a pixel.
_NOTHING = 1e-6

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in level-0 pixels."""


@dataclass(frozen=True)
class Placement:
    """Squares of level-0 pixels, one for each instance.

    Attributes:
        corners: ``(N, 2)`` float64, left and top of each square.
        size: side of the squares.
        stride: distance of adjacent squares, less than ``size`` where they overlap; None where instances stand on no
            lattice (nuclei): their squares are drawn around them.
    """

    corners: np.ndarray
    size: float
    stride: float | None

    def __len__(self) -> int:
        return len(self.corners)

    @property
    def box(self) -> Box:
        """The smallest box that holds all squares."""
        if not len(self):
            return (0.0, 0.0, 0.0, 0.0)
        low, high = self.corners.min(0), self.corners.max(0) + self.size
        return (float(low[0]), float(low[1]), float(high[0]), float(high[1]))

    @property
    def centres(self) -> np.ndarray:
        """``(N, 2)`` centres of the squares."""
        return self.corners + self.size / 2

    def take(self, index: np.ndarray) -> Placement:
        """The squares ``index``."""
        return Placement(self.corners[index], self.size, self.stride)

    def moved(self, x: float, y: float) -> Placement:
        """The squares moved by so many pixels."""
        return Placement(self.corners + np.array([x, y]), self.size, self.stride)

    @cached_property
    def _downwards(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the squares from top to bottom, and their tops."""
        order = np.argsort(self.corners[:, 1], kind="stable")
        return order, self.corners[order, 1]

    def between(self, top: float, bottom: float) -> np.ndarray:
        """Numbers of the squares that reach into the rows from ``top`` to ``bottom``."""
        order, tops = self._downwards
        return order[np.searchsorted(tops, top - self.size, side="right") : np.searchsorted(tops, bottom)]


def place(
    positions: np.ndarray,
    stride: float | None = None,
    attributes: Mapping[str, Any] | None = None,
    size: float | None = None,
    mpp: float | None = None,
) -> Placement:
    """The squares of the instances of a slide.

    Positions on a lattice are corners of patches, those of CLAM, TRIDENT, STAMP and most others, unless the attribute
    ``anchor`` is "centre" (slideflow). Other positions are centres, of nuclei for example, each of which gets a square
    of twice the mean distance between neighbours.

    Args:
        positions: ``(N, 2)`` x and y in the source's own unit: ``Bag.positions``, or ``Bag.coords`` where there are
            none.
        stride: distance of adjacent patches in the same unit; None: measured.
        attributes: what the source says of the bag: ``patch_size_level0``, CLAM's ``patch_size`` and ``downsample``,
            ``unit: um``, ``anchor: centre``.
        size: side of the patches in the same unit, over what the attributes say; None and no attribute: ``stride``.
        mpp: micrometres per level-0 pixel, for positions in micrometres.

    Raises:
        ValueError: positions that are not ``(N, 2)`` and finite, or micrometres without ``mpp``.
    """
    points = np.asarray(positions, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f"positions has shape {points.shape}, expected finite (N, 2)")
    about = attributes or {}
    if stride is None:
        stride = _measured(points)
    if size is None and stride is not None:
        size = _stated_size(about, stride)
    scale = 1.0
    if about.get("unit") == "um":
        if not mpp:
            raise ValueError(
                "positions are in micrometres, and the micrometres of a pixel are not known: give the slide itself "
                "(--slides), whose file says them, or state them (--mpp)"
            )
        scale = 1 / mpp
    if stride is None:
        side = 2 * mean_distance(points) if size is None else size
        return Placement((points - side / 2) * scale, side * scale, None)
    assert size is not None
    corners = points - size / 2 if about.get("anchor") == "centre" else points
    return Placement(corners * scale, size * scale, stride * scale)


def _measured(points: np.ndarray) -> float | None:
    try:
        return infer_stride(points) if len(points) else 1.0
    except ValueError:
        return None


def _stated_size(about: Mapping[str, Any], stride: float) -> float:
    """Side of a patch by the attributes, at least the stride."""
    stated = about.get("patch_size_level0", about.get("tile_size_um"))
    if not isinstance(stated, int | float) or isinstance(stated, bool):
        stated = clam_stride(about) if "patch_level" in about else None
    return max(float(stated), stride) if stated else stride


def mean_distance(points: np.ndarray) -> float:
    """About the distance between neighbours of points on no lattice: twice the median distance to the nearest other.

    For points strewn evenly at a density d the nearest one is 1 / (2 sqrt(d)) away on average.
    """
    from scipy.spatial import cKDTree

    if len(points) < 2:
        return 1.0
    some = points[:: -(-len(points) // _SAMPLE)]
    nearest = float(np.median(cKDTree(points).query(some, k=2)[0][:, 1]))
    if nearest > 0:
        return 2 * nearest
    return max(float(np.sqrt(np.prod(np.ptp(points, axis=0)) / len(points))), 1.0)


def average(
    placement: Placement, values: np.ndarray, box: Box, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the squares over each pixel of a picture of ``box``, weighted by how much of the pixel each covers.

        mean(p) = sum_i |p and i| v_i / sum_i |p and i|,   cover(p) = min(1, sum_i |p and i| / |p|)

    A square's part of the pixels is a product of two ramps, whose second differences are four numbers each: sixteen
    additions for each square and two running sums over the picture, whatever the size of the squares. O(N + pixels)
    time, 48 bytes a pixel and 400 bytes a square that reaches into ``box``.

    Args:
        placement: the squares.
        values: ``(N,)`` one number for each of them.
        box: what the picture shows, in level-0 pixels.
        shape: its height and width in pixels.

    Returns:
        mean: ``shape`` float32, 0 where nothing lies.
        cover: ``shape`` float32, covered share of each pixel, 0 to 1.
    """
    height, width = shape
    inside = placement.between(box[1], box[3])
    scale = np.array([width / (box[2] - box[0]), height / (box[3] - box[1])])
    low = (placement.corners[inside] - np.array(box[:2])) * scale
    high = low + placement.size * scale
    columns, across = _ramp(low[:, 0], high[:, 0], width)
    rows, down = _ramp(low[:, 1], high[:, 1], height)
    flat = (rows[:, :, None] * (width + 2) + columns[:, None, :]).reshape(-1)
    weights = down[:, :, None] * across[:, None, :]
    cover = _integrated(flat, weights, (height, width))
    total = _integrated(flat, weights * np.asarray(values, np.float64)[inside, None, None], (height, width))
    covered = cover > _NOTHING
    mean = np.divide(total, cover, out=np.zeros_like(total), where=covered)
    return mean.astype(np.float32), np.where(covered, np.minimum(cover, 1), 0).astype(np.float32)


def _ramp(low: np.ndarray, high: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """``(M, 4)`` places and numbers whose running sum is the share of each of ``length`` pixels from low to high."""
    low, high = np.clip(low, 0, length), np.clip(high, 0, length)
    first, last = np.floor(low), np.floor(high)
    part, rest = low - first, high - last
    places = np.stack([first, first + 1, last, last + 1], axis=1).astype(np.int64)
    return places, np.stack([1 - part, part, rest - 1, -rest], axis=1)


def _integrated(flat: np.ndarray, weights: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The running sums along both axes of ``weights`` added up at the places ``flat``."""
    height, width = shape
    grid = np.bincount(flat, weights.reshape(-1), (height + 2) * (width + 2)).reshape(height + 2, width + 2)
    np.cumsum(grid, axis=0, out=grid)
    np.cumsum(grid, axis=1, out=grid)
    return grid[:height, :width]
