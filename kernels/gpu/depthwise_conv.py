"""Depth-wise convolution of bags laid out as grids, on the GPU: see kernels/cpu/depthwise_conv for the formulas.

``_convolve``: one program owns BLOCK_T rows of one bag and BLOCK_C channels, and takes one tap after the other; of x
what the rows of a tap share comes from the caches. ``_grad_taps``: one program owns a split of a bag's rows, a line of
taps and BLOCK_C channels; the splits are added afterwards. Beside the taps stands the gradient of the bias. No atomics.

FLOPs: 2 T C kh kw forward, as many for each gradient. Bytes: y once, x kh kw times (the gradient of the taps: x as
often, dy kh times), from memory once each where kh lines of BLOCK_C channels stay in the second cache. Working memory:
kh kw C floats per SPLIT_ROWS rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bigbag.kernels.gpu.segments import Splits, row_blocks

INTERPRETED = triton.knobs.runtime.interpret
SPLIT_ROWS = 2048


@triton.jit
def _grid(offsets, widths, bag):
    """First row, height and width of a bag's grid; what is none has height 0 and width 1."""
    first, end, width = tl.load(offsets + bag), tl.load(offsets + bag + 1), tl.load(widths + bag)
    height = tl.where(width == 0, 0, (end - first) // tl.maximum(width, 1))
    return first, height.to(tl.int32), tl.maximum(width, 1).to(tl.int32)


@triton.jit
def _load_shifted(x, rows, lines, columns, inside, channels, down, right, height, width, C):
    """Rows of x as many lines and columns away, zeros beyond the grid, float32."""
    line, column = lines + down, columns + right
    found = inside & (line >= 0) & (line < height) & (column >= 0) & (column < width)
    place = (rows + (down * width + right))[:, None] * C + channels[None, :]
    return tl.load(x + place, mask=found[:, None] & (channels < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _convolve(
    x, taps, bias, bags, starts, offsets, widths, out, C, KH, KW, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    bag = tl.load(bags + tl.program_id(0))
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.load(starts + tl.program_id(0)) + tl.arange(0, BLOCK_T).to(tl.int64)
    inside = rows < tl.load(offsets + bag + 1)
    first, height, width = _grid(offsets, widths, bag)
    place = (rows - first).to(tl.int32)
    lines, columns = place // width, place % width
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32) + tl.load(bias + channels, mask=channels < C, other=0.0)[None, :]
    for u in range(KH):
        for v in range(KW):
            tap = tl.load(taps + (u * KW + v) * C + channels, mask=channels < C, other=0.0)
            value = _load_shifted(x, rows, lines, columns, inside, channels, u - KH // 2, v - KW // 2, height, width, C)
            total += tap[None, :] * value
    stored = inside[:, None] & (channels < C)[None, :]
    total = total.to(out.dtype.element_ty)
    if height == 0:
        total = tl.load(x + rows[:, None] * C + channels[None, :], mask=stored, other=0.0)
    tl.store(out + rows[:, None] * C + channels[None, :], total, mask=stored)


@triton.jit
def _grad_taps(
    x, grad, bags, starts, ends, offsets, widths, parts, C, KH, KW,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    split, u = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channels = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, end = tl.load(starts + split), tl.load(ends + split)
    first, height, width = _grid(offsets, widths, tl.load(bags + split))
    across = tl.arange(0, BLOCK_V)[:, None]
    total = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
    of_bias = tl.zeros([BLOCK_C], tl.float32)
    for begin in range(start, end, BLOCK_T):
        rows = begin + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = rows < end
        place = (rows - first).to(tl.int32)
        lines, columns = place // width, place % width
        slope = _load_shifted(grad, rows, lines, columns, inside, channels, 0, 0, height, width, C)
        of_bias += tl.sum(slope, 0)
        for v in range(KW):
            value = _load_shifted(x, rows, lines, columns, inside, channels, u - KH // 2, v - KW // 2, height, width, C)
            total += tl.where(across == v, tl.sum(slope * value, 0)[None, :], 0.0)
    parts += split * (KH * KW + 1) * C
    place = (u * KW + across) * C + channels[None, :]
    tl.store(parts + place, total, mask=(across < KW) & (channels < C)[None, :])
    tl.store(parts + KH * KW * C + channels, of_bias, mask=(channels < C) & (u == 0))


def _tiles(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile."""
    if INTERPRETED:  # the interpreter's cost is per operation, not per element
        return 256, triton.next_power_of_2(channels)
    return 32, min(64, triton.next_power_of_2(channels))


def forward(x: Tensor, taps: Tensor, bias: Tensor, offsets: Tensor, widths: Tensor) -> Tensor:
    """x (T, C) up to float32, taps (kh, kw, C) and bias (C,) float32 -> (T, C) like x."""
    x, taps, bias = x.contiguous(), taps.contiguous(), bias.contiguous()
    out, (high, across, channels) = x.new_empty(x.shape), taps.shape
    if x.numel():
        rows, columns = _tiles(channels)
        bags, starts = row_blocks(offsets, len(x), rows)
        _convolve[len(bags), triton.cdiv(channels, columns)](
            x, taps, bias, bags, starts, offsets, widths, out, channels, high, across, BLOCK_T=rows, BLOCK_C=columns
        )
    return out


def backward(
    grad: Tensor, x: Tensor, taps: Tensor, offsets: Tensor, widths: Tensor, need_x: bool, need_taps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (T, C), taps (kh, kw, C) and bias (C,), (0,) where they are not needed."""
    high, across, channels = taps.shape
    grad_x = forward(grad, taps.flip(0, 1), taps.new_zeros(channels), offsets, widths) if need_x else x.new_empty(0)
    if not need_taps:
        return grad_x, taps.new_empty(0), taps.new_empty(0)
    if not x.numel():
        return grad_x, taps.new_zeros(taps.shape), taps.new_zeros(channels)
    x, grad = x.contiguous(), grad.contiguous()
    (rows, columns), splits = _tiles(channels), Splits(offsets, len(x), SPLIT_ROWS)
    parts = taps.new_empty(splits.bound, high * across + 1, channels)
    _grad_taps[splits.bound, high, triton.cdiv(channels, columns)](
        x, grad, splits.bags, splits.starts, splits.ends, offsets, widths, parts, channels, high, across,
        BLOCK_T=rows, BLOCK_V=triton.next_power_of_2(across), BLOCK_C=columns,
    )  # fmt: skip
    total = parts.sum(0)
    return grad_x, total[:-1].view(taps.shape), total[-1].clone()
