"""Calls that prove ``segment_topk``, ``_logsumexp``, ``_pool`` and ``_dots``, and ``dot_attention_pool``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.bags import Segments
from bigbag.testing import Sample

_SIZES = {
    "several": (5, 1, 300, 64, 17),
    "empty bags": (0, 9, 0, 130, 0),
    "one instance": (1,),
    "small bags": (4,) * 10 + (3, 1, 2),
    "off the block": (1025, 513),
    "no bag has instances": (0, 0),
}


class _TopkSample(Sample):
    """The index is no output that can be compared by its error: it enters as the scores that it points to."""

    def call(self, tensors: Mapping[str, Tensor], impl: str | None) -> tuple[Tensor, ...]:
        values, index, count = super().call(tensors, impl)
        # Counted from the start of the bag, as the bag alone counts.
        starts = torch.tensor(Segments.from_sizes(self.sizes).starts[:-1], device=index.device)
        place = torch.where(index < 0, -1, index - starts.view(-1, *[1] * (index.dim() - 1)))
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        return values, place.to(dtype), count.to(dtype)


class _LogsumexpSample(Sample):
    def call(self, tensors: Mapping[str, Tensor], impl: str | None) -> tuple[Tensor, ...]:
        (out,) = super().call(tensors, impl)
        # The -inf of empty bags has no error; where it stands is compared.
        return out.masked_fill(out.isneginf(), -5.0), out.isneginf().to(out.dtype)


class _PoolSample(Sample):
    def apply(self, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], impl: str | None) -> Any:
        return ops.segment_pool(tensors["weights"], tensors["x"], structure["segments"], impl=impl)


class _DotsSample(Sample):
    def apply(self, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], impl: str | None) -> Any:
        return ops.segment_dots(tensors["x"], tensors["y"], structure["segments"], impl=impl)


def _randn(**shapes: tuple[int, ...]) -> Callable[[torch.Generator], dict[str, Tensor]]:
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        return {n: torch.randn(*shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}

    return make


def _ties(rows: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Few different values, so that most of a selection is decided by the row."""
    return lambda generator: {"x": torch.randint(-2, 3, (rows, 3), generator=generator).double()}


def _topk(name: str, sizes: str, k: int, make: Any = None, **options: Any) -> Sample:
    shape = (sum(_SIZES[sizes]), 3)
    cut = {"x": "rows", "output 0": "bags", "output 1": "bags", "output 2": "bags"}
    return _TopkSample("segment_topk", name, _SIZES[sizes], make or _randn(x=shape), {"k": k, **options}, cut=cut)


def _pool(name: str, sizes: str, columns: int, width: int, contiguous: bool = True) -> Sample:
    rows = sum(_SIZES[sizes])
    made = _randn(weights=(rows, columns), x=(rows, width))
    cut = {"weights": "rows", "x": "rows", "output 0": "bags"}
    return _PoolSample("segment_pool", name, _SIZES[sizes], made, {}, contiguous, cut=cut)


def _dots(name: str, sizes: str, columns: int, width: int, contiguous: bool = True) -> Sample:
    made = _randn(x=(sum(_SIZES[sizes]), width), y=(len(_SIZES[sizes]), columns, width))
    cut = {"x": "rows", "y": "bags", "output 0": "rows"}
    return _DotsSample("segment_dots", name, _SIZES[sizes], made, {}, contiguous, cut=cut)


class _DotPoolSample(Sample):
    def apply(self, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], impl: str | None) -> Any:
        return ops.dot_attention_pool(tensors["x"], tensors["y"], structure["segments"], impl=impl)


def _dot_pool(name: str, sizes: str, columns: int = 1, width: int = 33, scale: float = 0.2) -> Sample:
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        made = _randn(x=(sum(_SIZES[sizes]), width), y=(len(_SIZES[sizes]), columns, width))(generator)
        return made | {"y": made["y"] * scale}

    cut = {"x": "rows", "y": "bags", "output 0": "bags", "output 1": "rows"}
    return _DotPoolSample("dot_attention_pool", name, _SIZES[sizes], make, {}, "non-cont" not in name, cut=cut)


def _logsumexp(name: str, sizes: str, shape: tuple[int, ...] = (5,), scale: float = 1.0) -> Sample:
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        return {"x": _randn(x=(sum(_SIZES[sizes]), *shape))(generator)["x"] * scale}

    cut = {"x": "rows", "output 0": "bags", "output 1": "bags"}
    return _LogsumexpSample("segment_logsumexp", name, _SIZES[sizes], make, cut=cut)


SAMPLES: list[Sample] = [
    *(_topk(name, name, 7) for name in _SIZES),
    _topk("ties", "several", 20, _ties(387)),
    _topk("ties, smallest", "several", 20, _ties(387), largest=False),
    _topk("smallest", "several", 7, largest=False),
    _topk("k = 1", "off the block", 1),
    _topk("k beyond every bag", "small bags", 9),
    _topk("one-dimensional", "several", 7, _randn(x=(387,))),
    *(_logsumexp(name, name) for name in _SIZES),
    _logsumexp("one-dimensional", "several", ()),
    _logsumexp("values at 1e4", "several", (3,), 1e4),
    *(_pool(name, name, 7, 33) for name in _SIZES),
    _pool("many columns", "several", 130, 20),
    _pool("one column", "several", 1, 1),
    _pool("non-contiguous", "several", 6, 17, contiguous=False),
    *(_dots(name, name, 7, 33) for name in _SIZES),
    _dots("one column", "several", 1, 20),
    _dots("non-contiguous", "several", 3, 17, contiguous=False),
    *(_dot_pool(name, name) for name in _SIZES),
    _dot_pool("two columns", "several", 2, 20),
    _dot_pool("many columns", "several", 7, 20),
    _dot_pool("scores at 1e4", "several", scale=2e3),
    _dot_pool("non-contiguous", "several", 2, 17),
]
