"""Whether risks follow survival: Harrell's and Uno's concordance, under any number of weightings of the bags."""

from __future__ import annotations

import numpy as np

from bigbag.engine.metrics.decisions import divide

_BLOCK_PAIRS = 1 << 22


def concordance_index(time: np.ndarray, event: np.ndarray, risk: np.ndarray, ipcw: bool = False) -> float | None:
    """Harrell's c-index, or Uno's (``ipcw``), of B bags: see :func:`concordance`; None where it is undefined."""
    time, event, risk = np.asarray(time), np.asarray(event), np.asarray(risk)
    pair_weights = inverse_censoring(time, event) if ipcw else None
    value = float(concordance(time, event, risk, np.ones((1, len(time))), pair_weights)[0])
    return None if np.isnan(value) else value


def concordance(
    time: np.ndarray, event: np.ndarray, risk: np.ndarray, weights: np.ndarray, pair_weights: np.ndarray | None = None
) -> np.ndarray:
    """The share of comparable pairs in which the bag with the earlier event has the higher risk, ``(R,)``.

    The pair (i, j) is comparable where i has an event and j is known to have lived longer: ``t_i < t_j``, or
    ``t_i == t_j`` and j is censored. Two events at one time are not comparable. Equal risks count as half. 0.5 is
    chance, 1 perfect. O(R B) memory, O(R B E) time for E events, as matrix products.

    Args:
        time: ``(B,)``.
        event: ``(B,)``, 0 = censored.
        risk: ``(B,)``, higher meaning an earlier event.
        weights: ``(R, B)``; a pair has the product of its bags' weights.
        pair_weights: ``(B,)``, a factor for the pairs of each event; None: 1 (Harrell). With :func:`inverse_censoring`
            it is Uno's index.

    Returns:
        ``(R,)``; NaN where no pair is comparable, or a pair weight is infinite.

    Harrell et al., JAMA 1982; Uno et al., Statistics in Medicine 2011.
    """
    observed = np.asarray(event) != 0
    events = np.flatnonzero(observed)
    if pair_weights is not None and not np.isfinite(pair_weights).all():
        return np.full(len(weights), np.nan)
    concordant, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    rows = max(1, _BLOCK_PAIRS // max(len(time), 1))
    for first in range(0, len(events), rows):
        i = events[first : first + rows, None]
        comparable = _comparable(time, observed, i)
        order = comparable * ((risk[i] > risk) + 0.5 * (risk[i] == risk))
        of_event = weights[:, i[:, 0]] * (1.0 if pair_weights is None else pair_weights[i[:, 0]])
        concordant += ((weights @ order.T) * of_event).sum(1)
        pairs += ((weights @ comparable.T.astype(np.float64)) * of_event).sum(1)
    return divide(concordant, pairs)


def _comparable(time: np.ndarray, observed: np.ndarray, events: np.ndarray) -> np.ndarray:
    """``(E, B)``: whether a bag is known to have lived longer than the event ``(E, 1)``."""
    return (time > time[events]) | ((time == time[events]) & ~observed)


def discordant_pairs(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each bag's discordant and comparable pairs, ``(B,)`` both: in which of them the risks are the wrong way round.

    Comparable as for :func:`concordance`, equal risks half wrong, so that the sums give Harrell's index,
    ``c = 1 - sum discordant / sum comparable``. Each pair counts for both its bags.
    """
    observed = np.asarray(event) != 0
    events = np.flatnonzero(observed)
    discordant, comparable = np.zeros(len(time)), np.zeros(len(time))
    rows = max(1, _BLOCK_PAIRS // max(len(time), 1))
    for first in range(0, len(events), rows):
        i = events[first : first + rows, None]
        pairs = _comparable(time, observed, i)
        wrong = pairs * ((risk[i] < risk) + 0.5 * (risk[i] == risk))
        for total, own in ((discordant, wrong), (comparable, pairs)):
            total += own.sum(0)
            total[i[:, 0]] += own.sum(1)
    return discordant, comparable


def inverse_censoring(time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Inverse probability of censoring weights ``1 / G(t_i)^2`` of the bags with an event, ``(B,)``; 0 for the others.

    G is the Kaplan-Meier estimate of not being censored up to and including a time, from these very bags; at a time
    with both, events come before censorings. Infinite where G is 0.
    """
    observed = np.asarray(event) != 0
    times, place = np.unique(time, return_inverse=True)
    num_events = np.bincount(place, weights=observed, minlength=len(times))
    num_censored = np.bincount(place, weights=~observed, minlength=len(times))
    at_risk = np.cumsum((num_events + num_censored)[::-1])[::-1] - num_events
    kept = np.where(at_risk > 0, 1 - num_censored / np.maximum(at_risk, 1), 1.0)
    with np.errstate(divide="ignore"):
        return np.where(observed, 1 / np.cumprod(kept)[place] ** 2, 0.0)
