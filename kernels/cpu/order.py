"""The order in which the rows of a graph are computed, on CPU.

Where neighbours lie further apart than caches reach, rows are taken breadth first along the edges, so that what one has
read is still there for its neighbours. Found once per graph, in O(T + E).
"""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# What is larger does not stay in caches.
LARGE_BYTES = 32 << 20
# Neighbours so far apart, on average, are out of reach of a core's own cache.
_FAR_BYTES = 4 << 20
# In another order sums are written here and there, for which shorter rows do not make up: time in order, as a share of
# that as they lie, for 100,000 rows with 8 neighbours: 512 bytes 1.5, 1 KiB 1.0 to 1.4, 2 KiB 0.8 to 0.9, 4 KiB 0.7.
_LONG_ROW_BYTES = 2 << 10

_jit_serial = numba.njit(cache=True, nogil=True, error_model="numpy")


@_jit_serial
def _mean_distance(crow, col):
    total = 0
    for i in range(len(crow) - 1):
        for e in range(crow[i], crow[i + 1]):
            total += abs(col[e] - i)
    return total / max(len(col), 1)


@_jit_serial
def _breadth_first(crow, col, order):
    seen = np.zeros(len(order), np.bool_)
    count = 0
    for root in range(len(order)):
        if not seen[root]:
            seen[root] = True
            order[count] = root
            done = count
            count += 1
            while done < count:
                i = order[done]
                done += 1
                for e in range(crow[i], crow[i + 1]):
                    # Columns beyond the rows have none of their own.
                    if col[e] < len(seen) and not seen[col[e]]:
                        seen[col[e]] = True
                        order[count] = col[e]
                        count += 1


# By the tensor of columns: the order of a graph is found once.
_orders = WeakTensorKeyDictionary()
_IN_ORDER = np.empty(0, np.int32)


def row_order(crow: Tensor, col: Tensor, x: Tensor) -> np.ndarray:
    """The rows of a graph in the order they are computed in, from the rows of x (columns, D); an empty array for that
    in which they lie."""
    rows, row_bytes = crow.shape[0] - 1, x.element_size() * x.shape[1]
    if x.nbytes < LARGE_BYTES or row_bytes < _LONG_ROW_BYTES:
        return _IN_ORDER
    known = _orders.get(col)
    if known is None or known[0] != rows:
        distance = _mean_distance(crow.numpy(), col.numpy())
        known = _orders[col] = [rows, distance, None]
    if known[1] * row_bytes < _FAR_BYTES:
        return _IN_ORDER
    if known[2] is None:
        known[2] = np.empty(rows, np.int32)
        _breadth_first(crow.numpy(), col.numpy(), known[2])
    return known[2]
