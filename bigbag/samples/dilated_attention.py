"""Calls on which ``dilated_attention`` is proved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops.dilated_attention import dilated_attention, dilated_branches
from bigbag.testing import Sample

# log of at most 130 keys in two branches, and scores of variance 1.
_LOGSUMEXP = 6.0
_SIZES = {
    "several": (5, 1, 130, 17),
    "empty bags": (0, 9, 0, 60, 0),
    "off the block": (257, 65),
    "small": (9, 1, 23),
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

    def structure(self, device: str) -> dict[str, Any]:
        segments = Segments.from_sizes(self.sizes, device)
        return {"segments": segments, "branches": dilated_branches(segments, 4, self.lengths, self.dilations)}

    def apply(self, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], impl: str | None) -> Any:
        q, k, v = tensors.values()
        return dilated_attention(q, k, v, **structure, **self.options, impl=impl)


def _make(rows: int, width: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    shapes = {"q": 12, "k": 12, "v": width}
    return lambda generator: {
        name: torch.randn(rows, 4, last, generator=generator, dtype=torch.float64) for name, last in shapes.items()
    }


def _sample(
    name: str, sizes: str = "several", width: int = 12, lengths: tuple[int, ...] = (16, 64),
    dilations: tuple[int, ...] = (1, 2), contiguous: bool = True,
) -> Sample:  # fmt: skip
    pack = _SIZES[sizes]
    cut = dict.fromkeys(("q", "k", "v", "output 0"), "rows")
    make = _make(sum(pack), width)
    return DilatedSample(
        "dilated_attention", name, pack, make, {}, contiguous, lengths, dilations, cut=cut, amplification=_LOGSUMEXP
    )


SAMPLES: list[Sample] = [
    *(_sample(name, name) for name in _SIZES),
    _sample("more dilation than heads", lengths=(8, 64), dilations=(1, 8)),
    _sample("two thinned branches", width=7, lengths=(8, 40, 64), dilations=(1, 2, 4)),
    _sample("queries that no branch keeps", lengths=(30,), dilations=(5,)),
    _sample("non-contiguous", "small", contiguous=False),
]
