"""Confidence intervals of metrics by resampling patients.

A resample is a weighting: the weight of a bag is how often its patient was drawn. So all resamples of all metrics are
a few matrix products and cumulative sums (:func:`bigbag.engine.metrics.weighted_metrics`), and no loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
            covers at the nominal rate from fewer patients on. Areas under curves, the Brier score, MAE, RMSE and R²
            have :func:`jackknife_interval` instead, since neither covers them with few patients of a class or a few
            large errors.
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


@dataclass(frozen=True)
class Scale:
    """What is known of a metric beside its values, for intervals where resamples tell too little.

    Attributes:
        transform: scale of :func:`jackknife_interval`: "logit" of areas under curves and balanced accuracy,
            "complement", ``log(1 - v)``, of what is at most 1; "mean" and "root" of means of positive values and their
            roots, which :func:`mean_interval` does. None: the bootstrap's interval.
        num_groups: groups (patients) that it is a mean over: those of the smallest class that it asks for.
        perfect: whether 1 means that no group is wrong; then :func:`perfect_interval` is the interval of 1.
        worst: whether 0 means that every group is wrong; then it is that of 0, too.
        num_in_error: groups that the jackknife's error is of, where they are more than ``num_groups``.
    """

    transform: Literal["logit", "complement", "mean", "root"] | None
    num_groups: int
    perfect: bool = True
    worst: bool = False
    num_in_error: int | None = None


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
    scales: Mapping[str, Scale] | None = None,
) -> dict[str, tuple[float, float]]:
    """Confidence interval of every value of a statistic.

    Resamples that do not define a value (no positive patient drawn, say) do not count for it. A value that is the same
    in all of them has no interval, unless ``scales`` gives it one.

    Args:
        statistic: of weights ``(R, B)``.
        groups: ``(B,)`` the group (patient) of each bag, from 0.
        strata: ``(G,)`` of each group; used where ``options.stratified``.
        options: level, method, number of resamples.
        scales: of the values that have one by name; transforms count under "bca".

    Returns:
        name -> (low, high); NaN where the bags, or all resamples, do not define the value, and where it has none.
    """
    options = options or Bootstrap()
    point = statistic(np.ones((1, len(groups))))
    values = resample(statistic, groups, strata, options)
    tails = {name: np.array([1 - options.level, 1 + options.level]) / 2 for name in point}
    if options.method == "bca":
        left_out = _without_each_group(statistic, groups)
        tails = {name: _bca_tails(values[name], point[name][0], left_out[name], options.level) for name in point}
    result = {}
    for name, sample in values.items():
        value, known = float(point[name][0]), sample[~np.isnan(sample)]
        scale = (scales or {}).get(name, Scale(None, 0, perfect=False))
        low, high = np.nan, np.nan
        if (value == 1 and scale.perfect) or (value == 0 and scale.worst):
            low, high = perfect_interval(value, scale.num_groups, options.level)
        elif scale.transform is not None and options.method == "bca":
            low, high = jackknife_interval(value, left_out[name], scale, options.level)
        elif len(known) and not np.isnan(value) and np.ptp(known) > 0:
            low, high = np.quantile(known, tails[name])
        result[name] = (float(low), float(high))
    return result


def jackknife_interval(value: float, left_out: np.ndarray, scale: Scale, level: float = 0.95) -> tuple[float, float]:
    """Student's interval on another scale, with the jackknife's standard error.

    ``f^-1(f(v) -+ t s)``, ``s^2 = (G - 1) / G sum_g (f(v_g) - mean)^2`` over the values without each of the G groups, t
    of one degree of freedom less than ``scale.num_in_error``, or ``num_groups``. Log-odds keep an area under a curve
    within 0 and 1, where they make its error nearly normal (Boyd, Eng & Page, ECML 2013; Qin & Hotilovac, Stat. Methods
    Med. Res. 2008).

    In simulation it covers AUROC at 93 to 98 %, balanced accuracy of 30 to 150 bags at 94 to 97 %, and R² at 95 to 96 %
    where labels and errors are normal, at 92 to 94 % where errors have long tails (Student's t of 5 degrees of freedom,
    Laplace); BCa covers AUROC at 87 to 95 %, balanced accuracy at 90 to 97 %, R² at 92 to 94 % and 89 to 93 %.

    Args:
        value: v, of all groups.
        left_out: ``(G,)`` v_g; NaN where it is undefined.
        scale: f, and how many groups determine v.
        level: probability of covering the true value.

    Returns:
        low and high; NaN with fewer than two such groups, and where no single group changes the value.
    """
    from scipy.stats import t

    known = left_out[~np.isnan(left_out)]
    count = scale.num_in_error or scale.num_groups
    if count < 2 or np.isnan(value) or not len(known) or np.ptp(known) == 0:
        return np.nan, np.nan
    assert scale.transform is not None
    if scale.transform == "mean":
        return mean_interval(value, known, level)
    if scale.transform == "root":
        low, high = mean_interval(value**2, known**2, level)
        return low**0.5, high**0.5
    forward, back, slope = _TRANSFORMS[scale.transform]
    # the slope at v carries the error over: f of a v_g of exactly 0 or 1 is infinite
    error = np.sqrt((len(known) - 1) * known.var()) * abs(slope(value))
    half = t.ppf((1 + level) / 2, count - 1) * error
    ends = back(forward(value) + np.array([-half, half]))
    return float(ends.min()), float(ends.max())


def mean_interval(value: float, left_out: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean of values from 0 on, corrected for their skewness; not below 0.

    ``v - s g^-1(+-t)``, s the jackknife's standard error and t of G - 1 degrees of freedom;
    ``g(x) = x + k x^2 / 3 + k^2 x^3 / 27 + k / 6`` removes the skewness of ``(v - mean) / s`` and has the inverse
    ``3 / k ((1 + k (x - k / 6))^(1/3) - 1)``, k being the skewness of the groups' values over sqrt(G) (Hall, J. R.
    Stat. Soc. B 1992).

    Squared errors are skewed by a few large ones. In simulations of 30, 60 and 150 bags it covers the Brier score of a
    sure and good model at 82, 90 and 93 %, BCa at 65, 75 and 82; of other models at 95 to 97 %, BCa at 93 to 96; RMSE
    under errors of Student's t of 5 degrees of freedom at 90, 94 and 93 %, BCa at 85, 89 and 90; RMSE of normal errors
    at 94 to 95 %, BCa at 91 to 94; MAE at 93 to 96 %, BCa at 90 to 94.

    Args:
        value: v, of all groups.
        left_out: ``(G,)`` without each group, at least two, not all the same.
        level: probability of covering the true value.
    """
    from scipy.stats import skew, t

    count = len(left_out)
    error = np.sqrt((count - 1) * left_out.var())
    k = skew(left_out.mean() - left_out) / np.sqrt(count)
    ends = t.ppf(np.array([1 + level, 1 - level]) / 2, count - 1)
    if abs(k) > 1e-6:  # g is the identity at 0
        ends = 3 / k * (np.cbrt(1 + k * (ends - k / 6)) - 1)
    low, high = np.maximum(value - error * ends, 0)
    return float(low), float(high)


def _expit(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


_TRANSFORMS: Mapping[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[float], float]]] = {
    "logit": (lambda v: np.log(v / (1 - v)), _expit, lambda v: 1 / (v * (1 - v))),
    "complement": (lambda v: np.log(1 - v), lambda x: 1 - np.exp(x), lambda v: 1 / (1 - v)),
}


def perfect_interval(value: float, num_groups: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share of n groups in which none, or every one, is wrong: ``((1 - level) / 2)^(1 / n)`` to 1, or 0
    to the complement (Clopper & Pearson, Biometrika 1934).

    It holds for an AUROC of 1 too, n being the number of groups of the smaller class: they make n pairs that share no
    group, each of which is in order with the probability that the AUROC is.
    """
    if num_groups < 1:
        return np.nan, np.nan
    bound = ((1 - level) / 2) ** (1 / num_groups)
    return (bound, 1.0) if value == 1 else (0.0, 1 - bound)


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
