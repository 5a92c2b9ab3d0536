"""Graphs over the instances of a bag, from their positions."""

from bigbag.graphs.build import build_adjacency
from bigbag.graphs.edges import add_self_loops, normalize_adjacency
from bigbag.graphs.lattice import grid_coords, infer_stride
from bigbag.graphs.order import permute, space_filling_order

__all__ = [
    "add_self_loops",
    "build_adjacency",
    "grid_coords",
    "infer_stride",
    "normalize_adjacency",
    "permute",
    "space_filling_order",
]
