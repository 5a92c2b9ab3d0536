"""Reductions of (T, C) rows over segments, on the GPU, with Triton.

    sum, max, softmax  as in kernels/cpu/segments

Segments are cut into splits of at most ``SPLIT_ROWS`` rows; one program owns one split and one block of columns, and
writes one partial row. A second kernel, one program per bag and block of columns, combines the partial rows of a bag in
order. No atomics, so two runs give the same bits. x is read once; partials
are 1 / SPLIT_ROWS of it. The splits are planned on the device from ``offsets`` alone: nothing waits for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT_ROWS = 512
PROGRAMS = 1024
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _sum_splits(x, starts, ends, out, C, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    split = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, end = tl.load(starts + split), tl.load(ends + split)
    acc = tl.zeros([BLOCK_C], tl.float32)
    for first in range(start, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = (rows < end)[:, None] & (cols < C)[None, :]
        acc += tl.sum(tl.load(x + rows[:, None] * C + cols[None, :], mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(out + split * C + cols, acc, mask=cols < C)


@triton.jit
def _combine_sums(parts, first, out, C, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, end = tl.load(first + bag), tl.load(first + bag + 1)
    acc = tl.zeros([BLOCK_C], tl.float32)
    for split in range(start, end, BLOCK_S):
        rows = split + tl.arange(0, BLOCK_S).to(tl.int64)
        inside = (rows < end)[:, None] & (cols < C)[None, :]
        acc += tl.sum(tl.load(parts + rows[:, None] * C + cols[None, :], mask=inside, other=0.0), 0)
    tl.store(out + bag * C + cols, acc, mask=cols < C)


@triton.jit
def _max_splits(
    x, rows_in, starts, ends, out, index, C, INDEXED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    # First level: x are the rows themselves. Second level (INDEXED): x are partial maxima, rows_in their rows.
    split = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, end = tl.load(starts + split), tl.load(ends + split)
    best = tl.full([BLOCK_C], -float("inf"), tl.float32)
    where = tl.full([BLOCK_C], -1, tl.int64)
    for first in range(start, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = (rows < end)[:, None] & (cols < C)[None, :]
        tile = tl.load(x + rows[:, None] * C + cols[None, :], mask=inside, other=-float("inf")).to(tl.float32)
        # A NaN wins over every number, as in torch.max.
        tile = tl.where(tile != tile, float("inf"), tile)
        top = tl.max(tile, 0)
        if INDEXED:
            ids = tl.load(rows_in + rows[:, None] * C + cols[None, :], mask=inside, other=-1)
        else:
            ids = rows[:, None] + tl.zeros([BLOCK_T, BLOCK_C], tl.int64)
        # The first row that attains the maximum, masked rows excluded.
        candidates = tl.where((tile == top[None, :]) & inside, ids, 0x7FFFFFFFFFFFFFFF)
        top_row = tl.min(candidates, 0)
        better = (where < 0) | (top > best)
        best = tl.where(better, top, best)
        where = tl.where(better, top_row, where)
    tl.store(out + split * C + cols, best, mask=cols < C)
    tl.store(index + split * C + cols, where, mask=cols < C)


@triton.jit
def _rows_of_split(offsets, bag, split, splits):
    """First and last row of one of ``splits`` equal parts of a bag's rows."""
    start, stop = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    length = tl.cdiv(stop - start, splits)
    begin = tl.minimum(start + split * length, stop)
    return begin, tl.minimum(begin + length, stop)


class Splits:
    """Bag, first and last row of each split of at most ``size`` rows, and the first split of each bag, on the device.

    There are at most T // size + B splits; those beyond the last one are empty.
    """

    def __init__(self, offsets: Tensor, num_rows: int, size: int = SPLIT_ROWS) -> None:
        num_bags = offsets.shape[0] - 1
        self.bound = num_rows // size + num_bags
        counts = (offsets.diff() + size - 1) // size
        self.first = torch.cat([offsets.new_zeros(1), counts.cumsum(0)])
        split = torch.arange(self.bound, device=offsets.device)
        bag = torch.searchsorted(self.first[1:], split, right=True).clamp_max(max(num_bags - 1, 0))
        self.bags = split if num_bags == 0 else bag
        self.ends = offsets[self.bags + 1]
        self.starts = torch.minimum(offsets[self.bags] + (split - self.first[self.bags]) * size, self.ends)
        self.ends = torch.minimum(self.starts + size, self.ends)


def _tiles(num_cols: int) -> dict[str, int]:
    if INTERPRETED:  # the interpreter's cost is per operation, not per element
        return {"BLOCK_T": 64, "BLOCK_C": triton.next_power_of_2(num_cols)}
    columns = min(128, triton.next_power_of_2(num_cols))
    return {"BLOCK_T": min(SPLIT_ROWS, 4096 // columns), "BLOCK_C": columns}


def _combine_tiles(num_cols: int) -> tuple[int, int]:
    """Splits and columns of a tile. One long bag has thousands of splits: few columns, so that many programs share
    them, and many splits, so that each has much to read at once."""
    if INTERPRETED:
        return 16, triton.next_power_of_2(num_cols)
    columns = min(32, triton.next_power_of_2(num_cols))
    return min(1024, 2048 // columns), columns


def sum_rows(x: Tensor, offsets: Tensor) -> Tensor:
    """(T, C) -> (B, C) float32."""
    x = x.contiguous()
    num_cols, num_bags = x.shape[1], offsets.shape[0] - 1
    out = x.new_empty(num_bags, num_cols, dtype=torch.float32)
    if out.numel() == 0:
        return out
    splits = Splits(offsets, x.shape[0])
    parts = x.new_empty(splits.bound, num_cols, dtype=torch.float32)
    tiles = _tiles(num_cols)
    grid = (splits.bound, triton.cdiv(num_cols, tiles["BLOCK_C"]))
    _sum_splits[grid](x, splits.starts, splits.ends, parts, num_cols, **tiles)
    block, columns = _combine_tiles(num_cols)
    blocks = triton.cdiv(num_cols, columns)
    _combine_sums[num_bags, blocks](parts, splits.first, out, num_cols, BLOCK_S=block, BLOCK_C=columns)
    return out


def max_rows(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(T, C) -> maxima (B, C) float32 and their first rows (B, C), 0 and -1 for an empty bag."""
    x = x.contiguous()
    num_cols, num_bags = x.shape[1], offsets.shape[0] - 1
    out = x.new_zeros(num_bags, num_cols, dtype=torch.float32)
    index = offsets.new_full((num_bags, num_cols), -1)
    if out.numel() == 0 or x.numel() == 0:
        return out, index
    splits = Splits(offsets, x.shape[0])
    parts = x.new_empty(splits.bound, num_cols, dtype=torch.float32)
    rows = offsets.new_empty(splits.bound, num_cols)
    tiles = _tiles(num_cols)
    grid = (splits.bound, triton.cdiv(num_cols, tiles["BLOCK_C"]))
    _max_splits[grid](x, offsets, splits.starts, splits.ends, parts, rows, num_cols, INDEXED=False, **tiles)
    block, columns = _combine_tiles(num_cols)
    _max_splits[num_bags, triton.cdiv(num_cols, columns)](
        parts, rows, splits.first[:-1], splits.first[1:], out, index, num_cols, INDEXED=True,
        BLOCK_T=block, BLOCK_C=columns,
    )  # fmt: skip
    # The kernels compare a NaN as +inf; the value itself comes from x. Empty bags stay 0.
    values = x.gather(0, index.clamp_min(0)).float()
    return torch.where(index < 0, 0.0, values), index


def row_blocks(offsets: Tensor, num_rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Bag and first row of blocks of at most ``size`` rows, none of which reaches over two bags.

    Their number depends on that of rows and bags alone, so that nothing waits for the device; blocks beyond the last
    one start at the end of their bag, or after it.
    """
    counts = (offsets.diff() + size - 1) // size
    last = counts.cumsum(0)
    block = torch.arange(num_rows // size + len(counts), device=offsets.device)
    bags = torch.searchsorted(last, block, right=True).clamp_max(len(counts) - 1)
    return bags, offsets[bags] + (block - (last - counts)[bags]) * size


def num_splits(programs: int, rows: int) -> int:
    """Into how many splits of a bag's ``rows`` the work of ``programs`` is cut, so that it fills a device."""
    return max(1, min(PROGRAMS // programs, rows // 1024))


def _spread(values: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    return torch.repeat_interleave(values, offsets.diff(), 0, output_size=num_rows)


def softmax(x: Tensor, offsets: Tensor) -> Tensor:
    """(T, C) -> (T, C) float32."""
    a = (x.float() - _spread(max_rows(x, offsets)[0], offsets, x.shape[0])).exp_()
    return a.div_(_spread(sum_rows(a, offsets), offsets, x.shape[0]))


def softmax_backward(a: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """a * (grad - sum over the bag of a * grad), all (T, C) float32."""
    return (grad - _spread(sum_rows(a * grad, offsets), offsets, a.shape[0])).mul_(a)
