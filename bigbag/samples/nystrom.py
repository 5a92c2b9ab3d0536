"""Calls on which ``nystrom_attention`` is proved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.testing import Sample


def _make(sizes: tuple[int, ...], heads: int, dim: int, width: int, scale: float) -> Callable[..., dict[str, Tensor]]:
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        def randn(last: int) -> Tensor:
            return torch.randn(sum(sizes), heads, last, generator=generator, dtype=torch.float64)

        return {"q": randn(dim) * scale, "k": randn(dim) * scale, "v": randn(width)}

    return make


def _make_saturated(generator: torch.Generator) -> dict[str, Tensor]:
    """A bag whose softmaxes saturate, of integers, so that scores of 1e4 are exact in every precision, and an
    ordinary one.

    (Near 1e4 the rounding of a score decides between close ones: implementations then differ as they please.) The
    gradients of the first bag are zeros; what rounding leaves of them is as large as its rows, so the second bag's
    values are, too.
    """
    rows = torch.randint(-50, 51, (2, 64, 2, 16), generator=generator).double()
    ordinary = torch.randn(3, 30, 2, 16, generator=generator, dtype=torch.float64)
    q, k = torch.cat([rows, ordinary[:2]], 1)
    return {"q": q, "k": k, "v": torch.cat([rows[0] / 50, 50 * ordinary[2]])}


class _NystromSample(Sample):
    def apply(self, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], impl: str | None) -> Any:
        q, k, v = tensors.values()
        return ops.nystrom_attention(q, k, v, structure["segments"], **self.options, impl=impl)


# Each iteration of the pseudo-inverse is Z (13 - A Z (15 - A Z (7 - A Z))) / 4, whose terms at its fixed point A Z = 1
# cancel: sizes of (13 + 15 + 7 + 1) / 4 = 9, each with its rounding, leave 1.
_CANCELLATION = 9.0
_CUT = {"q": "rows", "k": "rows", "v": "rows", "output 0": "rows"}


def _sample(
    name: str,
    sizes: tuple[int, ...],
    heads: int = 2,
    dim: int = 8,
    width: int = 8,
    scale: float = 1.0,
    contiguous: bool = True,
    **options: Any,
) -> Sample:
    options = {"num_landmarks": 16, **options}
    made = _make(sizes, heads, dim, width, scale)
    return _NystromSample(
        "nystrom_attention", name, sizes, made, options, contiguous, cut=_CUT, amplification=_CANCELLATION
    )


SAMPLES: list[Sample] = [
    _sample("several", (5, 1, 300, 64, 17)),
    _sample("small", (9, 1, 23), num_landmarks=6),
    _sample("empty bags", (0, 9, 0, 130, 0)),
    _sample("no bag has instances", (0, 0)),
    _sample("as many landmarks as instances", (16, 15)),
    _sample("small bags", (4,) * 10 + (3, 1, 2), dim=16, scale=2.0),
    _sample("off the block", (1025, 513), num_landmarks=65),
    _sample("widths of no power of two", (70, 41), heads=3, dim=19, width=5),
    _sample("one landmark", (37, 5), num_landmarks=1),
    _sample("fewer iterations", (50, 31), scale=2.0, num_iterations=3),
    _NystromSample(
        "nystrom_attention",
        "scores at 1e4",
        (64, 30),
        _make_saturated,
        {"num_landmarks": 8, "num_iterations": 2},
        cut=_CUT,
        amplification=_CANCELLATION,
    ),
    _sample("non-contiguous", (50, 31), contiguous=False),
]
