"""Biases on attention scores that depend on where two instances lie, and that are never written down as a matrix.

    DistanceBias            B[h, i, j] = -slope_h |c_i - c_j|
    RelativePositionBias    B[h, i, j] = table[h, bucket(c_i - c_j)]                    mode "bias"
                            B[h, i, j] = scale q[i, h] . table[h, :, bucket(c_i - c_j)]  mode "contextual"

For kernels every bias is ``KernelBias``: a small table of weights (R, H, C), R = 1 or one row per query, and what
finds the column of a pair. The bucket functions of iRPE are monotone steps, so kernels count thresholds instead of
taking logarithms: all implementations agree on the bucket, except where rounding of non-integer positions decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigbag.segments import on_device

METHODS = ("product", "cross", "euclidean", "quant")
MODES = ("bias", "contextual")


@dataclass(frozen=True)
class DistanceBias:
    """``-slope_h |c_i - c_j|``: the nearer, the more attention. Instances without a place (NaN) get none.

    Attributes:
        coords: (Tq, 2) positions of the queries; a row of NaN is a token without a place, like a class token.
        slopes: (H,) per unit of ``coords``; gradients flow to them.
        kv_coords: (Tk, 2) positions of the keys; None: those of the queries.

    Press et al., Train short, test long: attention with linear biases, ICLR 2022 (there in one dimension).
    """

    coords: Tensor
    slopes: Tensor
    kv_coords: Tensor | None = None


@dataclass(frozen=True)
class RelativePositionBias:
    """Image relative position encoding (iRPE) on the keys, in the forms "bias" and "contextual".

    With S = 2 floor(beta) + 1, the number of ``buckets`` is S^2 for "product" (row and column offset together), S for
    "euclidean" (rounded distance) and "quant" (squared distance), and (2, S) for "cross" (one table for rows, one for
    columns, added). One column more is the bucket of pairs in which a token has no place; without it they get 0.

    Attributes:
        coords: (Tq, 2) positions of the queries (row, column); a row of NaN is a token without a place.
        table: (H, buckets) for mode "bias", (H, d, buckets) for "contextual"; H may be 1: shared by the heads.
        mode: "bias", or "contextual" (the scaled query times the encoding of the bucket).
        method: "product", "cross", "euclidean" or "quant".
        alpha: offset (in units) up to which every step has its own bucket.
        beta: the highest bucket; beyond alpha, buckets widen logarithmically.
        gamma: offset (in units) where beta is reached.
        unit: length of one step of the grid in ``coords``, such as the patch size in pixels.
        kv_coords: (Tk, 2) positions of the keys; None: those of the queries.

    Wu et al., Rethinking and improving relative position encoding for vision transformer, ICCV 2021, eq. 18-24.
    """

    coords: Tensor
    table: Tensor
    mode: str = "bias"
    method: str = "product"
    alpha: float = 1.9
    beta: float = 3.8
    gamma: float = 15.2
    unit: float = 1.0
    kv_coords: Tensor | None = None

    @property
    def steps(self) -> int:
        """The highest bucket of an offset along one direction."""
        return math.floor(self.beta)


AttentionBias = DistanceBias | RelativePositionBias


class KernelBias(NamedTuple):
    """A bias as kernels take it; all tensors None and ``kind`` "" where there is none.

    Attributes:
        coords: (Tq, 2) float32 in units; NaN: no place.
        kv_coords: (Tk, 2) float32.
        weights: (1, H, C) or (Tq, H, C) in the accumulation dtype: slopes (C = 1), or what each bucket adds.
        kind: "", "distance", "product" (column = bucket of rows * S + bucket of columns, last one for no place) or
            "radial" (column = bucket of the squared distance).
        thresholds: ascending; the bucket of an offset is the number of thresholds that it reaches.
    """

    coords: Tensor | None = None
    kv_coords: Tensor | None = None
    weights: Tensor | None = None
    kind: str = ""
    thresholds: tuple[float, ...] = ()


def num_buckets(method: str, beta: float) -> tuple[int, ...]:
    """The last dimensions of a :class:`RelativePositionBias` table, without the bucket of tokens that have no place."""
    side = 2 * math.floor(beta) + 1
    return {"product": (side**2,), "cross": (2, side)}.get(method, (side,))


def piecewise_index(offset: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """Bucket of an offset, int64 in [-floor(beta), floor(beta)] (eq. 18 of the paper).

    round(x)                                                              where |x| <= alpha
    sign(x) min(floor(beta), round(alpha + log(|x| / alpha) / log(gamma / alpha) (beta - alpha)))   elsewhere
    """
    size = offset.abs()
    far = alpha + torch.log((size / alpha).clamp_min(1)) / math.log(gamma / alpha) * (beta - alpha)
    index = torch.where(size <= alpha, size.round(), far.round()).clamp_max(math.floor(beta))
    return (offset.sign() * index).long()


def thresholds(bias: RelativePositionBias) -> tuple[float, ...]:
    """The smallest offsets (squared distances, for the radial methods) that reach bucket 1, 2, ..., floor(beta)."""

    def reach(value: float, even: bool) -> float:
        # Halves are rounded to even, so that an odd bucket begins just above its half.
        return value if even else float(torch.nextafter(torch.tensor(value), torch.tensor(math.inf)))

    found = []
    for index in range(1, bias.steps + 1):
        half = index - 0.5
        if half <= bias.alpha:
            start = reach(half, index % 2 == 0)
        else:
            start = bias.alpha * (bias.gamma / bias.alpha) ** ((half - bias.alpha) / (bias.beta - bias.alpha))
        if bias.method == "euclidean":
            # The distance is rounded first: it must reach the integer at or above the start.
            distance = math.ceil(start)
            start = reach((distance - 0.5) ** 2, distance % 2 == 0)
        found.append(start)
    return tuple(found)


def buckets(bias: RelativePositionBias, rows: Any = slice(None), columns: Any = slice(None)) -> Tensor:
    """(rows, columns) int64: the bucket of each pair, as the paper defines it; "cross" as "product"."""
    c_q, c_k = _units(bias, bias.coords)[rows], _units(bias, _keys(bias))[columns]
    offset = c_q[:, None] - c_k[None]
    steps, side = bias.steps, 2 * bias.steps + 1
    cut = (bias.alpha, bias.beta, bias.gamma)
    nowhere = offset.isnan().any(-1)
    offset = offset.nan_to_num()
    if bias.method in ("product", "cross"):
        index = (piecewise_index(offset, *cut) + steps) @ on_device([side, 1], offset.device)
    else:
        square = offset.square().sum(-1)
        index = piecewise_index(square.sqrt().round() if bias.method == "euclidean" else square, *cut) + steps
    return torch.where(nowhere, _columns(bias) - 1, index)


def matrix(bias: AttentionBias, q: Tensor, scale: float, rows: Any = slice(None), columns: Any = slice(None)) -> Tensor:
    """(H, rows, columns): the bias itself, of ``q[rows]`` towards keys ``columns``; the definition, differentiable."""
    if isinstance(bias, DistanceBias):
        offset = bias.coords[rows].to(q.dtype)[:, None] - _keys(bias)[columns].to(q.dtype)[None]
        distance = offset.square().sum(-1).nan_to_num().sqrt()
        return -bias.slopes.to(q.dtype)[:, None, None] * distance
    index = buckets(bias, rows, columns)
    weights = full_table(bias, q.shape[1]).to(q.dtype)
    if bias.mode == "bias":
        return weights[:, index]
    by_query = torch.einsum("ihd,hdc->hic", q[rows], weights) * scale
    return by_query.gather(2, index.expand(q.shape[1], *index.shape))


def for_kernels(bias: AttentionBias | None, q: Tensor, scale: float, acc: torch.dtype) -> KernelBias:
    """``bias`` as kernels take it; what is dense and small (q times a table) is done here, by autograd."""
    if bias is None:
        return KernelBias()
    if isinstance(bias, DistanceBias):
        coords, keys = bias.coords.detach().float(), _keys(bias).detach().float()
        return KernelBias(coords.contiguous(), keys.contiguous(), bias.slopes.to(acc)[None, :, None], "distance")
    weights = full_table(bias, q.shape[1]).to(acc)
    if bias.mode == "contextual":
        with torch.autocast(q.device.type, enabled=False):
            weights = torch.einsum("ihd,hdc->ihc", q.to(acc), weights) * scale
    else:
        weights = weights[None]
    kind = "product" if bias.method in ("product", "cross") else "radial"
    coords, keys = (_units(bias, c).detach().float().contiguous() for c in (bias.coords, _keys(bias)))
    return KernelBias(coords, keys, weights.contiguous(), kind, thresholds(bias))


def check(bias: AttentionBias, num_queries: int, num_keys: int, heads: int, dim: int) -> None:
    """Raises ValueError where ``bias`` does not fit q (num_queries, heads, dim) and num_keys keys."""
    places = {"coords": (bias.coords, num_queries), "kv_coords": (_keys(bias), num_keys)}
    for name, (value, count) in places.items():
        if tuple(value.shape) != (count, 2):
            raise ValueError(f"masked_attention: bias.{name} has shape {tuple(value.shape)}, expected {(count, 2)}")
    if isinstance(bias, DistanceBias):
        if tuple(bias.slopes.shape) != (heads,):
            raise ValueError(f"masked_attention: bias.slopes has shape {tuple(bias.slopes.shape)}, expected {(heads,)}")
        return
    if bias.mode not in MODES or bias.method not in METHODS:
        raise ValueError(
            f"masked_attention: bias has mode {bias.mode!r} and method {bias.method!r}, "
            f"expected one of {', '.join(MODES)} and one of {', '.join(METHODS)}"
        )
    if not (0 < bias.alpha < bias.beta and bias.alpha < bias.gamma and bias.beta >= 1 and bias.unit > 0):
        raise ValueError(
            "masked_attention: bias needs 0 < alpha < beta, alpha < gamma, beta >= 1 and unit > 0, got "
            f"alpha={bias.alpha}, beta={bias.beta}, gamma={bias.gamma}, unit={bias.unit}"
        )
    *front, last = num_buckets(bias.method, bias.beta)
    middle = (dim, *front) if bias.mode == "contextual" else tuple(front)
    wanted = ((*middle, last), (*middle, last + 1))
    if bias.table.dim() < 2 or bias.table.shape[0] not in (1, heads) or tuple(bias.table.shape[1:]) not in wanted:
        expected = f"({heads} or 1, {', '.join(str(n) for n in (*middle, last))}), or one bucket more"
        raise ValueError(f"masked_attention: bias.table has shape {tuple(bias.table.shape)}, expected {expected}")


def _keys(bias: AttentionBias) -> Tensor:
    return bias.coords if bias.kv_coords is None else bias.kv_coords


def _units(bias: RelativePositionBias, coords: Tensor) -> Tensor:
    """Positions in steps of the grid; multiples of the unit become integers exactly."""
    return (coords if coords.is_floating_point() else coords.float()) / bias.unit


def _columns(bias: RelativePositionBias) -> int:
    """Columns of the table that kernels see, the bucket of tokens without a place included."""
    side = 2 * bias.steps + 1
    return (side**2 if bias.method in ("product", "cross") else side) + 1


def full_table(bias: RelativePositionBias, heads: int) -> Tensor:
    """(H, C) or (H, d, C): the table for all heads, "cross" written out as "product", with the last column."""
    table = bias.table
    side = 2 * bias.steps + 1
    if table.shape[-1] == num_buckets(bias.method, bias.beta)[-1]:
        table = torch.nn.functional.pad(table, (0, 1))
    if bias.method == "cross":
        rows, columns = table.unbind(-2)
        pairs = rows[..., :side, None] + columns[..., None, :side]
        table = torch.cat([pairs.flatten(-2), rows[..., side:] + columns[..., side:]], -1)
    return table.expand(heads, *table.shape[1:])
