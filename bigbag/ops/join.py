"""Packs of parts of bags, and their graphs: what the ranks that share them have to know of each other's rows.

A rank holds the rows of a graph that are its own. Their columns may name rows of other ranks, its *halo*, whose values
come before a product (:func:`with_halo`). Where the order of the instances follows space, line by line as slides are
cut or along a curve (:func:`bigbag.graphs.space_filling_order`), the halo is the border of the rank's piece of tissue:
of N instances on a plane about sqrt(N) rows of N / R. In any other order it is most of the bag, which a warning says.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bigbag.adjacency import Adjacency
from bigbag.bags import PackedBags, Segments
from bigbag.ops.distributed import all_max, exchange, send_rows
from bigbag.parts import Halo, Parts

_FEW_ROWS = 1000


def join_parts(pack: PackedBags, group: Any = None) -> PackedBags:
    """Tell a pack of parts of bags of the other ranks' parts; all ranks of the group call it.

    Args:
        pack: this rank's parts (:meth:`bigbag.Bag.part`), on its device, and in ``parts`` who holds what.
        group: the process group; None: that of all ranks.

    Raises:
        ValueError: a pack of whole bags, or of parts of other sizes.
    """
    if pack.parts is None or pack.parts.sizes[pack.parts.rank] != pack.sizes:
        raise ValueError(
            f"join_parts: the pack has {pack.sizes} instances, its parts say {pack.parts}: make it of Bag.part, with "
            "parts=Parts.even(sizes of the whole bags, number of ranks, rank)"
        )
    parts = replace(pack.parts, group=group)
    adj = None if pack.adj is None else _join_graph(pack.adj, pack.segments, parts)
    return replace(pack, parts=parts, adj=adj)


def _join_graph(adj: Adjacency, segments: Segments, parts: Parts) -> Adjacency:
    """The graph with its columns beyond this rank's rows numbered after those, in the order of ``halo``."""
    bag = segments.bag_of_instance[adj.rows()].cpu().numpy()
    starts, ends = np.asarray(segments.starts)[bag], np.asarray(segments.starts)[bag + 1]
    whole = np.cumsum([0, *parts.totals])[bag] + np.asarray(parts.before, dtype=np.int64)[bag]
    col = adj.col.cpu().numpy().astype(np.int64)
    outside = (col < starts) | (col >= ends)
    return _with_columns(adj, col, outside, (col - starts + whole)[outside], parts)


def _with_columns(adj: Adjacency, col: np.ndarray, outside: np.ndarray, rows: np.ndarray, parts: Parts) -> Adjacency:
    """``adj`` with columns ``col`` but, where ``outside``, those of a halo of ``rows`` of the whole pack."""
    wanted, places = np.unique(rows, return_inverse=True)
    every: list[Any] = [None] * parts.num_ranks
    dist.all_gather_object(every, wanted, group=parts.group)
    col[outside] = adj.num_nodes + places
    device = adj.col.device
    if len(wanted) > max(adj.num_nodes, _FEW_ROWS):
        warnings.warn(
            f"a rank holds {adj.num_nodes} instances, which have edges to {len(wanted)} of other ranks, so that memory "
            "does not fall with the number of ranks: pack them in spatial order (bigbag.graphs.space_filling_order)",
            stacklevel=2,
        )
    return replace(adj, col=torch.from_numpy(col.astype(np.int32)).to(device), halo=Halo.of(parts, every, device))


def with_halo(x: Tensor, halo: Halo | None) -> Tensor:
    """``x`` of this rank's rows and, behind them, of those of its halo: ``(T, ...)`` to ``(T + H, ...)``."""
    return x if halo is None else torch.cat([x, exchange(x, halo)])


Spans = Sequence[Sequence[tuple[int, int]]]


def fetch(x: Tensor, parts: Parts, asked: Spans) -> list[Tensor]:
    """Rows of each bag, whichever ranks hold them; all ranks call it, and know what each of them asks for.

    Args:
        x: ``(T, ...)`` this rank's rows.
        parts: who holds what.
        asked: ``asked[r][b]``, from and up to which row of bag b rank r asks for.

    Returns:
        A tensor for each bag; gradients go back to the owners. Bytes: those of the rows, each way once.
    """
    firsts = np.cumsum([0, *parts.totals])
    wanted = [[first + np.arange(*span) for first, span in zip(firsts, spans)] for spans in asked]
    halo = Halo.of(parts, [np.concatenate([np.zeros(0, np.int64), *rows]) for rows in wanted], x.device)
    return list(exchange(x, halo).split([end - start for start, end in asked[parts.rank]]))


def windows(x: Tensor, parts: Parts, spans: Spans) -> list[Tensor]:
    """As :func:`fetch`, where each rank asks for its own rows (which go nowhere) and some on both sides of them."""
    ranks = list(zip(spans, parts.bounds))
    before = fetch(x, parts, [[(start, first) for (start, _), (first, _) in zip(*rank)] for rank in ranks])
    behind = fetch(x, parts, [[(last, end) for (_, end), (_, last) in zip(*rank)] for rank in ranks])
    return [torch.cat(rows) for rows in zip(before, x.split(parts.sizes[parts.rank]), behind)]


_offsets = WeakTensorKeyDictionary()


def squared(adj: Adjacency) -> Adjacency:
    """A graph with halo as a square one over this rank's rows and those of its halo, which have no edges here."""
    assert adj.halo is not None
    crow = _offsets.get(adj.crow)
    if crow is None:
        crow = _offsets[adj.crow] = torch.cat([adj.crow, adj.crow[-1:].expand(adj.halo.num_rows)])
    return Adjacency(crow, adj.col, adj.weight)


def transpose_in_parts(adj: Adjacency) -> Adjacency:
    """The transpose of a graph with halo, with a halo of its own; all ranks call it.

    An edge to another rank's row becomes that rank's edge. Bytes: 16 to 24 for each edge between ranks, once.

    Raises:
        ValueError: weights that require grad.
    """
    assert adj.halo is not None
    if adj.weight is not None and adj.weight.requires_grad:
        raise ValueError("transpose: adj.weight requires grad, which it does not get where ranks share a bag")
    parts, own = adj.halo.parts, torch.from_numpy(adj.halo.parts.rows())
    row, col = own[adj.rows().cpu()], columns_in_pack(adj).cpu()
    owner, place = (torch.from_numpy(found) for found in parts.locate(col.numpy()))
    order = owner.argsort(stable=True)
    counts = owner.bincount(minlength=parts.num_ranks)
    device, incoming = adj.col.device, _counts_from(counts, adj)

    def move(values: Tensor) -> Tensor:
        return send_rows(values[order.to(values.device)].to(device), counts.tolist(), incoming, parts)

    rows, columns = move(place).cpu(), move(row).cpu().numpy()
    by_row = torch.from_numpy(np.lexsort((columns, rows.numpy())))
    crow = torch.zeros(adj.num_nodes + 1, dtype=torch.int64)
    torch.cumsum(rows.bincount(minlength=adj.num_nodes), 0, out=crow[1:])
    weight = None if adj.weight is None else move(adj.weight)[by_row.to(device)]
    columns = columns[by_row.numpy()]
    rank, local = parts.locate(columns)
    outside = rank != parts.rank
    found = Adjacency(crow.to(device), torch.empty(len(columns), dtype=torch.int32, device=device), weight)
    return _with_columns(found, np.where(outside, 0, local), outside, columns[outside], parts)


def symmetric_in_parts(adj: Adjacency, rtol: float) -> bool:
    """Whether a graph with halo is its own transpose, its weights up to ``rtol``; all ranks call it, and agree."""
    assert adj.halo is not None
    one, other = (_by_column(graph) for graph in (adj, transpose_in_parts(adj)))
    # Of both, before anything is compared: ranks that find a difference must ask too.
    columns = [columns_in_pack(graph) for graph in (one, other)]
    same = torch.equal(one.crow, other.crow) and torch.equal(*columns)
    if same and one.weight is not None and other.weight is not None:
        same = torch.allclose(one.weight, other.weight, rtol=rtol, atol=0.0)
    return not bool(all_max(torch.tensor(int(not same), device=adj.col.device), adj.halo.parts))


def columns_in_pack(adj: Adjacency) -> Tensor:
    """(E,) int64: the columns as rows of the whole pack."""
    assert adj.halo is not None
    own = torch.from_numpy(adj.halo.parts.rows()).to(adj.col.device)
    return with_halo(own, adj.halo)[adj.col.long()]


def _by_column(adj: Adjacency) -> Adjacency:
    """The same graph, the edges of each row in the order of their columns in the whole pack."""
    columns = columns_in_pack(adj).cpu().numpy()
    order = torch.from_numpy(np.lexsort((columns, adj.rows().cpu().numpy()))).to(adj.col.device)
    return replace(adj, col=adj.col[order], weight=None if adj.weight is None else adj.weight[order])


def _counts_from(counts: Tensor, adj: Adjacency) -> list[int]:
    """How many come from each rank, where ``counts`` go to them."""
    assert adj.halo is not None
    ones = [1] * adj.halo.parts.num_ranks
    return send_rows(counts.to(adj.col.device), ones, ones, adj.halo.parts).tolist()
