"""Edges of CSR graphs on CPU, with Numba: their weights, self loops, and order.

    distances  w[e] = exp(-||x_i - x_j|| / P) for the edge e = (i, j)
    diagonal   a self loop in every row that has none
    scale      out[e] = w[e] * left[i] [* left[j]]
    permute    rows and columns in another order

A thread owns a range of rows and alone writes them, so results do not depend on the number of threads.
Columns come out sorted within a row. Rows are int64 offsets ``crow``, columns int32.
"""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from bigbag.kernels.cpu.graphs import NO_WEIGHT, _jit, _sort_columns
from bigbag.kernels.cpu.half import _widen
from bigbag.kernels.cpu.segments import _launch, array

_jit_sums = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})


@_jit_sums
def _widen_row(x, i, row):
    for p in range(x.shape[1]):
        row[p] = _widen(x[i, p])


@_jit_sums
def _square_distance(row, x, j):
    total = row.dtype.type(0)
    for p in range(x.shape[1]):
        difference = row[p] - _widen(x[j, p])
        total += difference * difference
    return total


@_jit
def _distances(begin, end, x, crow, col, out):
    for i in range(begin, end):
        row = np.empty(x.shape[1], out.dtype)
        _widen_row(x, i, row)
        for e in range(crow[i], crow[i + 1]):
            out[e] = np.exp(-np.sqrt(_square_distance(row, x, col[e])) / x.shape[1])


@_jit
def _has_diagonal(begin, end, crow, col, out):
    for i in range(begin, end):
        for e in range(crow[i], crow[i + 1]):
            if col[e] == i:
                out[i] = True


@_jit
def _add_diagonal(begin, end, crow, col, weight, has, new_crow, new_col, new_weight):
    for i in range(begin, end):
        place = new_crow[i]
        pending = not has[i]
        for e in range(crow[i], crow[i + 1]):
            if pending and col[e] > i:
                new_col[place] = i
                if len(new_weight):
                    new_weight[place] = 1
                place += 1
                pending = False
            new_col[place] = col[e]
            if len(new_weight):
                new_weight[place] = weight[e]
            place += 1
        if pending:
            new_col[place] = i
            if len(new_weight):
                new_weight[place] = 1


@_jit
def _degrees(begin, end, crow, weight, out):
    for i in range(begin, end):
        total = 0.0
        for e in range(crow[i], crow[i + 1]):
            total += weight[e]
        out[i] = total


@_jit
def _scale(begin, end, crow, col, weight, factor, both, out):
    for i in range(begin, end):
        for e in range(crow[i], crow[i + 1]):
            # The two factors first: their product is the same for (i, j) and (j, i).
            out[e] = weight[e] * (factor[i] * factor[col[e]] if both else factor[i])


@_jit
def _permute(begin, end, crow, col, weight, order, place_of, new_crow, new_col, new_weight):
    for i in range(begin, end):
        start = new_crow[i]
        count = new_crow[i + 1] - start
        old = crow[order[i]]
        for e in range(count):
            new_col[start + e] = place_of[col[old + e]]
            if len(new_weight):
                new_weight[start + e] = weight[old + e]
        _sort_columns(new_col, new_weight, start, start + count)


def feature_weights(x: np.ndarray | Tensor, crow: np.ndarray, col: np.ndarray) -> np.ndarray:
    """(E,) float32 exp(-||x_i - x_j|| / P); x (N, P) floating, sums in float32, float64 for float64."""
    if isinstance(x, Tensor):
        x = array(x)
    elif x.dtype == np.float16:
        x = x.view(np.uint16)
    out = np.empty(len(col), dtype=np.float64 if x.dtype == np.float64 else np.float32)
    _launch(_distances, len(crow) - 1, len(col) * x.shape[1], x, crow, col, out)
    return out.astype(np.float32, copy=False)


def with_diagonal(
    crow: np.ndarray, col: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A self loop of weight 1 in every row that has none."""
    has = np.zeros(len(crow) - 1, dtype=np.bool_)
    rows, work = len(crow) - 1, 8 * len(col)
    _launch(_has_diagonal, rows, work, crow, col, has)
    new_crow = crow.copy()
    new_crow[1:] += np.cumsum(~has)
    new_col = np.empty(new_crow[-1], dtype=np.int32)
    new_weight = np.empty(0 if weight is None else len(new_col), dtype=np.float32 if weight is None else weight.dtype)
    old_weight = new_weight[:0] if weight is None else weight
    _launch(_add_diagonal, rows, work, crow, col, old_weight, has, new_crow, new_col, new_weight)
    return new_crow, new_col, None if weight is None else new_weight


def row_sums(crow: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(N,) float64."""
    out = np.empty(len(crow) - 1)
    _launch(_degrees, len(out), 4 * len(weight), crow, weight, out)
    return out


def scale(crow: np.ndarray, col: np.ndarray, weight: np.ndarray, factor: np.ndarray, both: bool) -> np.ndarray:
    """(E,) weight[e] * factor[i], times factor[j] if ``both``, in the dtype of ``weight``."""
    out = np.empty_like(weight)
    _launch(_scale, len(crow) - 1, 4 * len(col), crow, col, weight, factor, both, out)
    return out


def permute(
    crow: np.ndarray, col: np.ndarray, weight: np.ndarray | None, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Row i of the result is row order[i], its columns renamed alike."""
    place_of = np.empty(len(order), dtype=np.int32)
    place_of[order] = np.arange(len(order), dtype=np.int32)
    new_crow = np.zeros_like(crow)
    np.cumsum(np.diff(crow)[order], out=new_crow[1:])
    new_col = np.empty_like(col)
    new_weight = NO_WEIGHT.copy() if weight is None else np.empty_like(weight)
    old = (crow, col, new_weight if weight is None else weight)
    _launch(_permute, len(order), 16 * len(col), *old, order, place_of, new_crow, new_col, new_weight)
    return new_crow, new_col, None if weight is None else new_weight
