"""Calls on which the segment operators are proved."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bigbag.testing import SIZES, Sample


def _samples(op: str) -> Iterator[Sample]:
    cut = {"x": "rows", "output 0": "rows" if op == "segment_softmax" else "bags"}

    def make(sizes: tuple[int, ...], shape: tuple[int, ...], scale: float) -> Callable[..., dict[str, Tensor]]:
        return lambda generator: {
            "x": torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64) * scale
        }

    def sample(name: str, sizes: str, shape: tuple[int, ...], scale: float = 1.0, contiguous: bool = True) -> Sample:
        return Sample(op, name, SIZES[sizes], make(SIZES[sizes], shape, scale), {}, contiguous, cut=cut)

    yield from (sample(name, name, (5,)) for name in SIZES)
    yield sample("one-dimensional", "several", ())
    yield sample("three-dimensional", "several", (2, 67))
    yield sample("values at 1e4", "several", (3,), 1e4)
    yield sample("non-contiguous", "several", (6,), contiguous=False)


_NAMES = ("segment_softmax", "segment_sum", "segment_mean", "segment_max")
SAMPLES: list[Sample] = [sample for op in _NAMES for sample in _samples(op)]
