"""DeepGraphSurv: Chebyshev graph convolutions, one branch for the representation, one for the attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.bags import PackedBags
from bigbag.models.base import GraphMILModel, feature_dim, squeeze_single_output
from bigbag.nn import ChebConv, LazyLinear


class DeepGraphSurv(GraphMILModel):
    r"""Graph network with attention (Li et al., Graph CNN for survival analysis on whole slide images, MICCAI 2018).

    ``H = conv(...conv(feat_ext(X)))`` and ``f = w conv(...conv(feat_ext(X))) + b``, each conv a Chebyshev convolution,
    ReLU and dropout; then ``z = H^T softmax(f)``; the logits are ``W z + c``. The instance scores are ``f``.

    The graph convolutions differ from torchmil's, which mix up instances and channels: see
    :class:`bigbag.nn.ChebConv`; with ``torchmil_layout`` the model gives torchmil's numbers for a batch of one. Edges
    to masked instances are dropped. For survival, set the task (or ``criterion`` and ``out_dim``).

    Memory: one ``(T, width)`` matrix for each convolution, and three more at a time.

    Args:
        in_shape: shape of one instance; None takes the width from the first input, and needs ``hidden_dim``.
        n_layers_rep: number of convolutions of the representation.
        n_layers_att: number of convolutions of the attention.
        hidden_dim: width of the representation; None: that of the features.
        att_dim: width of the attention space.
        dropout: probability of zeroing an entry after each convolution in training.
        K: number of Chebyshev polynomials.
        compute_lambda_max: scale the Laplacian of each bag by its largest eigenvalue, found by Lanczos' method; else
            by 2.
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.
        torchmil_layout: torchmil's numbers for a batch of one, for its checkpoints.

    Raises:
        ValueError: neither ``in_shape`` nor ``hidden_dim`` (which torchmil cannot do without either).
    """

    in_parts = True

    def __init__(
        self,
        in_shape: tuple[int, ...] | None = None,
        n_layers_rep: int = 1,
        n_layers_att: int = 1,
        hidden_dim: int | None = None,
        att_dim: int = 128,
        dropout: float = 0.0,
        K: int = 5,
        compute_lambda_max: bool = False,
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
        torchmil_layout: bool = False,
    ) -> None:
        super().__init__()
        if n_layers_rep < 1 or n_layers_att < 1:
            raise ValueError(
                f"DeepGraphSurv: n_layers_rep {n_layers_rep}, n_layers_att {n_layers_att}: expected 1 or more of each"
            )
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        self.dropout_prob = dropout
        feat_dim = feature_dim(self.feat_ext, in_shape)
        hidden_dim = feat_dim if hidden_dim is None else hidden_dim
        if hidden_dim is None:
            raise ValueError("DeepGraphSurv needs in_shape, the shape of one instance such as (1024,), or hidden_dim")

        def convolutions(count: int, width: int) -> torch.nn.ModuleList:
            widths = [feat_dim, *[width] * (count - 1)]
            return torch.nn.ModuleList(ChebConv(dim, width, K, compute_lambda_max, torchmil_layout) for dim in widths)

        self.layers_rep = convolutions(n_layers_rep, hidden_dim)
        self.layers_att = convolutions(n_layers_att, att_dim)
        self.proj1d = LazyLinear(att_dim, 1)
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

    def forward_bags(self, bags: PackedBags, return_att: bool = False) -> Any:
        assert bags.adj is not None
        x = self.encode(self.feat_ext, bags.x)
        first: Any = self.layers_rep[0]
        lambda_max = first.lambda_max(bags.adj, bags.segments)
        f = self._scores(self._branch(self.layers_att, x, bags, lambda_max))
        h = self._branch(self.layers_rep, x, bags, lambda_max)
        s = ops.segment_softmax(f, bags.segments)
        z = ops.segment_pool(s[:, None], h, bags.segments).squeeze(1)
        Y_pred = squeeze_single_output(self.classifier(z))
        return (Y_pred, f) if return_att else Y_pred

    def _branch(self, layers: Iterable[Any], x: Tensor, bags: PackedBags, lambda_max: float | Tensor) -> Tensor:
        for layer in layers:
            x = torch.relu_(layer.forward_packed(x, bags.adj, bags.segments, lambda_max))
            x = torch.nn.functional.dropout(x, self.dropout_prob, self.training)
        return x

    def _scores(self, x: Tensor) -> Tensor:
        """``(T,)`` attention values, in the precision of the weights."""
        linear: torch.nn.Linear = self.proj1d.module
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.to(linear.weight.dtype)).squeeze(1)
