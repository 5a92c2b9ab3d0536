"""Bands of ROC and precision-recall curves, by the resamples of patients that the intervals of metrics are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bigbag.evaluation.bootstrap import Bootstrap, resample


@dataclass(frozen=True)
class Band:
    """Pointwise interval of a curve: ``low`` and ``high`` at each of ``x``, all ``(G,)``; NaN where it is undefined."""

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray


def ranking_bands(
    positive: np.ndarray,
    scores: np.ndarray,
    groups: np.ndarray,
    options: Bootstrap | None = None,
    num_points: int = 101,
) -> tuple[Band, Band]:
    """Bootstrap bands of the sensitivity at each false positive rate, and of the precision at each recall.

    Quantiles over resamples of the patients, at each place on its own (vertical averaging; Fawcett, Pattern Recognition
    Letters 2006). Sensitivity is linear between thresholds, as the area under the curve takes it; precision is that of
    the strictest threshold that reaches the recall, as average precision takes it. Resamples without bags of both kinds
    do not count.

    Args:
        positive: ``(B,)`` bool.
        scores: ``(B,)``, larger meaning more positive.
        groups: ``(B,)`` the group (patient) of each bag, from 0.
        options: level, number of resamples (by default 1000), seed.
        num_points: places from 0 to 1, G.
    """
    options = options or Bootstrap(1000)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last_of_ties = np.flatnonzero(np.r_[ranked[1:] != ranked[:-1], True])
    labels = positive[order]
    places = np.linspace(0, 1, num_points)

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        drawn = weights[:, order]
        true = np.cumsum(drawn * labels, axis=1)[:, last_of_ties]
        false = np.cumsum(drawn * ~labels, axis=1)[:, last_of_ties]
        rows = np.array([_at(places, t, f) for t, f in zip(true, false)])
        return {"sensitivity": rows[:, 0], "precision": rows[:, 1]}

    values = resample(statistic, groups, options=options)
    tails = (1 - options.level) / 2, (1 + options.level) / 2
    bands = []
    for found in values.values():
        known = found[~np.isnan(found).any(1)]
        low, high = np.quantile(known, tails, axis=0) if len(known) else np.full((2, num_points), np.nan)
        bands.append(Band(places, low, high))
    return bands[0], bands[1]


def _at(places: np.ndarray, true: np.ndarray, false: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sensitivity at false positive rates and precision at recalls, of the numbers of positives and negatives down to
    each threshold; NaN without both kinds."""
    if not (true[-1] > 0 and false[-1] > 0):
        nothing = np.full(len(places), np.nan)
        return nothing, nothing
    sensitivity = np.interp(places, np.r_[0, false / false[-1]], np.r_[0, true / true[-1]])
    # Counts are whole: a recall of 0 is reached by the first positive, and the rounding of a recall is far below one.
    needed = np.maximum(places * true[-1] - 1e-6, 0.5)
    reached = np.searchsorted(true, needed)
    return sensitivity, true[reached] / (true[reached] + false[reached])
