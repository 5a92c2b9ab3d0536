"""The graph of a bag or of a pack, from coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.graphs.edges import NORMALIZATIONS, add_self_loops, normalize_adjacency
from bigbag.graphs.nearest import nearest_graph, symmetrized
from bigbag.graphs.points import as_coords, as_float64, as_sizes
from bigbag.graphs.radius import radius_graph

_WHERE = "build_adjacency"


def build_adjacency(
    coords: np.ndarray | Tensor,
    *,
    radius: float | None = None,
    knn: int | None = None,
    features: np.ndarray | Tensor | None = None,
    self_loops: bool = False,
    normalize: str = "none",
    symmetrize: str | None = None,
    sizes: Sequence[int] | None = None,
) -> Adjacency:
    """Join instances that lie close to each other; exactly one of ``radius`` and ``knn`` says what close means.

        radius:  i ~ j  if i != j and ||c_i - c_j|| <= radius             (symmetric)
        knn:     i ~ j  if j is one of the ``knn`` nearest others of i, of equally near ones those of lowest index

    Distances are Euclidean, in float64; two instances at one place are neighbours. Edge weights are

        a_ij = 1,  or with features  exp(-||x_i - x_j|| / P);   a_ii = 1 if ``self_loops``

    and then ``normalize`` applies to all of it, so ``self_loops=True, normalize="symmetric"`` is the GCN operator.
    ``radius`` with and without features is ``build_adj`` of torchmil, and ``normalize="symmetric"`` its
    ``normalize_adj``, except that torchmil loses pairs whose distance equals the radius when radius**2 rounds down
    (so its radius sqrt(3) misses the corners of a 3-D lattice), computes distances of half-precision features in half
    precision, and adds a self loop where there already is one.

    On a lattice (whole numbers, one step on all axes, a radius of 8 steps or less) the neighbours of a place in each
    row are those between two place numbers, so that no distance is computed, and instances that come row by row are not
    even sorted. Elsewhere a radius graph compares each point with those of the 3**c cells (side ``radius``) around
    its own. Both are O(T + E) where there are at most 4 cells or places to a point, since points are then sorted by
    counting; O(T log T + E) elsewhere. c > 3, boxes of more than 2**62 cells, and knn take a KD-tree. Working memory
    beside the result (8 (T + 1) + 4 E bytes, 4 E more with weights) is about 8 (2 c + 2) T bytes; no (E, P) array is
    formed. 1 M lattice points, 8 neighbours, one core of an AMD EPYC: in random order 0.16 s, 1.6 times np.lexsort of
    the same coordinates; row by row, where lexsort has next to nothing to do, 0.04 s, 2.9 times. numpy holds 72 MiB at
    the peak, 1.9 times the result; knn=8 takes 1.4 s (``python tests/graphs/measure_graphs.py 1000 1``).

    Args:
        coords: ``(T, c)`` positions, integer or floating, in any unit.
        radius: largest distance, in the unit of ``coords``. On a lattice of step 1: 1 joins 4 neighbours, sqrt(2) 8.
        knn: number of neighbours; fewer where a bag has not so many other instances.
        features: ``(T, P)`` floating or integer.
        self_loops: join every instance to itself.
        normalize: "none"; "symmetric", D^-1/2 A D^-1/2; "row", D^-1 A (D = row sums; rows without edges stay empty).
        symmetrize: of a knn graph, keep pairs where either chose the other ("union") or both did ("mutual").
        sizes: sizes of the bags of a pack that ``coords`` lie end to end in; no edge joins two bags. None: one bag.

    Returns:
        CSR over T on the CPU, columns ascending within a row; ``symmetric`` is set if A == A.T to the last bit.

    Raises:
        ValueError: arguments that do not go together, coordinates or features that are not finite.
    """
    points = as_coords(coords, _WHERE)
    checked_sizes = as_sizes(sizes, len(points), _WHERE)
    _check_arguments(radius, knn, normalize, symmetrize)
    x = None if features is None else _as_features(features, len(points))
    points = as_float64(points, _WHERE)
    if radius is not None:
        crow, col = radius_graph(points, float(radius), checked_sizes)
    else:
        assert knn is not None
        crow, col = nearest_graph(points, int(knn), checked_sizes)
        if symmetrize is not None:
            crow, col = symmetrized(crow, col, symmetrize)
    weight = None if x is None else _weigh(x, crow, col)
    symmetric = knn is None or symmetrize is not None
    adj = Adjacency(torch.from_numpy(crow), torch.from_numpy(col), weight, symmetric)
    if self_loops:
        adj = add_self_loops(adj)
    return normalize_adjacency(adj, normalize)


def _check_arguments(radius: float | None, knn: int | None, normalize: str, symmetrize: str | None) -> None:
    if (radius is None) == (knn is None):
        raise ValueError(f"{_WHERE}: got radius={radius} and knn={knn}, expected exactly one of them")
    if radius is not None and not 1e-150 < radius < 1e150:
        raise ValueError(f"{_WHERE}: radius is {radius}, expected a positive, finite distance in the unit of coords")
    if knn is not None and (int(knn) != knn or knn < 1):
        raise ValueError(f"{_WHERE}: knn is {knn}, expected a number of neighbours, 1 or more")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"{_WHERE}: normalize is {normalize!r}, expected one of {', '.join(NORMALIZATIONS)}")
    if symmetrize not in (None, "union", "mutual"):
        raise ValueError(f"{_WHERE}: symmetrize is {symmetrize!r}, expected None, 'union' or 'mutual'")
    if symmetrize is not None and radius is not None:
        raise ValueError(f"{_WHERE}: symmetrize={symmetrize!r} goes with knn; a radius graph is symmetric already")


def _as_features(features: Any, num_instances: int) -> np.ndarray | Tensor:
    x = features.detach().cpu() if isinstance(features, Tensor) else np.asarray(features)
    if x.ndim != 2 or x.shape[0] != num_instances or x.shape[1] == 0:
        raise ValueError(f"{_WHERE}: features has shape {tuple(x.shape)}, expected ({num_instances}, P), as coords")
    if isinstance(x, Tensor):
        return x if x.is_floating_point() else x.float()
    if x.dtype.kind not in "iuf":
        raise ValueError(f"{_WHERE}: features has dtype {x.dtype}, expected integers or floats")
    return x if x.dtype.kind == "f" else x.astype(np.float32)


def _weigh(x: np.ndarray | Tensor, crow: np.ndarray, col: np.ndarray) -> Tensor:
    from bigbag.kernels.cpu.edges import feature_weights

    weight = feature_weights(x, crow, col)
    finite = np.isfinite(weight)
    if not finite.all():
        instance = int(np.searchsorted(crow, np.argmin(finite), side="right")) - 1
        raise ValueError(f"{_WHERE}: features of instance {instance} or of a neighbour of it are not finite")
    return torch.from_numpy(weight)
