"""Nystrom attention over the bags of a pack: attention of every row to every row, through a few landmarks, in O(T M).

    out = softmax(q kl^T) pinv(softmax(ql kl^T)) softmax(ql k^T) v

from right to left: ``gather`` (the third factor times v) and ``spread`` (the first factor times what the middle leaves)
stream over rows and keep no T x M matrix; the middle is in :mod:`bigbag.ops.pseudo_inverse`. The three are custom
operators that take ``offsets`` and ``counts`` alone; landmarks stand in (B, H, M, d) with zeros where a bag has fewer
than M.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops import pseudo_inverse
from bigbag.ops.custom import CustomOp, launcher
from bigbag.ops.distributed import all_max, all_sum
from bigbag.ops.once import once_differentiable
from bigbag.ops.registry import FLOATING, HALF, Operator, choose
from bigbag.ops.rows import take_rows
from bigbag.segments import on_device

_DTYPES = {"triton": (*HALF, torch.float32), "cpu": FLOATING, "reference": FLOATING}
_MODULES = {"cpu": "bigbag.kernels.cpu.nystrom", "triton": "bigbag.kernels.gpu.nystrom"}


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    num_landmarks: int = 256,
    num_iterations: int = 6,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Nystrom approximation of the self-attention inside each bag, head by head.

        out = softmax(s q kl^T) pinv(softmax(s ql kl^T)) softmax(s ql k^T) v

    Landmarks: a bag of N instances has m = min(num_landmarks, N), the means ql, kl of q, k over m contiguous groups;
    group i is rows floor(i N / m) to floor((i + 1) N / m). So nothing is padded, and a bag gives the same alone or
    packed. (torchmil pads with zero rows in front up to a multiple of ``num_landmarks``, which then count as
    instances; where N is a multiple the two agree.) The pseudo-inverse is ``num_iterations`` steps of Razavi et al.
    2014 from A^T / (max row sum * max column sum), both maxima over the heads of the bag, as torchmil does for a
    batch of one.

    Accumulation and landmarks are float32 (float64 for float64) also for 16-bit inputs: the pseudo-inverse magnifies
    rounding by up to (13 / 4) ** num_iterations. On CPUs with AVX-512 BF16, factors of bfloat16 inputs' products are
    rounded where that shows no more than the rounding of the inputs does (``kernels/cpu/fused_nystrom.py``). Not twice
    differentiable, except ``impl="reference"``.

    FLOPs: T H m (4 d + 4 dv) forward, T H m (12 d + 8 dv) backward, and per bag 8 H m^3 (n - 1) and 24 H m^3 (n - 1)
    for n iterations. (The product from left to right, as torchmil has it, costs 2 T H m^2 more forward and 4 T H m^2
    backward.) Bytes: q, k, v read twice forward and once more backward. Kept for backward: q, k, v, 2 T H numbers and
    landmarks; working memory O(T H d) for one gradient, a constant number of chunks, and the m x m matrices of one
    bag. Where ranks share the bags, landmarks and what they gather are added up over the ranks, B H m (2 d + dv)
    numbers forward and as many backward, and the middle is computed on every rank.

    Args:
        q, k: (T, H, d) floating.
        v: (T, H, dv), of the dtype of q.
        segments: how the T rows are cut into bags.
        num_landmarks: most landmarks per bag.
        num_iterations: steps of the pseudo-inverse.
        scale: s; None is d ** -0.5.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (T, H, dv) in the dtype of q.

    Raises:
        ValueError: shapes or dtypes that do not fit, an ``impl`` that can't run.

    Xiong et al., Nystromformer: a Nystrom-based algorithm for approximating self-attention, AAAI 2021 (arXiv
    2102.03902).
    """
    _check("nystrom_attention", q, k, v, segments, num_landmarks, num_iterations)
    chosen = _choose(impl, q, segments)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return _reference(q, k, v, segments, num_landmarks, num_iterations, scale)
    landmarks = _Landmarks(segments, num_landmarks)
    with torch.autocast(q.device.type, enabled=False):
        ql, kl = landmarks.means(q, chosen) * scale, landmarks.means(k, chosen)
        gathered, _ = landmarks.gather(ql, k, v, chosen)
        middle = pseudo_inverse.inverse_times(ql, kl, gathered, landmarks.counts, landmarks.groups, num_iterations)
        out, _ = _OPS["spread", chosen](q, kl * scale, middle, segments.offsets, landmarks.counts)
    return out


@torch.no_grad()
def nystrom_class_token_attention(
    q: Tensor,
    k: Tensor,
    segments: Segments,
    *,
    token: int = 0,
    num_landmarks: int = 256,
    num_iterations: int = 6,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """One row of the attention matrix of :func:`nystrom_attention` per bag and head: that of its class token.

        a[t, h] = (softmax(s q_c kl^T) pinv(softmax(s ql kl^T)) softmax(s ql k^T))[t],   c the token's row in the bag
        of t

    The row sums to about one, but entries may be negative. Without gradient. FLOPs: 4 T H m d, bytes: q once, k three
    times.

    Args:
        token: row of the class token in each bag; negative counts from the bag's end.
        q, k, segments, num_landmarks, num_iterations, scale, impl: as in :func:`nystrom_attention`.

    Returns:
        (T, H) float32 (float64 for float64).

    Raises:
        ValueError: as :func:`nystrom_attention`; a bag with instances that has no row ``token``.
    """
    _check("nystrom_class_token_attention", q, k, k, segments, num_landmarks, num_iterations)
    short = [size for size in segments.totals if size and not -size <= token < size]
    if short:
        raise ValueError(f"nystrom_class_token_attention: a bag of {short[0]} instances has no row token={token}")
    chosen = _choose(impl, q, segments)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if chosen == "reference":
        found = [q[:0, :, 0].to(_acc(q.dtype))]
        with torch.autocast(q.device.type, enabled=False):
            for start, end in _bounds(segments):
                f1, z, f3 = _reference_factors(q[start:end], k[start:end], num_landmarks, num_iterations, scale)
                found.append((f1[:, token, None] @ z @ f3)[:, 0].t())
        return torch.cat(found)
    landmarks = _Landmarks(segments, num_landmarks)
    with torch.autocast(q.device.type, enabled=False):
        ql, kl = landmarks.means(q, chosen) * scale, landmarks.means(k, chosen)
        _, norms = landmarks.gather(ql, k, k.new_zeros(1, 1, 1).expand(*k.shape[:2], 1), chosen)
        places = [segments.place(bag, token) for bag in range(segments.num_bags)]
        tokens = take_rows(q.flatten(1), on_device(places, q.device), segments)
        tokens = tokens.view(-1, *q.shape[1:]).to(ql.dtype).unsqueeze(2)
        valid = torch.arange(ql.shape[2], device=q.device) < landmarks.counts[:, None]
        scores = (tokens * scale @ kl.mT).masked_fill(~valid[:, None, None], torch.finfo(ql.dtype).min)
        first = scores.softmax(3) * valid[:, None, None]
        weights = torch.zeros_like(first)
        for batch, size in pseudo_inverse.batches(ql.shape[1], ql.shape[2], landmarks.groups):
            index = on_device(batch, q.device)
            a = pseudo_inverse.landmark_softmax(ql[index, :, :size], kl[index, :, :size], landmarks.counts[index])
            z = pseudo_inverse.initial_inverse(a)[0]
            row = first[index, :, :, :size].mT
            weights[index, :, :, :size] = pseudo_inverse.times(a.mT, z.mT, row, num_iterations).mT
        weigh = importlib.import_module(_MODULES[chosen]).weigh
        return weigh(ql, k, norms, weights[:, :, 0], segments.offsets, landmarks.counts)


def _choose(impl: str | None, x: Tensor, segments: Segments) -> str:
    chosen = choose("nystrom_attention", _DTYPES, impl, x.device.type, x.dtype)
    if chosen == "reference" and segments.parts is not None:
        raise ValueError(
            "nystrom_attention: the reference takes whole bags, but ranks share these; choose another impl"
        )
    return chosen


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bounds(segments: Segments) -> list[tuple[int, int]]:
    return [(start, end) for start, end in zip(segments.starts, segments.starts[1:]) if end > start]


def _reference(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, num_landmarks: int, num_iterations: int, scale: float
) -> Tensor:
    """The definition, bag by bag."""
    # Without rows, an empty sum keeps its place in the graph.
    outs = [v[:0].to(_acc(v.dtype)) + q[:0].sum() + k[:0].sum()]
    for start, end in _bounds(segments):
        f1, z, f3 = _reference_factors(q[start:end], k[start:end], num_landmarks, num_iterations, scale)
        outs.append((f1 @ (z @ (f3 @ v[start:end].to(f3.dtype).transpose(0, 1)))).transpose(0, 1))
    return torch.cat(outs).to(q.dtype)


def _reference_factors(
    q: Tensor, k: Tensor, num_landmarks: int, num_iterations: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The three factors (H, N, m), (H, m, m), (H, m, N) of one bag, dense, from its q and k (N, H, d)."""
    size = q.shape[0]
    q, k = (x.to(_acc(x.dtype)).transpose(0, 1) for x in (q, k))
    m = min(num_landmarks, size)
    cuts = [i * size // m for i in range(m + 1)]
    ql, kl = (torch.stack([x[:, s:e].mean(1) for s, e in zip(cuts, cuts[1:])], 1) for x in (q, k))
    f1, a, f3 = ((left @ right.mT * scale).softmax(2) for left, right in ((q, kl), (ql, kl), (ql, k)))
    z = a.mT / (a.sum(2).max() * a.sum(1).max())
    eye = torch.eye(m, dtype=a.dtype, device=a.device)
    for _ in range(num_iterations):
        p = a @ z
        z = z @ (13 * eye - p @ (15 * eye - p @ (7 * eye - p))) / 4
    return f1, z, f3


class _Landmarks:
    """Where the landmarks of a pack lie.

    Attributes:
        sizes: (B, M) rows of each, those on other ranks included.
        counts: (B,) landmarks of each bag, on the device.
        groups: the same on the host, or M for all while tracing: a compiled graph must not depend on how a pack is cut.
    """

    def __init__(self, segments: Segments, num_landmarks: int) -> None:
        tracing = torch.compiler.is_compiling()
        self.segments = segments
        self.most = num_landmarks if tracing else max(1, min(num_landmarks, max(segments.totals, default=1)))
        offsets, sizes = segments.offsets, segments.bag_sizes
        self.counts = sizes.clamp_max(self.most)
        group = torch.minimum(torch.arange(self.most + 1, device=offsets.device), self.counts[:, None])
        bounds = group * sizes[:, None] // self.counts.clamp_min(1)[:, None]
        self.sizes = bounds.diff(dim=1)
        if segments.parts is not None:  # of the whole bag; here are the rows of this rank's part
            before = on_device(segments.parts.before, offsets.device)[:, None]
            bounds = torch.minimum((bounds - before).clamp_min(0), offsets.diff()[:, None])
        self.bounds = torch.cat([(offsets[:-1, None] + bounds[:, :-1]).flatten(), offsets[-1:]])
        if tracing:
            self.groups = torch.full((sizes.shape[0],), self.most, device="cpu")
        else:
            self.groups = torch.tensor([min(size, self.most) for size in segments.totals], dtype=torch.int64)

    def means(self, x: Tensor, impl: str) -> Tensor:
        """(T, H, d) -> (B, H, M, d) in the accumulation dtype."""
        total = getattr(torch.ops.bigbag, f"segment_sum_rows_{impl}")(x.flatten(1), self.bounds)
        if self.segments.parts is not None:
            total = all_sum(total, self.segments.parts)
        mean = total / self.sizes.flatten().clamp_min(1).to(total.dtype)[:, None]
        return mean.view(-1, self.most, *x.shape[1:]).transpose(1, 2)

    def gather(self, queries: Tensor, k: Tensor, v: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        """``softmax(queries k^T) v`` (B, H, M, dv), and maxima and sums of exponentials, over the rows of each bag."""
        if self.segments.parts is not None:
            return _GatherInParts.apply(queries, k, v, self.segments, self.counts, impl)
        return _OPS["gather", impl](queries, k, v, self.segments.offsets, self.counts)


class _GatherInParts(torch.autograd.Function):
    """``gather`` over rows of which each rank has some: B H M (dv + 2) numbers added up over the ranks, and B H M dv
    backward, where each rank takes the maxima and sums of all."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, k: Tensor, v: Tensor, segments: Segments, counts: Tensor, impl: str
    ) -> tuple[Tensor, Tensor]:
        parts = segments.parts
        assert parts is not None
        y, (own, total) = _OPS["gather", impl](queries, k, v, segments.offsets, counts)
        filled = (segments.offsets.diff() > 0)[:, None, None] & (total > 0)
        top = all_max(torch.where(filled, own, -torch.inf), parts)
        top = torch.where(top == -torch.inf, 0, top)
        total = torch.where(filled, total * (own - top).exp(), 0)
        sums = all_sum(torch.cat([y * total[..., None], total[..., None]], 3), parts)
        total = torch.where(sums[..., -1] > 0, sums[..., -1], 1)
        y, norms = sums[..., :-1] / total[..., None], torch.stack([top, total])
        ctx.parts, ctx.impl = parts, impl
        ctx.mark_non_differentiable(norms)
        ctx.save_for_backward(queries, k, v, y, norms, segments.offsets, counts)
        return y, norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        backward = getattr(torch.ops.bigbag, f"nystrom_gather_backward_{ctx.impl}")
        return *backward(all_sum(grad, ctx.parts), *ctx.saved_tensors), None, None, None


def _check(
    name: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments, num_landmarks: int, num_iterations: int
) -> None:
    if q.dim() != 3 or not q.is_floating_point() or k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"{name}: expected floating q, k (T, H, d) and v (T, H, dv), got {shapes}, {q.dtype}")
    for other in (k, v):
        if other.dtype != q.dtype or other.device != q.device:
            raise ValueError(f"{name}: q is {q.dtype} on {q.device}, but k or v is {other.dtype} on {other.device}")
    if not torch.compiler.is_compiling() and q.shape[0] != segments.num_instances:
        raise ValueError(f"{name}: q has {q.shape[0]} rows, but segments has {segments.num_instances} instances")
    if num_landmarks < 1 or num_iterations < 0:
        got = f"{num_landmarks}, {num_iterations}"
        raise ValueError(f"{name}: expected num_landmarks >= 1 and num_iterations >= 0, got {got}")


_OPS: dict[tuple[str, str], Any] = {}


def _register(impl: str, module: str) -> None:
    """Custom operators ``bigbag::nystrom_{spread,gather}{,_backward}_{impl}`` around the launchers of ``module``."""

    def define(function: str, schema: str) -> CustomOp:
        return CustomOp(f"nystrom_{function}_{impl}", schema, launcher(module, function))

    spread = define(
        "spread", "(Tensor q, Tensor keys, Tensor values, Tensor offsets, Tensor counts) -> (Tensor, Tensor)"
    )
    gather = define("gather", "(Tensor queries, Tensor k, Tensor v, Tensor offsets, Tensor counts) -> (Tensor, Tensor)")
    three, cut = "(Tensor, Tensor, Tensor)", "Tensor offsets, Tensor counts"
    spread_backward = define(
        "spread_backward", f"(Tensor grad, Tensor q, Tensor keys, Tensor values, Tensor norms, {cut}) -> {three}"
    )
    gather_backward = define(
        "gather_backward",
        f"(Tensor grad, Tensor queries, Tensor k, Tensor v, Tensor y, Tensor norms, {cut}) -> {three}",
    )
    _OPS["spread", impl], _OPS["gather", impl] = spread, gather

    def like(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)

    @spread.register_fake
    def _(q: Tensor, keys: Tensor, values: Tensor, *cut: Tensor) -> Any:
        return q.new_empty(*q.shape[:2], values.shape[3]), keys.new_empty(2, *q.shape[:2])

    @gather.register_fake
    def _(queries: Tensor, k: Tensor, v: Tensor, *cut: Tensor) -> Any:
        return queries.new_empty(*queries.shape[:3], v.shape[2]), queries.new_empty(2, *queries.shape[:3])

    spread_backward.register_fake(lambda grad, q, keys, values, *_: like(q, keys, values))
    gather_backward.register_fake(lambda grad, queries, k, v, *_: like(queries, k, v))

    def setup_spread(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:3], output[1], *inputs[3:])

    def setup_gather(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])

    spread.register_autograd(
        lambda ctx, grad, _: (*spread_backward(grad, *ctx.saved_tensors), None, None), setup_context=setup_spread
    )
    gather.register_autograd(
        lambda ctx, grad, _: (*gather_backward(grad, *ctx.saved_tensors), None, None), setup_context=setup_gather
    )


for _impl, _module in _MODULES.items():
    _register(_impl, _module)

OPERATORS = (Operator("nystrom_attention", nystrom_attention, _DTYPES),)
