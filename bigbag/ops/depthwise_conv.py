"""Depth-wise convolution of bags whose rows are laid out as grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops.custom import CustomOp, launcher
from bigbag.ops.registry import FLOATING, HALF, Operator, choose
from bigbag.segments import on_device

_DTYPES = {"triton": (*HALF, torch.float32), "cpu": FLOATING, "reference": FLOATING}


def depthwise_conv(
    x: Tensor,
    segments: Segments,
    widths: Sequence[int],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Each channel of a bag convolved by itself, the rows of bag b being a grid ``widths[b]`` wide, line after line.

        y[i, j, c] = bias[c] + sum_{u, v} weight[g, 0, u, v] x[i + u - kh // 2, j + v - kw // 2, c],   g = c G // C

    with zeros around the grid of each bag; as torch's ``conv2d(..., padding="same", groups=C)`` of a grid with channels
    last. The C / G channels of a group share a kernel. Rows of a bag of width 0 are no grid: they stay as they are. Of
    a bag that ranks share, each convolves the rows that it is given (:func:`bigbag.ops.join.windows` fetches them).

    Arithmetic is in float32 (float64 for float64), whatever autocast says; x is read as it is stored.

    Cost: 2 T C kh kw FLOP forward, as many for each gradient. Bytes: x and y once each way, and for the gradient of
    the weight x and that of y once more; ``triton`` reads them kh kw times, mostly from the caches. It keeps x alone.
    Working memory: kh kw C floats per 8192 (triton: 2048) rows. Not twice differentiable, except ``impl="reference"``.

    Args:
        x: (T, C) float16, bfloat16, float32 or float64.
        segments: how the T rows are cut into B bags.
        widths: columns of the grid of each bag, B integers; they divide the bag's rows.
        weight: (G, 1, kh, kw) as ``torch.nn.Conv2d`` has it; G divides C, kh and kw are odd.
        bias: (C,), or None for none.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (T, C) in the dtype of x.

    Raises:
        ValueError: shapes or widths that do not fit, kernels of even size, an ``impl`` that can't run.
    """
    _check(x, segments, widths, weight, bias)
    chosen = choose("depthwise_conv", _DTYPES, impl, x.device.type, x.dtype)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    # (kh, kw, C): a kernel's taps lie apart, its channels side by side, as those of x do.
    taps = weight.to(acc)[:, 0].permute(1, 2, 0).repeat_interleave(x.shape[1] // len(weight), 2)
    bias = taps.new_zeros(x.shape[1]) if bias is None else bias.to(acc)
    if chosen == "reference":
        return _reference(x, taps, bias, segments, widths)
    return _CONVOLVE[chosen](x, taps, bias, segments.offsets, on_device(list(widths), x.device, torch.int64))


def _check(x: Tensor, segments: Segments, widths: Sequence[int], weight: Tensor, bias: Tensor | None) -> None:
    # The number of rows is not checked while tracing: a compiled graph must not depend on how a pack is cut.
    tracing = torch.compiler.is_compiling()
    if x.dim() != 2 or (not tracing and len(x) != segments.num_instances):
        raise ValueError(f"depthwise_conv: expected x (T, C) with T as in segments, got {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        found = tuple(weight.shape)
        raise ValueError(f"depthwise_conv: expected weight (G, 1, kh, kw) with odd kh and kw, got {found}")
    if not len(weight) or x.shape[1] % len(weight):
        raise ValueError(f"depthwise_conv: {len(weight)} kernels do not divide {x.shape[1]} channels")
    if bias is not None and tuple(bias.shape) != (x.shape[1],):
        raise ValueError(f"depthwise_conv: bias has shape {tuple(bias.shape)}, expected {(x.shape[1],)}")
    bags = segments.offsets.shape[0] - 1
    if len(widths) != bags or any(width < 0 for width in widths):
        raise ValueError(f"depthwise_conv: expected {bags} widths, one per bag, that are not negative, got {widths}")
    if not tracing and any(size % width for size, width in zip(segments.sizes, widths) if width):
        raise ValueError(f"depthwise_conv: widths {widths} do not divide bags of {segments.sizes} rows")


def _reference(x: Tensor, taps: Tensor, bias: Tensor, segments: Segments, widths: Sequence[int]) -> Tensor:
    """The definition, bag by bag."""
    weight, padding = taps.permute(2, 0, 1)[:, None], (taps.shape[0] // 2, taps.shape[1] // 2)
    # The weights keep their place in the graph also where no bag has a grid.
    found = [x[:0] + 0 * (taps.sum() + bias.sum()).to(x.dtype)]
    starts = segments.starts
    for start, end, width in zip(starts, starts[1:], widths):
        if width == 0 or start == end:
            found.append(x[start:end])
            continue
        grid = x[start:end].to(taps.dtype).view(1, -1, width, x.shape[1]).permute(0, 3, 1, 2)
        with torch.autocast(x.device.type, enabled=False):
            out = F.conv2d(grid, weight, bias, padding=padding, groups=x.shape[1])
        found.append(out.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).to(x.dtype))
    return torch.cat(found)


def _register(impl: str, module: str) -> Any:
    """Custom operators ``bigbag::depthwise_conv_{impl}`` and ``..._backward`` around the launchers of ``module``."""

    def define(name: str, function: str, schema: str) -> CustomOp:
        return CustomOp(f"{name}_{impl}", schema, launcher(module, function))

    grids = "Tensor offsets, Tensor widths"
    forward = define("depthwise_conv", "forward", f"(Tensor x, Tensor taps, Tensor bias, {grids}) -> Tensor")
    backward = define(
        "depthwise_conv_backward",
        "backward",
        f"(Tensor grad, Tensor x, Tensor taps, {grids}, bool need_x, bool need_taps) -> (Tensor, Tensor, Tensor)",
    )
    forward.register_fake(lambda x, taps, bias, offsets, widths: x.new_empty(x.shape))

    @backward.register_fake
    def _(grad: Tensor, x: Tensor, taps: Tensor, offsets: Any, widths: Any, need_x: bool, need_taps: bool) -> Any:
        shapes = (taps.shape, taps.shape[2:]) if need_taps else ((0,), (0,))
        return x.new_empty(x.shape if need_x else (0,)), *(taps.new_empty(shape) for shape in shapes)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        x, taps, _, offsets, widths = inputs
        ctx.save_for_backward(x, taps, offsets, widths)

    def differentiate(ctx: Any, grad: Tensor) -> Any:
        need_x, need_taps, need_bias = ctx.needs_input_grad[:3]
        found = backward(grad, *ctx.saved_tensors, need_x, need_taps or need_bias)
        return *(value if need else None for value, need in zip(found, ctx.needs_input_grad)), None, None

    forward.register_autograd(differentiate, setup_context=setup)
    return forward


_CONVOLVE = {
    "cpu": _register("cpu", "bigbag.kernels.cpu.depthwise_conv"),
    "triton": _register("triton", "bigbag.kernels.gpu.depthwise_conv"),
}

OPERATORS = (Operator("depthwise_conv", depthwise_conv, _DTYPES),)
