"""Bands of curves: every resample by scikit-learn's curves and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import precision_recall_curve, roc_curve

from bigbag.evaluation.bootstrap import Bootstrap, resample
from bigbag.evaluation.curves import ranking_bands


@pytest.mark.parametrize("digits", [0, 9])
def test_bands_are_the_quantiles_of_resampled_curves(digits: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(50) < 0.3
    scores = (rng.normal(size=50) + labels).round(digits)
    groups = np.arange(50) // 2
    options = Bootstrap(120, level=0.9, seed=4)
    weights = resample(lambda w: {"w": w}, groups, options=options)["w"]
    places = np.linspace(0, 1, 21)
    sensitivities, precisions = [], []
    for row in weights:
        chosen = np.repeat(np.arange(50), row.astype(int))
        y, s = labels[chosen], scores[chosen]
        if not 0 < y.sum() < len(y):
            continue
        false_rate, true_rate, _ = roc_curve(y, s, drop_intermediate=False)
        sensitivities.append(np.interp(places, false_rate, true_rate))
        precision, recall, _ = precision_recall_curve(y, s, drop_intermediate=False)
        reaching = [np.flatnonzero(recall >= max(place, 1e-6) - 1e-9) for place in places]
        precisions.append([precision[own[-1]] for own in reaching])
    for band, expected in zip(ranking_bands(labels, scores, groups, options, 21), (sensitivities, precisions)):
        np.testing.assert_array_equal(band.x, places)
        low, high = np.quantile(expected, [0.05, 0.95], axis=0)
        np.testing.assert_allclose(band.low, low, atol=1e-12)
        np.testing.assert_allclose(band.high, high, atol=1e-12)


def test_bands_hold_the_true_curve() -> None:
    rng = np.random.default_rng(1)
    rates = np.array([0.2, 0.5])
    true = stats.norm.sf(stats.norm.isf(rates) - 1.2)  # two normals, 1.2 apart
    hits = []
    for seed in range(120):
        labels = rng.random(200) < 0.4
        band, _ = ranking_bands(labels, rng.normal(size=200) + 1.2 * labels, np.arange(200), Bootstrap(300, seed=seed))
        inside = np.interp(rates, band.x, band.low), np.interp(rates, band.x, band.high)
        hits.append((inside[0] <= true) & (true <= inside[1]))
    assert (np.mean(hits, axis=0) >= 0.89).all(), np.mean(hits, axis=0)  # 0.95 less three standard errors of 0.02


def test_patients_widen_bands_and_one_class_has_none() -> None:
    rng = np.random.default_rng(2)
    labels = np.repeat(rng.random(40) < 0.5, 4)
    scores = np.repeat(rng.normal(size=40), 4) + labels
    by_bag, by_patient = (ranking_bands(labels, scores, groups)[0] for groups in (np.arange(160), np.arange(160) // 4))
    ratio = (by_patient.high - by_patient.low).mean() / (by_bag.high - by_bag.low).mean()
    assert ratio == pytest.approx(2, rel=0.2)  # a quarter of the independent observations
    assert all(np.isnan(band.low).all() for band in ranking_bands(np.ones(5, bool), np.arange(5.0), np.arange(5)))
