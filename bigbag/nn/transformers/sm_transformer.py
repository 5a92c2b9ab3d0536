"""Transformer layers whose attention is smoothed over the graph of the bag."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.bags import PackedBags, Segments
from bigbag.nn.attention.multihead_self_attention import MultiheadSelfAttention
from bigbag.nn.sm import Sm
from bigbag.nn.transformers.encoder import LayerStack
from bigbag.nn.transformers.layer import Layer


class SmMultiheadSelfAttention(MultiheadSelfAttention):
    r"""Exact multi-head self-attention, then Sm: ``Y = Sm(Attention(X))`` (Castro-Macias et al., arXiv 2410.03276).

    Cost: that of :class:`MultiheadSelfAttention` and, per step of Sm, 2 E att_dim FLOP forward and backward.

    Args:
        in_dim: instance width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of queries, keys and values, all heads together.
        n_heads: heads.
        dropout: share of the attention weights set to zero in training.
        sm_alpha: coefficient of Sm, see :class:`bigbag.nn.Sm`.
        sm_mode: "approx" or "exact".
        sm_steps: steps of the approximate Sm.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        dropout: float = 0.0,
        sm_alpha: float | str = "trainable",
        sm_mode: str = "approx",
        sm_steps: int = 10,
    ) -> None:
        super().__init__(in_dim, out_dim, att_dim, n_heads, dropout)
        self.sm = Sm(alpha=sm_alpha, num_steps=sm_steps, mode=sm_mode)

    def attend(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, adj: Adjacency, **kwargs: Any
    ) -> Tensor:
        """Queries, keys and values ``(T, H, d)`` to ``(T, att_dim)``, smoothed, where no ``out_proj`` stands between.

        Raises:
            ValueError: ``out_dim`` differs from ``att_dim``, so that there is an ``out_proj``, behind which Sm acts.
        """
        if not isinstance(self.out_proj, torch.nn.Identity):
            raise ValueError(f"{type(self).__name__} in a layer needs out_dim = att_dim = {self.att_dim}")
        return self.sm.forward_packed(super().attend(q, k, v, segments, **kwargs), adj)

    def forward_packed(  # type: ignore[override]
        self, x: Tensor, segments: Segments, *, adj: Adjacency, **kwargs: Any
    ) -> Tensor:
        """``(T, in_dim)`` instances of a pack and their graph to ``(T, out_dim)``."""
        q, k, v = self.project(x)
        return self.sm.forward_packed(self.out_proj(super().attend(q, k, v, segments, **kwargs)), adj)

    def forward(  # type: ignore[override]
        self, X: Tensor, adj: Tensor, mask: Tensor | None = None, return_att: bool = False
    ) -> Any:
        """As :meth:`MultiheadSelfAttention.forward`, with ``adj`` ``(B, N, N)``, dense or sparse COO."""
        return super().forward(X, mask, return_att, adj=adj)

    def pack(
        self, x: Tensor, mask: Tensor | None = None, adj: Tensor | None = None
    ) -> tuple[PackedBags, dict[str, Any]]:
        """A padded batch and its adjacency ``(B, N, N)`` as a pack, and the graph of it."""
        bags = PackedBags.from_padded(x, mask, adj)
        if bags.adj is None:
            raise ValueError(f"{type(self).__name__} needs adj to smooth over: pass the adjacency of the batch")
        return bags, {"adj": bags.adj}


class SmTransformerLayer(Layer):
    r"""Transformer layer with smoothed attention: :class:`Layer` around :class:`SmMultiheadSelfAttention`.

    ``Z = X + Sm(Att(LayerNorm(X)))``; ``Y = Z + MLP(LayerNorm(Z))``.

    Args:
        in_dim: input width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of the attention.
        n_heads: heads.
        use_mlp: whether there is an MLP.
        dropout: of attention weights and MLP.
        sm_alpha: coefficient of Sm, see :class:`bigbag.nn.Sm`.
        sm_mode: "approx" or "exact".
        sm_steps: steps of the approximate Sm.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        use_mlp: bool = True,
        dropout: float = 0.0,
        sm_alpha: float | str = "trainable",
        sm_mode: str = "approx",
        sm_steps: int = 10,
    ) -> None:
        att_module = SmMultiheadSelfAttention(
            in_dim, att_dim, att_dim, n_heads, dropout, sm_alpha=sm_alpha, sm_mode=sm_mode, sm_steps=sm_steps
        )
        super().__init__(att_module, in_dim, in_dim, out_dim, att_dim, use_mlp, dropout=dropout)

    def forward(  # type: ignore[override]
        self, X: Tensor, adj: Tensor, mask: Tensor | None = None, return_att: bool = False
    ) -> Any:
        """As :meth:`Layer.forward`, with ``adj`` ``(B, N, N)``, dense or sparse COO, and ``mask`` ``(B, N)``."""
        return super().forward(X, return_att, adj=adj, mask=mask)


class SmTransformerEncoder(LayerStack):
    r"""A stack of :class:`SmTransformerLayer`, normalised at the end.

    Args:
        in_dim: input width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of the attentions, and between the layers.
        n_heads: heads.
        n_layers: layers.
        use_mlp: whether the layers have an MLP.
        add_self: add the input to the output of every layer; all widths must agree.
        dropout: of attention weights and MLP.
        sm_alpha: coefficient of Sm, see :class:`bigbag.nn.Sm`; every layer has its own.
        sm_mode: "approx" or "exact".
        sm_steps: steps of the approximate Sm.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        n_layers: int = 4,
        use_mlp: bool = True,
        add_self: bool = False,
        dropout: float = 0.0,
        sm_alpha: float | str = "trainable",
        sm_mode: str = "approx",
        sm_steps: int = 10,
    ) -> None:

        def layer(width_in: int, width_out: int) -> SmTransformerLayer:
            smoothing = (sm_alpha, sm_mode, sm_steps)
            return SmTransformerLayer(width_in, width_out, att_dim, n_heads, use_mlp, dropout, *smoothing)

        super().__init__(layer, in_dim, out_dim, att_dim, n_layers, add_self)

    def forward(  # type: ignore[override]
        self, X: Tensor, adj: Tensor, mask: Tensor | None = None, return_att: bool = False
    ) -> Any:
        """As :meth:`Encoder.forward`, with ``adj`` ``(B, N, N)``, dense or sparse COO, and ``mask`` ``(B, N)``."""
        return super().forward(X, return_att, adj=adj, mask=mask)
