"""Losses of survival tasks, whose labels are pairs ``(time, event)``: event 1 = observed, 0 = censored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def cox_loss(log_risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    r"""Negative log partial likelihood of Cox's model, Efron's treatment of ties, mean over the events.

    With the events ``D(t)`` at time t, ``d`` of them, and the risk set ``R(t) = {j : time_j >= t}``::

        L = 1/E sum_t [ sum_{l < d} log( sum_{R(t)} exp(h_j) - l/d sum_{D(t)} exp(h_j) ) - sum_{D(t)} h_j ]

    Zero, with zero gradient, where there is no event. Computed in float64 at O(B log B); no exponential overflows.
    Several log-risks of a bag, such as draws of a stochastic model, are as many models: ``L`` is the mean over them,
    each with risk sets of its own.

    Args:
        log_risk: ``(B,)`` or ``(B, S)``, larger for those expected to have the event earlier.
        time: ``(B,)``.
        event: ``(B,)``, nonzero = the event was observed at ``time``, 0 = censored then.

    Cox, J. R. Stat. Soc. B 1972; Efron, J. Am. Stat. Assoc. 1977.
    """
    if log_risk.numel() == 0:
        return log_risk.sum()
    order = torch.argsort(time, descending=True, stable=True)
    h, observed = log_risk.double()[order].reshape(len(order), -1), (event[order] != 0).double()[:, None]
    _, group, counts = torch.unique_consecutive(time[order], return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    log_at_risk = torch.logcumsumexp(h, 0)[last][group]
    zeros = h.new_zeros(len(counts), h.shape[1])
    # Share of the risk set's exponentials that the events of a time make up: at most 1, so nothing overflows.
    share = zeros.index_add(0, group, observed * torch.exp(h - log_at_risk))[group]
    num_events = zeros[:, :1].index_add(0, group, observed)[group]
    before = observed.cumsum(0) - observed
    rank = before - before[last - counts + 1][group]
    removed = rank / num_events.clamp(min=1) * share
    terms = observed * (log_at_risk + torch.log1p(-(observed * removed)) - h)
    return terms.mean(1).sum() / observed.sum().clamp(min=1)


class CoxLoss(torch.nn.Module):
    """:func:`cox_loss` of ``(B,)`` log-risks, or ``(B, S)`` draws of them, against ``(B, 2)`` labels ``(time, event)``.

    The bags are compared with each other, so the training loop evaluates it over all bags of a global step at once,
    whatever packs and ranks they are on (:mod:`bigbag.engine.step`).

    Attributes:
        stand_in: called in place of the loss, by the training loop; None: the loss itself.
    """

    spans_step: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.stand_in: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, Y_pred: Tensor, Y: Tensor) -> Tensor:
        if self.stand_in is not None:
            return self.stand_in(Y_pred, Y)
        return cox_loss(Y_pred, Y[:, 0], Y[:, 1])


class DiscreteSurvivalLoss(torch.nn.Module):
    r"""Negative log-likelihood over K time bins (Zadeh and Schmid, IEEE TPAMI 2020), mean over the bags.

    With hazards ``h_k = sigmoid(Y_pred_k)``, survival ``S_k = prod_{j <= k} (1 - h_j)``, ``S_{-1} = 1``, and k the bin
    of the bag's time::

        observed: -log S_{k-1} - log h_k        censored: -(1 - alpha) log S_k

    ``alpha`` weighs the censored bags down, as in MCAT (Chen et al., ICCV 2021) and Patch-GCN. Logarithms are taken of
    logits, so none has to be kept from 0 by an epsilon.

    Args:
        time_bins: the K - 1 inner edges, ascending; a time on an edge is in the bin above it.
        alpha: 0 is the plain likelihood.
    """

    def __init__(self, time_bins: Sequence[float], alpha: float = 0.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.time_bins: Tensor
        self.register_buffer("time_bins", torch.tensor(list(time_bins), dtype=torch.float32), persistent=False)

    def forward(self, Y_pred: Tensor, Y: Tensor) -> Tensor:
        time, event = Y[:, 0].float().contiguous(), Y[:, 1] != 0
        bins = torch.bucketize(time, self.time_bins.to(time.device), right=True)[:, None]
        log_hazard = logsigmoid(Y_pred).gather(1, bins).squeeze(1)
        log_survival = logsigmoid(-Y_pred).cumsum(1)  # of surviving the bin and all before it
        log_survived = log_survival.gather(1, bins).squeeze(1)
        log_before = torch.where(bins.squeeze(1) > 0, log_survival.gather(1, (bins - 1).clamp(min=0)).squeeze(1), 0.0)
        return -torch.where(event, log_before + log_hazard, (1 - self.alpha) * log_survived).mean()
