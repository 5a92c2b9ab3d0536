"""Samples of ``masked_attention`` and ``class_token_attention``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.bags import Segments
from bigbag.ops.attention_bias import AttentionBias, DistanceBias, RelativePositionBias, num_buckets
from bigbag.testing import Sample

_SIZES = {
    "several": (5, 1, 130, 17),
    "empty bags": (0, 9, 0, 60, 0),
    # Not a lone bag of one: there the gradient of q is exactly 0, and so would be its budget.
    "bags of one": (1, 9, 1, 12),
    "off the block": (257, 65),
    "no bag has instances": (0, 0),
}


def _mask(rows: int, first: int, device: str) -> Tensor:
    """Every third key, and all keys of the first bag, are masked."""
    mask = torch.arange(rows, device=device) % 3 != 1
    mask[:first] = False
    return mask


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

    def alone(self, bag: int) -> Sample:
        # A bag without keys differs from self-attention.
        kv_sizes = self.kv_sizes or self.sizes
        return replace(self, sizes=self.sizes[bag : bag + 1], kv_sizes=kv_sizes[bag : bag + 1], of=(self, bag))

    def bounds(self, kind: str, bag: int) -> tuple[int, int]:
        if kind != "keys":
            return super().bounds(kind, bag)
        sizes = self.kv_sizes or self.sizes
        start = sum(sizes[:bag])
        return start, start + sizes[bag]

    def structure(self, device: str) -> dict[str, Any]:
        """Positions lie on a lattice; the second query has none."""
        if self.of is not None:
            pack, bag = self.of
            whole = pack.structure(device)
            cut = {name: Segments.from_sizes(s, device) for name, s in self._cuts().items()}
            rows, keys = (slice(*pack.bounds(kind, bag)) for kind in ("rows", "keys"))
            parts = {"mask": keys, "coords": rows, "kv_coords": keys}
            return cut | {name: whole[name][part] for name, part in parts.items() if name in whole}
        found: dict[str, Any] = {name: Segments.from_sizes(s, device) for name, s in self._cuts().items()}
        rows, keys = (cut.num_instances for cut in found.values())
        if self.masked:
            found["mask"] = _mask(keys, self._cuts()["kv_segments"][0], device)
        if self.bias:
            generator = torch.Generator().manual_seed(2)
            coords, kv_coords = (torch.randint(0, 30, (n, 2), generator=generator).float() for n in (rows, keys))
            coords[1:2] = float("nan")
            found |= {"coords": coords.to(device), "kv_coords": (kv_coords if self.kv_sizes else coords).to(device)}
        return found

    def rounding(self, dtype: torch.dtype) -> float:
        """Backward takes the weights from exp(S - L), L the logsumexp, for scores of variance 1 about log(keys) + 1/2.

        Rounding S and L, in float32 at least, to eps |L| errs by as much in all weights of a row: so does its gradient.
        """
        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        logsumexp = 0.5 + math.log(max(1, *self._cuts()["kv_segments"]))
        return max(super().rounding(dtype), (1 + logsumexp) * torch.finfo(accumulated).eps)

    def _cuts(self) -> dict[str, tuple[int, ...]]:
        return {"segments": self.sizes, "kv_segments": self.kv_sizes or self.sizes}

    def apply(self, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], impl: str | None) -> Any:
        q, k, v, *weights = tensors.values()
        options = dict(structure)
        if weights:
            options["bias"] = self.make_bias(options.pop("coords"), options.pop("kv_coords"), weights[0])
        return ops.masked_attention(q, k, v, **options, **self.options, impl=impl)

    def make_bias(self, coords: Tensor, kv_coords: Tensor, weights: Tensor) -> AttentionBias:
        if self.bias == "distance":
            return DistanceBias(coords / 8, weights, kv_coords / 8)
        mode, method = self.bias.split()
        return RelativePositionBias(coords * 256, weights, mode, method, unit=256, kv_coords=kv_coords * 256)


@dataclass(frozen=True)
class ClassTokenSample(Sample):
    """A call of ``class_token_attention``: tensors q_cls and k."""

    masked: bool = False

    def structure(self, device: str) -> dict[str, Any]:
        found = super().structure(device)
        if self.masked:
            pack, bag = self.of or (self, 0)
            mask = _mask(sum(pack.sizes), pack.sizes[0], device)
            found["mask"] = mask if self.of is None else mask[slice(*pack.bounds("rows", bag))]
        return found

    def apply(self, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], impl: str | None) -> Any:
        return ops.class_token_attention(tensors["q_cls"], tensors["k"], **structure, impl=impl)


def _maker(shapes: dict[str, tuple[int, ...]], saturated: bool = False) -> Callable[..., dict[str, Tensor]]:
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        made = {n: torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        if "slopes" in made:  # the nearer, the more attention
            made["slopes"] = made["slopes"].abs()
        if saturated:
            # Integers, so that scores are exact in every precision: near 1e4, rounding would decide between close ones.
            made = {name: (3 * value).round() * (256 if name == "q_cls" else 1) for name, value in made.items()}
        return made

    return make


def _attention(
    name: str, sizes: str = "several", heads: int = 2, dim: int = 12, width: int = 12,
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
    cuts = {"q": "rows", "k": "keys", "v": "keys", "output 0": "rows"}
    make = _maker(shapes)
    return AttentionSample("masked_attention", name, cut, make, options, True, kv_sizes, masked, bias, cut=cuts)


def _class_token(name: str, sizes: str, masked: bool = False, saturated: bool = False) -> ClassTokenSample:
    cut, dim = _SIZES[sizes], 16 if saturated else 10  # a scale of 1 / 4 is exact
    make = _maker({"q_cls": (len(cut), 3, dim), "k": (sum(cut), 3, dim)}, saturated)
    cuts = {"q_cls": "bags", "k": "rows", "output 0": "rows"}
    return ClassTokenSample("class_token_attention", name, cut, make, {}, True, masked, cut=cuts)


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
    _class_token("scores at 1e4", "several", saturated=True),
]
