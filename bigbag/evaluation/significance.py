"""Whether two models on the same bags differ by more than chance: DeLong's test, paired bootstrap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bigbag.evaluation.bootstrap import Bootstrap, Statistic, resample


@dataclass(frozen=True)
class Difference:
    """One value minus another on the same bags.

    Attributes:
        value: the difference.
        low: lower end of its confidence interval.
        high: upper end.
        p_value: two-sided; NaN where the difference is undefined.
    """

    value: float
    low: float
    high: float
    p_value: float


def delong_test(labels: np.ndarray, first: np.ndarray, second: np.ndarray, level: float = 0.95) -> Difference:
    """DeLong's test of the difference of two AUROCs on the same bags, in O(B log B).

    With the placements ``V10(p) = share of negatives below s_p``, ``V01(n) = share of positives above s_n`` (ties half)
    of both models, the difference has the variance ``var(dV10) / P + var(dV01) / N`` over P positives and N negatives.

    It takes bags for independent; where patients have several bags use :func:`paired_bootstrap`.

    Args:
        labels: ``(B,)`` 0 or 1.
        first: ``(B,)`` scores of one model.
        second: ``(B,)`` scores of the other.
        level: probability of covering the true difference.

    Returns:
        AUROC of ``first`` minus that of ``second``. Where it has no variance (two models of the same placements), the
        p-value is 1 for no difference and 0 otherwise.

    Raises:
        ValueError: fewer than two bags of a class.

    DeLong et al., Biometrics 1988; Sun & Xu, IEEE Signal Processing Letters 2014.
    """
    from scipy.stats import norm

    positive = np.asarray(labels) == 1
    counts = int(positive.sum()), int((~positive).sum())
    if min(counts) < 2:
        raise ValueError(f"delong_test: {counts[0]} positive and {counts[1]} negative bags, expected 2 or more")
    above, below = zip(*(_placements(positive, np.asarray(scores)) for scores in (first, second)))
    difference = float(above[0].mean() - above[1].mean())
    variance = np.var(above[0] - above[1], ddof=1) / counts[0] + np.var(below[0] - below[1], ddof=1) / counts[1]
    error = float(np.sqrt(variance))
    half = norm.ppf((1 + level) / 2) * error
    p_value = 2 * norm.sf(abs(difference) / error) if error > 0 else float(difference == 0)
    return Difference(difference, difference - half, difference + half, float(p_value))


def _placements(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each positive the share of negatives below it, of each negative the share of positives above it."""
    p, n = scores[positive], scores[~positive]
    ranked_p, ranked_n = np.sort(p), np.sort(n)
    below = np.searchsorted(ranked_n, p, side="left") + np.searchsorted(ranked_n, p, side="right")
    above = 2 * len(p) - np.searchsorted(ranked_p, n, side="left") - np.searchsorted(ranked_p, n, side="right")
    return below / (2 * len(n)), above / (2 * len(p))


def paired_bootstrap(
    first: Statistic,
    second: Statistic,
    groups: np.ndarray,
    strata: np.ndarray | None = None,
    options: Bootstrap | None = None,
) -> dict[str, Difference]:
    """Difference of every metric of two models, both under the same resamples of patients.

    The interval is that of the quantiles. The p-value is twice the share of resamples in which the difference is not of
    the sign that it has on the bags, at least ``2 / (R + 1)`` and at most 1.

    Args:
        first: metrics of one model as a function of weights ``(R, B)``.
        second: those of the other, on the same bags in the same order.
        groups: ``(B,)`` the group (patient) of each bag, from 0.
        strata: ``(G,)`` of each group; used where ``options.stratified``.
        options: level and number of resamples.
    """
    options = options or Bootstrap()

    def both(weights: np.ndarray) -> dict[str, np.ndarray]:
        of_first, of_second = first(weights), second(weights)
        return {name: of_first[name] - of_second[name] for name in of_first if name in of_second}

    points = both(np.ones((1, len(groups))))
    return {
        name: _difference(float(points[name][0]), values, options.level)
        for name, values in resample(both, groups, strata, options).items()
    }


def _difference(point: float, values: np.ndarray, level: float) -> Difference:
    known = values[~np.isnan(values)]
    if np.isnan(point) or not len(known):
        return Difference(point, np.nan, np.nan, np.nan)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    against = min(np.count_nonzero(known <= 0), np.count_nonzero(known >= 0))
    p_value = min(1.0, 2 * (against + 1) / (len(known) + 1))
    return Difference(point, float(low), float(high), p_value)
