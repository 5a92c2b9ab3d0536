"""Calls on which the segment operators are proved."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bigbag.testing import SIZES, Sample


def _samples(op: str) -> Iterator[Sample]:
    def make(sizes: tuple[int, ...], shape: tuple[int, ...], scale: float) -> Callable[..., dict[str, Tensor]]:
        return lambda generator: {
            "x": torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64) * scale
        }

    for name, sizes in SIZES.items():
        yield Sample(op, name, sizes, make(sizes, (5,), 1.0))
    yield Sample(op, "one-dimensional", SIZES["several"], make(SIZES["several"], (), 1.0))
    yield Sample(op, "three-dimensional", SIZES["several"], make(SIZES["several"], (2, 67), 1.0))
    yield Sample(op, "values at 1e4", SIZES["several"], make(SIZES["several"], (3,), 1e4))
    yield Sample(op, "non-contiguous", SIZES["several"], make(SIZES["several"], (6,), 1.0), contiguous=False)


_NAMES = ("segment_softmax", "segment_sum", "segment_mean", "segment_max")
SAMPLES: list[Sample] = [sample for op in _NAMES for sample in _samples(op)]
