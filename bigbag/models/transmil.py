"""TransMIL: a class token, Nystrom attention, and positions from convolutions over the bag laid out as a square."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbag.bags import PackedBags, Segments
from bigbag.models.base import MILModel, feature_dim, squeeze_single_output
from bigbag.nn import NystromTransformerLayer
from bigbag.nn.linear import readable
from bigbag.nn.rows import Projection, Widen, by_rows
from bigbag.ops.depthwise_conv import depthwise_conv
from bigbag.ops.join import fetch, windows
from bigbag.ops.registry import compute_dtype
from bigbag.parts import Parts


class PPEG(torch.nn.Module):
    r"""Pyramid positional encoding generator (Shao et al. 2021, arXiv 2106.00908).

    ``Y = X + conv7(X) + conv5(X) + conv3(X)``, depth-wise, over the rows of a bag laid out as a grid; the class token
    stays as it is. The three kernels and the identity are added first: one convolution of 49 products per value.

    Args:
        dim: width of the rows.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = torch.nn.Conv2d(dim, dim, 7, 1, 3, groups=dim)
        self.proj1 = torch.nn.Conv2d(dim, dim, 5, 1, 2, groups=dim)
        self.proj2 = torch.nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward_packed(self, x: Tensor, segments: Segments) -> Tensor:
        """``(T, dim)``, in each bag a class token before a square of rows, to ``(T, dim)``."""
        sides = [math.isqrt(total - 1) for total in segments.totals]
        if segments.parts is None:
            return self._convolve(x, [(1, total - 1) for total in segments.totals], sides)
        token = int(segments.holds_first)
        pieces = list(x.split([size for own in segments.sizes for size in (token, own - token)]))
        pieces[1::2] = self._convolve_in_parts(torch.cat(pieces[1::2]), segments.parts, sides)
        return torch.cat(pieces)

    def _convolve_in_parts(self, x: Tensor, parts: Parts, sides: list[int]) -> list[Tensor]:
        """The rows of squares that ranks share: convolved with the three lines of the grid above and below them."""
        parts = parts.with_sizes([[size - (rank == 0) for size in own] for rank, own in enumerate(parts.sizes)])
        around = [[_lines_around(*bound, side) for bound, side in zip(own, sides)] for own in parts.bounds]
        found = windows(x, parts, around)
        rows = self._convolve(torch.cat(found), [(0, len(window)) for window in found], sides)
        skips = [before - first for before, (first, _) in zip(parts.before, around[parts.rank])]
        of_bags = zip(rows.split([len(window) for window in found]), skips, parts.sizes[parts.rank])
        return [window[skip : skip + size] for window, skip, size in of_bags]

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        """``(B, 1 + H W, dim)`` to the same shape."""
        return self._convolve(x.flatten(0, 1), [(1, H * W)] * len(x), [W] * len(x)).view(x.shape)

    def _convolve(self, x: Tensor, sizes: list[tuple[int, int]], widths: list[int]) -> Tensor:
        """Bags of rows that stay as they are, and of rows of a grid with a width."""
        weight, bias = self._kernel()
        segments = Segments.from_sizes([size for own in sizes for size in own], x.device)
        return depthwise_conv(x, segments, [across for width in widths for across in (0, width)], weight, bias)

    def _kernel(self) -> tuple[Tensor, Tensor]:
        layers = [readable(layer) for layer in (self.proj, self.proj1, self.proj2)]
        large, middle, small = (layer.weight for layer in layers)
        identity = torch.zeros_like(large)
        identity[:, :, 3, 3] = 1
        biases: list[Any] = [layer.bias for layer in layers]
        return large + F.pad(middle, (1, 1, 1, 1)) + F.pad(small, (2, 2, 2, 2)) + identity, sum(biases)


def _lines_around(first: int, end: int, side: int) -> tuple[int, int]:
    """Rows ``first`` to ``end`` of a square, made whole lines of it, and three more lines on both sides."""
    if first == end:
        return first, end
    return max(0, first // side - 3) * side, min(side, (end - 1) // side + 4) * side


class TransMIL(MILModel):
    r"""Transformer-based correlated MIL (Shao et al. 2021, arXiv 2106.00908).

    ``X = fc1(feat_ext(X))``. Each bag of N instances is filled up with its first ones to a square of
    ``ceil(sqrt(N))^2`` rows behind a class token. A Nystrom layer, :class:`PPEG`, more Nystrom layers; the logits are
    ``W LayerNorm(class token) + b``. The instance scores are the attention of the class token in the last layer, mean
    over the heads.

    The order of the instances is part of the model. Of the last layer only the row of the class token is computed.
    Ranks that share a bag share its square too; for :class:`PPEG` each asks for up to 8 lines of sqrt(N) rows
    around its own. Differs from torchmil in that masks are honoured: every bag has its own square, whatever it is
    batched with; and in that the attention that it returns carries no gradient.

    Args:
        in_shape: shape of one instance.
        att_dim: width inside; ``n_heads`` must divide it.
        n_layers: Nystrom layers, at least 2.
        n_heads: their heads.
        n_landmarks: their landmarks; None: ``att_dim // 2``.
        pinv_iterations: steps of their pseudo-inverse.
        dropout: of their MLP.
        use_mlp: whether they have one.
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.
        zero_padding: as in :class:`~bigbag.nn.NystromAttention`.
        conv_residual: the convolution of values that the paper's layers have and torchmil's have not.

    Raises:
        ValueError: fewer than 2 layers.
    """

    in_parts = True

    def __init__(
        self,
        in_shape: tuple[int, ...],
        att_dim: int = 512,
        n_layers: int = 2,
        n_heads: int = 4,
        n_landmarks: int | None = None,
        pinv_iterations: int = 6,
        dropout: float = 0.0,
        use_mlp: bool = False,
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
        zero_padding: bool = True,
        conv_residual: bool = False,
    ) -> None:
        super().__init__()
        if n_layers < 2:
            raise ValueError(f"TransMIL: expected n_layers >= 2, got {n_layers}")
        self.n_landmarks = att_dim // 2 if n_landmarks is None else n_landmarks
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        feat_dim = feature_dim(self.feat_ext, in_shape)
        assert feat_dim is not None
        self.fc1 = torch.nn.Linear(feat_dim, att_dim) if feat_dim != att_dim else torch.nn.Identity()
        self.pos_layer = PPEG(att_dim)
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, att_dim))
        layers = [
            NystromTransformerLayer(
                att_dim,
                att_dim,
                att_dim,
                n_heads,
                n_landmarks=self.n_landmarks,
                pinv_iterations=pinv_iterations,
                dropout=dropout,
                use_mlp=use_mlp,
                zero_padding=zero_padding,
                conv_residual=conv_residual,
            )
            for _ in range(n_layers)
        ]
        self.layers = torch.nn.ModuleList(layers)
        self.norm = torch.nn.LayerNorm(att_dim)
        self.classifier = torch.nn.Linear(att_dim, out_dim)
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()

    def forward_bags(self, bags: PackedBags, return_att: bool = False):  # type: ignore[no-untyped-def]
        layers: list[Any] = list(self.layers)
        for layer in layers:
            layer.recompute = self.activation_checkpointing
        x, segments = self._squares(bags)
        x = self.pos_layer.forward_packed(layers[0].forward_packed(x, segments), segments)
        for layer in layers[1:-1]:
            x = layer.forward_packed(x, segments)
        Y_pred = squeeze_single_output(self.classifier(self.norm(layers[-1].forward_first(x, segments))))
        if not return_att:
            return Y_pred
        rows = layers[-1].first_attention(x, segments).mean(1).split(segments.sizes)
        token = int(segments.holds_first)
        return Y_pred, torch.cat([part[token : token + size] for part, size in zip(rows, bags.sizes)])

    def _squares(self, bags: PackedBags) -> tuple[Tensor, Segments]:
        """Of each bag: the class token, the instances, and the first of them again up to a square."""
        x = self.encode(self.feat_ext, bags.x)
        widen = Widen(compute_dtype(self.cls_token))
        if isinstance(self.fc1, torch.nn.Linear):
            x = by_rows(widen, x, projection=Projection(readable(self.fc1).weight, self.fc1.bias))
        else:
            x = self.fc1(widen(x))
        token, totals = self.cls_token[0].to(x.dtype), bags.segments.totals
        missing = [(math.isqrt(max(size - 1, 0)) + (size > 0)) ** 2 - size for size in totals]
        segments = bags.segments.extended([1] * bags.num_bags, missing)
        instances = x.split(bags.sizes) if bags.num_bags > 1 else [x]
        if bags.parts is None:
            pieces = [(token, bag, bag[:more]) for bag, more in zip(instances, missing)]
        else:
            first, last = bags.parts.rank == 0, bags.parts.num_ranks - 1
            asked = [[(0, more if rank == last else 0) for more in missing] for rank in range(last + 1)]
            copies = fetch(x, bags.parts, asked)
            pieces = [(token[:first], bag, more) for bag, more in zip(instances, copies)]
        return torch.cat([piece for bag in pieces for piece in bag]), segments

    def forward(  # type: ignore[override]
        self, X: Tensor | PackedBags, return_att: bool = False, mask: Tensor | None = None
    ) -> Any:
        """As :meth:`MILModel.forward`, with torchmil's order of arguments."""
        return self.run(X, mask, return_att=return_att)

    def compute_loss(self, Y: Tensor, X: Tensor | PackedBags, mask: Tensor | None = None) -> Any:
        """As :meth:`MILModel.compute_loss`."""
        return super().compute_loss(Y, X, mask=mask)

    def predict(  # type: ignore[override]
        self, X: Tensor | PackedBags, return_inst_pred: bool = True, mask: Tensor | None = None
    ) -> Any:
        """As :meth:`MILModel.predict`, with torchmil's order of arguments."""
        return self.forward(X, return_inst_pred, mask)
