"""How well scores put positives above negatives, under any number of weightings of the bags at once."""

from __future__ import annotations

import numpy as np


def ranking(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision, exact, ties included.

    With weights ``w``, positives ``p`` and negatives ``n``::

        AUROC = sum_pn w_p w_n ([s_p > s_n] + [s_p = s_n] / 2) / sum_pn w_p w_n
        AP    = sum_p w_p precision(s_p) / sum_p w_p,  precision(s) = share of positives among what is scored >= s

    Args:
        positive: ``(B,)`` bool.
        scores: ``(B,)``, larger meaning more positive.
        weights: ``(R, B)``, 0 or more: one weighting a row.

    Returns:
        both ``(R,)``; NaN where a weighting has no positive or no negative bag.
    """
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    first_of_ties = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(ranked) else np.zeros(0, np.int64)
    of_positive = np.add.reduceat((weights * positive)[:, order], first_of_ties, axis=1)
    of_negative = np.add.reduceat((weights * ~positive)[:, order], first_of_ties, axis=1)
    num_positive, num_negative = of_positive.sum(1), of_negative.sum(1)
    below = np.cumsum(of_negative, axis=1) - of_negative
    with np.errstate(divide="ignore", invalid="ignore"):
        auroc = (of_positive * (below + of_negative / 2)).sum(1) / (num_positive * num_negative)
        true = num_positive[:, None] - np.cumsum(of_positive, axis=1) + of_positive
        precision = true / (true + num_negative[:, None] - below)
        average = np.where(of_positive > 0, of_positive * precision, 0.0).sum(1) / num_positive
    return auroc, np.where(num_negative > 0, average, np.nan)
