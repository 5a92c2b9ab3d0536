"""Products with a sparse matrix in CSR form, on the GPU, with Triton.

    spmm         out[i] = scale[i] sum_e w[e] x[col[e]] + diagonal[i] x[i] + beta h[i]        (e: the edges of row i)
    edge_dots    d[e] = <x[i], y[col[e]]>           edge_distances  d[e] = |x[i] - x[col[e]]|^2
    edge_softmax a[e] = exp(s[e]) / sum over the edges of row i          transpose   CSR of A^T, by a stable sort

One program owns ``BLOCK_R`` rows x ``BLOCK_C`` columns of the output (edge_dots: a block of edges and a head) and walks
over the neighbours of its rows together, up to the longest list. Programs of one block of columns run one after the
other, so in a local graph neighbours' rows are found in L2. With H heads, edge values are (E, H), head h owns columns
h D/H to (h + 1) D/H. No atomics: two runs give the same bits. Sums are accumulated in float32.
Bytes: x once where L2 holds the neighbourhood, out once, 4 (1 + H) per edge. Scalars are read on the device: no launch
waits for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _gather(
    crow,
    col,
    weight,
    x,
    rows,
    cols,
    T,
    C,
    WEIGHTED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(BLOCK_R, BLOCK_C) sums of the weighted neighbours' rows."""
    start = tl.load(crow + rows, mask=rows < T, other=0)
    end = tl.load(crow + rows + 1, mask=rows < T, other=0)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for k in range(tl.max(end - start)):
        edge = start + k
        present = edge < end
        neighbour = tl.load(col + edge, mask=present, other=0).to(tl.int64)
        inside = present[:, None] & (cols < C)[None, :]
        tile = tl.load(x + neighbour[:, None] * C + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            if HEADS == 1:
                tile *= tl.load(weight + edge, mask=present, other=0.0)[:, None]
            else:
                head = cols // (C // HEADS)
                tile *= tl.load(weight + edge[:, None] * HEADS + head[None, :], mask=inside, other=0.0)
        acc += tile
    return acc


@triton.jit
def _spmm(
    crow,
    col,
    weight,
    x,
    scale,
    diagonal,
    h,
    beta,
    out,
    T,
    C,
    WEIGHTED: tl.constexpr,
    HEADS: tl.constexpr,
    SCALED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < T)[:, None] & (cols < C)[None, :]
    places = rows[:, None] * C + cols[None, :]
    acc = _gather(crow, col, weight, x, rows, cols, T, C, WEIGHTED, HEADS, BLOCK_R, BLOCK_C)
    if SCALED == 1:
        acc *= tl.load(scale)
    if SCALED == 2:
        acc *= tl.load(scale + rows, mask=rows < T, other=0.0)[:, None]
    if DIAGONAL:
        factor = tl.load(diagonal + rows, mask=rows < T, other=0.0)
        acc += factor[:, None] * tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        acc += tl.load(beta) * tl.load(h + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _edge_dots(
    rows,
    col,
    x,
    y,
    out,
    E,
    C,
    HEADS: tl.constexpr,
    DISTANCE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    edges = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    head = tl.program_id(1)
    left = tl.load(rows + edges, mask=edges < E, other=0)
    right = tl.load(col + edges, mask=edges < E, other=0).to(tl.int64)
    dim = C // HEADS
    acc = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, dim, BLOCK_C):
        offset = first + tl.arange(0, BLOCK_C)
        inside = (edges < E)[:, None] & (offset < dim)[None, :]
        cols = (head * dim + offset)[None, :]
        mine = tl.load(x + left[:, None] * C + cols, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(y + right[:, None] * C + cols, mask=inside, other=0.0).to(tl.float32)
        if DISTANCE:
            acc += tl.sum((mine - other) * (mine - other), 1)
        else:
            acc += tl.sum(mine * other, 1)
    tl.store(out + edges * HEADS + head, acc, mask=edges < E)


@triton.jit
def _edge_softmax(crow, scores, out, T, HEADS: tl.constexpr, BLOCK_R: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    head = tl.program_id(1)
    start = tl.load(crow + rows, mask=rows < T, other=0)
    end = tl.load(crow + rows + 1, mask=rows < T, other=0)
    longest = tl.max(end - start)
    top = tl.full([BLOCK_R], -float("inf"), tl.float32)
    for k in range(longest):
        value = tl.load(scores + (start + k) * HEADS + head, mask=start + k < end, other=-float("inf"))
        top = tl.maximum(top, value)
    # Rows without edges: any finite number keeps inf - inf out.
    top = tl.where(start < end, top, 0.0)
    total = tl.zeros([BLOCK_R], tl.float32)
    for k in range(longest):
        value = tl.load(scores + (start + k) * HEADS + head, mask=start + k < end, other=-float("inf"))
        total += tl.exp(value - top)
    for k in range(longest):
        place = (start + k) * HEADS + head
        value = tl.load(scores + place, mask=start + k < end, other=-float("inf"))
        tl.store(out + place, tl.exp(value - top) / tl.where(start < end, total, 1.0), mask=start + k < end)


@triton.jit
def _edge_softmax_backward(crow, a, grad, out, T, HEADS: tl.constexpr, BLOCK_R: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    head = tl.program_id(1)
    start = tl.load(crow + rows, mask=rows < T, other=0)
    end = tl.load(crow + rows + 1, mask=rows < T, other=0)
    longest = tl.max(end - start)
    # Gradients count from that of the largest weight: one that is nearly 1 would cancel with the mean.
    top = tl.full([BLOCK_R], -1.0, tl.float32)
    base = tl.zeros([BLOCK_R], tl.float32)
    for k in range(longest):
        place = (start + k) * HEADS + head
        present = start + k < end
        weight = tl.load(a + place, mask=present, other=-1.0)
        base = tl.where(weight > top, tl.load(grad + place, mask=present, other=0.0), base)
        top = tl.maximum(top, weight)
    mean = tl.zeros([BLOCK_R], tl.float32)
    for k in range(longest):
        place = (start + k) * HEADS + head
        present = start + k < end
        difference = tl.load(grad + place, mask=present, other=0.0) - base
        mean += tl.load(a + place, mask=present, other=0.0) * difference
    for k in range(longest):
        place = (start + k) * HEADS + head
        present = start + k < end
        difference = tl.load(grad + place, mask=present, other=0.0) - base - mean
        tl.store(out + place, tl.load(a + place, mask=present, other=0.0) * difference, mask=present)


def _tiles(num_cols: int, heads: int = 1) -> dict[str, int]:
    if INTERPRETED:  # the interpreter's cost is per operation, not per element
        return {"BLOCK_R": 512, "BLOCK_C": triton.next_power_of_2(num_cols)}
    columns = min(256, triton.next_power_of_2(num_cols))
    # Rows that are not aligned to 16 bytes load element by element, and with several heads every element loads a
    # weight of its own: each by a pointer in registers.
    elements = 512 if heads > 1 else 2048 if num_cols % 8 == 0 else 1024
    return {"BLOCK_R": min(128, max(1, elements // columns)), "BLOCK_C": columns}


def _row_block() -> int:
    return 1024 if INTERPRETED else 128


def _values(x: Tensor | None, other: Tensor) -> Tensor:
    """Scalars, row or edge values in float32; any tensor where there are none, since it is not read."""
    return other if x is None else x.float().contiguous()


def spmm(
    crow: Tensor,
    col: Tensor,
    weight: Tensor | None,
    x: Tensor,
    scale: Tensor | None = None,
    diagonal: Tensor | None = None,
    h: Tensor | None = None,
    beta: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """weight (E, H) or None for ones, x (T, D), scale (1,) or (T,), diagonal (T,), h (T, D), beta (1,) -> (T, D).

    ``out`` may be ``h`` itself, not x.
    """
    x = x.contiguous()
    num_rows, num_cols = crow.shape[0] - 1, x.shape[1]
    out = x.new_empty(num_rows, num_cols) if out is None else out
    if out.numel() == 0:
        return out
    beta = x.new_ones(1, dtype=torch.float32) if beta is None else beta
    tensors = (_values(weight, x), x, _values(scale, x), _values(diagonal, x), x if h is None else h.contiguous())
    flags = {
        "WEIGHTED": weight is not None,
        "HEADS": 1 if weight is None else weight.shape[1],
        "SCALED": 0 if scale is None else (1 if scale.numel() == 1 else 2),
        "DIAGONAL": diagonal is not None,
        "ADDED": h is not None,
    }
    tiles = _tiles(num_cols, flags["HEADS"])
    grid = (triton.cdiv(num_rows, tiles["BLOCK_R"]), triton.cdiv(num_cols, tiles["BLOCK_C"]))
    _spmm[grid](crow, col, *tensors, _values(beta, x), out, num_rows, num_cols, **flags, **tiles)
    return out


def spmm_backward(
    crow: Tensor, col: Tensor, crow_t: Tensor, col_t: Tensor, perm: Tensor, weight: Tensor, x: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients (T, D) to x and (E, H) to the weights of :func:`spmm`."""
    return spmm(crow_t, col_t, weight[perm], grad), edge_dots(crow, col, grad, x, weight.shape[1])


def _edges(crow: Tensor, col: Tensor, x: Tensor, y: Tensor, heads: int, distance: bool) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    num_edges = col.shape[0]
    out = x.new_empty(num_edges, heads, dtype=torch.float32)
    if out.numel() == 0:
        return out
    nodes = torch.arange(crow.shape[0] - 1, device=crow.device)
    rows = torch.repeat_interleave(nodes, crow.diff(), output_size=num_edges)
    dim = triton.next_power_of_2(x.shape[1] // heads)
    aligned = x.shape[1] // heads % 8 == 0
    tiles = {"BLOCK_E": 32 if aligned else 8, "BLOCK_C": min(128, dim)}
    if INTERPRETED:
        tiles = {"BLOCK_E": 4096, "BLOCK_C": dim}
    grid = (triton.cdiv(num_edges, tiles["BLOCK_E"]), heads)
    _edge_dots[grid](rows, col, x, y, out, num_edges, x.shape[1], HEADS=heads, DISTANCE=distance, **tiles)
    return out


def edge_dots(crow: Tensor, col: Tensor, x: Tensor, y: Tensor, heads: int) -> Tensor:
    """x, y (T, D) of one dtype -> (E, heads) float32."""
    return _edges(crow, col, x, y, heads, False)


def edge_distances(crow: Tensor, col: Tensor, x: Tensor) -> Tensor:
    """x (T, D) -> (E, 1) float32."""
    return _edges(crow, col, x, x, 1, True)


def edge_softmax(crow: Tensor, scores: Tensor) -> Tensor:
    """(E, H) float32 -> softmax over the edges of each row."""
    out = torch.empty_like(scores)
    if out.numel():
        grid = (triton.cdiv(crow.shape[0] - 1, _row_block()), scores.shape[1])
        _edge_softmax[grid](crow, scores, out, crow.shape[0] - 1, HEADS=scores.shape[1], BLOCK_R=_row_block())
    return out


def edge_softmax_backward(crow: Tensor, a: Tensor, grad: Tensor) -> Tensor:
    """a * (grad - sum over the edges of the row of a * grad), all (E, H)."""
    out = torch.empty_like(a)
    if out.numel():
        grid = (triton.cdiv(crow.shape[0] - 1, _row_block()), a.shape[1])
        args = (crow, a.contiguous(), grad.contiguous(), out, crow.shape[0] - 1)
        _edge_softmax_backward[grid](*args, HEADS=a.shape[1], BLOCK_R=_row_block())
    return out


def transpose(crow: Tensor, col: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CSR of A^T: crow (T + 1,), col (E,) and, for each of its edges, the edge of A it comes from (E,)."""
    nodes = torch.arange(crow.shape[0] - 1, device=crow.device)
    rows = torch.repeat_interleave(nodes, crow.diff(), output_size=col.shape[0])
    ordered, perm = torch.sort(col, stable=True)
    crow_t = torch.searchsorted(ordered, torch.arange(crow.shape[0], device=crow.device, dtype=col.dtype))
    return crow_t, rows[perm].to(col.dtype), perm
