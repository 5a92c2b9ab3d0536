"""Losses of survival tasks against their formulas, term by term."""

from __future__ import annotations

import math

import pytest
import torch

from bigbag.nn.survival import CoxLoss, DiscreteSurvivalLoss, cox_loss


def efron(h: list[float], time: list[float], event: list[int]) -> float:
    """The formula with loops and plain exponentials."""
    total = 0.0
    for t in {time[i] for i in range(len(h)) if event[i]}:
        at_risk = sum(math.exp(h[j]) for j in range(len(h)) if time[j] >= t)
        tied = [h[j] for j in range(len(h)) if time[j] == t and event[j]]
        for rank in range(len(tied)):
            total += math.log(at_risk - rank / len(tied) * sum(map(math.exp, tied)))
        total -= sum(tied)
    return total / max(1, sum(event))


@pytest.mark.parametrize("seed", range(5))
def test_cox_with_ties_and_censoring(seed):
    torch.manual_seed(seed)
    h = torch.randn(40, dtype=torch.float64, requires_grad=True)
    time, event = torch.randint(1, 8, (40,)).float(), torch.randint(0, 2, (40,))
    assert cox_loss(h, time, event).item() == pytest.approx(efron(h.tolist(), time.tolist(), event.tolist()), rel=1e-12)
    assert torch.autograd.gradcheck(lambda v: cox_loss(v, time, event), h)
    moved = torch.randperm(40)
    torch.testing.assert_close(cox_loss(h[moved], time[moved], event[moved]), cox_loss(h, time, event))
    torch.testing.assert_close(cox_loss(h + 3.0, time, event), cox_loss(h, time, event))


def test_cox_of_draws_is_the_mean_over_them():
    torch.manual_seed(0)
    h = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    time, event = torch.randint(1, 6, (12,)).float(), torch.randint(0, 2, (12,))
    expected = sum(efron(draw, time.tolist(), event.tolist()) for draw in h.t().tolist()) / 5
    assert cox_loss(h, time, event).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda v: cox_loss(v, time, event), h)


def test_cox_by_hand():
    # The first of three dies at 1 among all, the last at 3 alone; the second is censored at 2.
    h = torch.log(torch.tensor([2.0, 3.0, 5.0]))
    loss = CoxLoss()(h, torch.tensor([[1.0, 1], [2, 0], [3, 1]]))
    assert loss.item() == pytest.approx((-math.log(2 / 10) - math.log(1.0)) / 2)


def test_cox_without_events_and_with_huge_risks():
    h = torch.randn(5, requires_grad=True)
    loss = cox_loss(h, torch.arange(5), torch.zeros(5))
    loss.backward()
    assert loss.item() == 0 and not h.grad.any()
    wild = torch.tensor([1e4, -1e4, 3.0, 3.0], requires_grad=True)
    loss = cox_loss(wild, torch.tensor([2.0, 1.0, 1.0, 3.0]), torch.tensor([1, 1, 1, 0]))
    loss.backward()
    # At 1: log(e^1e4 + ...) twice, less -1e4 + 3; at 2: nothing but the largest risk itself.
    assert loss.item() == pytest.approx((2e4 + 1e4 - 3) / 3) and torch.isfinite(wild.grad).all()
    assert cox_loss(torch.zeros(0), torch.zeros(0), torch.zeros(0)).item() == 0


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_discrete_likelihood_by_hand(alpha):
    torch.manual_seed(0)
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0.5, 1], [0.5, 0], [1.0, 1], [1.7, 0], [2.0, 1], [9.0, 0]])
    bins = [0, 0, 1, 1, 2, 2]  # edges at 1 and 2 belong to the bin above
    expected = 0.0
    for row, k, event in zip(torch.sigmoid(logits).tolist(), bins, labels[:, 1].tolist()):
        survival = [math.prod(1 - h for h in row[:j]) for j in range(4)]
        observed = -math.log(survival[k]) - math.log(row[k])
        expected += observed if event else -(1 - alpha) * math.log(survival[k + 1])
    loss = DiscreteSurvivalLoss([1.0, 2.0], alpha)
    assert loss(logits, labels).item() == pytest.approx(expected / 6)
    assert torch.autograd.gradcheck(lambda v: loss(v, labels), logits)
    assert not loss.state_dict()
