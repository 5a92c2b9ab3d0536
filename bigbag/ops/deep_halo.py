"""Deep halos: the rows within some steps of a rank's own, with which it takes those steps and asks nobody again.

A halo holds what one product reads of other ranks' rows. With the rows that T products read, and the edges between
them, a rank takes all T by itself: of a row k edges away the state is right after T - k steps, so that of its own rows
is right in the end. That is one message in place of T, and steps that need not wait for each other, for H_T rows that
other ranks compute as well. Rows lie in the order of the whole pack, before and behind a rank's own, so that edges join
rows that lie close to each other where they do in the whole graph.

J. Demmel, M. Hoemmen, M. Mohiyuddin, K. Yelick, Avoiding communication in sparse matrix computations, IPDPS 2008.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.kernels.cpu.memory import huge_pages
from bigbag.ops.distributed import exchange, send_rows
from bigbag.ops.join import columns_in_pack
from bigbag.ops.per_graph import once_per_graph
from bigbag.parts import Halo

# Rows of others that a rank may take, for each row of the rank with most of them. Step by step, smoothing takes twice
# as long for each row, but memory is to fall with the number of ranks.
_SHARE = 1 / 6


@dataclass(frozen=True)
class DeepHalo:
    """What a rank computes T steps with.

    Attributes:
        graph: square, over the own rows and those of the halo, in the order of the whole pack; the last to be reached
            have no edges.
        halo: the rows of other ranks.
        places: which rows of ``graph`` they are, as they come.
        own: which rows are this rank's.
    """

    graph: Adjacency
    halo: Halo
    places: Tensor
    own: slice | Tensor

    def widen(self, x: Tensor) -> Tensor:
        """The rows of ``graph``, of this rank's; all ranks call it."""
        return self._laid_out(x, exchange(x, self.halo))

    def pad(self, x: Tensor) -> Tensor:
        """The same with zeros for the rows of other ranks."""
        return self._laid_out(x, x.new_zeros(()))

    def _laid_out(self, own: Tensor, others: Tensor) -> Tensor:
        out = huge_pages(own.new_empty(self.graph.num_nodes, own.shape[1]))
        out[self.own] = own
        out[self.places] = others
        return out


@once_per_graph(weighted=True)
def deep_halo(adj: Adjacency, num_steps: int) -> DeepHalo | None:
    """The deep halo of a graph with halo, found once; all ranks call it.

    None, on all ranks alike, where it would give a rank more than 7 / 6 of the rows that the one with most has.

    Bytes: 8 for each row and 8 to 16 for each edge of the deep halo, once, in ``num_steps`` rounds of messages. Held: 4
    to 12 for each edge of ``graph`` and 8 for each of its rows.
    """
    assert adj.halo is not None
    parts, device = adj.halo.parts, adj.col.device
    own, columns = torch.from_numpy(parts.rows()).to(device), columns_in_pack(adj)
    sizes = np.asarray(parts.sizes, dtype=np.int64).reshape(parts.num_ranks, -1).sum(1)
    limit = (1 + _SHARE) * sizes.max()
    seen = torch.zeros(sum(parts.totals), dtype=torch.bool, device=device)
    seen[own] = True
    rows, edges = [own], [(adj.crow.diff(), columns, adj.weight)]
    asked: list[list[np.ndarray]] = [[] for _ in sizes]
    for step in range(num_steps):
        reached = edges[-1][1]
        new = reached[~seen[reached]].unique()
        seen[new] = True
        every: list[Any] = [None] * parts.num_ranks
        dist.all_gather_object(every, new.cpu().numpy(), group=parts.group)
        sizes += [len(of_rank) for of_rank in every]
        # Of what all ranks know, so that they decide alike.
        if sizes.max() > limit:
            return None
        for of_rank, more in zip(asked, every):
            of_rank.append(more)
        halo = Halo.of(parts, every, device)
        rows.append(torch.empty_like(new).index_copy(0, halo.order, new))
        # The last rows to be reached are only read.
        edges.append(_fetched(adj, columns, halo) if step + 1 < num_steps else _none(adj, columns, len(new)))
    halo = Halo.of(parts, [np.concatenate(of_rank) for of_rank in asked], device)
    graph, place = _in_order(torch.cat(rows), edges, len(seen))
    places = place[torch.from_numpy(np.concatenate(asked[parts.rank])).to(device)]
    return DeepHalo(graph, halo, places, _run(place[own]))


Edges = tuple[Tensor, Tensor, Tensor | None]
"""How many each row has; their columns in the whole pack; their weights."""


def _none(adj: Adjacency, columns: Tensor, num_rows: int) -> Edges:
    return adj.crow.new_zeros(num_rows), columns[:0], None if adj.weight is None else adj.weight[:0]


def _fetched(adj: Adjacency, columns: Tensor, halo: Halo) -> Edges:
    """Those of the rows of a halo, as they come."""
    degrees = adj.crow.diff()[halo.send]
    edges = _ranges(adj.crow[halo.send], degrees)
    incoming = send_rows(degrees, halo.send_counts, halo.counts, halo.parts)
    sent, counts = (
        [int(own.sum()) for own in of.split(rows)]
        for of, rows in ((degrees, halo.send_counts), (incoming, halo.counts))
    )

    def move(values: Tensor) -> Tensor:
        return send_rows(values[edges], sent, counts, halo.parts)

    return incoming, move(columns), None if adj.weight is None else move(adj.weight)


def _ranges(firsts: Tensor, counts: Tensor) -> Tensor:
    """``firsts[0], firsts[0] + 1, ...``, so many as ``counts`` says, then those of the next."""
    ends = counts.cumsum(0)
    return torch.repeat_interleave(firsts - ends + counts, counts) + torch.arange(int(counts.sum()), device=ends.device)


def _in_order(rows: Tensor, edges: list[Edges], num_rows: int) -> tuple[Adjacency, Tensor]:
    """The graph of ``rows``, ordered, and where in it each row of the whole pack is."""
    rows, order = rows.sort()
    place = torch.empty(num_rows, dtype=torch.int64, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    counts, columns, weights = zip(*edges)
    degrees = torch.cat(counts)
    taken = _ranges((degrees.cumsum(0) - degrees)[order], degrees[order])
    weight = None if weights[0] is None else torch.cat(weights)[taken]
    crow = torch.cat([degrees.new_zeros(1), degrees[order].cumsum(0)])
    return Adjacency(crow, place[torch.cat(columns)[taken]].to(torch.int32), weight), place


def _run(places: Tensor) -> slice | Tensor:
    """A slice, which copies nothing, where the places follow one another."""
    first = int(places[0]) if len(places) else 0
    follow = not len(places) or int(places[-1]) - first + 1 == len(places)
    return slice(first, first + len(places)) if follow else places
