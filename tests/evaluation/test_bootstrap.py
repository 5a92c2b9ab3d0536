"""Intervals: every resample by a plain loop, coverage in simulation; tests of two models against their definitions."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn import metrics as sk

from bigbag.engine.metrics import weighted_metrics
from bigbag.engine.metrics.ranking import ranking
from bigbag.engine.metrics.tasks import confusion, mean_over, recall
from bigbag.evaluation.bootstrap import (
    Bootstrap,
    Scale,
    Statistic,
    groups_of,
    intervals,
    jackknife_interval,
    mean_interval,
    perfect_interval,
    resample,
    strata_of,
)
from bigbag.evaluation.significance import delong_test, paired_bootstrap
from bigbag.evaluation.summary import scales_of


def binary(labels: np.ndarray, logits: np.ndarray) -> Statistic:
    return lambda weights: weighted_metrics(labels, logits, "binary", weights)


def draw(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    labels = (rng.random(num) < 0.4).astype(int)
    return labels, rng.normal(size=num) + 1.2 * labels - 0.6


def test_resamples_are_whole_patients_and_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    labels, logits = draw(rng, 60)
    groups = groups_of([f"p{i % 20}" for i in range(50)] + [""] * 10)
    assert groups.max() == 29 and len(set(groups[50:])) == 10
    seen = []

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(weights)
        return binary(labels, logits)(weights)

    values = resample(statistic, groups, options=Bootstrap(50, seed=3))
    (weights,) = seen
    assert (weights.sum(1) > 0).all() and all(len(set(weights[r][groups == g])) == 1 for r in range(5) for g in (0, 7))
    for row in range(50):
        chosen = np.repeat(np.arange(60), weights[row].astype(int))
        assert values["auroc"][row] == pytest.approx(sk.roc_auc_score(labels[chosen], logits[chosen]), abs=1e-12)
        assert values["f1"][row] == pytest.approx(sk.f1_score(labels[chosen], logits[chosen] >= 0), abs=1e-12)


def test_strata_keep_their_sizes() -> None:
    labels, groups = np.array([0, 1, 0, 0, 1, 0]), np.array([0, 0, 1, 2, 3, 4])
    strata = strata_of(labels, groups)
    assert strata.tolist() == [1, 0, 0, 1, 0]
    positive = resample(lambda w: {"n": w @ (strata[groups] == 1)}, groups, strata, Bootstrap(200, stratified=True))
    assert set(positive["n"]) <= {2.0, 3.0, 4.0}  # two patients, of two bags and of one
    loose = resample(lambda w: {"n": w @ (strata[groups] == 1)}, groups, strata, Bootstrap(200))
    assert 0.0 in loose["n"]


def test_undefined_values_have_no_interval_and_undefined_resamples_do_not_count() -> None:
    labels, logits = np.array([0, 0, 0]), np.array([1.0, 2, 3])
    assert np.isnan(intervals(binary(labels, logits), np.arange(3))["auroc"]).all()
    labels = np.array([0, 0, 0, 1])  # where defined, every resample has an AUROC of 1
    assert np.isnan(intervals(binary(labels, np.arange(4.0)), np.arange(4))["auroc"]).all()


def test_bca_against_scipy() -> None:
    values = np.random.default_rng(1).exponential(size=40)
    options = Bootstrap(20_000, method="bca")
    low, high = intervals(lambda w: {"mean": w @ values / w.sum(1)}, np.arange(40), options=options)["mean"]
    found = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(2))
    spread = found.confidence_interval.high - found.confidence_interval.low
    assert low == pytest.approx(found.confidence_interval.low, abs=0.03 * spread)
    assert high == pytest.approx(found.confidence_interval.high, abs=0.03 * spread)
    plain = intervals(
        lambda w: {"mean": w @ values / w.sum(1)}, np.arange(40), options=Bootstrap(20_000, method="percentile")
    )["mean"]
    assert high - plain[1] > 0.05 * spread  # the shift that a skewed sample calls for


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_cover_at_the_nominal_rate(method: str) -> None:
    rng = np.random.default_rng(5)
    truth = {"auroc": stats.norm.cdf(1.2 / np.sqrt(2)), "accuracy": stats.norm.cdf(0.6)}
    covered: dict[str, list[bool]] = {name: [] for name in truth}
    num = 400
    for seed in range(num):
        found = intervals(
            _auroc_and_accuracy(*draw(rng, 150)), np.arange(150), options=Bootstrap(400, method=method, seed=seed)
        )
        for name, true in truth.items():
            covered[name].append(found[name][0] <= true <= found[name][1])
    # 0.95 within three standard errors, sqrt(0.95 * 0.05 / 400) = 0.011
    assert all(0.917 <= np.mean(hits) <= 0.983 for hits in covered.values()), covered


@cache
def _true_average_precision(prevalence: float, distance: float) -> float:
    """Of normal scores whose means are ``distance`` apart: the mean precision at the positives."""
    s = np.linspace(-8, 11, 20_001)
    true, false = prevalence * stats.norm.sf(s - distance), (1 - prevalence) * stats.norm.sf(s)
    return float(np.trapezoid(stats.norm.pdf(s - distance) * true / (true + false), s))


def _covered(rng: np.random.Generator, num: int, prevalence: float, distance: float, alike: int = 1) -> bool:
    """Whether the interval of ``num`` patients, each of ``alike`` bags with nearly one score, holds the truth."""
    labels, groups = np.repeat(rng.random(num) < prevalence, alike), np.repeat(np.arange(num), alike)
    patient, own = np.repeat(rng.normal(size=num), alike), rng.normal(size=num * alike)
    scores = distance * labels + (patient if alike == 1 else np.sqrt(0.8) * patient + np.sqrt(0.2) * own)
    of_all, left_out = (
        ranking(labels, scores, weights)[1]
        for weights in (np.ones((1, len(labels))), groups != np.arange(num)[:, None])
    )
    scale = Scale("logit", int(labels[::alike].sum()))
    low, high = jackknife_interval(float(of_all[0]), left_out, scale)
    return low <= _true_average_precision(prevalence, distance) <= high


def test_interval_of_average_precision_covers() -> None:
    rng = np.random.default_rng(11)
    hits = np.mean([_covered(rng, 100, 0.2, 1.2) for _ in range(400)])
    assert 0.917 <= hits <= 0.983, hits  # 0.95 within three standard errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num", "prevalence", "distance", "alike"),
    [
        (50, 0.3, 1.2, 1),
        (100, 0.1, 1.2, 1),
        (100, 0.4, 0.3, 1),
        (100, 0.4, 2.5, 1),
        (300, 0.1, 1.2, 1),
        (80, 0.4, 1.2, 3),
    ],
)
def test_interval_of_average_precision_covers_everywhere(
    num: int, prevalence: float, distance: float, alike: int
) -> None:
    rng = np.random.default_rng(12)
    hits = np.mean([_covered(rng, num, prevalence, distance, alike) for _ in range(2000)])
    assert 0.93 <= hits <= 0.97, hits


def test_summaries_have_this_interval_of_areas() -> None:
    rng = np.random.default_rng(13)
    labels, groups = rng.integers(0, 3, 40), np.arange(40) // 2
    scores = rng.normal(size=(40, 3)) + np.eye(3)[labels]
    scales = scales_of("multiclass", labels, groups)
    of_class = [len(set(groups[labels == k])) for k in range(3)]
    assert [scales[f"average_precision_{k}"].num_groups for k in range(3)] == of_class
    assert (
        scales["average_precision"].num_groups == min(of_class) and scales["average_precision_micro"].num_groups == 20
    )
    many = rng.integers(0, 2, (40, 2))
    of_label, of_rest = (len(set(groups[many[:, 1] == k])) for k in (1, 0))
    assert scales_of("multilabel", many, groups)["auroc_1"].num_groups == min(of_label, of_rest)
    yes = scales_of("binary", np.r_[np.ones(3, int), np.zeros(7, int)], np.arange(10))
    names = ("sensitivity", "specificity", "accuracy", "auroc", "average_precision", "f1", "kappa")
    assert [yes[name].num_groups for name in names] == [3, 7, 10, 3, 3, 3, 3]

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        return weighted_metrics(labels, scores, "multiclass", weights, per_class=True)

    found = intervals(statistic, groups, options=Bootstrap(50), scales=scales)
    plain = intervals(statistic, groups, options=Bootstrap(50))
    chances = softmax(scores, 1)[:, 1]
    for name, measure, count in (
        ("average_precision_1", sk.average_precision_score, of_class[1]),
        ("auroc_1", sk.roc_auc_score, min(of_class[1], len(set(groups[labels != 1])))),
    ):
        left_out = np.array([measure(labels[groups != g] == 1, chances[groups != g]) for g in range(20)])
        error, value = np.sqrt(19 / 20 * ((left_out - left_out.mean()) ** 2).sum()), measure(labels == 1, chances)
        half = stats.t.ppf(0.975, count - 1) * error / (value * (1 - value))
        ends = np.log(value / (1 - value)) + np.array([-half, half])
        assert found[name] == pytest.approx(tuple(1 / (1 + np.exp(-ends))), abs=1e-9)
    assert found["accuracy"] == plain["accuracy"] and found["average_precision"] != plain["average_precision"]
    assert np.isnan(jackknife_interval(0.5, np.array([0.4, 0.6]), Scale("logit", 1))).all()


def _covers_errors(rng: np.random.Generator, num: int, truth: dict[str, float]) -> list[bool]:
    """Whether the intervals of regression metrics hold the truth."""
    labels = rng.normal(size=num)
    predictions = 0.7 * labels + 0.6 * rng.normal(size=num)

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        return weighted_metrics(labels, predictions, "regression", weights)

    groups = np.arange(num)
    found = intervals(statistic, groups, options=Bootstrap(2), scales=scales_of("regression", labels, groups))
    return [found[name][0] <= true <= found[name][1] for name, true in truth.items()]


def test_intervals_of_regression_cover() -> None:
    # the error is -0.3 y + 0.6 n: its mean square 0.09 + 0.36, of labels of variance 1
    truth = {"rmse": np.sqrt(0.45), "mae": np.sqrt(0.45 * 2 / np.pi), "r2": 1 - 0.45}
    rng = np.random.default_rng(14)
    hits = np.mean([_covers_errors(rng, 80, truth) for _ in range(400)], axis=0)
    assert ((hits >= 0.917) & (hits <= 0.983)).all(), hits  # 0.95 within three standard errors


def test_interval_of_a_mean_is_what_removes_its_skewness() -> None:
    """Hall's polynomial of the studentised ends is Student's quantile; RMSE has the roots of its mean square's."""
    errors = np.random.default_rng(16).exponential(size=25)
    scales = scales_of("regression", errors, np.arange(25))
    found = intervals(
        lambda w: weighted_metrics(np.zeros(25), errors, "regression", w),
        np.arange(25),
        options=Bootstrap(2),
        scales=scales,
    )
    for values, ends in ((errors, found["mae"]), (errors**2, np.square(found["rmse"]))):
        k = stats.skew(values) / 5
        x = (values.mean() - np.array(ends)) / stats.sem(values)
        assert x + k * x**2 / 3 + k**2 * x**3 / 27 + k / 6 == pytest.approx(stats.t.ppf([0.975, 0.025], 24), abs=1e-9)
    assert mean_interval(0.1, np.array([0.0, 0.1, 0.2]))[0] == 0.0


def test_interval_of_balanced_accuracy_covers_where_classes_are_small() -> None:
    """Four ordered classes of 40, 30, 20 and 10 % of 30 bags, taken for the nearest one. BCa covers at 90 %."""
    share, noise, num = np.array([0.4, 0.3, 0.2, 0.1]), 0.7, 30
    within = stats.norm.cdf(0.5 / noise)
    truth = np.mean([within, 2 * within - 1, 2 * within - 1, within])
    rng, hits, groups = np.random.default_rng(18), [], np.arange(num)
    for _ in range(400):
        labels = rng.choice(4, num, p=share)
        logits = -np.abs(labels + noise * rng.normal(size=num) - np.arange(4)[:, None]).T
        if len(np.unique(labels)) == 4:
            found = intervals(
                lambda w, y=labels, s=logits: {"balanced_accuracy": mean_over(recall(confusion(y, s.argmax(1), 4, w)))},
                groups,
                options=Bootstrap(2),
                scales=scales_of("multiclass", labels, groups),
            )
            hits.append(found["balanced_accuracy"][0] <= truth <= found["balanced_accuracy"][1])
    assert len(hits) > 350 and 0.917 <= np.mean(hits) <= 0.983, np.mean(hits)  # 0.95 within three standard errors


def test_interval_of_the_brier_score_covers_where_a_few_bags_are_far_off() -> None:
    """Probabilities u^20 off the label, u uniform: the mean score is 1/41, of which a few bags of 60 make the most.

    BCa covers at 88 %.
    """
    rng, hits, groups = np.random.default_rng(17), [], np.arange(60)
    for _ in range(400):
        off, labels = rng.random(60) ** 20, rng.integers(0, 2, 60)
        logits = (2 * labels - 1) * np.log((1 - off) / off)
        found = intervals(
            lambda w, y=labels, s=logits: {"brier": weighted_metrics(y, s, "binary", w)["brier"]},
            groups,
            options=Bootstrap(2),
            scales=scales_of("binary", labels, groups),
        )
        hits.append(found["brier"][0] <= 1 / 41 <= found["brier"][1])
    assert 0.917 <= np.mean(hits) <= 0.983, np.mean(hits)  # 0.95 within three standard errors


@pytest.mark.parametrize(("num", "prevalence", "distance"), [(100, 0.1, 2.5), (60, 0.5, 3.0)])
def test_interval_of_auroc_covers_where_it_is_high(num: int, prevalence: float, distance: float) -> None:
    """BCa covers at 87 and 89 %; of the 60 bags one set in twenty has an AUROC of 1."""
    rng, truth, hits = np.random.default_rng(15), stats.norm.cdf(distance / np.sqrt(2)), []
    groups = np.arange(num)
    for _ in range(400):
        labels = (rng.random(num) < prevalence).astype(int)
        if 2 <= labels.sum() <= num - 2:
            scores = rng.normal(size=num) + distance * labels
            scales = scales_of("binary", labels, groups)
            low, high = intervals(_auroc(labels, scores), groups, options=Bootstrap(2), scales=scales)["auroc"]
            hits.append(low <= truth <= high)
    assert 0.917 <= np.mean(hits) <= 0.99, np.mean(hits)  # the interval of 1 covers at more than 95 %


def test_interval_of_a_perfect_score_is_that_of_clopper_and_pearson() -> None:
    expected = stats.binomtest(12, 12).proportion_ci(method="exact")
    assert perfect_interval(1.0, 12) == pytest.approx((expected.low, expected.high), abs=1e-12)
    expected = stats.binomtest(0, 12).proportion_ci(method="exact")
    assert perfect_interval(0.0, 12) == pytest.approx((expected.low, expected.high), abs=1e-12)
    labels, groups = np.r_[np.zeros(8, int), np.ones(4, int)], np.arange(12)
    found = intervals(
        binary(labels, labels - 0.5), groups, options=Bootstrap(50), scales=scales_of("binary", labels, groups)
    )
    assert found["accuracy"] == perfect_interval(1.0, 12) and found["auroc"] == perfect_interval(1.0, 4)
    assert found["specificity"] == perfect_interval(1.0, 8) and found["f1"] == perfect_interval(1.0, 4)


def _auroc(labels: np.ndarray, scores: np.ndarray) -> Statistic:
    return lambda weights: {"auroc": ranking(labels == 1, scores, weights)[0]}


def _auroc_and_accuracy(labels: np.ndarray, logits: np.ndarray) -> Statistic:
    right = (logits >= 0) == labels
    return lambda w: {"auroc": ranking(labels == 1, logits, w)[0], "accuracy": w @ right / w.sum(1)}


def test_patients_widen_intervals_where_their_bags_are_alike() -> None:
    rng = np.random.default_rng(6)
    labels, logits = (np.repeat(part, 4) for part in draw(rng, 60))
    by_bag = intervals(binary(labels, logits), np.arange(240))["auroc"]
    by_patient = intervals(binary(labels, logits), np.arange(240) // 4)["auroc"]
    ratio = (by_patient[1] - by_patient[0]) / (by_bag[1] - by_bag[0])
    assert ratio == pytest.approx(2.0, rel=0.15)  # a quarter of the independent observations


def test_all_metrics_of_400_bags_in_a_second_or_so() -> None:
    labels, logits = draw(np.random.default_rng(7), 400)
    started = time.process_time()
    intervals(binary(labels, logits), np.arange(400), options=Bootstrap(1000))
    assert time.process_time() - started < 3


def _delong_by_pairs(labels: np.ndarray, scores: list[np.ndarray]) -> tuple[float, float]:
    """Difference and z by the double sums of the paper."""
    pairs = [
        (s[labels == 1][:, None] > s[labels == 0]) + 0.5 * (s[labels == 1][:, None] == s[labels == 0]) for s in scores
    ]
    over_negatives, over_positives = np.array([p.mean(1) for p in pairs]), np.array([p.mean(0) for p in pairs])
    covariance = np.cov(over_negatives) / over_negatives.shape[1] + np.cov(over_positives) / over_positives.shape[1]
    contrast = np.array([1, -1])
    difference = pairs[0].mean() - pairs[1].mean()
    return difference, difference / np.sqrt(contrast @ covariance @ contrast)


@pytest.mark.parametrize("digits", [1, 9])
def test_delong_by_pairs(digits: int) -> None:
    rng = np.random.default_rng(8)
    labels, common = draw(rng, 80)
    scores = [(common + rng.normal(size=80) * noise).round(digits) for noise in (0.3, 1.0)]
    difference, z = _delong_by_pairs(labels, scores)
    found = delong_test(labels, *scores)
    assert found.value == pytest.approx(difference, abs=1e-12)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(z)), abs=1e-12)
    assert found.high - found.low == pytest.approx(2 * 1.959963985 * difference / z, rel=1e-8)
    assert delong_test(labels, scores[0], scores[0]).p_value == 1.0
    with pytest.raises(ValueError, match="1 positive and 3 negative bags"):
        delong_test(np.array([1, 0, 0, 0]), np.arange(4), np.arange(4))


def test_delong_and_the_paired_bootstrap_agree_and_are_calibrated() -> None:
    rng = np.random.default_rng(9)
    p_values = []
    for _ in range(400):
        labels, common = draw(rng, 100)
        first, second = (common + 0.5 * rng.normal(size=100) for _ in range(2))
        p_values.append(delong_test(labels, first, second).p_value)
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.033)  # three standard errors
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    labels, common = draw(rng, 200)
    first, second = common + 0.2 * rng.normal(size=200), common + 1.5 * rng.normal(size=200)
    found = paired_bootstrap(binary(labels, first), binary(labels, second), np.arange(200))["auroc"]
    expected = delong_test(labels, first, second)
    assert found.value == pytest.approx(expected.value, abs=1e-12)
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.1 * width)
    assert found.high == pytest.approx(expected.high, abs=0.1 * width)
    same = paired_bootstrap(binary(labels, first), binary(labels, first), np.arange(200), options=Bootstrap(100))
    assert same["auroc"].value == 0 and same["auroc"].p_value == 1
