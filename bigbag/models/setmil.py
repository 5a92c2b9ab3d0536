"""SETMIL: windows of several sizes over the bag's lattice, and a transformer with relative positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigbag.bags import PackedBags, Segments
from bigbag.models.base import CoordsMILModel, feature_dim, squeeze_single_output
from bigbag.nn import SinusoidalPositionalEncodingND, TransformerLayer, iRPETransformerEncoder
from bigbag.nn.lattice import Lattice, Window
from bigbag.nn.linear import readable
from bigbag.nn.rows import Projection, Widen, Windows, add_constant, by_rows
from bigbag.ops.registry import compute_dtype

Pairs = Sequence[Sequence[int]]


class T2TLayer(torch.nn.Module):
    r"""Tokens-to-token layer (Yuan et al. 2021, arXiv 2101.11986) as SETMIL has it: windows first, then attention.

    The rows of a window side by side, ``in_dim * kernel`` wide, go through a :class:`~bigbag.nn.TransformerLayer`; they
    are made chunk by chunk, when they are needed. Cells without an instance are zeros.

    Args:
        in_dim: width of a row.
        out_dim: output width; None: ``att_dim``.
        att_dim: width of the attention.
        kernel_size, stride, padding, dilation: of the windows.
        n_heads: heads.
        use_mlp: whether the transformer layer has an MLP.
        dropout: of attention weights and MLP.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        kernel_size: Sequence[int] = (3, 3),
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (2, 2),
        dilation: Sequence[int] = (1, 1),
        n_heads: int = 4,
        use_mlp: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.window = Window(*((int(v[0]), int(v[1])) for v in (kernel_size, stride, padding, dilation)))
        width = in_dim * self.window.kernel[0] * self.window.kernel[1]
        self.transf_layer = TransformerLayer(width, att_dim, att_dim, n_heads, use_mlp, dropout)
        same = out_dim is None or out_dim == att_dim
        self.out_proj = torch.nn.Identity() if same else torch.nn.Linear(att_dim, int(out_dim or 0))

    def forward_packed(self, x: Tensor, lattice: Lattice, tokens: Lattice) -> Tensor:
        """``(T, in_dim)`` rows on a lattice to ``(L, out_dim)``, one for each window at the places of ``tokens``."""
        windows: Any = Windows(x, lattice.neighbours(tokens, self.window))
        return self.out_proj(self.transf_layer.forward_packed(windows, tokens.segments))

    def forward(self, X: Tensor) -> Tensor:
        """``(B, in_dim, h, w)`` to ``(B, L, out_dim)``: every window, as ``torch.nn.Unfold`` has them."""
        rows, lattice = _rows_of_image(X)
        return self.forward_packed(rows, lattice, lattice.windows(self.window, full=True)[0]).unflatten(0, (len(X), -1))


class PMF(torch.nn.Module):
    r"""Pyramid multi-scale fusion: :class:`T2TLayer` for several windows, side by side, and a linear layer.

    Args:
        in_dim: width of a row.
        out_dim: output width; None: ``att_dim`` for each window, without a linear layer.
        att_dim: width of the attentions.
        kernel_list, stride_list, padding_list, dilation_list: one pair of numbers for each window.
        n_heads: heads.
        use_mlp: whether the layers have an MLP.
        dropout: of attention weights and MLP.

    Raises:
        ValueError: windows that do not lie around the same cells.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        kernel_list: Pairs = ((3, 3), (5, 5), (7, 7)),
        stride_list: Pairs = ((1, 1), (1, 1), (1, 1)),
        padding_list: Pairs = ((1, 1), (2, 2), (3, 3)),
        dilation_list: Pairs = ((1, 1), (1, 1), (1, 1)),
        n_heads: int = 4,
        use_mlp: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers = [
            T2TLayer(in_dim, att_dim, att_dim, kernel, stride, padding, dilation, n_heads, use_mlp, dropout)
            for kernel, stride, padding, dilation in zip(kernel_list, stride_list, padding_list, dilation_list)
        ]
        centres = {(layer.window.stride, layer.window.shift) for layer in layers}
        if len(centres) != 1:
            raise ValueError(
                "PMF: the windows must have equal strides and centres, that is equal 2 padding - dilation (kernel - 1);"
                f" got strides and those numbers {sorted(centres)}"
            )
        self.layers = torch.nn.ModuleList(layers)
        width = att_dim * len(layers)
        self.out_proj = torch.nn.Identity() if out_dim is None else torch.nn.Linear(width, out_dim)

    def forward_packed(self, x: Tensor, lattice: Lattice, tokens: Lattice, recompute: bool = False) -> Tensor:
        """``(T, in_dim)`` rows on a lattice to ``(L, out_dim)``, one for each window at the places of ``tokens``."""
        layers: list[Any] = list(self.layers)
        for layer in layers:
            layer.transf_layer.recompute = recompute
        found = [layer.forward_packed(x, lattice, tokens) for layer in layers]
        if isinstance(self.out_proj, torch.nn.Identity):
            return torch.cat(found, 1)
        return by_rows(lambda *rows: torch.cat(rows, 1), *found, projection=_projection(self.out_proj))

    def forward(self, X: Tensor) -> Tensor:
        """``(B, in_dim, h, w)`` to ``(B, L, out_dim)``."""
        rows, lattice = _rows_of_image(X)
        first: Any = self.layers[0]
        tokens = lattice.windows(first.window, full=True)[0]
        return self.forward_packed(rows, lattice, tokens).unflatten(0, (len(X), -1))


class SETMIL(CoordsMILModel):
    r"""Spatial encoding transformer MIL (Zhao et al. 2022, MICCAI, doi 10.1007/978-3-031-16434-7_7).

    ``X = proj(feat_ext(X))``. With ``use_pmf``, :class:`PMF` over the bag's lattice: a token for each cell with an
    instance (the mean of its instances) or, with strides, for each window around some. Then a class token; sinusoids
    of the number of the cell, counted row by row in the smallest square around the bag; a transformer with relative
    positions; the logits are ``W z + b`` of the class token. The instance scores are the attention of the class token
    in the last layer, mean over the heads, to the instance (to its window, with ``use_pmf``).

    The order of the instances does not matter, nor where the lattice begins. Attention is exact, in linear memory; of
    the last layer only the row of the class token is computed, in linear time: without PMF and with one layer, so is
    the model.

    Differs from torchmil, which reads ``(att_dim, cells)`` as ``(cells, att_dim)`` without a transpose, mixes heads and
    positions, lets every empty cell of a square around the whole batch take part as a token, has no mask, and gives
    zeros as instance scores with ``use_pmf``. The scores carry no gradient.

    Args:
        in_shape: shape of one instance.
        att_dim: width inside; the heads must divide it.
        use_pmf: use PMF.
        pmf_n_heads, pmf_use_mlp, pmf_dropout: of its transformer layers.
        pmf_kernel_list, pmf_stride_list, pmf_padding_list, pmf_dilation_list: of its windows.
        set_n_layers, set_n_heads, set_use_mlp, set_dropout: of the transformer.
        rpe_ratio, rpe_method, rpe_mode, rpe_shared_head, rpe_skip, rpe_on: its relative positions, as in
            :class:`~bigbag.nn.iRPEMultiheadSelfAttention`.
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.
        unit: one step of the lattice in the unit of the coordinates; 1 where they are places on a lattice.
        torchmil_layout: torchmil's numbers for a batch of one, for its checkpoints: mixed axes, empty cells and all.
            The memory grows with the area of the bag.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        att_dim: int = 512,
        use_pmf: bool = False,
        pmf_n_heads: int = 4,
        pmf_use_mlp: bool = True,
        pmf_dropout: float = 0.0,
        pmf_kernel_list: Pairs = ((3, 3), (5, 5), (7, 7)),
        pmf_stride_list: Pairs = ((1, 1), (1, 1), (1, 1)),
        pmf_padding_list: Pairs = ((1, 1), (2, 2), (3, 3)),
        pmf_dilation_list: Pairs = ((1, 1), (1, 1), (1, 1)),
        set_n_layers: int = 1,
        set_n_heads: int = 4,
        set_use_mlp: bool = True,
        set_dropout: float = 0.0,
        rpe_ratio: float = 1.9,
        rpe_method: str = "product",
        rpe_mode: str | None = "contextual",
        rpe_shared_head: bool = True,
        rpe_skip: int = 1,
        rpe_on: str = "k",
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
        unit: float = 1.0,
        torchmil_layout: bool = False,
    ) -> None:
        super().__init__()
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        feat_dim = feature_dim(self.feat_ext, in_shape)
        assert feat_dim is not None
        self.att_dim, self.unit, self.torchmil_layout = att_dim, unit, torchmil_layout
        self.proj = torch.nn.Linear(feat_dim, att_dim) if feat_dim != att_dim else torch.nn.Identity()
        self.pos_embed = SinusoidalPositionalEncodingND(1, att_dim)
        self.use_pmf = use_pmf
        if use_pmf:
            windows = (pmf_kernel_list, pmf_stride_list, pmf_padding_list, pmf_dilation_list)
            self.pmf = PMF(att_dim, att_dim, att_dim, *windows, pmf_n_heads, pmf_use_mlp, pmf_dropout)
        self.se_transf = iRPETransformerEncoder(
            att_dim,
            att_dim=att_dim,
            n_layers=set_n_layers,
            n_heads=set_n_heads,
            use_mlp=set_use_mlp,
            dropout=set_dropout,
            rpe_ratio=rpe_ratio,
            rpe_method=rpe_method,
            rpe_mode=rpe_mode,
            rpe_shared_head=rpe_shared_head,
            rpe_skip=rpe_skip,
            rpe_on=rpe_on,
            torchmil_layout=torchmil_layout,
        )
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, att_dim))
        self.classifier = torch.nn.Linear(att_dim, out_dim)

    def forward_bags(self, bags: PackedBags, return_att: bool = False):  # type: ignore[no-untyped-def]
        x, tokens, token = self._tokens(bags)
        segments = Segments.from_sizes([1 + size for size in tokens.segments.sizes], x.device)
        numbers = _behind(tokens.numbers.new_zeros(1), tokens.numbers + 1, tokens.segments)
        sequence = _behind(self.cls_token[0].to(x.dtype), x, tokens.segments)
        sequence = add_constant(sequence, lambda rows: self.pos_embed.encode(numbers[rows])[:, : self.att_dim])
        nowhere = torch.full((1, 2), torch.nan, device=x.device)
        coords = _behind(nowhere, tokens.places.float(), tokens.segments)
        self.se_transf.recompute = self.activation_checkpointing
        found = self.se_transf.forward_first(sequence, segments, return_att, coords=coords)
        z, att = found if return_att else (found, None)
        Y_pred = squeeze_single_output(self.classifier(z))
        if att is None:
            return Y_pred
        scores = torch.cat([bag[1:] for bag in att.mean(1).split(segments.sizes)])
        known = token >= 0
        # An instance in no window has no score.
        return Y_pred, torch.where(known, scores[token.clamp_min(0)] if len(scores) else 0.0, 0.0)

    def _tokens(self, bags: PackedBags) -> tuple[Tensor, Lattice, Tensor]:
        """The tokens of a pack, where they lie, and for each instance which of them it is in, or -1."""
        x = self.encode(self.feat_ext, bags.x)
        widen = Widen(compute_dtype(self.cls_token))
        x = (
            widen(x)
            if isinstance(self.proj, torch.nn.Identity)
            else by_rows(widen, x, projection=_projection(self.proj))
        )
        lattice = self._lattice(bags)
        if self.torchmil_layout:
            lattice, token = lattice.windows(Window((1, 1)), full=True)
            x = x.new_zeros(len(lattice.places), self.att_dim).index_copy(0, token, x)
        elif self.use_pmf:
            lattice, token = lattice.cells()
            counts = torch.bincount(token, minlength=len(lattice.places)).clamp_min(1)
            x = x.new_zeros(len(counts), self.att_dim).index_add(0, token, x / counts[token, None].to(x.dtype))
        else:
            token = torch.arange(len(x), device=x.device)
        if self.use_pmf:
            first: Any = self.pmf.layers[0]
            tokens, window = lattice.windows(first.window, full=self.torchmil_layout)
            x = self.pmf.forward_packed(x, lattice, tokens, self.activation_checkpointing)
            return x, tokens, window[token]
        if self.torchmil_layout:
            x = torch.cat([bag.t().reshape(bag.shape) for bag in x.split(lattice.segments.sizes)])
        return x, lattice, token

    def _lattice(self, bags: PackedBags) -> Lattice:
        """Where the instances lie in the smallest square around their bag (torchmil: from 0 on)."""
        assert bags.coords is not None
        if bags.coords.dim() != 2 or bags.coords.shape[1] != 2:
            raise ValueError(f"SETMIL needs two coordinates per instance, got {tuple(bags.coords.shape[1:])}")
        places = torch.floor(bags.coords.double() / self.unit).long()
        bag, count = bags.segments.bag_of_instance[:, None].expand(-1, 2), bags.num_bags
        if not self.torchmil_layout:
            first = places.new_zeros(count, 2).scatter_reduce(0, bag, places, "amin", include_self=False)
            places = places - first[bag[:, 0]]
        last = places.new_full((count, 2), -1).scatter_reduce(0, bag, places, "amax")
        size = (last.amax(1, keepdim=True) + 1).expand(-1, 2)
        return Lattice(places, size, bags.segments)


def _projection(linear: Any) -> Projection:
    return Projection(readable(linear).weight, linear.bias)


def _rows_of_image(X: Tensor) -> tuple[Tensor, Lattice]:
    """``(B, C, h, w)`` as rows ``(B h w, C)`` on full lattices."""
    rows = X.flatten(2).mT.flatten(0, 1)
    return rows, Lattice.full([(X.shape[2], X.shape[3])] * X.shape[0], X.device)


def _behind(token: Tensor, x: Tensor, segments: Segments) -> Tensor:
    """``token`` before the rows of each bag."""
    return torch.cat([part for bag in x.split(segments.sizes) for part in (token, bag)])
