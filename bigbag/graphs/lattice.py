"""Positions in pixels or micrometres, as positions on a lattice of step 1."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from bigbag.graphs.points import as_coords, as_float64

# Positions this close below a lattice line are on it: what is left by float32 positions some thousand steps away.
_SNAP = 5e-4
# Gaps that differ by less than this fraction are one gap.
_SAME_GAP = 2e-3
# The stride must make up this share of all gaps, and divide that share of them.
_STRIDE_SHARE = 0.05
_MULTIPLE_SHARE = 0.9


def grid_coords(coords_level0: np.ndarray | Tensor, stride: float | Any) -> np.ndarray:
    """Positions counted in strides, floor((c - min) / stride), from 0 on each axis.

    A position that rounding put less than 5e-4 strides below a lattice line is taken to that line.

    Args:
        coords_level0: ``(N, c)`` positions at level 0, integer or floating.
        stride: distance of adjacent instances in the same unit, one number or one for each axis. At level 0 this is
            the patch size in level-0 pixels less the overlap, not the patch size at the magnification of the patches.

    Returns:
        ``(N, c)`` int64.

    Raises:
        ValueError: a stride of 0 or less, or of another length than the axes.
    """
    array = as_coords(coords_level0, "grid_coords")
    steps = np.asarray(stride, dtype=np.float64)
    if steps.shape not in ((), (array.shape[1],)) or not (np.isfinite(steps) & (steps > 0)).all():
        raise ValueError(f"grid_coords: stride is {stride}, expected a positive number, or one for each of the axes")
    if len(array) == 0:
        return np.empty(array.shape, dtype=np.int64)
    points = as_float64(array, "grid_coords")
    counted = (points - points.min(0)) / steps
    return np.floor(counted + _SNAP).astype(np.int64)


def infer_stride(coords: np.ndarray | Tensor) -> float:
    """The step of the lattice that instances stand on, in the unit of ``coords``; O(N log N).

    Takes the gaps between each instance and the next along every axis (all other coordinates being equal), and of
    these the smallest that makes up 5 % of them and of which 90 % are multiples. So missing patches do no harm, nor do
    a few pairs of tissue pieces whose lattices are not aligned.

    Args:
        coords: ``(N, c)`` positions on a lattice of one step for all axes.

    Raises:
        ValueError: there are no gaps, no such gap, or axes disagree; the remedy is to state the stride.
    """
    points = as_float64(as_coords(coords, "infer_stride"), "infer_stride")
    strides = {}
    for axis in range(points.shape[1]):
        gaps = _gaps_along(points, axis)
        if len(gaps):
            strides[axis] = _stride_of(gaps, axis)
    if not strides:
        raise ValueError(
            f"infer_stride: no two of {len(points)} instances lie in one row of a lattice, so there is no gap to "
            "measure; state the stride"
        )
    smallest, largest = min(strides.values()), max(strides.values())
    if largest - smallest > _SAME_GAP * largest:
        found = ", ".join(f"axis {axis}: {stride:g}" for axis, stride in strides.items())
        raise ValueError(f"infer_stride: axes disagree, {found}; state the stride")
    return smallest


def _gaps_along(points: np.ndarray, axis: int) -> np.ndarray:
    """Positive gaps between neighbours along ``axis`` among instances that share all other coordinates, ascending."""
    others = [a for a in range(points.shape[1]) if a != axis]
    order = np.lexsort([points[:, axis], *(points[:, a] for a in others)])
    steps = np.diff(points[order], axis=0)
    same_row = (steps[:, others] == 0).all(1)
    gaps = steps[same_row, axis]
    return np.sort(gaps[gaps > 0])


def _stride_of(gaps: np.ndarray, axis: int) -> float:
    groups = np.split(gaps, np.nonzero(np.diff(gaps) > _SAME_GAP * gaps[1:])[0] + 1)
    common = [group for group in groups if len(group) >= _STRIDE_SHARE * len(gaps)]
    for group in common:
        stride = float(np.median(group))
        counted = gaps / stride
        multiples = np.abs(counted - np.rint(counted)) <= _SAME_GAP * counted + _SNAP
        if multiples.mean() >= _MULTIPLE_SHARE:
            return stride
    frequent = ", ".join(f"{np.median(group):g} ({len(group) / len(gaps):.0%})" for group in common[:5])
    raise ValueError(
        f"infer_stride: {len(gaps)} gaps along axis {axis} have no common step; most frequent: {frequent or 'none'}; "
        "state the stride"
    )
