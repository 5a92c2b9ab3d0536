"""Survival of groups of bags: the Kaplan-Meier estimate with its interval, and the logrank test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Survival:
    """An estimate of the share that has had no event until ``time``, with its pointwise interval.

    Attributes:
        time: ``(E + 1,)`` 0, then the distinct times of events; the share is constant from each to the next.
        share: ``(E + 1,)`` from 1 downwards.
        low: ``(E + 1,)`` lower end of the interval; NaN where the share is 0, which has none.
        high: ``(E + 1,)`` upper end.
        last: the last time, of an event or censored.
    """

    time: np.ndarray
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray
    last: float


def kaplan_meier(time: np.ndarray, event: np.ndarray, level: float = 0.95) -> Survival:
    """The product-limit estimate ``S(t) = prod_{t_i <= t} (1 - d_i / n_i)`` of d_i events among n_i at risk.

    The interval is Greenwood's on the scale of ``log(-log S)``, which stays between 0 and 1:
    ``S ** exp(-+ z s)``, ``s^2 = sum d_i / (n_i (n_i - d_i)) / log(S)^2``.

    Args:
        time: ``(B,)``, 0 or more.
        event: ``(B,)`` 1 = observed, 0 = censored.
        level: of the interval.

    Kaplan & Meier, J. Am. Stat. Assoc. 1958; Kalbfleisch & Prentice, 1980.
    """
    from scipy.stats import norm

    times = np.unique(time[event == 1])
    at_risk = (time[:, None] >= times).sum(0)
    deaths = ((time[:, None] == times) & (event[:, None] == 1)).sum(0)
    share = np.cumprod(1 - deaths / at_risk)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(np.cumsum(deaths / (at_risk * (at_risk - deaths)))) / np.abs(np.log(share))
        half = norm.ppf((1 + level) / 2) * error
        low, high = (np.where(share > 0, share ** np.exp(sign * half), np.nan) for sign in (1, -1))
    start = np.ones(1)
    share, low, high = (np.r_[start, values] for values in (share, low, high))
    return Survival(np.r_[0.0, times], share, low, high, float(time.max(initial=0)))


def logrank_test(time: np.ndarray, event: np.ndarray, group: np.ndarray) -> float:
    """p-value of the logrank test that groups have the same survival; NaN where fewer than two can be compared.

    ``U_g = sum_i (d_ig - d_i n_ig / n_i)`` over the times of events, ``chi2 = U' V^-1 U`` with the hypergeometric
    covariance ``V``, of one degree of freedom less than there are groups.

    Args:
        time: ``(B,)``.
        event: ``(B,)`` 1 = observed, 0 = censored.
        group: ``(B,)`` any values.

    Mantel, Cancer Chemotherapy Reports 1966.
    """
    from scipy.stats import chi2

    times, names = np.unique(time[event == 1]), np.unique(group)
    member = (group == names[:, None]).astype(np.float64)
    at_risk = member @ (time[:, None] >= times)
    deaths = member @ ((time[:, None] == times) & (event[:, None] == 1))
    risk, dead = at_risk.sum(0), deaths.sum(0)
    share = at_risk / risk
    excess = (deaths - dead * share).sum(1)
    scale = dead * (risk - dead) / np.maximum(risk - 1, 1)
    covariance = np.diag((scale * share).sum(1)) - (scale * share) @ share.T
    if not covariance.any():
        return float("nan")
    statistic = excess @ np.linalg.pinv(covariance) @ excess
    return float(chi2.sf(statistic, np.linalg.matrix_rank(covariance)))
