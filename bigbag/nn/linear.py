"""Linear layers: of instances stored in any precision, of input widths yet unknown, and small stacks of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from bigbag.kernels.cpu.memory import huge_pages
from bigbag.nn.rows import row_chunks
from bigbag.ops.once import once_differentiable
from bigbag.ops.registry import compute_dtype

_PLAIN = (torch.nn.Linear.forward, torch.nn.Conv2d.forward)
_WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)


class LazyLinear(torch.nn.Module):
    """``torch.nn.Linear`` whose input width may be left out and is then taken from the first input.

    Args:
        in_features: input width, or None.
        out_features: output width.
        bias: whether there is a bias.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int = 512,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.module: torch.nn.Linear
        if in_features is None:
            self.module = torch.nn.LazyLinear(out_features, bias=bias, device=device, dtype=dtype)
        else:
            self.module = torch.nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        return self.module(x)

    def materialize(self, in_features: int) -> torch.nn.Linear:
        """The linear layer, its parameters created for ``in_features`` if they were not yet."""
        if isinstance(self.module, torch.nn.LazyLinear):
            weight = self.module.weight
            self.module(torch.zeros(1, in_features, device=weight.device, dtype=weight.dtype))
        return self.module


def readable(layer: Any) -> Any:
    """A linear layer or convolution whose weight an operator takes, instead of calling the layer.

    Hooks by which torch computes a weight before each call (``prune`` and the old ``weight_norm`` and ``spectral_norm``
    of ``torch.nn.utils``) are run here.

    Raises:
        ValueError: a layer in its place that computes something else, such as an adapter around it.
    """
    if type(layer).forward not in _PLAIN:
        raise ValueError(
            f"a {type(layer).__module__}.{type(layer).__name__} stands for a linear layer that is read, not called, so "
            "that what it adds to the weight would be lost: register a parametrization of the weight "
            "(torch.nn.utils.parametrize), or merge it first"
        )
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, _WEIGHT_HOOKS):
            hook(layer, ())
    return layer


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, in autocast's dtype where autocast is on (float64 weights excepted), else in that of ``weight``.

    Like ``torch.nn.functional.linear``, but x may be stored in another precision: it is converted chunk by chunk,
    forward and backward, never as a whole. FLOPs: 2 T P D forward, as much for each gradient. It keeps x as it is.

    Args:
        x: ``(T, P)`` instances.
        weight: ``(D, P)``.
        bias: ``(D,)`` or None.

    Returns:
        ``(T, D)``.
    """
    return _Project.apply(x, weight, bias, compute_dtype(weight), False)


def gelu_project(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``gelu(h) W^T + b``, in the dtypes of :func:`project`; it keeps h alone.

    gelu(h) and its gradient exist for a block of rows at a time: fresh memory for a large tensor costs more time than
    the activation. FLOPs: 2 T P D forward, twice as much backward.

    Args:
        h: ``(T, P)`` the layer before it, not yet activated.
        weight: ``(D, P)``.
        bias: ``(D,)``.

    Returns:
        ``(T, D)``.
    """
    return _Project.apply(h, weight, bias, compute_dtype(weight), True)


def linear_error(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, gram: Tensor | None = None) -> Tensor:
    """``|x - (h W^T + b)|^2`` of each row: how far a linear layer is from its targets, without its ``(T, P)`` output.

    With ``x' = x - b`` and ``u = x' W`` it is ``|x'|^2 + <h, h W^T W - 2 u>``, and its gradient to h is
    ``2 (h W^T W - u)``: neither needs a product with W again. FLOPs: 2 T P K forward and as many backward, beside
    4 T K^2 (a layer and squares take 2 and 4 T P K). It keeps x, h and ``(T, K)`` numbers more.

    Terms cancel where the layer is near its targets: the rounding of squares one by one is 1 / (1 - R^2) times smaller,
    R^2 the share of ``|x'|^2`` that the layer explains. So it is for products in float32 or float64; where they are
    less precise (:func:`are_precise`), or T <= 2 K rows are too few for 4 P K^2 that they share (:func:`share_gram`),
    errors are formed: 2 T P K forward and 4 backward, or 6 where T is more than a chunk, each formed anew.

    Args:
        x: ``(T, P)``, in any precision.
        h: ``(T, K)``.
        weight: ``(P, K)``, float32 or float64.
        bias: ``(P,)``.
        gram: ``W^T W`` ``(K, K)``, for callers that have it, as those who come with a chunk of rows at a time.

    Returns:
        ``(T,)``.
    """
    if gram is None and not share_gram(x, weight):
        return _LinearErrorByRows.apply(x, h, weight, bias, compute_dtype(weight))
    with torch.no_grad():
        gram = weight.t() @ weight if gram is None else gram
    return _LinearError.apply(x, h, weight, bias, gram)


def share_gram(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`linear_error` goes by ``W^T W`` for these rows."""
    return len(x) > 2 * weight.shape[1] and are_precise(weight)


def are_precise(parameter: Tensor) -> bool:
    """Whether products with it are those of float32 at least: not in 16 bits, nor of factors rounded to TF32."""
    dtype = compute_dtype(parameter)
    backend: Any = torch.backends.cuda if parameter.is_cuda else torch.backends.mkldnn
    unrounded = backend.matmul.fp32_precision in ("none", "ieee")
    return dtype == torch.float64 or (dtype == torch.float32 and unrounded)


class _LinearError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, gram: Tensor) -> Tensor:
        out, slope = h.new_empty(len(h)), huge_pages(torch.empty_like(h))
        for rows in row_chunks(x):
            centred = x[rows].to(weight.dtype) - bias
            u, own = centred @ weight, slope[rows]
            torch.mm(h[rows], gram, out=own)
            own -= u
            out[rows] = torch.linalg.vecdot(centred, centred) + torch.linalg.vecdot(h[rows], own - u)
        ctx.save_for_backward(x, h, weight, bias, slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor, None]:
        x, h, weight, bias, slope = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        # Sums over the rows, each times its gradient: of x h^T, of h h^T, of x, and of h.
        cross, gram = weight.new_zeros(weight.shape), weight.new_zeros(h.shape[1], h.shape[1])
        sum_x, sum_h = torch.zeros_like(bias), weight.new_zeros(h.shape[1])
        for rows in row_chunks(x):
            wide, scaled = x[rows].to(weight.dtype), h[rows] * grad[rows, None]
            cross += wide.t() @ scaled
            gram += h[rows].t() @ scaled
            sum_x += grad[rows] @ wide
            sum_h += scaled.sum(0)
            if grad_x is not None:
                grad_x[rows] = (2 * grad[rows, None]) * (wide - torch.addmm(bias, h[rows], weight.t()))
        grad_weight = 2 * (weight @ gram - cross + torch.outer(bias, sum_h))
        grad_bias = 2 * (weight @ sum_h - sum_x + bias * grad.sum())
        return grad_x, slope * (2 * grad)[:, None], grad_weight, grad_bias, None


class _LinearErrorByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        squares, chunks = weight.new_empty(len(x)), row_chunks(x)
        low = [t.to(dtype) for t in (weight, bias)]
        for rows in chunks:
            errors = _errors(x[rows], h[rows].to(dtype), *low)
            wide = errors.to(weight.dtype)
            squares[rows] = torch.linalg.vecdot(wide, wide)
        # Those of a single chunk, as callers with a chunk at a time have, are kept.
        kept = errors.to(dtype) if len(chunks) == 1 else None
        ctx.save_for_backward(x, h, weight, bias, kept)
        ctx.dtype = dtype
        return squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor, None]:
        x, h, weight, bias, kept = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_h = huge_pages(torch.empty_like(h))
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        low, low_bias = (t.to(ctx.dtype) for t in (weight, bias))
        for rows in row_chunks(x):
            own, factor = h[rows].to(ctx.dtype), (-2 * grad[rows]).to(ctx.dtype)
            errors = _errors(x[rows], own, low, low_bias).to(ctx.dtype) if kept is None else kept
            grad_h[rows] = (errors @ low) * factor[:, None]
            grad_weight += errors.t() @ (own * factor[:, None])
            grad_bias += errors.t() @ factor
            if grad_x is not None:
                grad_x[rows] = errors * -factor[:, None]
        return grad_x, grad_h, grad_weight, grad_bias, None


def _errors(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x - (h W^T + b)``, in the wider dtype."""
    out = torch.addmm(bias, h, weight.t())
    return torch.sub(x, out, out=out) if x.dtype == out.dtype else x - out


def _chunks(x: Tensor, dtype: torch.dtype, gelu: bool) -> list[slice]:
    """Rows to compute together: on a CPU, thin products are a fifth faster a block of rows at a time."""
    if x.device.type != "cpu" and x.dtype == dtype and not gelu:
        return [slice(None)]
    return row_chunks(x)


def _converted(rows: Tensor, dtype: torch.dtype) -> Tensor:
    # Between 16-bit formats torch converts element by element; by way of float32 both steps are vectorised.
    by_way = rows.dtype != dtype and {rows.dtype, dtype} == {torch.float16, torch.bfloat16}
    return (rows.float() if by_way else rows).to(dtype)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gelu, ctx.bias_dtype = gelu, None if bias is None else bias.dtype
        out, w_t = huge_pages(x.new_empty(len(x), weight.shape[0], dtype=dtype)), weight.to(dtype).t()
        low = None if bias is None else bias.to(dtype)
        for chunk in _chunks(x, dtype, gelu):
            rows = _converted(x[chunk], dtype)
            rows = F.gelu(rows) if gelu else rows
            if low is None:
                torch.mm(rows, w_t, out=out[chunk])
            else:
                torch.addmm(low, rows, w_t, out=out[chunk])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad_x = huge_pages(torch.empty_like(x)) if ctx.needs_input_grad[0] else None
        grad_weight, w = None, weight.to(grad.dtype)
        chunks = _chunks(x, grad.dtype, ctx.gelu)
        for chunk in chunks:
            rows = _converted(x[chunk], grad.dtype)
            if ctx.needs_input_grad[1]:
                entered = F.gelu(rows) if ctx.gelu else rows
                # Transposed where there are many rows: the product of a tall matrix's columns with few others is
                # faster than that of the few with it.
                part = grad.t() @ entered if len(chunks) == 1 else entered.t() @ grad[chunk]
                grad_weight = part.to(weight.dtype) if grad_weight is None else grad_weight.add_(part)
            if grad_x is not None:
                grad_rows = grad[chunk] @ w
                grad_x[chunk] = torch.ops.aten.gelu_backward(grad_rows, rows) if ctx.gelu else grad_rows
        if grad_weight is not None and len(chunks) > 1:
            grad_weight = grad_weight.t().contiguous()
        grad_bias = grad.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None


_ACTIVATIONS = {"relu": torch.nn.ReLU, "sigmoid": torch.nn.Sigmoid, "tanh": torch.nn.Tanh, "gelu": torch.nn.GELU}


class MLP(torch.nn.Module):
    """Multi-layer perceptron: ``x <- dropout(act_i(W_i x + b_i))`` for each layer i.

    Args:
        input_size: input width.
        linear_sizes: output width of each layer.
        activations: activation after each layer: "relu", "sigmoid", "tanh", "gelu" or "none".
        dropout: probability of zeroing a unit after each activation, in training.
        layer_norm: normalise each input to mean 0 and variance 1 over its features first (Ba et al. 2016), so that what
            all instances share does not drown what tells them apart.

    Raises:
        ValueError: an unknown activation, or not one activation per layer.
    """

    def __init__(
        self,
        input_size: int = 512,
        linear_sizes: Sequence[int] = (100, 50),
        activations: Sequence[str] = ("relu", "relu"),
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        if len(linear_sizes) != len(activations):
            raise ValueError(f"MLP: {len(linear_sizes)} linear_sizes for {len(activations)} activations; give one each")
        self.input_size = input_size
        self.linear_sizes = list(linear_sizes)
        self.activations = list(activations)
        self.norm = torch.nn.LayerNorm(input_size) if layer_norm else torch.nn.Identity()
        layers: list[torch.nn.Module] = []
        for width, size, activation in zip([input_size, *linear_sizes], linear_sizes, activations):
            layers.append(torch.nn.Linear(width, size))
            if activation.lower() != "none":
                if activation not in _ACTIVATIONS:
                    raise ValueError(f"MLP: activation {activation!r}; expected one of {[*_ACTIVATIONS, 'none']}")
                layers.append(_ACTIVATIONS[activation]())
            if dropout > 0:
                layers.append(torch.nn.Dropout(dropout))
        self.net = torch.nn.Sequential(*layers)

    def forward(self, X: Tensor) -> Tensor:
        """``(..., input_size)`` to ``(..., linear_sizes[-1])``."""
        return self.net(self.norm(X))


def get_feat_dim(feat_ext: torch.nn.Module, input_shape: tuple[int, ...]) -> int:
    """Width of the features that ``feat_ext`` makes of one instance of ``input_shape``."""
    parameter = next(feat_ext.parameters(), None)
    dtype, device = (torch.float32, None) if parameter is None else (parameter.dtype, parameter.device)
    with torch.no_grad():
        return feat_ext(torch.zeros((1, *input_shape), dtype=dtype, device=device)).shape[-1]
