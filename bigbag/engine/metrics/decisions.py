"""How often decisions are right, from confusion matrices under any number of weightings of the bags at once."""

from __future__ import annotations

import numpy as np


def confusion(labels: np.ndarray, decided: np.ndarray, num_classes: int, weights: np.ndarray) -> np.ndarray:
    """Confusion matrices ``(R, K, K)``, weight of the bags by label and decision.

    Args:
        labels: ``(B,)`` integers below K.
        decided: ``(B,)`` integers below K.
        num_classes: K.
        weights: ``(R, B)``.
    """
    cell = labels.astype(np.int64) * num_classes + decided
    in_cell = cell[:, None] == np.arange(num_classes**2)
    return (weights @ in_cell.astype(np.float64)).reshape(-1, num_classes, num_classes)


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)


def recall(table: np.ndarray) -> np.ndarray:
    """Share of each class that is decided right, ``(R, K)``; NaN for an absent class."""
    return divide(np.diagonal(table, axis1=1, axis2=2), table.sum(2))


def f1(table: np.ndarray) -> np.ndarray:
    """``2 TP / (2 TP + FP + FN)`` of each class, ``(R, K)``; NaN for a class neither labelled nor decided."""
    return divide(2 * np.diagonal(table, axis1=1, axis2=2), table.sum(2) + table.sum(1))


def kappa(table: np.ndarray, quadratic: bool = False) -> np.ndarray:
    """Cohen's kappa, ``1 - sum(w O) / sum(w E)``: O the confusion, E that of independent margins.

    Args:
        table: ``(R, K, K)``.
        quadratic: ``w_ij = (i - j)^2``, for ordered classes; otherwise ``[i != j]``.

    Returns:
        ``(R,)``; NaN where labels and decisions are all of one class.

    Cohen, Educational and Psychological Measurement 1960; Psychological Bulletin 1968.
    """
    distance = np.subtract.outer(np.arange(table.shape[1]), np.arange(table.shape[1]))
    cost = distance**2 if quadratic else distance != 0
    expected = table.sum(2)[:, :, None] * table.sum(1)[:, None, :]
    return 1 - divide((cost * table).sum((1, 2)) * table.sum((1, 2)), (cost * expected).sum((1, 2)))


def mean_over(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean over the last axis of what is not NaN (NaN where nothing is), weighted where weights are given."""
    known = ~np.isnan(values)
    share = known if weights is None else known * weights
    return divide((np.where(known, values, 0.0) * share).sum(-1), share.sum(-1))
