"""The generic stack of transformer layers on packs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.nn.encoded import Encoded
from bigbag.nn.rows import are_few, by_rows


class Encoder(torch.nn.Module):
    r"""A stack of transformer layers.

    ``X_l = Layer_l(X_{l-1})`` or, with ``add_self``, ``X_l = Layer_l(X_{l-1}) + X_0``.

    Args:
        layers: the layers.
        add_self: add the input of the stack to the output of every layer; when it runs, their widths must agree.
    """

    recompute: bool = False
    """Keep only the inputs of the layers for the backward pass, and compute the rest again."""

    def __init__(self, layers: torch.nn.ModuleList, add_self: bool = False) -> None:
        super().__init__()
        self.add_self = add_self
        self.layers = layers
        self.norm: torch.nn.Module = torch.nn.Identity()

    def forward_packed(self, x: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        """``(T, in_dim)`` instances of a pack to ``(T, out_dim)``; ``kwargs`` are for the attentions."""
        return self._norm(self._through(x, segments, len(self.layers), **kwargs))

    def forward_encoded(self, x: Tensor, segments: Segments, **kwargs: Any) -> Tensor | Encoded:
        """As :meth:`forward_packed`, for pools: where rows are many, normalised a chunk at a time, when needed."""
        y = self._through(x, segments, len(self.layers), **kwargs)
        return self._norm(y) if are_few(y) else Encoded(y, self.norm)

    def forward_first(self, x: Tensor, segments: Segments, return_att: bool = False, **kwargs: Any) -> Any:
        """The rows of :meth:`forward_packed` that stand first in their bag, such as class tokens.

        The last layer computes no other row. Every bag must have one.

        Args:
            x: ``(T, in_dim)``.
            segments: how the rows are cut into B bags.
            return_att: also return the attention of those rows in the last layer.
            kwargs: for the attentions.

        Returns:
            ``(B, out_dim)`` and, if ``return_att``, ``(T, H)``.
        """
        y = self._through(x, segments, len(self.layers) - 1, **kwargs)
        last = self._layers[-1]
        first = last.forward_first(y, segments, **kwargs)
        if self.add_self:
            first = self._plus_input(first, x[segments.offsets[:-1]])
        first = self._norm(first)
        return (first, last.first_attention(y, segments, **kwargs)) if return_att else first

    def _through(self, x: Tensor, segments: Segments, num_layers: int, **kwargs: Any) -> Tensor:
        y = x
        for layer in self._layers[:num_layers]:
            y = layer.forward_packed(y, segments, **kwargs)
            y = self._plus_input(y, x).to(y.dtype) if self.add_self else y
        return y

    def _plus_input(self, y: Tensor, x: Tensor) -> Tensor:
        if y.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"{type(self).__name__}: add_self adds the input, {x.shape[-1]} wide, to the output of each layer, but "
                f"one is {y.shape[-1]} wide; expected att_dim = in_dim = out_dim, or add_self=False"
            )
        return y + x

    @property
    def _layers(self) -> list[Any]:
        """The layers, told whether to recompute."""
        layers: list[Any] = list(self.layers)
        for layer in layers:
            layer.recompute = self.recompute
        return layers

    def _norm(self, y: Tensor) -> Tensor:
        norm = self.norm
        if isinstance(norm, torch.nn.Identity):
            return y
        # Not y itself in the function, which lives until the backward pass is over.
        inside, outside = next(norm.parameters()).dtype, y.dtype
        return by_rows(lambda rows: norm(rows.to(inside)).to(outside), y, modules=[norm])

    def forward(self, X: Tensor, return_att: bool = False, mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Padded form.

        Args:
            X: ``(B, N, in_dim)``.
            return_att: also return the attention weights, which costs O(B H N^2) memory per layer: for small bags.
            mask: ``(B, N)``, zero where there is no instance.
            kwargs: what the layers take beside it.

        Returns:
            Y: ``(B, N, out_dim)``.
            att: ``(num_layers, B, H, N, N)``, only if ``return_att``.
        """
        Y, atts = X, []
        for layer in self._layers:
            Y = layer(Y, return_att=return_att, mask=mask, **kwargs)
            if return_att:
                Y, att = Y
                atts.append(att)
            Y = self._plus_input(Y, X) if self.add_self else Y
        Y = self._norm(Y)
        return (Y, torch.stack(atts)) if return_att else Y


class LayerStack(Encoder):
    """A stack of layers of one kind, ``att_dim`` wide between them, normalised at the end.

    Args:
        layer: makes a layer from its input and output width.
        in_dim: input width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width between the layers.
        n_layers: layers.
        add_self: as in :class:`Encoder`.
    """

    def __init__(
        self,
        layer: Callable[[int, int], torch.nn.Module],
        in_dim: int,
        out_dim: int | None,
        att_dim: int,
        n_layers: int,
        add_self: bool,
    ) -> None:
        out_dim = in_dim if out_dim is None else out_dim
        super().__init__(
            torch.nn.ModuleList(layer(*pair) for pair in layer_widths(in_dim, att_dim, out_dim, n_layers)), add_self
        )
        self.norm = torch.nn.LayerNorm(out_dim)


def layer_widths(in_dim: int, att_dim: int, out_dim: int, n_layers: int) -> list[tuple[int, int]]:
    """Input and output width of each layer of a stack that is ``att_dim`` wide inside."""
    widths = [in_dim, *[att_dim] * (n_layers - 1), out_dim]
    return list(zip(widths, widths[1:]))
