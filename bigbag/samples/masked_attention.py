"""Samples of ``masked_attention`` and ``class_token_attention``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops.attention_bias import AttentionBias, DistanceBias, RelativePositionBias, num_buckets
from bigbag.ops.class_attention import class_token_attention
from bigbag.ops.masked_attention import masked_attention
from bigbag.testing import Sample

_SIZES = {
    "several": (5, 1, 130, 17),
    "empty bags": (0, 9, 0, 60, 0),
    # Not a lone bag of one: there the gradient of q is exactly 0, and so would be its budget.
    "bags of one": (1, 9, 1, 12),
    "off the block": (257, 65),
    "no bag has instances": (0, 0),
}


@dataclass(frozen=True)
class AttentionSample(Sample):
    """A call of ``masked_attention``: tensors q, k, v and, with a bias, its slopes or table.

    Attributes:
        kv_sizes: keys of each bag; empty: self-attention.
        masked: mask every third key, and all keys of the first bag.
        bias: "", "distance", or "mode method" of a relative position.
    """

    kv_sizes: tuple[int, ...] = ()
    masked: bool = False
    bias: str = ""

    def call(self, tensors: dict[str, Tensor], impl: str | None) -> tuple[Tensor, ...]:
        q, k, v, *weights = tensors.values()
        segments = Segments.from_sizes(self.sizes, q.device)
        keys = Segments.from_sizes(self.kv_sizes or self.sizes, q.device)
        options: dict[str, Any] = dict(self.options)
        if self.masked:
            mask = torch.arange(k.shape[0], device=k.device) % 3 != 1
            mask[: keys.sizes[0]] = False
            options["mask"] = mask
        if self.bias:
            options["bias"] = self.make_bias(q.shape[0], k.shape[0], weights[0])
        return (masked_attention(q, k, v, segments, keys, **options, impl=impl),)

    def make_bias(self, num_queries: int, num_keys: int, weights: Tensor) -> AttentionBias:
        """Positions on a lattice, the second query having none."""
        generator = torch.Generator().manual_seed(2)
        both = [torch.randint(0, 30, (n, 2), generator=generator).float() for n in (num_queries, num_keys)]
        both[0][1:2] = float("nan")
        coords, kv_coords = (c.to(weights.device) for c in both)
        if self.bias == "distance":
            return DistanceBias(coords / 8, weights, kv_coords / 8 if self.kv_sizes else None)
        mode, method = self.bias.split()
        places = (coords * 256, weights, mode, method)
        return RelativePositionBias(*places, unit=256, kv_coords=kv_coords * 256 if self.kv_sizes else None)


@dataclass(frozen=True)
class ClassTokenSample(Sample):
    """A call of ``class_token_attention``: tensors q_cls and k."""

    masked: bool = False

    def call(self, tensors: dict[str, Tensor], impl: str | None) -> tuple[Tensor, ...]:
        q_cls, k = tensors.values()
        mask = torch.arange(k.shape[0], device=k.device) % 3 != 1 if self.masked else None
        if mask is not None:
            mask[: self.sizes[0]] = False
        segments = Segments.from_sizes(self.sizes, k.device)
        return (class_token_attention(q_cls, k, segments, mask=mask, impl=impl),)


def _maker(shapes: dict[str, tuple[int, ...]], factor: float = 1.0) -> Callable[[torch.Generator], dict[str, Tensor]]:
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        made = {n: torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        first = next(iter(made))
        made[first] = made[first] * factor
        if "slopes" in made:  # the nearer, the more attention
            made["slopes"] = made["slopes"].abs()
        return made

    return make


def _attention(
    name: str, sizes: str = "several", heads: int = 2, dim: int = 12, width: int = 12, factor: float = 1.0,
    kv_sizes: tuple[int, ...] = (), masked: bool = False, bias: str = "", skip: int = 1, **options: Any,
) -> AttentionSample:  # fmt: skip
    cut = _SIZES[sizes]
    rows, keys = sum(cut), sum(kv_sizes or cut)
    shapes: dict[str, tuple[int, ...]] = {"q": (rows, heads, dim), "k": (keys, heads, dim), "v": (keys, heads, width)}
    if bias == "distance":
        shapes["slopes"] = (heads,)
    elif bias:
        mode, method = bias.split()
        *front, last = num_buckets(method, RelativePositionBias.beta)
        # "bias": one table per head; "contextual": one for all.
        before = (heads,) if mode == "bias" else (1, dim)
        shapes["table"] = (*before, *front, last + skip)
    make = _maker(shapes, factor)
    return AttentionSample("masked_attention", name, cut, make, options, True, kv_sizes, masked, bias)


def _class_token(name: str, sizes: str, masked: bool = False, factor: float = 1.0) -> ClassTokenSample:
    cut = _SIZES[sizes]
    make = _maker({"q_cls": (len(cut), 3, 10), "k": (sum(cut), 3, 10)}, factor)
    return ClassTokenSample("class_token_attention", name, cut, make, {}, True, masked)


SAMPLES: list[Sample] = [
    *(_attention(name, name, heads=8 if name == "bags of one" else 2) for name in _SIZES),
    _attention("masked", heads=3, width=16, masked=True),
    _attention("values wider", dim=5, width=40),
    _attention("values narrower", dim=33, width=7, masked=True),
    _attention("scale", scale=0.2),
    _attention("cross", kv_sizes=(3, 0, 40, 9), masked=True),
    _attention("dropout", dropout=0.4, seed=-(2**40) - 7),
    _attention("dropout, masked", "off the block", masked=True, dropout=0.1, seed=3),
    # Eight heads where the bias has few weights: the error of a single number says little about the reference.
    _attention("distance", bias="distance", heads=8, dim=16, width=9),
    _attention("distance, cross", bias="distance", heads=8, kv_sizes=(3, 2, 40, 9), masked=True, dropout=0.2),
    _attention("bias product", bias="bias product"),
    _attention("bias cross", "off the block", bias="bias cross", masked=True),
    _attention("bias euclidean", bias="bias euclidean", heads=8, skip=0),
    _attention("bias quant", bias="bias quant", heads=8, width=9, dropout=0.3),
    _attention("contextual product", bias="contextual product", masked=True),
    _attention("contextual cross", bias="contextual cross", kv_sizes=(3, 2, 40, 9)),
    _attention("contextual euclidean", bias="contextual euclidean", dropout=0.3),
    *(_class_token(name, name) for name in _SIZES),
    _class_token("masked", "several", masked=True),
    _class_token("scores at 1e4", "several", factor=3e3),
]
