"""Attention pooling on CPU.

    h = act(x W1^T + b1) [* sigmoid(x Wg^T + bg)],  scores = h w2^T,
    a = softmax of scores per bag,  z = (a * factors)^T x

The scores do not know bags: they are computed in chunks of instances, one GEMM per chunk with the concatenated weight
[W1; Wg] into a reused buffer, and one pass over its rows for all that follows it (Numba). What knows bags (softmax,
a^T x, and x dz in backward) is bound by memory; it runs over the whole pack with the kernels of ``segments``, dropout's
factors included. Backward walks over the chunks again; it recomputes the pre-activations unless they were kept; one
pass over a chunk makes their gradients.

Each worker thread walks over its own share of the rows, with its own buffers and its own gradients of the weights,
which are added in the order of the shares. So threads meet once per pass, not at the end of every operation of every
chunk, which on cores shared with data loading would cost several times the work.

Reads: x twice forward (scores, z) and twice backward. FLOPs: 2 T P D' forward, 4 T P D' backward with recomputation
(D' = 2D if gated, else D), 2 T P D' more for the gradient of x. Working memory, per worker: the pre-activations of a
chunk, the chunk itself where x is stored in another precision, its gradient where that is wanted, and D' P floats in
backward; and 3 T H floats.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu import segments
from bigbag.kernels.cpu.attention_scores import _ACTIVATIONS, _differentiate_rows, _score_rows
from bigbag.kernels.cpu.half import _narrow, _wide
from bigbag.kernels.cpu.memory import huge_pages
from bigbag.kernels.cpu.segments import _jit, accumulation_dtype, array

# Small enough for the caches, large enough that Python's share of the time stays small.
CHUNK_BYTES = 8 << 20
MAX_WORKERS = 8
_MIN_ROWS_PER_WORKER = 512


def _num_workers(num_rows: int) -> int:
    return max(1, min(MAX_WORKERS, torch.get_num_threads(), num_rows // _MIN_ROWS_PER_WORKER))


def _chunk_rows(num_rows: int, width: int, total: int) -> int:
    chunk_bytes = CHUNK_BYTES // min(4, _num_workers(num_rows))
    return max(1, min(num_rows, max(64, min(8192, chunk_bytes // (4 * max(width, total))))))


@cache
def _pool(process: int, workers: int, threads: int) -> ThreadPoolExecutor:
    """Workers whose torch operations run on ``threads`` threads each. Of one process: threads do not survive a fork."""
    ready = threading.Barrier(workers + 1)

    def start() -> None:
        # A thread takes over the process's number when it first asks; only a number set after that stays.
        torch.get_num_threads()
        torch.set_num_threads(threads)
        ready.wait()

    total = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="bigbag-attention-pool", initializer=start)
    for _ in range(workers):
        pool.submit(int)
    ready.wait()
    # The call in the workers also set what threads started later begin with; set that back.
    torch.set_num_threads(total)
    return pool


def _share(part: Callable[[int, int], object], num_rows: int) -> list:
    """``part(start, end)`` on shares of the rows, one per worker; the results in order."""
    workers = _num_workers(num_rows)
    if workers == 1:
        return [part(0, num_rows)]
    inference = torch.is_inference_mode_enabled()

    def run(start: int, end: int) -> object:
        # Grad mode and inference mode belong to a thread.
        with torch.inference_mode(inference), torch.no_grad():
            return part(start, end)

    pool = _pool(os.getpid(), workers, torch.get_num_threads() // workers)
    bounds = [num_rows * worker // workers for worker in range(workers + 1)]
    jobs = [pool.submit(run, start, end) for start, end in zip(bounds, bounds[1:])]
    return [job.result() for job in jobs]


class _Chunks:
    """Chunks of x in the compute dtype, through one reused buffer."""

    def __init__(self, x: Tensor, dtype: torch.dtype, rows: int) -> None:
        self.x, self.rows = x, rows
        self.buffer = torch.empty(rows, x.shape[1], dtype=dtype) if x.dtype != dtype else None
        # torch converts float16 to bfloat16 element by element; by way of float32 both steps are vectorised.
        by_way = {x.dtype, dtype} == {torch.float16, torch.bfloat16}
        self.wide = torch.empty(rows, x.shape[1], dtype=torch.float32) if by_way else None

    def bounds(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(start, min(start + self.rows, last)) for start in range(first, last, self.rows)]

    def load(self, start: int, end: int) -> Tensor:
        chunk = self.x[start:end]
        if self.buffer is None:
            return chunk
        if self.wide is not None:
            chunk = self.wide[: end - start].copy_(chunk)
        return self.buffer[: end - start].copy_(chunk)


@_jit
def _add_weighted(grad, weights, bags, grad_z, out):
    """out[i] = grad[i] + sum_h weights[i, h] grad_z[bags[i], h]"""
    total = np.empty(grad.shape[1], grad_z.dtype)
    for i in range(len(grad)):
        for p in range(len(total)):
            total[p] = _wide(grad[i, p])
        for h in range(weights.shape[1]):
            weight = weights[i, h]
            for p in range(len(total)):
                total[p] += weight * grad_z[bags[i], h, p]
        for p in range(len(total)):
            out[i, p] = _narrow(total[p], out[i, p])


def _scaled(a: Tensor, factors: Tensor | None) -> Tensor:
    """Attention weights, or gradients to them, as dropout leaves them."""
    return a if factors is None else a * factors


def forward(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor,
    w2: Tensor,
    factors: Tensor | None,
    act: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (T, P), weight (D', P) in the compute dtype, bias (D',) and w2 (H, D) in the accumulation dtype, factors (T, H)
    of dropout -> z (B, H, P), scores (T, H), a (T, H), kept (T, D') or (0,)."""
    scores, kept = _scores(x, weight, bias, w2, act, keep)
    a = segments.softmax(scores, offsets)
    return segments.weighted_sum(x, _scaled(a, factors), offsets), scores, a, kept


def _scores(x: Tensor, weight: Tensor, bias: Tensor, w2: Tensor, act: str, keep: bool) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    num_rows = x.shape[0]
    chunk_rows = _chunk_rows(num_rows, x.shape[1], weight.shape[0])
    scores = torch.empty(num_rows, w2.shape[0], dtype=bias.dtype)
    kept = huge_pages(torch.empty((num_rows, weight.shape[0]) if keep else (0,), dtype=weight.dtype))

    def part(first: int, last: int) -> None:
        chunks = _Chunks(x, weight.dtype, chunk_rows)
        buffer = torch.empty(0 if keep else chunk_rows, weight.shape[0], dtype=weight.dtype)
        for start, end in chunks.bounds(first, last):
            projected = kept[start:end] if keep else buffer[: end - start]
            torch.mm(chunks.load(start, end), weight.t(), out=projected)
            _score_rows(array(projected), array(bias), array(w2), _ACTIVATIONS[act], scores[start:end].numpy())

    _share(part, num_rows)
    return scores, kept


def backward(
    grad_z: Tensor | None,
    grad_scores: Tensor | None,
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor,
    w2: Tensor,
    z: Tensor,
    a: Tensor,
    kept: Tensor,
    factors: Tensor | None,
    act: str,
    gated: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradients of z and of the scores, and what ``forward`` took and gave: those of x (T, P) or (0,),
    weight (D', P), bias (D',), w2 (H, D)."""
    ds = torch.zeros_like(a)
    if grad_z is not None:
        ds = segments.softmax_backward(a, _scaled(segments.row_dots(x, grad_z, offsets), factors), offsets)
    if grad_scores is not None:
        ds = ds + grad_scores
    weights = _scaled(a, factors)
    x = x.contiguous()
    num_rows = x.shape[0]
    acc = accumulation_dtype(weight.dtype)
    chunk_rows = _chunk_rows(num_rows, x.shape[1], weight.shape[0])
    grad_x = huge_pages(torch.empty(x.shape if need_x else (0,), dtype=x.dtype))
    bags = torch.repeat_interleave(offsets.diff(), output_size=num_rows) if need_x else offsets

    def part(first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        chunks = _Chunks(x, weight.dtype, chunk_rows)
        buffer = torch.empty(chunk_rows, weight.shape[0], dtype=weight.dtype)
        grad_weight = torch.zeros(weight.shape, dtype=acc)
        grad_bias, grad_w2 = torch.zeros_like(bias), torch.zeros_like(w2)
        low = torch.empty_like(weight) if weight.dtype != acc else None
        for start, end in chunks.bounds(first, last):
            chunk, grad_pre = chunks.load(start, end), buffer[: end - start]
            projected = kept[start:end] if kept.numel() else torch.mm(chunk, weight.t(), out=grad_pre)
            args = (array(projected), array(bias), array(w2), _ACTIVATIONS[act], array(ds[start:end]), array(grad_pre))
            _differentiate_rows(*args, grad_bias.numpy(), grad_w2.numpy())
            if low is None:
                grad_weight.addmm_(grad_pre.t(), chunk)
            else:
                grad_weight += torch.mm(grad_pre.t(), chunk, out=low).to(acc)
            if not need_x:
                continue
            grad_chunk = torch.mm(grad_pre, weight)
            if grad_z is None:
                grad_x[start:end] = grad_chunk
            else:
                shares = array(weights[start:end])
                _add_weighted(
                    array(grad_chunk), shares, bags[start:end].numpy(), array(grad_z), array(grad_x[start:end])
                )
        return grad_weight, grad_bias, grad_w2

    # In order of the shares: the same bits for the same number of workers.
    (grad_weight, grad_bias, grad_w2), *others = _share(part, num_rows)
    for other_weight, other_bias, other_w2 in others:
        grad_weight += other_weight
        grad_bias += other_bias
        grad_w2 += other_w2
    return grad_x, grad_weight.to(weight.dtype), grad_bias, grad_w2
