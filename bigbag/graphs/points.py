"""Positions of instances, checked and made ready for exact distances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

# float64 holds every integer up to here.
_EXACT = 2**53


def as_array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def as_coords(coords: Any, where: str) -> np.ndarray:
    """``(N, c)`` real, finite coordinates as an array of their own dtype.

    Raises:
        ValueError: another shape or dtype, too many rows for int32 columns, or a coordinate that is NaN or infinite.
    """
    array = as_array(coords)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{where}: coords has shape {array.shape}, expected (N, c) with c of 1 or more")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{where}: coords has dtype {array.dtype}, expected integers or floats")
    if len(array) >= 2**31:
        raise ValueError(f"{where}: {len(array)} instances, expected less than 2**31, since columns are int32")
    if array.dtype.kind == "f":
        finite = np.isfinite(array)
        if not finite.all():
            bad = int(np.argmin(finite.all(1)))
            raise ValueError(f"{where}: coords of instance {bad} are {array[bad].tolist()}, expected finite numbers")
    return array


def as_float64(coords: np.ndarray, where: str) -> np.ndarray:
    """The same points in float64, C-contiguous; integers moved towards 0 where float64 couldn't hold them.

    Raises:
        ValueError: coordinates so far apart that differences are not exact (integers) or overflow (floats).
    """
    from bigbag.kernels.cpu.graphs import bounds

    points = np.ascontiguousarray(coords, dtype=np.float64)
    if len(coords) == 0:
        return points
    if coords.dtype.kind == "f":
        low, high = bounds(points)
        with np.errstate(over="ignore"):
            span = float((high - low).max())
        if not span < 1e150:
            raise ValueError(f"{where}: coords span {span:.3g}, expected less than 1e150, or distances overflow")
    elif points.min() <= -_EXACT or points.max() >= _EXACT:
        low, high = coords.min(0), coords.max(0)
        widest = max(int(b) - int(a) for a, b in zip(low, high))
        if widest > _EXACT:
            raise ValueError(f"{where}: integer coords span {widest}, expected at most 2**53, or distances are inexact")
        if max(-int(low.min()), int(high.max())) > _EXACT:
            return np.ascontiguousarray(coords - low, dtype=np.float64)
    return points


def as_sizes(sizes: Sequence[int] | None, num_instances: int, where: str) -> tuple[int, ...]:
    """Sizes of the bags, checked; one bag if None.

    Raises:
        ValueError: a negative size, or a sum other than ``num_instances``.
    """
    if sizes is None:
        return (num_instances,)
    checked = tuple(int(size) for size in sizes)
    if any(size < 0 for size in checked) or sum(checked) != num_instances:
        raise ValueError(
            f"{where}: sizes sum to {sum(checked)} (smallest {min(checked, default=0)}), expected sizes of 0 or more "
            f"that sum to the {num_instances} rows of coords"
        )
    return checked
