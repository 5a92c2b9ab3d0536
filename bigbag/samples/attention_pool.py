"""Calls on which ``attention_pool`` is proved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.testing import SIZES, Sample

_CUT = {"x": "rows", "output 0": "bags", "output 1": "rows"}


def _sample(
    name: str,
    sizes: str = "several",
    width: int = 33,
    dim: int = 20,
    heads: int = 1,
    gated: bool = True,
    biases: bool = True,
    scale: float = 1.0,
    contiguous: bool = True,
    **options: Any,
) -> Sample:
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        made = {"x": randn(sum(SIZES[sizes]), width), "w1": randn(dim, width) / width**0.5}
        made |= {"b1": randn(dim)} if biases else {}
        made |= {"w2": randn(heads, dim) * scale}
        made |= {"wg": randn(dim, width) / width**0.5} if gated else {}
        return made | ({"bg": randn(dim)} if gated and biases else {})

    options |= {} if biases else {"b1": None}
    return Sample("attention_pool", name, SIZES[sizes], make, options, contiguous, cut=_CUT)


SAMPLES: list[Sample] = [
    *(_sample(name, name, heads=8 if sum(sizes) < 10 else 1) for name, sizes in SIZES.items()),
    *(_sample(f"act {act}", act=act, gated=False) for act in ("tanh", "relu", "gelu")),
    *(_sample(f"gated {act}, kept", act=act, keep_preactivations=True) for act in ("relu", "gelu")),
    _sample("three heads", heads=3, width=70, dim=65),
    _sample("dropout", heads=3, dropout=0.3, seed=5),
    _sample("no biases", biases=False),
    _sample("scores at 1e4", scale=1e4),
    _sample("non-contiguous", contiguous=False),
    _sample("kept", "off the block", width=16, dim=8, keep_preactivations=True),
]
