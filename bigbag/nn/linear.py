"""Linear layers: of instances stored in any precision, of input widths yet unknown, and small stacks of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbag.kernels.cpu.memory import huge_pages
from bigbag.nn.rows import _ROWS


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


_PROJECTED_ROWS = 8192


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
    dtype = _compute_dtype(x, weight)
    return _Project.apply(x, weight, None if bias is None else bias.to(dtype), dtype)


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
    dtype = _compute_dtype(h, weight)
    return _GeluProject.apply(h, weight.to(dtype), bias.to(dtype))


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _chunks(x: Tensor, rows: int) -> list[slice]:
    step = max(1, rows)
    return [slice(start, start + step) for start in range(0, len(x), step)]


def _converted(rows: Tensor, dtype: torch.dtype) -> Tensor:
    # Between 16-bit formats torch converts element by element; by way of float32 both steps are vectorised.
    by_way = rows.dtype != dtype and {rows.dtype, dtype} == {torch.float16, torch.bfloat16}
    return (rows.float() if by_way else rows).to(dtype)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        out, w = huge_pages(x.new_empty(len(x), weight.shape[0], dtype=dtype)), weight.to(dtype)
        for chunk in _chunks(x, len(x) if x.dtype == dtype else _PROJECTED_ROWS):
            rows = _converted(x[chunk], dtype)
            if bias is None:
                torch.mm(rows, w.t(), out=out[chunk])
            else:
                torch.addmm(bias, rows, w.t(), out=out[chunk])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = huge_pages(torch.empty_like(x)) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(x, len(x) if x.dtype == grad.dtype else _PROJECTED_ROWS):
            if grad_weight is not None:
                grad_weight += grad[chunk].t() @ _converted(x[chunk], grad.dtype)
            if grad_x is not None:
                grad_x[chunk] = grad[chunk] @ weight.to(grad.dtype)
        return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None, None


class _GeluProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        out = huge_pages(h.new_empty(len(h), weight.shape[0], dtype=weight.dtype))
        for chunk in _chunks(h, _ROWS.get(h.device.type, _ROWS["cuda"])):
            torch.addmm(bias, F.gelu(_converted(h[chunk], weight.dtype)), weight.t(), out=out[chunk])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        h, weight = ctx.saved_tensors
        grad_h = huge_pages(torch.empty_like(h)) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(h, _ROWS.get(h.device.type, _ROWS["cuda"])):
            rows = _converted(h[chunk], weight.dtype)
            if grad_weight is not None:
                grad_weight += grad[chunk].t() @ F.gelu(rows)
            if grad_h is not None:
                grad_h[chunk] = torch.ops.aten.gelu_backward(grad[chunk] @ weight, rows)
        return grad_h, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None


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
