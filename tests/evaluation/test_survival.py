"""Kaplan-Meier and the logrank test: published numbers, loops, and lifelines where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bigbag.evaluation.survival import kaplan_meier, logrank_test

# Weeks in remission of leukaemia patients under 6-MP and under placebo (Freireich et al., Blood 1963).
TREATED = np.array([6, 6, 6, 7, 10, 13, 16, 22, 23, 6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35.0])
TREATED_EVENT = np.r_[np.ones(9), np.zeros(12)]
PLACEBO = np.array([1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23.0])


def test_remission_of_leukaemia_as_published() -> None:
    curve = kaplan_meier(TREATED, TREATED_EVENT)
    assert curve.time.tolist() == [0, 6, 7, 10, 13, 16, 22, 23] and curve.last == 35
    published = [1, 0.8571, 0.8067, 0.7529, 0.6902, 0.6275, 0.5378, 0.4482]
    np.testing.assert_allclose(curve.share, published, atol=5e-5)
    # R's survfit(conf.type = "log-log") at 6 and 23 weeks
    np.testing.assert_allclose([curve.low[1], curve.high[1]], [0.6197, 0.9516], atol=5e-4)
    np.testing.assert_allclose([curve.low[-1], curve.high[-1]], [0.1881, 0.6801], atol=5e-4)
    gone = kaplan_meier(PLACEBO, np.ones(21))
    assert gone.share[-1] == 0 and np.isnan(gone.low[-1]) and not np.isnan(gone.low[:-1]).any()
    time, event = np.r_[TREATED, PLACEBO], np.r_[TREATED_EVENT, np.ones(21)]
    assert logrank_test(time, event, np.arange(42) < 21) == pytest.approx(stats.chi2.sf(16.793, 1), rel=1e-3)


def test_logrank_of_three_groups_by_loops() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(0, 3, 60)
    time, event = np.ceil(rng.exponential(5 + 3 * group)), rng.random(60) < 0.7
    excess, covariance = np.zeros(3), np.zeros((3, 3))
    for t in sorted(set(time[event])):
        n = np.array([(time[group == g] >= t).sum() for g in range(3)])
        d = np.array([(event & (time == t) & (group == g)).sum() for g in range(3)])
        excess += d - d.sum() * n / n.sum()
        if n.sum() > 1:
            scale = d.sum() * (n.sum() - d.sum()) / (n.sum() - 1)
            covariance += scale * (np.diag(n / n.sum()) - np.outer(n, n) / n.sum() ** 2)
    statistic = excess[:2] @ np.linalg.solve(covariance[:2, :2], excess[:2])
    assert logrank_test(time, event.astype(float), group) == pytest.approx(stats.chi2.sf(statistic, 2), rel=1e-9)


def test_what_is_not_defined() -> None:
    time = np.array([1.0, 2, 3, 4])
    assert np.isnan(logrank_test(time, np.ones(4), np.zeros(4)))
    assert np.isnan(logrank_test(time, np.zeros(4), np.array([0, 0, 1, 1])))
    curve = kaplan_meier(time, np.zeros(4))
    assert curve.time.tolist() == [0] and curve.share.tolist() == [1] and curve.last == 4


def test_against_lifelines() -> None:
    statistics = pytest.importorskip("lifelines.statistics")
    lifelines = pytest.importorskip("lifelines")
    rng = np.random.default_rng(1)
    time, event = np.ceil(rng.exponential(9, 80)), (rng.random(80) < 0.6).astype(float)
    group = rng.integers(0, 2, 80)
    expected = statistics.logrank_test(time[group == 0], time[group == 1], event[group == 0], event[group == 1])
    assert logrank_test(time, event, group) == pytest.approx(expected.p_value, rel=1e-9)
    fitter = lifelines.KaplanMeierFitter().fit(time, event)
    curve = kaplan_meier(time, event)
    np.testing.assert_allclose(curve.share, fitter.survival_function_.loc[curve.time].to_numpy()[:, 0], rtol=1e-9)
    ends = fitter.confidence_interval_.loc[curve.time[1:]].to_numpy()
    inside = curve.share[1:] > 0
    np.testing.assert_allclose(np.stack([curve.low, curve.high], 1)[1:][inside], ends[inside], rtol=1e-5)
