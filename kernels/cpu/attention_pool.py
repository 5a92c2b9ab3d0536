"""Attention pooling on CPU.

    h = act(x W1^T + b1) [* sigmoid(x Wg^T + bg)],  scores = h w2^T,
    a = softmax of scores per bag,  z = (a * factors)^T x

The scores do not know bags: they are computed in chunks of instances, one GEMM per chunk with the concatenated weight
[W1; Wg] into a reused buffer, activations in place. What knows bags (softmax, a^T x, and x dz in backward) is bound by
memory; the operator runs it over the whole pack with the kernels of ``segments``, dropout's factors included.
Backward walks over the chunks again; it recomputes the pre-activations unless they were kept.

Each worker thread walks over its own share of the rows, with its own buffers and its own gradients of the weights,
which are added in the order of the shares. So threads meet once per pass, not at the end of every operation of every
chunk, which on cores shared with data loading would cost several times the work.

Reads: x twice forward (scores, z) and twice backward. FLOPs: 2 T P D' forward, 4 T P D' backward with recomputation
(D' = 2D if gated, else D), 2 T P D' more for the gradient of x. Working memory: about six times CHUNK_BYTES (twice that
from eight threads on), D' P floats per worker in backward, and 3 T H floats.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from bigbag.kernels.cpu.memory import huge_pages
from bigbag.kernels.cpu.segments import accumulation_dtype

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


def _activate(pre: Tensor, act: str, out: Tensor, rough: bool) -> Tensor:
    """``out = act(pre)``; ``rough`` where ``pre`` was rounded to 16 bits."""
    if act == "tanh" and rough:
        # tanh(v) = 2 sigmoid(2 v) - 1 to a rounding of 1 in float32, in a fifth of the time of torch's tanh.
        return torch.mul(pre, 2, out=out).sigmoid_().mul_(2).sub_(1)
    if act == "tanh":
        return torch.tanh(pre, out=out)
    if act == "relu":
        return torch.clamp_min(pre, 0, out=out)
    assert act == "gelu", act
    return out.copy_(torch.nn.functional.gelu(pre))


def _scale_by_derivative(grad: Tensor, pre: Tensor, value: Tensor, act: str, scratch: Tensor) -> None:
    """grad *= act'(pre), where value = act(pre)."""
    if act == "tanh":
        torch.mul(value, value, out=scratch)
        grad.addcmul_(grad, scratch, value=-1)
    elif act == "relu":
        grad.mul_(value > 0)
    else:
        torch.mul(pre, math.sqrt(0.5), out=scratch).erf_().add_(1).mul_(0.5)
        density = torch.mul(pre, pre).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        grad.mul_(scratch.addcmul_(pre, density))


class _Scorer:
    """Buffers and weights for the scores of one chunk at a time."""

    def __init__(self, weight: Tensor, bias: Tensor, w2: Tensor, act: str, gated: bool, rows: int) -> None:
        self.weight, self.bias, self.w2, self.act, self.gated = weight, bias, w2, act, gated
        self.width = weight.shape[0]
        self.dim = self.width // 2 if gated else self.width
        self.pre_low = torch.empty(rows, self.width, dtype=weight.dtype)
        self.pre = torch.empty(rows, self.width, dtype=bias.dtype)
        self.hidden = torch.empty(rows, self.dim, dtype=bias.dtype)

    def project(self, chunk: Tensor, out: Tensor | None = None) -> Tensor:
        """chunk W^T, without the bias."""
        return torch.mm(chunk, self.weight.t(), out=self.pre_low[: len(chunk)] if out is None else out)

    def activate(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pre-activations (m, D), act of them (m, D), and the gate (m, D) or None, in the accumulation dtype."""
        rows = len(projected)
        pre = self.pre[:rows]
        rough = projected.dtype != pre.dtype
        if rough:
            pre.copy_(projected).add_(self.bias)
        else:
            torch.add(projected, self.bias, out=pre)
        hidden = _activate(pre[:, : self.dim], self.act, self.hidden[:rows], rough)
        gate = pre[:, self.dim :].sigmoid_() if self.gated else None
        return pre[:, : self.dim], hidden, gate


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, w2: Tensor, act: str, gated: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """x (T, P), weight (D', P) in the compute dtype, bias (D',) and w2 (H, D) in the accumulation dtype
    -> scores (T, H), kept (T, D') or (0,)."""
    x = x.contiguous()
    num_rows = x.shape[0]
    chunk_rows = _chunk_rows(num_rows, x.shape[1], weight.shape[0])
    scores = torch.empty(num_rows, w2.shape[0], dtype=bias.dtype)
    kept = huge_pages(torch.empty((num_rows, weight.shape[0]) if keep else (0,), dtype=weight.dtype))

    def part(first: int, last: int) -> None:
        chunks = _Chunks(x, weight.dtype, chunk_rows)
        scorer = _Scorer(weight, bias, w2, act, gated, chunk_rows)
        for start, end in chunks.bounds(first, last):
            projected = scorer.project(chunks.load(start, end), kept[start:end] if keep else None)
            _, hidden, gate = scorer.activate(projected)
            if gate is not None:
                hidden.mul_(gate)
            torch.mm(hidden, w2.t(), out=scores[start:end])

    _share(part, num_rows)
    return scores, kept


def backward(
    ds: Tensor,
    grad_z: Tensor | None,
    weights: Tensor,
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor,
    w2: Tensor,
    kept: Tensor,
    act: str,
    gated: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradients of the scores (T, H) and of z, and the weights (T, H) of its rows: those of x (T, P) or (0,),
    weight (D', P), bias (D',), w2 (H, D)."""
    x = x.contiguous()
    num_rows = x.shape[0]
    acc = accumulation_dtype(weight.dtype)
    chunk_rows = _chunk_rows(num_rows, x.shape[1], weight.shape[0])
    grad_x = huge_pages(torch.empty(x.shape if need_x else (0,), dtype=x.dtype))
    bags = torch.repeat_interleave(offsets.diff(), output_size=num_rows) if need_x else None

    def part(first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        chunks = _Chunks(x, weight.dtype, chunk_rows)
        scorer = _Scorer(weight, bias, w2, act, gated, chunk_rows)
        dim = scorer.dim
        grad_pre_buffer = torch.empty(chunk_rows, scorer.width, dtype=acc)
        scratch_buffer = torch.empty(chunk_rows, dim, dtype=acc)
        grad_weight = torch.zeros(weight.shape, dtype=acc)
        grad_bias, grad_w2 = torch.zeros_like(bias), torch.zeros_like(w2)
        low = torch.empty_like(weight) if weight.dtype != acc else None
        for start, end in chunks.bounds(first, last):
            chunk = chunks.load(start, end)
            pre, hidden, gate = scorer.activate(kept[start:end] if kept.numel() else scorer.project(chunk))
            grad_pre, scratch = grad_pre_buffer[: end - start], scratch_buffer[: end - start]
            grad_hidden = torch.mm(ds[start:end], w2, out=scratch)
            left = grad_pre[:, :dim]
            if gate is None:
                left.copy_(grad_hidden)
                grad_w2.addmm_(ds[start:end].t(), hidden)
            else:
                right = grad_pre[:, dim:]
                torch.mul(grad_hidden, gate, out=left)
                torch.mul(hidden, gate, out=scratch)
                grad_w2.addmm_(ds[start:end].t(), scratch)
                # d sigmoid: dh * h * g * (1 - g), where dh * g is what ``left`` holds so far.
                torch.mul(left, hidden, out=right)
                right.addcmul_(right, gate, value=-1)
            _scale_by_derivative(left, pre, hidden, act, scratch)
            grad_bias += grad_pre.sum(0)
            if low is None:
                grad_weight.addmm_(grad_pre.t(), chunk)
            else:
                grad_pre = scorer.pre_low[: end - start].copy_(grad_pre)
                grad_weight += torch.mm(grad_pre.t(), chunk, out=low)
            if bags is not None:
                grad_chunk = torch.mm(grad_pre, weight).to(acc)
                if grad_z is not None:
                    for head in range(w2.shape[0]):
                        grad_chunk.addcmul_(weights[start:end, head : head + 1], grad_z[bags[start:end], head])
                grad_x[start:end] = grad_chunk
        return grad_weight, grad_bias, grad_w2

    # In order of the shares: the same bits for the same number of workers.
    (grad_weight, grad_bias, grad_w2), *others = _share(part, num_rows)
    for other_weight, other_bias, other_w2 in others:
        grad_weight += other_weight
        grad_bias += other_bias
        grad_w2 += other_w2
    return grad_x, grad_weight.to(weight.dtype), grad_bias, grad_w2
