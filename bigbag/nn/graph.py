"""Graph convolutions, with torchmil's arguments and parameter names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.adjacency import Adjacency
from bigbag.bags import PackedBags
from bigbag.nn.linear import LazyLinear, project, readable


def on_padded(layer: Callable[[Tensor, Adjacency], Tensor], x: Tensor, adj: Tensor) -> Tensor:
    """``layer`` of a pack and its graph, on ``(B, N, D)`` rows and a ``(B, N, N)`` adjacency, dense or sparse COO."""
    bags = PackedBags.from_padded(x, adj=adj)
    assert bags.adj is not None
    return bags.to_padded(layer(bags.x, bags.adj))


class GNNIdentity(torch.nn.Module):
    """A graph layer that does nothing."""

    def forward_packed(self, x: Tensor, adj: Adjacency | None = None) -> Tensor:
        return x

    def forward(self, x: Tensor, adj: Tensor | None = None) -> Tensor:
        return x


class GCNConv(torch.nn.Module):
    r"""Graph convolution (Kipf and Welling 2017, arXiv 1609.02907), with the adjacency as it is given.

    ``Y = dropout(act(norm(W (A X + X) + b)))``; the term ``X`` only with ``add_self_loops``, W and b only with
    ``learn_weights``. The product with A is made on the thinner side of W.

    Args:
        in_dim: input width.
        out_dim: output width; None, or without ``learn_weights``: the input's.
        add_self_loops: add the instance itself to the sum over its neighbours.
        learn_weights: apply a linear layer.
        layer_norm: apply layer normalisation.
        normalize: divide each row by its Euclidean norm, before the layer normalisation.
        dropout: probability of zeroing an entry of the output in training.
        activation: module applied before the dropout; None for none.
        bias: whether the linear layer has a bias.
    """

    def __init__(
        self,
        in_dim: int | None,
        out_dim: int | None = None,
        add_self_loops: bool = False,
        learn_weights: bool = False,
        layer_norm: bool = False,
        normalize: bool = False,
        dropout: float = 0.0,
        activation: torch.nn.Module | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if out_dim is None or not learn_weights:
            out_dim = in_dim
        if out_dim is None and (learn_weights or layer_norm):
            raise ValueError("GCNConv: in_dim and out_dim are None; give at least out_dim, and learn_weights=True")
        self.add_self_loops = add_self_loops
        self.activation = activation if activation is not None else torch.nn.Identity()
        self.dropout = torch.nn.Dropout(dropout)
        self.normalize = normalize
        self.fc: LazyLinear | torch.nn.Identity = torch.nn.Identity()
        if learn_weights:
            assert out_dim is not None
            self.fc = LazyLinear(in_dim, out_dim, bias=bias)
        self.layer_norm = torch.nn.LayerNorm(out_dim) if layer_norm and out_dim else torch.nn.Identity()

    def propagate(self, x: Tensor, adj: Adjacency) -> Tensor:
        """``W (A X + X) + b``, ``(T, in_dim)`` to ``(T, out_dim)``."""
        if not isinstance(self.fc, LazyLinear):
            return self._sum(x, adj)
        fc = readable(self.fc.materialize(x.shape[-1]))
        if fc.out_features > fc.in_features:
            return project(self._sum(x, adj), fc.weight, fc.bias)
        y = self._sum(project(x, fc.weight), adj)
        return y if fc.bias is None else y.add_(fc.bias.to(y.dtype))

    def _sum(self, x: Tensor, adj: Adjacency) -> Tensor:
        y = ops.spmm(adj, x)
        return y.add_(x) if self.add_self_loops else y

    def finish(self, y: Tensor) -> Tensor:
        """What follows the linear layer, row by row."""
        if self.normalize:
            y = torch.nn.functional.normalize(y, p=2, dim=-1)
        return self.dropout(self.activation(self.layer_norm(y)))

    def forward_packed(self, x: Tensor, adj: Adjacency) -> Tensor:
        """``(T, in_dim)`` instances of a pack and their graph to ``(T, out_dim)``."""
        return self.finish(self.propagate(x, adj))

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        """``(B, N, in_dim)`` and ``(B, N, N)``, dense or sparse COO, to ``(B, N, out_dim)``."""
        return on_padded(self.forward_packed, x, adj)


class DeepGCNLayer(torch.nn.Module):
    r"""Convolution, normalisation and activation with a skip connection (Li et al. 2020, arXiv 2006.07739).

    - "plain": ``dropout(act(norm(conv(X))))``
    - "res": ``dropout(act(norm(conv(X))) + X)``
    - "dense": ``dropout([X, act(norm(conv(X)))])``
    - "res+": ``conv(dropout(act(norm(X)))) + X``

    Args:
        conv: graph layer; None for none.
        norm: normalisation; None for none.
        act: activation; None for none.
        block: one of the above; anything else is "plain", as in torchmil.
        dropout: probability of zeroing an entry in training.
    """

    def __init__(
        self,
        conv: torch.nn.Module | None = None,
        norm: torch.nn.Module | None = None,
        act: torch.nn.Module | None = None,
        block: str = "plain",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv = conv if conv is not None else GNNIdentity()
        self.norm = norm if norm is not None else torch.nn.Identity()
        self.act = act if act is not None else torch.nn.Identity()
        self.dropout = torch.nn.Dropout(dropout)
        self.block = block

    def forward_packed(self, x: Tensor, adj: Adjacency) -> Tensor:
        """``(T, in_dim)`` instances of a pack and their graph to ``(T, out_dim)``."""
        conv: Any = self.conv
        return self._layer(conv.forward_packed, x, adj)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        """``(B, N, in_dim)`` and ``(B, N, N)``, dense or sparse COO, to ``(B, N, out_dim)``."""
        return self._layer(self.conv, x, adj)

    def _layer(self, conv: Callable[..., Tensor], x: Tensor, adj: Tensor | Adjacency) -> Tensor:
        if self.block == "res+":
            return conv(self.dropout(self.act(self.norm(x))), adj) + x
        y = self.act(self.norm(conv(x, adj)))
        if self.block == "res":
            y = y + x
        elif self.block == "dense":
            y = torch.cat([x, y], dim=-1)
        return self.dropout(y)
