"""A sparse graph over instances, in CSR form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from bigbag.parts import Halo


@dataclass(frozen=True)
class Adjacency:
    """A sparse ``(T, T)`` matrix over instances in CSR form.

    Row ``i`` has the columns ``col[crow[i]:crow[i + 1]]`` with the weights ``weight[...]`` (ones where ``weight`` is
    None). In a pack it is block-diagonal: no edge joins two bags.

    Attributes:
        crow: ``(T + 1,)`` int64.
        col: ``(E,)`` int32.
        weight: ``(E,)`` floating, or None for a binary graph.
        symmetric: True promises ``A == A.T``, so that the backward of a product needs no transposed copy.
        halo: where bags are shared out over ranks, so that T counts this rank's rows: the rows of other ranks that
            columns ``T, T + 1, ...`` stand for. ``symmetric`` is then said of the whole graph.

    Raises:
        ValueError: integers of another width, more than one dimension, not one weight for each edge.
    """

    crow: Tensor
    col: Tensor
    weight: Tensor | None = None
    symmetric: bool = False
    halo: Halo | None = None

    def __post_init__(self) -> None:
        # Kernels read memory as what it should be: integers of another width would be other numbers.
        for name, value, dtype in (("crow", self.crow, torch.int64), ("col", self.col, torch.int32)):
            if value.dtype != dtype or value.dim() != 1:
                raise ValueError(
                    f"Adjacency: {name} is {tuple(value.shape)} {value.dtype}, expected one dimension of {dtype}; "
                    f"convert it: {name}.to({dtype})"
                )
        if self.weight is not None and self.weight.shape != self.col.shape:
            raise ValueError(
                f"Adjacency: weight has shape {tuple(self.weight.shape)}, expected one for each edge, as in col: "
                f"{tuple(self.col.shape)}"
            )

    @property
    def num_nodes(self) -> int:
        return self.crow.numel() - 1

    @property
    def num_edges(self) -> int:
        return self.col.numel()

    @staticmethod
    def from_edges(
        row: Tensor, col: Tensor, weight: Tensor | None, num_nodes: int, symmetric: bool = False
    ) -> Adjacency:
        """CSR of the edges ``(row[e], col[e])``, sorted by row, then column. Duplicate edges are kept.

        Raises:
            ValueError: edges of nodes that are not there (on CPU, where that is known without waiting).
        """
        _check_nodes("row", row, num_nodes)
        _check_nodes("col", col, num_nodes)
        order = torch.argsort(row.long() * num_nodes + col.long())
        crow = torch.zeros(num_nodes + 1, dtype=torch.int64, device=row.device)
        torch.cumsum(torch.bincount(row, minlength=num_nodes), 0, out=crow[1:])
        return Adjacency(crow, col[order].to(torch.int32), None if weight is None else weight[order], symmetric)

    def check_edges(self) -> None:
        """Whether the edges are those of a graph over these rows, and a halo's; O(T + E), on CPU alone.

        Raises:
            ValueError: columns that name no row, row offsets that do not rise from 0 to E.
        """
        if self.crow.device.type != "cpu":
            return
        crow = self.crow.numpy()
        down = np.count_nonzero(crow[1:] < crow[:-1])
        if down or [crow[0], crow[-1]] != [0, self.num_edges]:
            raise ValueError(
                f"Adjacency: crow must rise from 0 to the number of edges, {self.num_edges}; it goes from {crow[0]} to "
                f"{crow[-1]}, and falls {down} times"
            )
        _check_nodes("col", self.col, self.num_nodes + (0 if self.halo is None else self.halo.num_rows))

    def part(self, start: int, end: int) -> Adjacency:
        """The rows from ``start`` to ``end``; columns count from ``start``, and may lie beyond those rows."""
        first, last = int(self.crow[start]), int(self.crow[end])
        weight = None if self.weight is None else self.weight[first:last]
        return Adjacency(self.crow[start : end + 1] - first, self.col[first:last] - start, weight, self.symmetric)

    def to(self, device: torch.device | str) -> Adjacency:
        """The graph on ``device``."""
        weight = None if self.weight is None else self.weight.to(device)
        return replace(self, crow=self.crow.to(device), col=self.col.to(device), weight=weight)

    def rows(self) -> Tensor:
        """``(E,)`` int64: the row of every edge."""
        nodes = torch.arange(self.num_nodes, device=self.crow.device)
        return torch.repeat_interleave(nodes, self.crow.diff(), output_size=self.num_edges)

    def diagonal(self) -> Tensor:
        """``(T,)``: the weights of the self loops, 0 where there is none."""
        rows = self.rows()
        own = (rows == self.col).float() if self.weight is None else torch.where(rows == self.col, self.weight, 0)
        return own.new_zeros(self.num_nodes).index_add(0, rows, own)

    def with_self_loops(self) -> Adjacency:
        """A + I: one more edge of weight 1 at the head of each row, whether or not there is one already."""
        nodes = torch.arange(self.num_nodes, device=self.col.device)
        places = torch.arange(self.num_edges, device=self.col.device) + self.rows() + 1
        crow = self.crow + torch.arange(self.num_nodes + 1, device=self.col.device)
        num_edges = self.num_edges + self.num_nodes
        col = self.col.new_empty(num_edges).index_copy(0, places, self.col)
        col[crow[:-1]] = nodes.to(col.dtype)
        weight = None if self.weight is None else self.weight.new_ones(num_edges).index_copy(0, places, self.weight)
        return replace(self, crow=crow, col=col, weight=weight)

    def to_coo(self) -> Tensor:
        """The same matrix as a torch sparse COO tensor ``(T, T)``."""
        weight = torch.ones(self.num_edges, device=self.col.device) if self.weight is None else self.weight
        size = (self.num_nodes, self.num_nodes)
        return torch.sparse_coo_tensor(
            torch.stack([self.rows(), self.col.long()]), weight, size, check_invariants=False
        ).coalesce()

    @staticmethod
    def block_diagonal(parts: Sequence[Adjacency]) -> Adjacency:
        """One matrix with ``parts`` along its diagonal; binary only if every part is, symmetric only if every part is.

        Raises:
            ValueError: ``parts`` is empty.
        """
        if not parts:
            raise ValueError("block_diagonal: expected at least one Adjacency, got none")
        nodes = [0, *accumulate(part.num_nodes for part in parts)]
        edges = [0, *accumulate(part.num_edges for part in parts)]
        crow = torch.cat([parts[0].crow[:1], *(part.crow[1:] + first for part, first in zip(parts, edges))])
        col = torch.cat([part.col + first for part, first in zip(parts, nodes)])
        weight = None
        if any(part.weight is not None for part in parts):
            weight = torch.cat([torch.ones(p.num_edges) if p.weight is None else p.weight for p in parts])
        return Adjacency(crow, col, weight, all(part.symmetric for part in parts))

    @staticmethod
    def from_padded(adj: Tensor, index: Tensor | None, num_instances: int) -> Adjacency:
        """Block-diagonal CSR of a padded ``(B, N, N)`` adjacency, restricted to the instances in ``index``."""
        batch, length, _ = adj.shape
        sparse = (adj if adj.is_sparse else adj.to_sparse()).coalesce()
        bag, row, col = sparse.indices()
        place = torch.full((batch * length,), -1, dtype=torch.int64, device=adj.device)
        kept = torch.arange(batch * length, device=adj.device) if index is None else index
        place[kept] = torch.arange(num_instances, device=adj.device)
        row, col = place[bag * length + row], place[bag * length + col]
        inside = (row >= 0) & (col >= 0)
        return Adjacency.from_edges(row[inside], col[inside], sparse.values()[inside], num_instances)


def _check_nodes(name: str, nodes: Tensor, num_nodes: int) -> None:
    if nodes.device.type != "cpu" or not nodes.numel():
        return
    lowest, highest = nodes.numpy().min(), nodes.numpy().max()
    if lowest < 0 or highest >= num_nodes:
        raise ValueError(
            f"Adjacency: {name} names nodes {lowest} to {highest}, but there are {num_nodes}, counted from 0: is the "
            "graph that of these instances?"
        )
