"""PatchGCN: graph convolutions over neighbouring patches, all layers pooled by attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigbag.bags import PackedBags
from bigbag.models.base import GraphMILModel, required_feature_dim, squeeze_single_output
from bigbag.nn import AttentionPool, DeepGCNLayer, GCNConv, LazyLinear
from bigbag.nn.graph_stack import graph_stack
from bigbag.nn.linear import readable
from bigbag.nn.rows import by_rows


class PatchGCN(GraphMILModel):
    r"""Patch-based graph convolutional network (Chen et al., MICCAI 2021, arXiv 2107.13048).

    ``H_0 = feat_ext(X)``; ``H_l = dropout(relu(norm(W_l (A + I) H_{l-1} + b_l)))``; then
    ``z, f = AttentionPool(MLP([H_0, ..., H_L]))``; the logits are ``W z + b``. The instance scores are the attention
    values ``f`` before the softmax.

    Memory: one ``(T, hidden_dim)`` matrix for each layer, and a few more; with ``activation_checkpointing`` about the
    square root of the number of layers. See :func:`bigbag.nn.graph_stack.graph_stack`.

    Args:
        in_shape: shape of one instance.
        n_gcn_layers: number of graph convolutions.
        mlp_depth: number of layers of the MLP.
        hidden_dim: width of the layers; None: that of the features.
        att_dim: width of the attention space.
        dropout: probability of zeroing an entry after each layer in training.
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.

    Raises:
        ValueError: ``n_gcn_layers`` or ``mlp_depth`` below 1.
    """

    in_parts = True

    def __init__(
        self,
        in_shape: tuple[int, ...],
        n_gcn_layers: int = 4,
        mlp_depth: int = 1,
        hidden_dim: int | None = None,
        att_dim: int = 128,
        dropout: float = 0.0,
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
    ) -> None:
        super().__init__()
        if n_gcn_layers < 1 or mlp_depth < 1:
            raise ValueError(
                f"PatchGCN: n_gcn_layers {n_gcn_layers}, mlp_depth {mlp_depth}: expected 1 or more of each"
            )
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        feat_dim = required_feature_dim(self, in_shape)
        hidden_dim = feat_dim if hidden_dim is None else hidden_dim
        self.gcn_layers = torch.nn.ModuleList(
            DeepGCNLayer(
                GCNConv(feat_dim if i == 0 else hidden_dim, hidden_dim, add_self_loops=True, learn_weights=True),
                torch.nn.LayerNorm(hidden_dim),
                torch.nn.ReLU(),
                dropout=dropout,
            )
            for i in range(n_gcn_layers)
        )
        self.mlp = torch.nn.ModuleList(
            torch.nn.Sequential(
                LazyLinear(feat_dim + hidden_dim * n_gcn_layers if i == 0 else hidden_dim, hidden_dim),
                torch.nn.ReLU(),
                torch.nn.Dropout(dropout),
            )
            for i in range(mlp_depth)
        )
        self.pool = AttentionPool(in_dim=hidden_dim, att_dim=att_dim)
        self.classifier = LazyLinear(hidden_dim, out_dim)

    def predict(  # type: ignore[override]
        self,
        X: Tensor | PackedBags,
        adj: Tensor | None = None,
        mask: Tensor | None = None,
        return_inst_pred: bool = False,
    ) -> Any:
        """As :meth:`MILModel.predict`; like torchmil's, without instance scores unless they are asked for."""
        return super().predict(X, adj, mask, return_inst_pred)

    def forward_bags(self, bags: PackedBags, return_att: bool = False):  # type: ignore[no-untyped-def]
        assert bags.adj is not None
        self.pool.recompute = self.activation_checkpointing
        h = self._read_layers(self.encode(self.feat_ext, bags.x), bags)
        for layer in self.mlp[1:]:
            h = by_rows(layer, h, modules=[layer])
        z, f = self.pool.pool(h, bags.segments)
        Y_pred = squeeze_single_output(self.classifier(z))
        return (Y_pred, f) if return_att else Y_pred

    def _read_layers(self, x: Tensor, bags: PackedBags) -> Tensor:
        """The first layer of the MLP, of all graph convolutions; ``(T, hidden_dim)``."""
        assert bags.adj is not None
        mlp: Any = self.mlp[0]
        layers: list[Any] = list(self.gcn_layers)
        linear, dropout = readable(mlp[0].module), mlp[2]
        convolutions = [readable(layer.conv.fc.module) for layer in layers]
        widths = [fc.in_features for fc in convolutions] + [convolutions[-1].out_features]
        out = graph_stack(
            x,
            bags.adj.with_self_loops(),
            [_after(layer) for layer in layers],
            [[fc.bias, *layer.norm.parameters()] for fc, layer in zip(convolutions, layers)],
            [fc.weight for fc in convolutions],
            linear.weight.split(widths, dim=1),
            keep_every=math.isqrt(len(layers)) if self.activation_checkpointing else 1,
            modules=layers,
        )
        return dropout(torch.relu_(out.add_(linear.bias.to(out.dtype))))


def _after(layer: Any) -> Callable[[Tensor], Tensor]:
    """What follows the product with the adjacency, row by row."""

    def function(z: Tensor) -> Tensor:
        return layer.dropout(layer.act(layer.norm(z + layer.conv.fc.module.bias.to(z.dtype))))

    return function
