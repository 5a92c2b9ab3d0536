"""Calls on which ``dilated_attention`` is proved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops.dilated_attention import dilated_attention, dilated_branches
from bigbag.testing import Sample

_SIZES = {
    "several": (5, 1, 130, 17),
    "empty bags": (0, 9, 0, 60, 0),
    "off the block": (257, 65),
    "no bag has instances": (0, 0),
}


@dataclass(frozen=True)
class DilatedSample(Sample):
    """A call with tensors q, k and v.

    Attributes:
        lengths: of the segments of each branch.
        dilations: of each branch.
    """

    lengths: tuple[int, ...] = (16, 64)
    dilations: tuple[int, ...] = (1, 2)

    def call(self, tensors: Mapping[str, Tensor], impl: str | None) -> tuple[Tensor, ...]:
        q, k, v = tensors.values()
        segments = Segments.from_sizes(self.sizes, q.device)
        branches = dilated_branches(segments, q.shape[1], self.lengths, self.dilations)
        return (dilated_attention(q, k, v, segments, branches, **self.options, impl=impl),)


def _make(rows: int, heads: int, dim: int, width: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    shapes = {"q": dim, "k": dim, "v": width}
    return lambda generator: {
        name: torch.randn(rows, heads, last, generator=generator, dtype=torch.float64) for name, last in shapes.items()
    }


def _sample(
    name: str, sizes: str = "several", heads: int = 2, width: int = 12, lengths: tuple[int, ...] = (16, 64),
    dilations: tuple[int, ...] = (1, 2),
) -> Sample:  # fmt: skip
    cut = _SIZES[sizes]
    make = _make(sum(cut), heads, 12, width)
    return DilatedSample("dilated_attention", name, cut, make, {}, True, lengths, dilations)


SAMPLES: list[Sample] = [
    *(_sample(name, name) for name in _SIZES),
    _sample("more dilation than heads", heads=2, lengths=(8, 64), dilations=(1, 8)),
    _sample("two thinned branches", heads=4, width=7, lengths=(8, 40, 64), dilations=(1, 2, 4)),
    _sample("queries that no branch keeps", heads=2, lengths=(30,), dilations=(3,)),
]
