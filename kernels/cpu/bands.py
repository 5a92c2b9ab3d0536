"""Graphs in CSR form whose rows are relabelled so that edges join rows that lie close to each other.

    order[k]    the row that comes k-th        crow, col    A[order][:, order]        band    max |col[e] - row of e|

Breadth first, rows of one distance from the first follow one another, and an edge reaches the next distance at most: of
N points in a plane the band is a few sqrt(N). Edges are walked both ways, so that A and A^T have one order and one
band. From the row that such a walk finds last, at the edge of the points, a second walk starts: its fronts are shorter
than those from a row in the middle (0.85 times the band of points spread evenly, half that of points in clusters).
Every component lies apart from the others.

A row keeps its edges in their order, so sums over them keep their bits. Found once per graph: four visits to each edge
and row at random, besides transposing; held: 4 bytes per edge and 12 per row.

E. Cuthill, J. McKee, Reducing the bandwidth of sparse symmetric matrices, ACM 1969; the start as N. Gibbs et al., An
algorithm for reducing the bandwidth and profile of a sparse matrix, SIAM J. Numer. Anal. 13 (1976).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bigbag.kernels.cpu.order import _jit_serial
from bigbag.kernels.cpu.spmm import transpose


@_jit_serial
def _band(crow, col):
    """The furthest that an edge reaches, in rows."""
    furthest = 0
    for i in range(len(crow) - 1):
        for e in range(crow[i], crow[i + 1]):
            furthest = max(furthest, abs(col[e] - i))
    return furthest


@_jit_serial
def _append(i, walk, crow, col, seen, order, count):
    """The neighbours of a row that this walk has not seen."""
    for e in range(crow[i], crow[i + 1]):
        j = col[e]
        if seen[j] != walk:
            seen[j] = walk
            order[count] = j
            count += 1
    return count


@_jit_serial
def _walk(walk, root, crow, col, crow_t, col_t, seen, order, count):
    """The component of a row, breadth first, from ``order[count]`` on; returns its end."""
    done = count
    seen[root], order[count] = walk, root
    count += 1
    while done < count:
        count = _append(order[done], walk, crow, col, seen, order, count)
        count = _append(order[done], walk, crow_t, col_t, seen, order, count)
        done += 1
    return count


@_jit_serial
def _breadth_first(crow, col, crow_t, col_t, order):
    seen, count = np.zeros(len(order), np.uint8), 0
    for root in range(len(order)):
        if not seen[root]:
            last = order[_walk(1, root, crow, col, crow_t, col_t, seen, order, count) - 1]
            count = _walk(2, last, crow, col, crow_t, col_t, seen, order, count)


@_jit_serial
def _relabel(crow, col, order, new_crow, new_col):
    place = np.empty(len(order), np.int32)
    for k in range(len(order)):
        place[order[k]] = k
    new_crow[0] = 0
    for k in range(len(order)):
        i, first = order[k], new_crow[k]
        new_crow[k + 1] = first + crow[i + 1] - crow[i]
        for e in range(crow[i], crow[i + 1]):
            new_col[first + e - crow[i]] = place[col[e]]


@_jit_serial
def _values_in_order(crow, order, values, out):
    count = 0
    for i in order:
        for e in range(crow[i], crow[i + 1]):
            out[count] = values[e]
            count += 1


class Banded(NamedTuple):
    """A graph with its rows in the ``order`` that makes the ``band`` narrow."""

    order: np.ndarray
    crow: np.ndarray
    col: np.ndarray
    band: int


def band(crow: Tensor, col: Tensor) -> int:
    """How far edges reach where rows are as they lie."""
    return _once("band", crow, col, lambda: _band(crow.numpy(), col.numpy()))


def banded(crow: Tensor, col: Tensor) -> Banded | None:
    """The graph relabelled; None where that does not make the band half as wide."""
    return _once("banded", crow, col, lambda: _relabelled(crow, col))


def values_in_order(crow: Tensor, order: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of the edges of a graph with this ``crow``, in the order of the relabelled ones."""
    out = np.empty_like(values)
    _values_in_order(crow.numpy(), order, values, out)
    return out


def _relabelled(crow: Tensor, col: Tensor) -> Banded | None:
    crow_t, col_t, _ = transpose(crow, col)
    rows, columns, order = crow.numpy(), col.numpy(), np.empty(crow.shape[0] - 1, np.int32)
    _breadth_first(rows, columns, crow_t.numpy(), col_t.numpy(), order)
    new_rows, new_columns = np.empty_like(rows), np.empty_like(columns)
    _relabel(rows, columns, order, new_rows, new_columns)
    found = Banded(order, new_rows, new_columns, _band(new_rows, new_columns))
    return found if 2 * found.band <= band(crow, col) else None


# By the tensor of columns, then by what was found; nothing in it may keep that tensor alive, as its array would.
_known = WeakTensorKeyDictionary()


def _once(name: str, crow: Tensor, col: Tensor, find: Callable[[], Any]) -> Any:
    # In-place changes show in the versions, which tensors of inference mode do not have.
    if crow.is_inference() or col.is_inference():
        return find()
    state, known = (crow._version, col._version), _known.get(col)
    if known is None or known[0] is not crow or known[1] != state:
        known = _known[col] = (crow, state, {})
    if name not in known[2]:
        known[2][name] = find()
    return known[2][name]
