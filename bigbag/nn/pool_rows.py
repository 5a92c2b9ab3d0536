"""Weighted sums of what a row-wise computation makes of the instances of each bag, without ever holding all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.kernels.cpu.memory import huge_pages
from bigbag.nn.recompute import State, gradients, trained_tensors
from bigbag.nn.rows import chunk_rows
from bigbag.ops import distributed
from bigbag.ops.once import once_differentiable
from bigbag.ops.segments import log_sums

RowFunction = Callable[..., tuple[Tensor, Tensor]]


def pool_rows(
    function: RowFunction,
    *inputs: Tensor,
    segments: Segments,
    softmax: bool = True,
    modules: Iterable[torch.nn.Module] = (),
    shared: Iterable[Tensor] = (),
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Pool values that exist for one chunk of instances at a time, forward and backward.

        v, s = function(*inputs, *shared),   a = softmax of s over the bag, or s itself
        z[b, h] = sum_{t in b} a[t, h] v[t]

    Forward goes through the rows once, with a running maximum and sum; backward computes each chunk again. The
    gradient is that of all rows together, to rounding; random numbers and autocast are the same in both passes. Cost:
    that of ``function`` twice forward and once backward, and 2 T H P FLOP forward, 4 T H P backward. Bytes: ``inputs``
    twice; it keeps T H + B H P numbers and one chunk. Not twice differentiable.

    Args:
        function: of rows of ``inputs``, and ``shared``, to values (n, P) and scores (n, H), each row by itself.
        inputs: tensors of T rows.
        segments: how the T rows are cut into B bags.
        softmax: False: the scores are the weights.
        modules: the modules whose parameters ``function`` uses.
        shared: further arguments of it, the same for all rows.
        chunk: rows to compute together; None as in :func:`bigbag.nn.rows.chunk_rows`.

    Returns:
        z (B, H, P), zeros for an empty bag, and s (T, H), both float32 (float64 for float64).
    """
    modules, shared = tuple(modules), tuple(shared)
    work = _Pooling(function, segments, softmax, inputs[0], modules, chunk, len(inputs), len(shared))
    z, scores = _PoolRows.apply(work, *inputs, *shared, *trained_tensors(modules, ()))
    if segments.parts is not None:
        if softmax:
            z = z * distributed.shares(log_sums(scores, segments), segments.parts)[..., None]
        z = distributed.all_sum(z, segments.parts)
    return z, scores


class _Pooling(State):
    def __init__(
        self,
        function: RowFunction,
        segments: Segments,
        softmax: bool,
        x: Tensor,
        modules: tuple[torch.nn.Module, ...],
        chunk: int | None,
        num_inputs: int,
        num_shared: int,
    ) -> None:
        super().__init__(x.device, modules)
        self.function, self.segments, self.softmax = function, segments, softmax
        self.num_inputs, self.num_shared = num_inputs, num_shared
        self.step, self.num_rows = chunk_rows(x, chunk), x.shape[0]

    def chunks(self) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
        return chunks_by_bag(self.segments, self.step)


def chunks_by_bag(segments: Segments, step: int) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Chunks of ``step`` rows, and which rows of a chunk belong to which bag; an empty chunk where there are none."""
    starts, bag = segments.starts, 0
    for first in range(0, max(starts[-1], 1), step):
        last, pieces = min(first + step, starts[-1]), []
        while bag < len(starts) - 1 and starts[bag] < last:
            if starts[bag + 1] > max(starts[bag], first):
                pieces.append((bag, slice(max(starts[bag], first) - first, min(starts[bag + 1], last) - first)))
            if starts[bag + 1] > last:
                break
            bag += 1
        yield slice(first, last), pieces


class _PoolRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Pooling, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        inputs, rest = tensors[: work.num_inputs], tensors[work.num_inputs :]
        shared, parameters = rest[: work.num_shared], rest[work.num_shared :]
        sums: _Sums | None = None
        for rows, pieces in work.chunks():
            with torch.autocast(*work.autocast):
                values, scores = work.function(*(t[rows] for t in inputs), *shared)
            if sums is None:
                sums = _Sums(values, scores, work)
            sums.add(rows, pieces, values, scores)
        assert sums is not None
        ctx.work = work
        ctx.set_materialize_grads(False)
        z, log_sum = sums.finish()
        ctx.save_for_backward(*inputs, *shared, z, log_sum)
        # Not as saved tensors: under torch.utils.checkpoint those would be copies that ``function`` doesn't use.
        ctx.parameters = parameters
        ctx.versions = [t._version for t in ctx.parameters]
        return z, sums.scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor | None, grad_scores: Tensor | None) -> Any:
        work = ctx.work
        if ctx.versions != [t._version for t in ctx.parameters]:
            raise RuntimeError("a parameter was changed between the forward pass and its backward pass")
        *given, z, log_sum = ctx.saved_tensors
        inputs = given[: work.num_inputs]
        shared = [t.detach().requires_grad_(t.requires_grad) for t in given[work.num_inputs :]]
        found = [huge_pages(torch.empty_like(t)) if need else None for t, need in zip(inputs, ctx.needs_input_grad[1:])]
        parameters = [t for t in shared if t.requires_grad] + list(ctx.parameters)
        totals = [torch.zeros_like(p) for p in parameters]
        if grad_z is None and grad_scores is None:
            return (None,) * len(ctx.needs_input_grad)
        grad_z = torch.zeros_like(z) if grad_z is None else grad_z
        with work.restored():
            for rows, pieces in work.chunks():
                with torch.enable_grad():
                    part = [t[rows].detach().requires_grad_(whole is not None) for t, whole in zip(inputs, found)]
                    values, scores = work.function(*part, *shared)
                upper = _chunk_gradients(work, pieces, values.detach(), scores.detach(), z, log_sum, grad_z)
                if grad_scores is not None:
                    upper[1].add_(grad_scores[rows])
                upper = [grad.to(out.dtype) for grad, out in zip(upper, (values, scores))]
                results = gradients((values, scores), upper, [t for t in part if t.requires_grad] + parameters)
                for whole in (w for w in found if w is not None):
                    whole[rows] = 0 if results is None else next(results)
                for total, gradient in zip(totals, results or ()):
                    total += gradient
        sums = iter(totals)
        return None, *found, *(next(sums) if t.requires_grad else None for t in shared), *sums


class _Sums:
    """Maximum, sum of exponentials and weighted sum of each bag so far."""

    def __init__(self, values: Tensor, scores: Tensor, work: _Pooling) -> None:
        acc = torch.float64 if values.dtype == torch.float64 else torch.float32
        shape = (work.segments.num_bags, scores.shape[1])
        self.softmax = work.softmax
        self.top = scores.new_full(shape, -torch.inf, dtype=acc)
        self.total = scores.new_zeros(shape, dtype=acc)
        self.z = values.new_zeros(*shape, values.shape[1], dtype=acc)
        self.scores = scores.new_empty(work.num_rows, scores.shape[1], dtype=acc)

    def add(self, rows: slice, pieces: list[tuple[int, slice]], values: Tensor, scores: Tensor) -> None:
        self.scores[rows] = scores
        wide, values = self.scores[rows], values.to(self.z.dtype)
        for bag, part in pieces:
            weights = wide[part]
            if self.softmax:
                top = torch.maximum(self.top[bag], weights.amax(0))
                weights = (weights - top).exp()
                shrink = (self.top[bag] - top).exp()
                self.total[bag] = self.total[bag] * shrink + weights.sum(0)
                self.z[bag] *= shrink[:, None]
                self.top[bag] = top
            self.z[bag].addmm_(weights.t(), values[part])

    def finish(self) -> tuple[Tensor, Tensor]:
        """z, and the log of the sum of exponentials."""
        if not self.softmax:
            return self.z, self.top
        return self.z.div_(torch.where(self.total > 0, self.total, 1)[..., None]), self.top + self.total.log()


def _chunk_gradients(
    work: _Pooling,
    pieces: list[tuple[int, slice]],
    values: Tensor,
    scores: Tensor,
    z: Tensor,
    log_sum: Tensor,
    grad_z: Tensor,
) -> list[Tensor]:
    """Gradients of the values and the scores of a chunk, in the accumulation dtype."""
    values, scores = values.to(z.dtype), scores.to(z.dtype)
    grad_values, grad_scores = torch.empty_like(values), torch.empty_like(scores)
    for bag, part in pieces:
        weights = (scores[part] - log_sum[bag]).exp() if work.softmax else scores[part]
        torch.mm(weights, grad_z[bag], out=grad_values[part])
        grads = values[part] @ grad_z[bag].t()
        grad_scores[part] = weights * (grads - (z[bag] * grad_z[bag]).sum(1)) if work.softmax else grads
    return [grad_values, grad_scores]
