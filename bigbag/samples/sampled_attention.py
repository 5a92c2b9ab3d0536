"""Calls on which ``sampled_attention`` and ``attention_draws`` are proved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.testing import SIZES, Sample

_CUT = {"mu": "rows", "log_var": "rows", "values": "rows"}
# f enters exponentials: its rounding is magnified by |f|, below 10 here but for what is clipped at 20.
_AMPLIFICATION = 10.0


class _Sample(Sample):
    def apply(self, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], impl: str | None) -> Any:
        return getattr(ops, self.op)(**tensors, segments=structure["segments"], **self.options, impl=impl)


def _sample(
    op: str, name: str, sizes: str = "several", width: int = 3, num_samples: int = 21, scale: float = 1.0, **more: Any
) -> Sample:
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        rows = sum(SIZES[sizes])
        made = {"mu": randn(rows) * scale, "log_var": randn(rows) / 2}
        return made | ({"values": randn(rows, width)} if op == "sampled_attention" else {})

    options = {"num_samples": num_samples, "seed": 2**62 + 7}
    amplification = _AMPLIFICATION * max(1.0, scale / 5)
    cut = {**_CUT, "output 0": "bags" if op == "sampled_attention" else "rows"}
    return _Sample(op, name, SIZES[sizes], make, options, cut=cut, amplification=amplification, **more)


SAMPLES: list[Sample] = [
    # The gradient to the mean of one instance is 0, and what is computed is rounding alone.
    *(_sample("sampled_attention", name, name) for name in SIZES if name != "one instance"),
    _sample("sampled_attention", "clipped", scale=10.0),
    _sample("sampled_attention", "one sample, one value", num_samples=1, width=1),
    _sample("sampled_attention", "many samples, many values", "off the block", num_samples=300, width=20),
    _sample("sampled_attention", "non-contiguous", contiguous=False),
    *(_sample("attention_draws", name, name) for name in SIZES if name != "long bag"),
    _sample("attention_draws", "clipped", scale=10.0, num_samples=6),
    _sample("attention_draws", "non-contiguous", contiguous=False),
]
