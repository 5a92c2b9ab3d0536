"""Every bag metric against an independent implementation, to 1e-9, with and without weights, ties included."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from bigbag.engine.metrics import (
    bag_metrics,
    concordance_index,
    probabilities,
    reliability_curve,
    weighted_metrics,
    why_undefined,
)
from bigbag.engine.metrics.concordance import inverse_censoring

EXACT = {"rel": 0, "abs": 1e-9}
NUM = 230


def _weightings(rng: np.random.Generator) -> np.ndarray:
    """All ones, the counts of two resamples, and real weights."""
    counts = rng.multinomial(NUM, np.full(NUM, 1 / NUM), 2)
    return np.concatenate([np.ones((1, NUM)), counts, rng.random((1, NUM))])


def _ece(outcomes: np.ndarray, chances: np.ndarray, weights: np.ndarray) -> float:
    place = np.minimum((chances * 15 + 1e-12).astype(int), 14)
    gaps = [abs((weights * (outcomes - chances))[place == b].sum()) for b in range(15)]
    return sum(gaps) / weights.sum()


@pytest.mark.parametrize("seed", [0, 1])
def test_binary(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random(NUM) < 0.3).astype(int)
    logits = (rng.normal(size=NUM) + labels).round(1)  # rounded: ties
    chances, decided = probabilities(logits, "binary"), logits >= 0
    weights = _weightings(rng)
    found = weighted_metrics(labels, logits, "binary", weights)
    for row, w in enumerate(weights):
        given = {"sample_weight": w}
        expected = {
            "auroc": sk.roc_auc_score(labels, logits, **given),
            "average_precision": sk.average_precision_score(labels, logits, **given),
            "accuracy": sk.accuracy_score(labels, decided, **given),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, decided, **given),
            "sensitivity": sk.recall_score(labels, decided, **given),
            "specificity": sk.recall_score(labels, decided, pos_label=0, **given),
            "f1": sk.f1_score(labels, decided, **given),
            "kappa": sk.cohen_kappa_score(labels, decided, **given),
            "brier": sk.brier_score_loss(labels, chances, **given),
            "ece": _ece(labels, chances, w),
        }
        assert {name: values[row] for name, values in found.items()} == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize("absent_from_decisions", [False, True])
def test_multiclass(absent_from_decisions: bool) -> None:
    rng = np.random.default_rng(2)
    labels = rng.choice(4, NUM, p=[0.5, 0.3, 0.1, 0.1])
    logits = (rng.normal(size=(NUM, 4)) + 1.2 * np.eye(4)[labels]).round(2)
    logits[:, 3] -= 20.0 * absent_from_decisions
    chances, decided = probabilities(logits, "multiclass"), logits.argmax(1)
    weights = _weightings(rng)
    found = weighted_metrics(labels, logits, "multiclass", weights, per_class=True)
    one_hot = np.eye(4)[labels]
    for row, w in enumerate(weights):
        given = {"sample_weight": w}
        expected = {
            "accuracy": sk.accuracy_score(labels, decided, **given),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, decided, **given),
            "kappa": sk.cohen_kappa_score(labels, decided, **given),
            "quadratic_kappa": sk.cohen_kappa_score(labels, decided, weights="quadratic", **given),
            "brier": np.average(((chances - one_hot) ** 2).sum(1), weights=w),
            "ece": _ece(decided == labels, chances.max(1), w),
        }
        for average, suffix in (("macro", ""), ("weighted", "_weighted")):
            ovr = {"multi_class": "ovr", "average": average, **given}
            expected[f"auroc{suffix}"] = sk.roc_auc_score(labels, chances, **ovr)
            expected[f"average_precision{suffix}"] = sk.average_precision_score(
                one_hot, chances, average=average, **given
            )
            expected[f"f1{suffix}"] = sk.f1_score(labels, decided, average=average, **given)
        for k in range(4):
            expected[f"auroc_{k}"] = sk.roc_auc_score(labels == k, chances[:, k], **given)
            expected[f"average_precision_{k}"] = sk.average_precision_score(labels == k, chances[:, k], **given)
            expected[f"f1_{k}"] = sk.f1_score(labels == k, decided == k, **given)
        assert {name: values[row] for name, values in found.items()} == pytest.approx(expected, **EXACT)


def test_multilabel() -> None:
    rng = np.random.default_rng(3)
    labels = (rng.random((NUM, 3)) < [0.2, 0.5, 0.8]).astype(int)
    logits = (rng.normal(size=(NUM, 3)) + labels).round(1)
    chances, decided = probabilities(logits, "multilabel"), logits >= 0
    weights = _weightings(rng)
    found = weighted_metrics(labels, logits, "multilabel", weights)
    for row, w in enumerate(weights):
        expected = {
            "accuracy": np.average((decided == labels).mean(1), weights=w),
            "subset_accuracy": sk.accuracy_score(labels, decided, sample_weight=w),
            "brier": np.average(((chances - labels) ** 2).mean(1), weights=w),
            "ece": _ece(labels.ravel(), chances.ravel(), np.repeat(w, 3)),
        }
        for average, suffix in (("macro", ""), ("weighted", "_weighted"), ("micro", "_micro")):
            how = {"average": average, "sample_weight": w}
            expected[f"auroc{suffix}"] = sk.roc_auc_score(labels, logits, **how)
            expected[f"average_precision{suffix}"] = sk.average_precision_score(labels, logits, **how)
            expected[f"f1{suffix}"] = sk.f1_score(labels, decided, **how)
        assert {name: values[row] for name, values in found.items()} == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression(outputs: int) -> None:
    rng = np.random.default_rng(4)
    labels = 1e3 + rng.normal(size=(NUM, outputs))
    predictions = labels + rng.normal(size=labels.shape)
    weights = _weightings(rng)
    found = weighted_metrics(labels, predictions, "regression", weights)
    for row, w in enumerate(weights):
        given = {"sample_weight": w}
        expected = {
            "mae": sk.mean_absolute_error(labels, predictions, **given),
            "rmse": np.sqrt(sk.mean_squared_error(labels, predictions, **given)),
            "r2": sk.r2_score(labels, predictions, **given),
        }
        assert {name: values[row] for name, values in found.items()} == pytest.approx(expected, **EXACT)


def test_calibration_against_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is not installed")
    import torch

    rng = np.random.default_rng(5)
    labels, logits = rng.integers(0, 2, 400), rng.normal(size=400)
    expected = functional.binary_calibration_error(
        torch.from_numpy(probabilities(logits, "binary")), torch.from_numpy(labels), n_bins=15
    )
    assert bag_metrics(labels, logits, "binary")["ece"] == pytest.approx(float(expected), abs=1e-6)  # fp32 bins
    labels, logits = rng.integers(0, 3, 400), rng.normal(size=(400, 3))
    chances = torch.from_numpy(probabilities(logits, "multiclass"))
    expected = functional.multiclass_calibration_error(chances, torch.from_numpy(labels), num_classes=3, n_bins=15)
    assert bag_metrics(labels, logits, "multiclass")["ece"] == pytest.approx(float(expected), abs=1e-6)


def test_reliability_curve_against_scikit_learn() -> None:
    rng = np.random.default_rng(6)
    labels, chances = rng.integers(0, 2, 50), 0.7 * rng.random(50)
    mean, observed, count = reliability_curve(labels, chances, 10)
    filled = count > 0
    assert count.sum() == 50 and not filled[8:].any() and np.isnan(mean[~filled]).all()
    expected_observed, expected_mean = calibration_curve(labels, chances, n_bins=10)
    np.testing.assert_allclose(mean[filled], expected_mean, atol=1e-12)
    np.testing.assert_allclose(observed[filled], expected_observed, atol=1e-12)
    assert reliability_curve([1, 0], np.array([1.0, 0.0]), 2)[2].tolist() == [1, 1]  # 1 is in the last bin


def _survival(rng: np.random.Generator, tied: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    risk = rng.normal(size=NUM).round(1)
    time, censored = rng.exponential(np.exp(-risk)), rng.exponential(2.0, NUM)
    event = time <= censored
    time = np.minimum(time, censored)
    return (np.ceil(time * 10) if tied else time), event.astype(int), risk


def _uno_by_pairs(time: np.ndarray, event: np.ndarray, risk: np.ndarray, weights: np.ndarray) -> float:
    def uncensored(t: float) -> float:
        share = 1.0
        for u in np.unique(time[(event == 0) & (time <= t)]):
            censored = np.sum((time == u) & (event == 0))
            share *= 1 - censored / (np.sum(time >= u) - np.sum((time == u) & (event == 1)))
        return share

    right = total = 0.0
    for i in np.flatnonzero(event):
        for j in range(len(time)):
            if time[i] < time[j] or (time[i] == time[j] and not event[j]):
                pair = weights[i] * weights[j] / uncensored(time[i]) ** 2
                total += pair
                right += pair * (1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0)
    return right / total


@pytest.mark.parametrize("tied", [False, True])
def test_survival_by_pairs(tied: bool) -> None:
    time, event, risk = (part[:60] for part in _survival(np.random.default_rng(7), tied))
    last = time.argmax()
    event[last] = 0  # the longest time is censored: G is positive at every event
    time[last] += 1
    weights = np.random.default_rng(8).integers(0, 3, (2, 60))
    found = weighted_metrics(np.stack([time, event], 1), risk, "survival", weights)
    for row in range(2):
        assert found["c_index_ipcw"][row] == pytest.approx(_uno_by_pairs(time, event, risk, weights[row]), **EXACT)


@pytest.mark.parametrize("tied", [False, True])
def test_survival_against_scikit_survival_and_lifelines(tied: bool) -> None:
    surv = pytest.importorskip("sksurv.metrics", reason="scikit-survival is not installed")
    lifelines = pytest.importorskip("lifelines.utils", reason="lifelines is not installed")
    time, event, risk = _survival(np.random.default_rng(9), tied)
    expected = surv.concordance_index_censored(event != 0, time, risk)[0]
    assert concordance_index(time, event, risk) == pytest.approx(expected, **EXACT)
    if not tied:  # lifelines counts two events at one time as a tie
        assert concordance_index(time, event, risk) == pytest.approx(
            lifelines.concordance_index(time, -risk, event), **EXACT
        )
    if np.isfinite(inverse_censoring(time, event)).all():
        data = np.array(list(zip(event != 0, time)), dtype=[("event", bool), ("time", float)])
        expected = surv.concordance_index_ipcw(data, data, risk)[0]
        assert concordance_index(time, event, risk, ipcw=True) == pytest.approx(expected, **EXACT)


def test_ipcw_by_hand() -> None:
    # G is 1 at 1, 2/3 from 2 on: the pairs of the event at 3 count 9/4 each. In order: 1 < 2, 3, 4; not in order: 3 < 4
    time, event, risk = np.array([1, 2, 3, 4]), np.array([1, 0, 1, 0]), np.array([9.0, 0.0, 1.0, 5.0])
    assert concordance_index(time, event, risk) == 3 / 4
    assert concordance_index(time, event, risk, ipcw=True) == pytest.approx(3 / (3 + 9 / 4))
    assert concordance_index(time, np.zeros(4), risk, ipcw=True) is None
    assert concordance_index(np.array([1, 2, 2]), np.array([1, 1, 0]), np.zeros(3), ipcw=True) is None  # G(2) = 0


def test_undefined_values_have_reasons() -> None:
    def reason(name: str, labels: object, logits: object, task: str) -> str:
        found = weighted_metrics(np.asarray(labels), np.asarray(logits, float), task)
        assert np.isnan(found[name][0])
        return why_undefined(name, np.asarray(labels), np.asarray(logits, float), task)

    assert reason("auroc", [0, 0], [1, 2], "binary") == "no bag is labelled positive"
    assert reason("specificity", [1, 1], [1, 2], "binary") == "no bag is labelled negative"
    assert reason("kappa", [1, 1], [1, 2], "binary") == "labels and decisions are all of one class"
    assert reason("auroc", [0, 1], np.eye(3)[:2], "multiclass") == "no bag is labelled with class 2"
    assert reason("balanced_accuracy", [1, 1], np.eye(3)[:2], "multiclass") == "every bag has the same label"
    assert reason("f1", [[0, 1], [0, 0]], np.ones((2, 2)), "multilabel") == "no bag has label 0"
    assert reason("auroc", [[0, 1], [0, 0]], np.ones((2, 2)), "multilabel") == "all bags agree on label 0"
    assert reason("r2", [2, 2], [1, 2], "regression") == "the labels of the bags do not vary"
    assert reason("c_index", [[1, 0], [2, 0]], [1, 2], "survival").startswith("no two bags can be compared")
    labels = [[1, 1], [2, 1], [2, 0]]
    assert reason("c_index_ipcw", labels, [1, 2, 3], "survival") == "all bags at risk at an event are censored"
