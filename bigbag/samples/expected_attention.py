"""Calls on which ``expected_attention`` is proved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.testing import SIZES, Sample

_SIZES = SIZES | {"small bags": (4,) * 10 + (3, 1, 2)}
_CUT = {"mu": "rows", "log_var": "rows", "output 0": "rows"}
# exp(-r x) of a level is the square of that before the last, up to sixty times in a row, each rounded; what of that
# remains in the sums over levels is a few roundings.
_AMPLIFICATION = 4.0


class _Sample(Sample):
    def apply(self, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], impl: str | None) -> Any:
        return ops.expected_attention(**tensors, segments=structure["segments"], impl=impl)


def _sample(name: str, sizes: str = "several", mean: float = 0.0, spread: float = 1.0, **more: Any) -> Sample:
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        mu, log_var = torch.randn(2, sum(_SIZES[sizes]), generator=generator, dtype=torch.float64)
        return {"mu": mean + spread * mu, "log_var": log_var / 2}

    return _Sample("expected_attention", name, _SIZES[sizes], make, cut=_CUT, amplification=_AMPLIFICATION, **more)


SAMPLES: list[Sample] = [
    # The gradient to the mean of one instance is 0, and what is computed is rounding alone.
    *(_sample(name, name) for name in _SIZES if name != "one instance"),
    _sample("far apart", spread=6.0),
    _sample("clipped", mean=18.0, spread=2.0),
    _sample("non-contiguous", contiguous=False),
]
