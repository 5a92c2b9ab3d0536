"""Whether probabilities mean what they say: Brier score, expected calibration error, reliability curve."""

from __future__ import annotations

import numpy as np

from bigbag.engine.metrics.decisions import divide

NUM_BINS = 15


def brier(outcomes: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean squared difference of probability and outcome, ``(R,)``; for K classes the sum over the classes.

    Args:
        outcomes: ``(B,)`` 0 or 1; ``(B, K)`` one-hot.
        probabilities: of the same shape.
        weights: ``(R, B)``.

    Brier, Monthly Weather Review 1950.
    """
    error = ((probabilities - outcomes) ** 2).reshape(len(outcomes), -1).sum(1)
    return divide(weights @ error, weights.sum(1))


def calibration_error(outcomes: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error, ``sum_b n_b / n |mean outcome - mean probability|`` over 15 bins, ``(R,)``.

    Bin b holds the probabilities from b / 15 up to, and without, (b + 1) / 15; the last holds 1 too.

    Args:
        outcomes: ``(B,)`` 0 or 1: the label (binary), or whether the most probable class is right (multi-class).
        probabilities: ``(B,)`` of the outcome 1.
        weights: ``(R, B)``.

    Guo et al., ICML 2017.
    """
    excess = (outcomes - probabilities)[:, None] * _in_bin(probabilities, NUM_BINS)
    return divide(np.abs(weights @ excess).sum(1), weights.sum(1))


def reliability_curve(
    outcomes: np.ndarray, probabilities: np.ndarray, num_bins: int = NUM_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probability, share of outcomes 1 and number of bags of each bin; empty bins have NaN, NaN, 0.

    Args:
        outcomes: ``(B,)`` 0 or 1.
        probabilities: ``(B,)``.
        num_bins: bins of equal width, as those of :func:`calibration_error`.
    """
    inside = _in_bin(np.asarray(probabilities, dtype=np.float64), num_bins)
    count = inside.sum(0)
    return divide(probabilities @ inside, count), divide(np.asarray(outcomes) @ inside, count), count.astype(np.int64)


def _in_bin(probabilities: np.ndarray, num_bins: int) -> np.ndarray:
    """``(B, num_bins)`` float64, 1 where the bag is in the bin."""
    edges = np.linspace(0, 1, num_bins + 1)
    place = np.clip(np.searchsorted(edges, probabilities, side="right") - 1, 0, num_bins - 1)
    return (place[:, None] == np.arange(num_bins)).astype(np.float64)
