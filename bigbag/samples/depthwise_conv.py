"""Calls on which ``depthwise_conv`` is proved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.testing import Sample

_CUT = {"x": "rows", "output 0": "rows"}


@dataclass(frozen=True)
class _ConvSample(Sample):
    """With the widths of the bags' grids, which a bag alone keeps."""

    widths: tuple[int, ...] = ()

    def alone(self, bag: int) -> Sample:
        return replace(super().alone(bag), widths=self.widths[bag : bag + 1])  # type: ignore[call-arg]

    def apply(self, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], impl: str | None) -> Any:
        x, weight, bias = tensors["x"], tensors["weight"], tensors.get("bias")
        return ops.depthwise_conv(x, structure["segments"], self.widths, weight, bias, impl=impl)


def _sample(
    name: str, grids: tuple[tuple[int, int], ...], kernel: tuple[int, int] = (3, 3), channels: int = 5,
    groups: int | None = None, bias: bool = True, scale: float = 1.0, contiguous: bool = True,
) -> Sample:  # fmt: skip
    """``grids``: rows and width of each bag."""
    sizes, widths = tuple(rows for rows, _ in grids), tuple(width for _, width in grids)

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        made = {"x": randn(sum(sizes), channels) * scale, "weight": randn(groups or channels, 1, *kernel)}
        return made | ({"bias": randn(channels) * scale} if bias else {})

    return _ConvSample("depthwise_conv", name, sizes, make, {}, contiguous, cut=_CUT, widths=widths)


SAMPLES: list[Sample] = [
    _sample("several", ((6, 3), (1, 1), (300, 20), (64, 8), (17, 17))),
    _sample("empty bags", ((0, 0), (9, 3), (0, 4), (130, 13), (0, 0)), (7, 7)),
    _sample("one instance", ((1, 1),), (7, 7)),
    _sample("no bag has instances", ((0, 0), (0, 5))),
    _sample("rows that are no grid", ((1, 0), (36, 6), (1, 0), (25, 5), (3, 0)), (7, 7)),
    _sample("small bags", ((4, 2),) * 10 + ((3, 1), (1, 1), (2, 2)), (5, 5)),
    _sample("grids narrower than the kernel", ((40, 2), (12, 3), (14, 7)), (7, 7)),
    _sample("off the block", ((1025, 41), (513, 27)), (7, 7), channels=3),
    _sample("lines longer than a tile", ((600, 300), (517, 517)), (3, 5), channels=2),
    _sample("columns, and shared kernels", ((70, 1), (0, 0), (300, 1), (1, 1)), (33, 1), 12, groups=3, bias=False),
    _sample("columns beside a wider grid", ((70, 1), (30, 5)), (5, 1)),
    _sample("lines", ((70, 70), (30, 15)), (1, 9)),
    _sample("one tap", ((70, 10), (1, 0)), (1, 1)),
    _sample("channels off the vector", ((60, 10), (9, 3)), (3, 3), channels=83),
    _sample("channels of whole vectors", ((60, 10),), (3, 3), channels=64),
    _sample("without bias", ((60, 10), (9, 3)), bias=False),
    _sample("values at 1e4", ((60, 10), (9, 3)), scale=1e4),
    _sample("non-contiguous", ((60, 10), (9, 3)), contiguous=False),
]
