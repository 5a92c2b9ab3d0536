"""Row-wise computations in chunks of rows, of which nothing but the inputs is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbag.kernels.cpu.memory import huge_pages
from bigbag.nn.recompute import State, gradients, trained_tensors
from bigbag.ops.once import once_differentiable
from bigbag.ops.registry import compute_dtype

_ROWS = {"cpu": 2048, "cuda": 16_384}


class Projection(NamedTuple):
    """A linear map at the end of a row-wise function, which the backward pass need not compute again.

    Attributes:
        weight, bias: of the map.
        widths: the parts that its result is cut into; None: one.
        added: the function has a second result, which is added to the map's only part: a residual connection.
    """

    weight: Tensor
    bias: Tensor | None = None
    widths: tuple[int, ...] | None = None
    added: bool = False

    def room(self, num_rows: int) -> list[Tensor]:
        """Memory for the parts ``(num_rows, width)`` of the result, in the dtype of the products."""
        widths, dtype = self.widths or self.weight.shape[:1], compute_dtype(self.weight)
        return [huge_pages(self.weight.new_empty(num_rows, width, dtype=dtype)) for width in widths]

    def of(self, rows: Tensor, added: Tensor | None = None) -> tuple[Tensor, ...]:
        """The parts of the result for ``rows``, differentiable: of few rows, so that their gradients are joined, not
        those of the weights."""
        dtype = compute_dtype(self.weight)
        bias = None if self.bias is None else self.bias.to(dtype)
        found = F.linear(rows.to(dtype), self.weight.to(dtype), bias).split(self.widths or self.weight.shape[:1], -1)
        return tuple(t.contiguous() for t in found) if added is None else ((found[0] + added).to(dtype),)

    def into(self, places: Sequence[Tensor], rows: Tensor, added: Tensor | None = None) -> None:
        """Write the parts of the result for ``rows`` to ``places``: one pass over the memory of the result."""
        widths, dtype = [place.shape[1] for place in places], places[0].dtype
        weights, rows = self.weight.to(dtype).split(widths), rows.to(dtype)
        biases = [None] * len(widths) if self.bias is None else self.bias.to(dtype).split(widths)
        for place, weight, bias in zip(places, weights, biases):
            if bias is None:
                torch.mm(rows, weight.t(), out=place)
            else:
                torch.addmm(bias, rows, weight.t(), out=place)
        if added is not None:
            places[0].copy_(places[0] + added)  # in the wider of both dtypes


@dataclass(frozen=True)
class Windows:
    """Rows that are made when they are needed: row i is ``x[index[i, 0]], x[index[i, 1]], ...``, -1 standing for zeros.

    They are laid out channel by channel, as by ``torch.nn.Unfold``.

    Attributes:
        x: ``(S, C)``.
        index: ``(T, K)`` int64 rows of ``x``.
    """

    x: Tensor
    index: Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def requires_grad(self) -> bool:
        return self.x.requires_grad

    @property
    def shape(self) -> tuple[int, int]:
        return self.index.shape[0], self.index.shape[1] * self.x.shape[1]

    def __getitem__(self, rows: slice) -> Tensor:
        index = self.index[rows]
        found = self.x[index.clamp_min(0).flatten()].view(*index.shape, self.x.shape[1])
        return found.masked_fill(index[:, :, None] < 0, 0).transpose(1, 2).flatten(1)

    def add_gradient(self, total: Tensor, rows: slice, grad: Tensor) -> None:
        """Add the gradient of ``self[rows]`` to that of ``x``."""
        index = self.index[rows]
        parts = grad.view(len(index), self.x.shape[1], index.shape[1]).transpose(1, 2)
        parts = parts.masked_fill(index[:, :, None] < 0, 0).flatten(0, 1)
        total.index_add_(0, index.clamp_min(0).flatten(), parts.to(total.dtype))


class Padding(NamedTuple):
    """Rows of zeros before those of each bag: ``pads[b]`` before its ``sizes[b]`` rows."""

    sizes: tuple[int, ...]
    pads: tuple[int, ...]


class Widen(torch.nn.Module):
    """Rows in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """``x`` in that dtype."""
        return x.to(self.dtype)


def by_rows(
    function: Callable[..., Any],
    *inputs: Tensor | Windows,
    modules: Iterable[torch.nn.Module] = (),
    shared: Iterable[Tensor] = (),
    projection: Projection | None = None,
    padding: Padding | None = None,
    chunk: int | None = None,
) -> Any:
    """``function(*inputs)``, chunk by chunk, where each row of the result depends on that row of the inputs only.

    Backward computes each chunk again and differentiates it, so that intermediate values (normalised rows, the hidden
    layer of an MLP) exist for one chunk at a time. Cost: the FLOP of ``function`` once more, but not those of
    ``projection``; kept: ``inputs``. Dropout and autocast are the same in both passes. Not twice differentiable.

    Few rows, up to half of 2048 (GPU: 16,384) if that is less than ``chunk``, are not worth it: of them all is kept.

    Args:
        function: takes and returns tensors (one or several) whose first dimension is the rows of a chunk.
        inputs: tensors of T rows, or :class:`Windows`.
        modules: the modules whose parameters ``function`` uses, beside ``function`` if it is one; others get no
            gradient.
        shared: tensors beside ``inputs`` and parameters that ``function`` uses and that need gradients.
        projection: applied to the result ``(rows, width)`` of ``function``, the only one unless it says otherwise.
        padding: rows of zeros to put between those of the result.
        chunk: rows to compute together; None: 2048 on a CPU, 16,384 on a GPU.

    Returns:
        What ``function`` (or ``projection``) returns, with T rows and those of ``padding``.
    """
    modules = (*modules, function) if isinstance(function, torch.nn.Module) else tuple(modules)
    parameters = trained_tensors(modules, shared)
    weights = [] if projection is None else [t for t in projection[:2] if t is not None]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *weights, *parameters))
    if differentiable and padding is None and _are_few(inputs, chunk):
        outputs = _as_tuple(function(*inputs))
        outputs = outputs if projection is None else projection.of(*outputs)
    elif differentiable:
        work = _Work(function, projection, padding, inputs, modules, chunk)
        tensors = [t.x if isinstance(t, Windows) else t for t in inputs]
        outputs = _ByRows.apply(work, *tensors, *weights, *parameters)
    else:
        outputs = _run(function, projection, padding, inputs, chunk)
    return outputs[0] if len(outputs) == 1 else outputs


def _are_few(inputs: tuple[Tensor | Windows, ...], chunk: int | None) -> bool:
    return not any(isinstance(t, Windows) for t in inputs) and are_few(inputs[0], chunk)


def are_few(x: Tensor | Windows, chunk: int | None = None) -> bool:
    """Whether all intermediate values of these rows may be kept. Less than a chunk: predictions of memory start at a
    whole one."""
    rows, most = x.shape[0], _ROWS.get(x.device.type, _ROWS["cuda"])
    return 2 * rows <= most and (chunk is None or rows < chunk)


def add_constant(x: Tensor, make: Callable[[slice], Tensor]) -> Tensor:
    """``x[rows] + make(rows)``, chunk by chunk, in the memory of x: that of a result which nothing else needs.

    ``make`` gives what needs no gradient, such as an encoding of places; it is not called again in the backward pass.
    """
    return _AddConstant.apply(x, make)


class _AddConstant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[slice], Tensor]) -> Tensor:
        ctx.mark_dirty(x)
        for rows in row_chunks(x):
            x[rows] += make(rows).to(x.dtype)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def row_chunks(x: Tensor) -> list[slice]:
    """The rows of ``x``, a chunk at a time; one empty chunk where there are none."""
    return [rows for rows, _ in _chunks(x, None)]


def chunk_rows(x: Tensor, chunk: int | None = None, width: int | None = None) -> int:
    """Rows that one chunk of ``x`` has: as asked for, else so many as 2048 (GPU: 16,384) rows of 1024 numbers hold.

    Args:
        x: the rows.
        chunk: the number asked for.
        width: numbers per row; None: those of ``x``.
    """
    most = _ROWS.get(x.device.type, _ROWS["cuda"])
    width = x.shape[1:].numel() if width is None else width
    return chunk or max(1, min(most, 1024 * most // max(1, width)))


def _chunks(x: Tensor | Windows, padding: Padding | None, chunk: int | None = None) -> list[tuple[slice, slice]]:
    """Rows to compute together, and where they stand in the result."""
    step = chunk or _ROWS.get(x.device.type, _ROWS["cuda"])
    if isinstance(x, Windows):
        step = max(64, 8 * step // max(x.index.shape[1], 8))
    sizes, pads = ((x.shape[0],), (0,)) if padding is None else padding
    found, first, shift = [], 0, 0
    for size, pad in zip(sizes, pads):
        shift += pad
        for start in range(first, first + size, step):
            end = min(start + step, first + size)
            found.append((slice(start, end), slice(start + shift, end + shift)))
        first += size
    return found or [(slice(0, 0), slice(0, 0))]


def _zero_pads(found: list[Tensor], padding: Padding | None) -> None:
    end = 0
    for size, pad in zip(*(padding or ((), ()))):
        for whole in found:
            whole[end : end + pad] = 0
        end += pad + size


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _room_like(parts: Sequence[Tensor], num_rows: int) -> list[Tensor]:
    return [huge_pages(part.new_empty(num_rows, *part.shape[1:])) for part in parts]


def _run(
    function: Callable[..., Any],
    projection: Projection | None,
    padding: Padding | None,
    inputs: tuple[Tensor | Windows, ...],
    chunk: int | None,
) -> tuple[Tensor, ...]:
    total = inputs[0].shape[0] + (0 if padding is None else sum(padding.pads))
    found: list[Tensor] = []
    for rows, place in _chunks(inputs[0], padding, chunk):
        results = _as_tuple(function(*(t[rows] for t in inputs)))
        if projection is None and len(results[0]) == total:
            return tuple(part.contiguous() for part in results)
        if not found:
            found = _room_like(results, total) if projection is None else projection.room(total)
            _zero_pads(found, padding)
        places = [whole[place] for whole in found]
        if projection is None:
            for there, part in zip(places, results):
                there.copy_(part)
        else:
            projection.into(places, *results)
    return tuple(found)


class _Work(State):
    """What is to be done with a chunk."""

    def __init__(
        self,
        function: Callable[..., Any],
        projection: Projection | None,
        padding: Padding | None,
        inputs: tuple[Tensor | Windows, ...],
        modules: tuple[torch.nn.Module, ...],
        chunk: int | None,
    ) -> None:
        super().__init__(inputs[0].device, modules)
        self.function, self.projection, self.padding, self.chunk = function, projection, padding, chunk
        self.indices = [t.index if isinstance(t, Windows) else None for t in inputs]

    def inputs(self, tensors: Sequence[Tensor]) -> tuple[Tensor | Windows, ...]:
        return tuple(t if index is None else Windows(t, index) for t, index in zip(tensors, self.indices))

    def through_projection(
        self, outputs: tuple[Tensor, ...], grads: list[Tensor | None], totals: list[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradients of ``outputs``, the projection's input and what is added to its result, from those of the
        parts of the result; adds to those of its weights."""
        assert self.projection is not None
        rows, (weight, bias, widths, added) = outputs[0], self.projection
        dtype = next(grad.dtype for grad in grads if grad is not None)
        pieces = [
            rows.new_zeros(len(rows), width, dtype=dtype) if grad is None else grad
            for grad, width in zip(grads, widths or weight.shape[:1])
        ]
        grad = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
        with torch.no_grad():
            if totals[0] is not None:
                totals[0] += grad.t() @ rows.to(dtype)
            if bias is not None and totals[1] is not None:
                totals[1] += grad.sum(0)
            found = [(grad @ weight).to(rows.dtype) if rows.requires_grad else None]
            return [*found, grad.to(outputs[1].dtype)] if added else found


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> Any:
        ctx.work, num_inputs = work, len(work.indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:num_inputs])
        # Not as saved tensors: under torch.utils.checkpoint those would be copies that ``function`` doesn't use.
        ctx.parameters = tensors[num_inputs:]
        ctx.versions = [t._version for t in ctx.parameters]
        with torch.autocast(*work.autocast):
            inputs = work.inputs(tensors[:num_inputs])
            return _run(work.function, work.projection, work.padding, inputs, work.chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        work, tensors, parameters = ctx.work, ctx.saved_tensors, ctx.parameters
        if ctx.versions != [t._version for t in parameters]:
            raise RuntimeError("a parameter was changed between the forward pass and its backward pass")
        inputs = work.inputs(tensors)
        found = [
            None if not need else torch.zeros_like(t) if isinstance(given, Windows) else huge_pages(torch.empty_like(t))
            for t, given, need in zip(tensors, inputs, ctx.needs_input_grad[1:])
        ]
        totals = [torch.zeros_like(p) if p.requires_grad else None for p in parameters]
        if all(grad is None for grad in grads):
            return None, *[None] * (len(found) + len(totals))
        num_weights = 0 if work.projection is None else sum(t is not None for t in work.projection[:2])
        trained = list(parameters[num_weights:])
        with work.restored():
            for chunk, place in _chunks(inputs[0], work.padding, work.chunk):
                with torch.enable_grad():
                    rows = [t[chunk].detach().requires_grad_(whole is not None) for t, whole in zip(inputs, found)]
                    outputs = _as_tuple(work.function(*rows))
                upper = [None if grad is None else grad[place] for grad in grads]
                if work.projection is not None:
                    upper = work.through_projection(outputs, upper, totals)
                results = gradients(outputs, upper, [row for row in rows if row.requires_grad] + trained)
                if results is None:
                    continue
                for whole, given in zip(found, inputs):
                    if whole is not None and isinstance(given, Windows):
                        given.add_gradient(whole, chunk, next(results))
                    elif whole is not None:
                        whole[chunk] = next(results)
                for total, part in zip((t for t in totals[num_weights:] if t is not None), results):
                    total += part
        return None, *found, *totals
