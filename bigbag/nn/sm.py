"""The Sm operator: features smoothed over the graph of their bag, by steps or exactly."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from bigbag import ops
from bigbag.adjacency import Adjacency
from bigbag.bags import PackedBags


class _Smoothing(torch.nn.Module):
    """The coefficient that both forms of Sm share, and the padded form. A subclass defines :meth:`forward_packed`."""

    coef: float | Tensor

    def __init__(self, alpha: float | str = "trainable") -> None:
        super().__init__()
        self.alpha = alpha
        if isinstance(alpha, float) and 0.0 <= alpha < 1.0:
            self.coef = 1.0 / (1.0 - alpha) - 1.0
        elif alpha == "trainable":
            self.coef = torch.nn.Parameter(torch.tensor(1.0))
        else:
            raise ValueError(f"[{type(self).__name__}] alpha must be a float in [0, 1) or 'trainable', got {alpha!r}")

    def forward_packed(self, f: Tensor, adj: Adjacency, adjoint: bool = False) -> Tensor:
        """Smooth the instances of a pack.

        Args:
            f: ``(T, ...)``.
            adj: the graph over the T instances.
            adjoint: apply the adjoint map, that is the same with the transpose of A.

        Returns:
            ``(T, ...)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward_packed(f, adj)")

    def forward(self, f: Tensor, adj_mat: Tensor) -> Tensor:
        """``(B, N, ...)`` and its adjacency ``(B, N, N)``, dense or sparse COO, to ``(B, N, ...)``."""
        bags = PackedBags.from_padded(f, adj=adj_mat)
        assert bags.adj is not None
        return bags.to_padded(self.forward_packed(bags.x, bags.adj))


class ApproxSm(_Smoothing):
    r"""Sm by steps: ``g_0 = f``, ``g_t = (1 - a) f + a A g_{t-1}``, with ``a = 1 / (1 + coef)``.

    ``coef`` is a parameter that starts at 1 or, for a float ``alpha``, the constant ``alpha / (1 - alpha)``: so the
    weight of the neighbours is ``a = 1 - alpha``, as in torchmil (the paper calls that weight alpha).
    Memory does not grow with the number of steps; see :func:`bigbag.ops.smooth`.

    Args:
        alpha: a float in [0, 1), or "trainable".
        num_steps: number of steps.

    Raises:
        ValueError: another ``alpha``.

    Castro-Macias et al., Sm: enhanced localization in multiple instance learning for medical imaging classification,
    NeurIPS 2024, arXiv 2410.03276.
    """

    def __init__(self, alpha: float | str = "trainable", num_steps: int = 10) -> None:
        super().__init__(alpha)
        self.num_steps = num_steps

    def forward_packed(self, f: Tensor, adj: Adjacency, adjoint: bool = False) -> Tensor:
        return ops.smooth(ops.transpose(adj) if adjoint else adj, f, 1.0 / (1.0 + self.coef), self.num_steps)


class ExactSm(_Smoothing):
    r"""Sm in the limit: ``g = (I + coef (I - A))^-1 f``, by conjugate gradients; no ``(N, N)`` matrix is formed.

    The graph should be symmetric, with eigenvalues up to 1 (symmetrically normalised); any other takes
    :func:`bigbag.ops.smooth_exact_directed`, which is slower.

    ``coef`` is a parameter that starts at 1 or, for a float ``alpha``, the constant ``alpha / (1 - alpha)``. Memory and
    time: see :func:`bigbag.ops.smooth_exact`.

    Args:
        alpha: a float in [0, 1), or "trainable".

    Raises:
        ValueError: another ``alpha``.

    Castro-Macias et al., Sm: enhanced localization in multiple instance learning for medical imaging classification,
    NeurIPS 2024, arXiv 2410.03276.
    """

    def forward_packed(self, f: Tensor, adj: Adjacency, adjoint: bool = False) -> Tensor:
        adj = ops.marked_symmetric(adj)
        if adj.symmetric:
            # Whether the matrix is positive definite shows in the solution itself, at no cost.
            with contextlib.suppress(ops.IndefiniteSystem):
                return ops.smooth_exact(adj, f, self.coef)
        return ops.smooth_exact_directed(ops.transpose(adj) if adjoint else adj, f, self.coef)


class Sm(torch.nn.Module):
    """The Sm operator in one of its two forms, :class:`ApproxSm` or :class:`ExactSm`.

    Args:
        alpha: a float in [0, 1), or "trainable".
        num_steps: number of steps of the approximate form.
        mode: "approx" or "exact".

    Raises:
        ValueError: an unknown mode or ``alpha``.
    """

    def __init__(self, alpha: float | str = "trainable", num_steps: int = 10, mode: str = "approx") -> None:
        super().__init__()
        self.alpha = alpha
        self.num_steps = num_steps
        self.mode = mode
        self.sm: _Smoothing
        if mode == "approx":
            self.sm = ApproxSm(alpha=alpha, num_steps=num_steps)
        elif mode == "exact":
            self.sm = ExactSm(alpha=alpha)
        else:
            raise ValueError(f"[Sm] mode must be 'approx' or 'exact', got {mode!r}")

    def forward_packed(self, f: Tensor, adj: Adjacency, adjoint: bool = False) -> Tensor:
        """``(T, ...)`` and the graph of a pack to ``(T, ...)``; ``adjoint`` applies the adjoint map."""
        return self.sm.forward_packed(f, adj, adjoint)

    def forward(self, f: Tensor, adj_mat: Tensor) -> Tensor:
        """``(B, N, ...)`` and its adjacency ``(B, N, N)``, dense or sparse COO, to ``(B, N, ...)``."""
        return self.sm(f, adj_mat)
