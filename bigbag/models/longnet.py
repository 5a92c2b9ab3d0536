"""LongNetMIL: a whole-slide transformer of dilated attention, in time linear in the bag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigbag.bags import PackedBags
from bigbag.models.base import CoordsMILModel, required_feature_dim, squeeze_single_output
from bigbag.nn import AttentionPool, Encoder, Layer, MeanPool
from bigbag.nn.dilated import (
    DilatedSelfAttention,
    hilbert_order,
    relative_coords,
    sinusoidal_position,
    unsorted,
)
from bigbag.nn.linear import project, readable
from bigbag.nn.rows import add_constant


class LongNetMIL(CoordsMILModel):
    r"""A slide encoder of the shape of Prov-GigaPath's: LongNet's dilated attention over all patches of a slide.

        H = feat_ext(X) W_in + b_in + PE(coords / patch_size)
        n_layers times: H = H + DilatedAttention(LayerNorm(H)), H = H + MLP(LayerNorm(H))
        z = pool(LayerNorm(H)), and the logits are W z + b

    PE are sines and cosines of the place beside the bag's smallest, computed as they are needed. Instances are taken in
    the order of Hilbert's curve through their places, along which a segment is a compact region of the slide (a run of
    rows, as in Prov-GigaPath, is a thin strip); their order in the pack does not matter, except at one place.

    The instance scores are the attention values before the softmax or, with ``pool="mean"``, the largest logit of a
    bag that holds the encoded instance alone.

    Cost per layer, with D = att_dim: 24 T D^2 FLOP for projections and MLP forward, and 4 T D sum_b w_b / r_b^2 for
    the attention: 1,344 keys per query with the defaults, however large the bag. Kept for backward: five times T D
    per layer, once with ``activation_checkpointing``.

    Args:
        in_shape: shape of one instance.
        att_dim: width of the encoder, a multiple of 4 and of ``n_heads``.
        n_layers: layers.
        n_heads: heads.
        segment_lengths: instances of a segment, for each branch of the attention.
        dilations: of each branch.
        use_mlp: whether the layers have an MLP.
        dropout: of the MLPs.
        pool: "attention" or "mean".
        pool_att_dim: width of the attention space of the pooling.
        patch_size: distance of neighbouring patches in the unit of ``coords``.
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.

    Raises:
        ValueError: widths, heads, segments or a pooling that do not fit.

    Ding et al. 2023, arXiv 2307.02486; Xu et al., A whole-slide foundation model for digital pathology from real-world
    data, Nature 630, 2024.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        att_dim: int = 256,
        n_layers: int = 2,
        n_heads: int = 8,
        segment_lengths: Sequence[int] = (1024, 4096, 16384),
        dilations: Sequence[int] = (1, 4, 16),
        use_mlp: bool = True,
        dropout: float = 0.0,
        pool: str = "attention",
        pool_att_dim: int = 128,
        patch_size: float = 1.0,
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
    ) -> None:
        super().__init__()
        if att_dim % 4:
            raise ValueError(f"LongNetMIL: att_dim is {att_dim}, expected a multiple of 4, for positions of two axes")
        if pool not in ("attention", "mean"):
            raise ValueError(f"LongNetMIL: pool is {pool!r}, expected 'attention' or 'mean'")
        if patch_size <= 0:
            raise ValueError(f"LongNetMIL: patch_size is {patch_size}, expected a distance above 0")
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        self.patch_size = patch_size
        self.in_proj = torch.nn.Linear(required_feature_dim(self, in_shape), att_dim)
        layers = [
            Layer(
                DilatedSelfAttention(att_dim, att_dim, att_dim, n_heads, segment_lengths, dilations),
                att_dim,
                att_dim,
                use_mlp=use_mlp,
                dropout=dropout,
            )
            for _ in range(n_layers)
        ]
        self.encoder = Encoder(torch.nn.ModuleList(layers))
        self.encoder.norm = torch.nn.LayerNorm(att_dim)
        self.pool = AttentionPool(att_dim, pool_att_dim) if pool == "attention" else MeanPool()
        self.classifier = torch.nn.Linear(att_dim, out_dim)

    def forward_bags(self, bags: PackedBags, return_att: bool = False) -> Any:
        self.encoder.recompute = self.activation_checkpointing
        places, extent = relative_coords(bags, "LongNetMIL")
        order = hilbert_order(places, extent, bags.segments)
        x = self._embed(self.encode(self.feat_ext, bags.x), places)[order]
        layers: Any = self.encoder.layers
        branches = layers[0].att_module.branches(bags.segments) if len(layers) else ()
        h = self.encoder.forward_packed(x, bags.segments, branches=branches)
        if isinstance(self.pool, AttentionPool):
            self.pool.recompute = self.activation_checkpointing
            z, scores = self.pool.pool(h, bags.segments)
        else:
            z = self.pool.pool(h, bags.segments)
            scores = self.classifier(h).amax(-1) if return_att else z
        Y_pred = squeeze_single_output(self.classifier(z))
        return (Y_pred, unsorted(scores, order)) if return_att else Y_pred

    def _embed(self, x: Tensor, places: Tensor) -> Tensor:
        """Features ``(T, P)`` and places ``(T, 2)`` to ``(T, att_dim)``."""
        near, width = places / self.patch_size, self.in_proj.out_features
        projected = project(x, readable(self.in_proj).weight, self.in_proj.bias)
        return add_constant(projected, lambda rows: sinusoidal_position(near[rows], width))
