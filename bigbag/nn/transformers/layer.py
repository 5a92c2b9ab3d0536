"""The generic transformer layer on packs.

Row-wise parts (normalisation, projections, MLP) run in chunks that are computed again in the backward pass, but for the
last linear layer; kept per layer and row are its input, queries, keys and values, and the output of attention (and all
the rest where rows are few, :func:`~bigbag.nn.rows.by_rows`). With ``recompute`` only its input
and, of attention that compares all pairs, the output, which takes far longer to compute again than all the rest.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from bigbag.bags import Segments
from bigbag.nn.attention.base import SelfAttention
from bigbag.nn.rows import Projection, Widen, by_rows, chunk_rows
from bigbag.nn.take import take_of_bags
from bigbag.ops.registry import compute_dtype

_KEPT = [torch.ops.bigbag.masked_attention_cpu.default, torch.ops.bigbag.masked_attention_triton.default]


class Layer(torch.nn.Module):
    r"""Transformer layer around any attention, normalised first (Xiong et al. 2020, arXiv 2002.04745).

    ``Z = X + Att(LayerNorm(X))``; ``Y = Z + MLP(LayerNorm(Z))``, with linear layers where widths differ.

    Args:
        att_module: a :class:`~bigbag.nn.attention.SelfAttention`, or any module that takes ``(B, N, att_in_dim)`` and
            ``return_att`` (then only the padded form works).
        in_dim: input width.
        att_in_dim: input width of the attention.
        out_dim: output width; None: ``in_dim``.
        att_out_dim: output width of the attention; None: ``att_in_dim``.
        use_mlp: whether there is an MLP. Without one, ``norm2`` takes no part and is not trained.
        mlp_module: the MLP; it must work row by row. None: linear to 4 ``att_out_dim``, GELU, dropout, linear back,
            dropout.
        dropout: of that MLP.
    """

    recompute: bool = False
    """Keep only what costs most to compute again for the backward pass, and compute the rest again."""

    def __init__(
        self,
        att_module: torch.nn.Module,
        in_dim: int,
        att_in_dim: int,
        out_dim: int | None = None,
        att_out_dim: int | None = None,
        use_mlp: bool = True,
        mlp_module: torch.nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        out_dim = in_dim if out_dim is None else out_dim
        att_out_dim = att_in_dim if att_out_dim is None else att_out_dim
        self.att_module = att_module
        self.in_proj = linear_or_identity(in_dim, att_in_dim)
        self.att_proj = linear_or_identity(att_in_dim, att_out_dim)
        self.use_mlp = use_mlp
        if use_mlp:
            self.mlp_module: Any = mlp_of(att_out_dim, torch.nn.GELU(), dropout) if mlp_module is None else mlp_module
        self.out_proj = linear_or_identity(att_out_dim, out_dim)
        self.norm1 = torch.nn.LayerNorm(att_in_dim)
        self.norm2 = torch.nn.LayerNorm(att_out_dim).requires_grad_(use_mlp)

    def forward_packed(self, x: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        """``(T, in_dim)`` instances of a pack to ``(T, out_dim)``; ``kwargs`` are for the attention.

        ``x`` may be :class:`~bigbag.nn.rows.Windows`.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return self._compute(x, segments, **kwargs)
        if not self._attention.exact:
            return checkpoint(self._compute, x, segments, use_reentrant=False, **kwargs)
        kept = partial(create_selective_checkpoint_contexts, _KEPT)
        attended = checkpoint(self._attend, x, segments, use_reentrant=False, context_fn=kept, **kwargs)
        return self._leave(x, attended)

    def forward_first(self, x: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        """The rows of :meth:`forward_packed` that stand first in their bag, such as class tokens: ``(B, out_dim)``.

        No other row is computed, so exact attention costs O(T) instead of O(N^2) here. Every bag must have a row.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._compute_first, x, segments, use_reentrant=False, **kwargs)
        return self._compute_first(x, segments, **kwargs)

    def first_attention(self, x: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        """``(T, H)``: the attention of the first row of each bag to all its rows. Without gradient."""
        with torch.no_grad():
            return self._attention.first_attention(by_rows(self.entry, x), segments, **kwargs)

    @property
    def entry(self) -> torch.nn.Module:
        """Row-wise, from the input of the layer to what the attention sees."""
        return torch.nn.Sequential(Widen(self.norm1.weight.dtype), self.in_proj, self.norm1)

    @property
    def _attention(self) -> SelfAttention:
        assert isinstance(self.att_module, SelfAttention), f"{type(self.att_module).__name__} does not compute on packs"
        return self.att_module

    def _compute(self, x: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        return self._leave(x, self._attend(x, segments, **kwargs))

    def _attend(self, x: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        q, k, v = self._attention.project(x, enter=self.entry, padding=self._attention.padding(segments))
        return self._attention.attend(q, k, v, segments, **kwargs)

    def _compute_first(self, x: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        x, first = take_of_bags(x, segments)
        return self._leave(first, self._attention.attend_first(x, segments, self.entry, **kwargs))

    def _leave(self, x: Tensor, attended: Tensor) -> Tensor:
        linear = (self.in_proj, self.att_proj, self._attention.out_proj, self.out_proj)
        if not self.use_mlp and all(isinstance(module, torch.nn.Identity) for module in linear):
            # A sum has the same gradient for both, so nothing need be computed again.
            return (x + attended).to(compute_dtype(self.norm1.weight))
        modules = [self.in_proj, self.att_proj, self._attention.out_proj, self.out_proj]
        chunk = None
        if self.use_mlp:
            modules += [self.norm2, self.mlp_module]
            chunk = chunk_rows(attended, width=4 * self.norm2.normalized_shape[0])
        last = self._last
        if last is None:
            return by_rows(self._after, x, attended, modules=modules, chunk=chunk)
        projection = Projection(last.weight, last.bias, added=last is not self.out_proj)
        # The projection has gradients of its own: those of the function leave its weights out.
        parts = [
            part for module in modules for part in (module if isinstance(module, torch.nn.Sequential) else [module])
        ]
        modules = [part for part in parts if part is not last]
        return by_rows(self._before_last, x, attended, modules=modules, projection=projection, chunk=chunk)

    @property
    def _last(self) -> torch.nn.Linear | None:
        """The linear layer that comes last, if its product is the result, or what is added to the rows before it."""
        last = self.out_proj
        if isinstance(last, torch.nn.Identity):
            last = self._attention.out_proj
            if self.use_mlp:
                if not (_is_plain(self.mlp_module, torch.nn.Sequential) and len(self.mlp_module) > 1):
                    return None
                last, dropout = self.mlp_module[-2:]
                if not _is_plain(dropout, torch.nn.Dropout) or (dropout.p > 0 and dropout.training):
                    return None
        return last if isinstance(last, torch.nn.Linear) and _is_plain(last, torch.nn.Linear) else None

    def _before_last(self, x: Tensor, attended: Tensor) -> Any:
        """What :attr:`_last` takes, and what is added to its product, if anything is."""
        y, attended = self.att_proj(self._enter(x)), attended.to(compute_dtype(self.norm1.weight))
        no_projection = isinstance(self.out_proj, torch.nn.Identity)
        if no_projection and not self.use_mlp:
            return attended, y
        y = y + self._attention.out_proj(attended)
        return (self.mlp_module[:-2](self.norm2(y)), y) if no_projection else self._with_mlp(y)

    def _enter(self, x: Tensor) -> Tensor:
        return self.in_proj(x.to(self.norm1.weight.dtype))

    def _after(self, x: Tensor, attended: Tensor) -> Tensor:
        y = self.att_proj(self._enter(x)) + self._attention.out_proj(attended.to(compute_dtype(self.norm1.weight)))
        return self.out_proj(self._with_mlp(y)).to(compute_dtype(self.norm1.weight))

    def _with_mlp(self, y: Tensor) -> Tensor:
        return y + self.mlp_module(self.norm2(y)) if self.use_mlp else y

    def forward(self, X: Tensor, return_att: bool = False, mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Padded form.

        Args:
            X: ``(B, N, in_dim)``.
            return_att: also return the attention weights, which costs O(B H N^2) memory: for small bags.
            mask: ``(B, N)``, zero where there is no instance.
            kwargs: what the attention takes beside it.

        Returns:
            Y: ``(B, N, out_dim)``.
            att: ``(B, H, N, N)``, only if ``return_att``.
        """
        if mask is not None:
            kwargs["mask"] = mask
        if not isinstance(self.att_module, SelfAttention):
            found = self.att_module(self.norm1(self.in_proj(X)), return_att=return_att, **kwargs)
            y, *att = found if return_att else (found,)
            Y = self.out_proj(self._with_mlp(self.att_proj(self.in_proj(X)) + y))
            return (Y, *att) if return_att else Y
        bags, extras = self.att_module.pack(X, **kwargs)
        Y = bags.to_padded(self.forward_packed(bags.x, bags.segments, **extras))
        if not return_att:
            return Y
        return Y, self.att_module.padded_attention(bags.with_x(by_rows(self.entry, bags.x)), **extras)


def _is_plain(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether it is of this very kind, and nothing is hooked on its call: then its work may be done without it."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return type(module) is kind and not any(hooks)


def linear_or_identity(in_dim: int, out_dim: int) -> torch.nn.Module:
    """A linear layer where the widths differ."""
    return torch.nn.Identity() if in_dim == out_dim else torch.nn.Linear(in_dim, out_dim)


def mlp_of(dim: int, activation: torch.nn.Module, dropout: float) -> torch.nn.Sequential:
    """The MLP of a transformer layer: to four times the width and back."""
    return torch.nn.Sequential(
        torch.nn.Linear(dim, 4 * dim),
        activation,
        torch.nn.Dropout(dropout),
        torch.nn.Linear(4 * dim, dim),
        torch.nn.Dropout(dropout),
    )
