"""The graph of a bag, built once when it is packed and stored as CSR beside its features.

Stored, not rebuilt at every reading: on a lattice of which 80 % is tissue (6.4 edges an instance) the default graph
takes 59 bytes an instance, 2.9 % of 1024 float16 features, and lengthens the reading of a mapped bag by 0.1 to 0.2 ms,
where building it takes 2.3 ms at 8 k instances and 48 ms at 80 k (with ``features`` 16 and 93 ms; one bag, 2 cores of
an AMD EPYC; ``python tests/data/measure_graph.py``). Columns are int32 and weights float32: float16 would save another
0.6 % and cost the fourth digit of every weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bigbag.bags import Bag
from bigbag.graphs import build_adjacency

_TOO_MANY_ALONE = 50


def with_graph(bag: Bag, settings: Mapping[str, Any], where: str) -> tuple[Bag, str | None]:
    """The bag with the graph that ``settings`` describe.

    Args:
        bag: with ``coords`` that count patches (:func:`bigbag.data.lattice.on_lattice`), without a graph of its own.
        settings: the fields of :class:`bigbag.config.GraphConfig`.
        where: what to call the bag in messages.

    Returns:
        The bag with ``adj``, and a remark where no two of its instances are joined, else None.

    Raises:
        ValueError: no coordinates, a graph that the source brings itself, or a large bag without any edge.
    """
    if bag.adj is not None:
        raise ValueError(f"{where}: the source brings a graph of its own; leave data.graph out")
    if bag.coords is None:
        raise ValueError(
            f"{where}: has no coords, from which data.graph is built: give them, or leave data.graph out for a model "
            "that needs no graph"
        )
    try:
        adj = build_adjacency(
            bag.coords,
            radius=settings["radius"],
            knn=settings["knn"],
            features=bag.x.reshape(len(bag.x), -1) if settings["features"] else None,
            self_loops=settings["self_loops"],
            normalize=settings["normalize"],
            symmetrize=None if settings["knn"] is None else "union",
        )
    except ValueError as error:
        raise ValueError(f"{where}: data.graph: {error}") from error
    num_alone = bag.num_instances if settings["self_loops"] else 0
    remark = None
    if bag.num_instances > 1 and adj.num_edges == num_alone:
        remark = (
            f"{where}: data.graph joins no two of {bag.num_instances} instances; coords are taken to have the stride "
            f"{1 if bag.stride is None else bag.stride} (set data.graph.stride to that of the coords, or to infer)"
        )
        if bag.num_instances > _TOO_MANY_ALONE:
            raise ValueError(remark)
    return replace(bag, adj=adj), remark
