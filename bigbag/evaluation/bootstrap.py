"""Confidence intervals of metrics by resampling patients.

A resample is a weighting: the weight of a bag is how often its patient was drawn. So all resamples of all metrics are
a few matrix products and cumulative sums (:func:`bigbag.engine.metrics.weighted_metrics`), and no loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

_BLOCK_ELEMENTS = 1 << 22
"""Weights of resamples times bags that are held at a time."""

Statistic = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""From weights ``(R, B)`` to named values ``(R,)``."""


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made.

    Attributes:
        num_resamples: resamples, R.
        level: probability of covering the true value.
        method: "percentile": the quantiles of the resampled values. "bca": those quantiles shifted for bias and for how
            the spread changes with the value (Efron, JASA 1987), at the cost of one more evaluation per patient; it
            covers at the nominal rate from fewer patients on. Average precision has :func:`logit_interval` instead,
            since neither covers it with few positive patients.
        stratified: draw the patients of each label on their own, as many as there are: for sets whose share of
            positives was fixed when they were made. A patient with several labels counts by the largest.
        seed: seed of the draws.
    """

    num_resamples: int = 2000
    level: float = 0.95
    method: Literal["percentile", "bca"] = "bca"
    stratified: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_resamples < 2:
            raise ValueError(f"num_resamples is {self.num_resamples}, expected at least 2")
        if not 0 < self.level < 1:
            raise ValueError(f"level is {self.level}, expected a probability between 0 and 1, such as 0.95")
        if self.method not in ("percentile", "bca"):
            raise ValueError(f"method is {self.method!r}, expected percentile or bca")


def groups_of(patients: Sequence[str]) -> np.ndarray:
    """``(B,)`` numbers of the patients; a bag without one ("") is a patient of its own."""
    numbers: dict[tuple[str, int], int] = {}
    keys = [(patient, -1) if patient else ("", i) for i, patient in enumerate(patients)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def strata_of(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """``(G,)`` the stratum of each group: the largest label of its bags (the event, for survival)."""
    values = labels if labels.ndim == 1 else labels @ (2.0 ** np.arange(labels.shape[1]))
    largest = np.full(groups.max(initial=-1) + 1, -np.inf)
    np.maximum.at(largest, groups, values)
    return np.unique(largest, return_inverse=True)[1]


def resample(
    statistic: Statistic, groups: np.ndarray, strata: np.ndarray | None = None, options: Bootstrap | None = None
) -> dict[str, np.ndarray]:
    """The values of a statistic under every resample, ``(R,)`` each.

    Args:
        statistic: of weights ``(R, B)``.
        groups: ``(B,)`` the group (patient) of each bag, from 0: groups are drawn whole.
        strata: ``(G,)`` of each group; used where ``options.stratified``.
        options: how many, which seed.
    """
    options = options or Bootstrap()
    num_groups = int(groups.max(initial=-1)) + 1
    strata = np.zeros(num_groups, np.int64) if strata is None or not options.stratified else strata
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    generator = np.random.default_rng(options.seed)
    rows = max(1, min(options.num_resamples, _BLOCK_ELEMENTS // max(len(groups), 1)))
    parts = []
    for first in range(0, options.num_resamples, rows):
        count = min(rows, options.num_resamples - first)
        drawn = np.zeros((count, num_groups))
        for own in members:
            drawn[:, own] = generator.multinomial(len(own), np.full(len(own), 1 / len(own)), size=count)
        parts.append(statistic(drawn[:, groups]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def intervals(
    statistic: Statistic,
    groups: np.ndarray,
    strata: np.ndarray | None = None,
    options: Bootstrap | None = None,
    positives: Mapping[str, int] | None = None,
) -> dict[str, tuple[float, float]]:
    """Confidence interval of every value of a statistic.

    Resamples that do not define a value (no positive patient drawn, say) do not count for it.

    Args:
        statistic: of weights ``(R, B)``.
        groups: ``(B,)`` the group (patient) of each bag, from 0.
        strata: ``(G,)`` of each group; used where ``options.stratified``.
        options: level, method, number of resamples.
        positives: name -> number of positive groups, of the values that have a :func:`logit_interval` under "bca".

    Returns:
        name -> (low, high); NaN where the bags, or all resamples, do not define the value.
    """
    options = options or Bootstrap()
    point = statistic(np.ones((1, len(groups))))
    values = resample(statistic, groups, strata, options)
    tails = {name: np.array([1 - options.level, 1 + options.level]) / 2 for name in point}
    if options.method == "bca":
        left_out = _without_each_group(statistic, groups)
        tails = {name: _bca_tails(values[name], point[name][0], left_out[name], options.level) for name in point}
    positives, result = positives or {}, {}
    for name, sample in values.items():
        known = sample[~np.isnan(sample)]
        usable = len(known) > 0 and not np.isnan(point[name][0])
        low, high = np.quantile(known, tails[name]) if usable else (np.nan, np.nan)
        if usable and options.method == "bca" and name in positives:
            low, high = logit_interval(float(point[name][0]), left_out[name], positives[name], options.level)
        result[name] = (float(low), float(high))
    return result


def logit_interval(value: float, left_out: np.ndarray, num_positive: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of an average precision: Student's on the scale of its log-odds, with the jackknife's standard error.

    ``logit(v) -+ t s / (v (1 - v))``, ``s^2 = (G - 1) / G sum_g (v_g - mean)^2`` over the values without each of the G
    groups, t of ``num_positive - 1`` degrees of freedom, for it is the positive groups that average precision is a mean
    over. The log-odds keep it within 0 and 1 (Boyd, Eng & Page, ECML 2013). A value of 1 or 0 that no single group
    changes has no width.

    Args:
        value: v, of all groups.
        left_out: ``(G,)`` v_g; NaN where it is undefined.
        num_positive: groups with a positive bag.
        level: probability of covering the true value.

    Returns:
        low and high; NaN with fewer than two positive groups.
    """
    from scipy.special import expit, logit
    from scipy.stats import t

    if num_positive < 2:
        return np.nan, np.nan
    known = left_out[~np.isnan(left_out)]
    variance = (len(known) - 1) * known.var()
    if variance == 0 or not 0 < value < 1:
        return value, value
    half = t.ppf((1 + level) / 2, num_positive - 1) * np.sqrt(variance) / (value * (1 - value))
    return float(expit(logit(value) - half)), float(expit(logit(value) + half))


def _without_each_group(statistic: Statistic, groups: np.ndarray) -> dict[str, np.ndarray]:
    """The jackknife: the statistic without each group in turn, ``(G,)`` each."""
    num_groups = int(groups.max(initial=-1)) + 1
    rows = max(1, _BLOCK_ELEMENTS // max(len(groups), 1))
    parts = [
        statistic((groups != np.arange(first, min(first + rows, num_groups))[:, None]).astype(np.float64))
        for first in range(0, num_groups, rows)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _bca_tails(values: np.ndarray, point: float, left_out: np.ndarray, level: float) -> np.ndarray:
    """``Phi(z0 + (z0 + z) / (1 - a (z0 + z)))`` for both ends: z0 the bias, a the acceleration."""
    from scipy.stats import norm

    known, left_out = values[~np.isnan(values)], left_out[~np.isnan(left_out)]
    plain = np.array([1 - level, 1 + level]) / 2
    if not len(known) or not len(left_out):
        return plain
    below = (np.count_nonzero(known < point) + np.count_nonzero(known == point) / 2) / len(known)
    if not 0 < below < 1:
        return plain  # all on one side: the bias is beyond measuring
    deviation = left_out.mean() - left_out
    spread = (deviation**2).sum() ** 1.5
    acceleration = (deviation**3).sum() / (6 * spread) if spread > 0 else 0.0
    shifted = norm.ppf(below) + norm.ppf(plain)
    return norm.cdf(norm.ppf(below) + shifted / (1 - acceleration * shifted))
