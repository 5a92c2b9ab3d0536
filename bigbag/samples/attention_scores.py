"""Calls on which ``attention_scores`` is proved; it knows no bags, so that they are cuts of its rows alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.testing import SIZES, Sample

_CUT = {"h": "rows", "output 0": "rows"}
# The kernels' tanh and sigmoid err by up to two roundings of 1, which no matrix product before them hides.
_AMPLIFICATION = 2.0


class _Sample(Sample):
    def apply(self, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], impl: str | None) -> Any:
        h, bias, w2 = tensors["h"], tensors.get("bias"), tensors["w2"]
        return ops.attention_scores(h, bias, w2, **self.options, impl=impl)


def _sample(
    name: str, sizes: str = "several", dim: int = 20, heads: int = 1, gated: bool = True, bias: bool = True,
    scale: float = 1.0, contiguous: bool = True, act: str = "tanh",
) -> Sample:  # fmt: skip
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        total = dim * (1 + gated)
        made = {"h": randn(sum(SIZES[sizes]), total) * scale}
        return made | ({"bias": randn(total)} if bias else {}) | {"w2": randn(heads, dim) * scale}

    options = {"act": act, "gated": gated}
    return _Sample(
        "attention_scores", name, SIZES[sizes], make, options, contiguous, cut=_CUT, amplification=_AMPLIFICATION
    )


SAMPLES: list[Sample] = [
    *(_sample(name, name, heads=8 if sum(sizes) < 10 else 1) for name, sizes in SIZES.items()),
    *(_sample(f"act {act}", act=act, gated=False) for act in ("tanh", "relu", "gelu")),
    *(_sample(f"gated {act}", act=act) for act in ("relu", "gelu")),
    _sample("three heads", heads=3, dim=65),
    _sample("no bias", bias=False),
    _sample("one unit, not gated", dim=1, gated=False),
    _sample("scores at 1e4", scale=1e2, act="relu", gated=False),
    _sample("non-contiguous", contiguous=False),
]
