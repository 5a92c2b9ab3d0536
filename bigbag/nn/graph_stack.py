"""A stack of graph convolutions whose layers are all read by one linear map, in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.adjacency import Adjacency
from bigbag.nn.recompute import State, hooks_aside
from bigbag.nn.rows import row_chunks
from bigbag.ops.once import once_differentiable
from bigbag.ops.registry import compute_dtype

RowFunction = Callable[[Tensor], Tensor]
_COLUMNS = 128


def graph_stack(
    x: Tensor,
    adj: Adjacency,
    functions: Sequence[RowFunction],
    parameters: Sequence[Sequence[Tensor]],
    weights: Sequence[Tensor],
    readouts: Sequence[Tensor],
    keep_every: int = 1,
    modules: Iterable[torch.nn.Module] = (),
) -> Tensor:
    r"""L graph convolutions with dense connections, read by a linear map.

        u_0 = x,   z_l = A u_{l-1} W_l^T,   u_l = f_l(z_l),   out = sum_{l=0}^{L} u_l M_l^T

    The concatenation of all layers is never formed, and of a layer at most z_l is kept: u_l is computed again, a chunk
    of rows at a time. The gradient is exact.

    Cost: the products as they stand, forward and backward, and one with W_l more for each layer that is not kept.
    Bytes: T D for each layer kept, and beside ``out`` or its gradient at most 1.25 times T D more (at width 1024),
    and backward the layers between two that are kept. Products with A are in place, 128 columns at a time.

    Args:
        x: (T, P) instances; may be stored narrower than the weights.
        adj: (T, T) adjacency; no gradient flows to its weights.
        functions: f_1 to f_L, of (n, D) rows to (n, D) rows, each row by itself.
        parameters: of each function, what gradients flow to.
        weights: W_1 to W_L, (D, P) and (D, D).
        readouts: M_0 to M_L, (out, P) and (out, D).
        keep_every: 1 keeps every z_l; else each such one but the last, the others being computed again.
        modules: those whose dropout the functions apply, which is the same when they are computed again.

    Returns:
        (T, out) in the dtype of the computation.

    Raises:
        ValueError: weights of the adjacency that require grad.
    """
    if adj.weight is not None and adj.weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("graph_stack: adj.weight requires grad, which it does not give; detach it")
    stack = _Stack(adj, functions, tuple(modules), compute_dtype(weights[0]))
    counts = [len(own) for own in parameters]
    return _GraphStack.apply(stack, counts, keep_every, x, *weights, *readouts, *(p for own in parameters for p in own))


class _Stack:
    """The parts of the computation, a layer at a time; layer 0 is the input."""

    weights: Sequence[Tensor]
    readouts: Sequence[Tensor]

    def __init__(
        self, adj: Adjacency, functions: Sequence[RowFunction], modules: tuple[torch.nn.Module, ...], dtype: torch.dtype
    ) -> None:
        self.adj, self.functions, self.modules, self.dtype = adj, functions, modules, dtype
        self.states: list[State] = []

    @property
    def num_layers(self) -> int:
        return len(self.functions)

    def set_weights(self, tensors: Sequence[Tensor]) -> None:
        linear = [t.detach().to(self.dtype) for t in tensors]
        self.weights, self.readouts = linear[: self.num_layers], linear[self.num_layers :]

    def inner(self, layer: int, rows: Tensor) -> Tensor:
        return (self.functions[layer - 1](rows) if layer else rows).to(self.dtype)

    def step(self, layer: int, z: Tensor, out: Tensor | None) -> Tensor | None:
        """``z_{l+1}``, None after the last layer; what layer l gives to ``out`` is added to it."""
        weight = self.weights[layer].t() if layer < self.num_layers else None
        y = None if weight is None else z.new_empty(len(z), weight.shape[1], dtype=self.dtype)
        for rows in row_chunks(z):
            u = self.inner(layer, z[rows])
            if out is not None:
                out[rows].addmm_(u, self.readouts[layer].t(), beta=1 if layer else 0)
            if y is not None and weight is not None:
                torch.mm(u, weight, out=y[rows])
        return None if y is None else _multiply_(self.adj, y)

    def restore(self, layer: int, z: dict[int, Tensor]) -> None:
        """Compute ``z[layer]`` and all between it and the last one kept before it."""
        for last in range(max(k for k in z if k <= layer), layer):
            with self.states[last].restored():
                found = self.step(last, z[last], None)
            assert found is not None
            z[last + 1] = found

    def differentiate(
        self, layer: int, z: Tensor, linear: Sequence[_Linear], own: Sequence[_Gradient], grad_z: Tensor | None
    ) -> None:
        """Write the gradient of ``z_l``, if wanted; add to those of the matrices that read u_l, and of f_l.

        ``grad_z`` may be ``z``, or the gradient of what a matrix made.
        """
        through = layer > 0
        with self.states[layer].restored():
            for rows in row_chunks(z):
                part = z[rows].detach().requires_grad_(through)
                with torch.set_grad_enabled(through):
                    u = self.inner(layer, part)
                for upstream, _, total in linear:
                    total += upstream[rows].t() @ u.detach()
                if grad_z is None:
                    continue
                (upstream, matrix, _), *others = linear
                grad_u = upstream[rows] @ matrix
                for upstream, matrix, _ in others:
                    grad_u.addmm_(upstream[rows], matrix)
                if not through:
                    grad_z[rows] = grad_u
                    continue
                parameters = [p for p, _ in own]
                with hooks_aside(parameters):
                    found = torch.autograd.grad(u, [part, *parameters], grad_u)
                grad_z[rows] = found[0]
                for (_, total), value in zip(own, found[1:]):
                    total += value


def _multiply_(adj: Adjacency, y: Tensor) -> Tensor:
    """``A y`` in the memory of y, some columns at a time."""
    for columns in y.split(_COLUMNS, dim=1):
        columns.copy_(ops.spmm(adj, columns.contiguous()))
    return y


_Gradient = tuple[Tensor, Tensor]
"""A parameter and the sum of its gradients."""
_Linear = tuple[Tensor, Tensor, Tensor]
"""The gradient of what a matrix made, the matrix, and the sum of the matrix's gradients."""


class _GraphStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stack: _Stack, counts: list[int], keep_every: int, x: Tensor, *tensors: Tensor) -> Tensor:
        num_layers = stack.num_layers
        stack.set_weights(tensors[: 2 * num_layers + 1])
        out = x.new_empty(len(x), stack.readouts[0].shape[0], dtype=stack.dtype)
        kept: dict[int, Tensor] = {}
        z: Tensor | None = x
        for layer in range(num_layers + 1):
            assert z is not None
            stack.states.append(State(x.device, stack.modules))
            with torch.autocast(*stack.states[layer].autocast):
                z = stack.step(layer, z, out)
            if z is not None and (keep_every == 1 or ((layer + 1) % keep_every == 0 and layer + 1 < num_layers)):
                kept[layer + 1] = z
        ctx.stack, ctx.counts, ctx.kept = stack, counts, list(kept)
        # Parameters not as saved tensors: under torch.utils.checkpoint those would be copies that no function uses.
        ctx.parameters, ctx.versions = tensors, [t._version for t in tensors]
        ctx.save_for_backward(x, *kept.values())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        stack, num_layers = ctx.stack, ctx.stack.num_layers
        if ctx.versions != [t._version for t in ctx.parameters]:
            raise RuntimeError("a parameter was changed between the forward pass and its backward pass")
        z, tensors = dict(zip([0, *ctx.kept], ctx.saved_tensors)), ctx.parameters
        sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
        of_weights, of_readouts = sums[:num_layers], sums[num_layers : 2 * num_layers + 1]
        own = iter(zip(tensors[2 * num_layers + 1 :], sums[2 * num_layers + 1 :]))
        of_functions = [[], *([next(own) for _ in range(count)] for count in ctx.counts)]
        of_functions = [[pair for pair in pairs if pair[0].requires_grad] for pairs in of_functions]
        adj_t = ops.transpose(stack.adj)
        grad_y = grad_x = None
        for layer in range(num_layers, -1, -1):
            stack.restore(layer, z)
            z_l = z.pop(layer)
            linear = [(grad, stack.readouts[layer], of_readouts[layer])]
            if grad_y is not None:
                linear.append((grad_y, stack.weights[layer], of_weights[layer]))
            if layer == 0:
                grad_x = torch.empty_like(z_l) if ctx.needs_input_grad[3] else None
                stack.differentiate(layer, z_l, linear, [], grad_x)
                continue
            if grad_y is None:
                grad_y = torch.empty_like(z_l) if layer in ctx.kept else z_l
            stack.differentiate(layer, z_l, linear, of_functions[layer], grad_y)
            grad_y = _multiply_(adj_t, grad_y)
        return None, None, None, grad_x, *(total.to(t.dtype) for total, t in zip(sums, tensors))
