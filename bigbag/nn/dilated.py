"""What a whole-slide encoder of dilated attention is made of: its attention, positions, and the order of instances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigbag import ops
from bigbag.bags import PackedBags, Segments
from bigbag.nn.attention import SelfAttention

_BITS = 16


class DilatedSelfAttention(SelfAttention):
    r"""Multi-head dilated self-attention, ``Y = DilatedAttention(X W_q, X W_k, X W_v) W_o + b_o``.

    See :func:`bigbag.ops.dilated_attention` for the formula and its cost, linear in the size of a bag.

    Args:
        in_dim: instance width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of queries, keys and values, all heads together.
        n_heads: heads.
        segment_lengths: instances of a segment, for each branch.
        dilations: of each branch.

    Ding et al. 2023, arXiv 2307.02486.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 256,
        n_heads: int = 8,
        segment_lengths: Sequence[int] = (1024, 4096, 16384),
        dilations: Sequence[int] = (1, 4, 16),
    ) -> None:
        super().__init__(in_dim, out_dim, att_dim, n_heads)
        self.segment_lengths, self.dilations = tuple(segment_lengths), tuple(dilations)
        self.branches(Segments.from_sizes(()))  # refuses what does not fit

    def branches(self, segments: Segments) -> tuple[ops.Branch, ...]:
        """The branches for a pack, which layers of the same shape share."""
        return ops.dilated_branches(segments, self.n_heads, self.segment_lengths, self.dilations)

    def attend(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, branches: Sequence[ops.Branch] | None = None
    ) -> Tensor:
        """Queries, keys and values ``(T, H, d)``, in the order in which segments are cut, to ``(T, att_dim)``."""
        branches = self.branches(segments) if branches is None else branches
        return ops.dilated_attention(q, k, v, segments, branches).flatten(1)


def relative_coords(bags: PackedBags, name: str) -> tuple[Tensor, Tensor]:
    """Places beside the smallest of their bag ``(T, 2)``, and the largest extent of each bag ``(B,)``, float64.

    Raises:
        ValueError: coordinates that are not of two axes.
    """
    assert bags.coords is not None
    if bags.coords.dim() != 2 or bags.coords.shape[1] != 2:
        raise ValueError(f"{name} needs coords of two axes, (T, 2), got {tuple(bags.coords.shape)}")
    coords, bag = bags.coords.double(), bags.segments.bag_of_instance
    index = bag[:, None].expand_as(coords)
    ends = [
        coords.new_zeros(bags.num_bags, 2).scatter_reduce(0, index, coords, how, include_self=False)
        for how in ("amin", "amax")
    ]
    return coords - ends[0][bag], (ends[1] - ends[0]).amax(1)


def hilbert_order(places: Tensor, extent: Tensor, segments: Segments) -> Tensor:
    """The instances of each bag along Hilbert's curve, so that a run of them is a compact region of the slide.

    Bags keep their places in the pack, and a bag's order does not depend on the others. Of instances in one cell of a
    65,536 x 65,536 lattice over the bag, those that come first stay first. O(T log T), on the device.

    Args:
        places: ``(T, 2)``, as from :func:`relative_coords`.
        extent: ``(B,)`` largest extent of each bag.
        segments: how the T instances are cut into bags.

    Returns:
        ``(T,)`` int64: the instance that comes k-th.
    """
    bag = segments.bag_of_instance
    side = 1 << _BITS
    scale = (side - 1) / extent.clamp_min(torch.finfo(extent.dtype).tiny)
    x, y = (places * scale[bag, None]).long().clamp_(0, side - 1).unbind(1)
    key = torch.zeros_like(x)
    for bit in range(_BITS - 1, -1, -1):
        half = 1 << bit
        right, up = (x & half) != 0, (y & half) != 0
        key += half * half * ((3 * right.long()) ^ up.long())
        # In the lower quarters the curve is transposed, and in the right one of them turned about.
        turned = right & ~up
        x, y = torch.where(turned, side - 1 - x, x), torch.where(turned, side - 1 - y, y)
        x, y = torch.where(up, x, y), torch.where(up, y, x)
    return torch.argsort(bag * (1 << 2 * _BITS) + key, stable=True)


def sinusoidal_position(places: Tensor, dim: int) -> Tensor:
    """Sines and cosines of two coordinates: ``(n, 2)`` to ``(n, dim)``, float32; no table, so no largest place.

    ``[sin(x w_i), cos(x w_i), sin(y w_i), cos(y w_i)]`` with ``w_i = 10000^(-4 i / dim)``, ``i < dim / 4`` (Vaswani et
    al. 2017, one half of the channels for each axis).
    """
    index = torch.arange(dim // 4, device=places.device, dtype=torch.float64)
    angles = places.double()[:, :, None] * 10000.0 ** (-4 * index / dim)
    return torch.cat([angles.sin(), angles.cos()], 2).flatten(1).float()


def unsorted(values: Tensor, order: Tensor) -> Tensor:
    """Values of instances in ``order``, back in the order of the pack."""
    return torch.empty_like(values).index_copy(0, order, values)
