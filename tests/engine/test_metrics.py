from __future__ import annotations

import json
import logging
import tracemalloc

import numpy as np
import pytest
from sklearn import metrics as sk

from bigbag.engine.metrics import bag_metrics, instance_metrics, probabilities
from bigbag.engine.metrics.undefined import leave_out


@pytest.fixture(autouse=True)
def _log_again() -> None:
    leave_out.cache_clear()


def test_binary_by_hand() -> None:
    # scores of positives 2, -1; of negatives 1, -2, -3: 5 of the 6 pairs are in order, TP = FN = FP = 1, TN = 2
    got = bag_metrics(np.array([1, 0, 1, 0, 0]), np.array([2.0, 1.0, -1.0, -2.0, -3.0]), "binary")
    expected = {"num_bags": 5, "accuracy": 3 / 5, "auroc": 5 / 6, "f1": 1 / 2}
    expected |= {"average_precision": (1 + 2 / 3) / 2, "balanced_accuracy": (1 / 2 + 2 / 3) / 2}
    expected |= {"sensitivity": 1 / 2, "specificity": 2 / 3, "kappa": 1 - (2 / 5) / (12 / 25)}
    chances = 1 / (1 + np.exp(-np.array([2.0, 1.0, -1.0, -2.0, -3.0])))
    expected |= {"brier": np.mean((chances - [1, 0, 1, 0, 0]) ** 2)}
    expected |= {"ece": np.mean(np.abs(chances - [1, 0, 1, 0, 0]))}  # fifteenths 13, 10, 4, 1 and 0: one bag in each
    assert got == pytest.approx(expected)


def test_binary_takes_a_column_and_survives_huge_logits() -> None:
    got = bag_metrics(np.array([1, 0]), np.array([[1e4], [-1e4]]), "binary")
    assert (got["auroc"], got["accuracy"], got["f1"]) == (1.0, 1.0, 1.0)
    assert probabilities(np.array([1e4, -1e4, 0.0]), "binary").tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_leaves_metrics_out_and_says_why(label: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        got = bag_metrics(np.full(4, label), np.array([1.0, 2.0, -1.0, 3.0]), "binary")
    always = {"num_bags", "accuracy", "kappa", "brier", "ece"}
    assert set(got) == always | ({"f1", "sensitivity"} if label else {"specificity"})
    assert got["accuracy"] == pytest.approx(0.75 if label else 0.25)
    assert "auroc" in caplog.text and ("negative" if label else "positive") in caplog.text
    json.dumps(got, allow_nan=False)


def test_multiclass_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    logits = rng.normal(size=(200, 4)) + 1.5 * np.eye(4)[labels]
    got = bag_metrics(labels, logits, "multiclass")
    scores = probabilities(logits, "multiclass")
    np.testing.assert_allclose(scores.sum(1), 1)
    assert got["auroc"] == pytest.approx(sk.roc_auc_score(labels, scores, multi_class="ovr", average="macro"))
    assert got["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, logits.argmax(1)))
    assert got["f1"] == pytest.approx(sk.f1_score(labels, logits.argmax(1), average="macro"))
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(labels, logits.argmax(1)))


def test_multiclass_with_an_absent_class_has_no_auroc(caplog: pytest.LogCaptureFixture) -> None:
    got = bag_metrics(np.array([0, 1, 1]), np.eye(3)[[0, 1, 2]], "multiclass")
    assert "auroc" not in got and "class 2" in caplog.text
    assert got["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert got["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_multilabel_against_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, (60, 3))
    logits = rng.normal(size=(60, 3)) + labels
    got = bag_metrics(labels, logits, "multilabel")
    assert got["auroc"] == pytest.approx(sk.roc_auc_score(labels, logits, average="macro"))
    assert got["average_precision"] == pytest.approx(sk.average_precision_score(labels, logits, average="macro"))
    assert got["f1"] == pytest.approx(sk.f1_score(labels, logits > 0, average="macro"))
    assert got["accuracy"] == pytest.approx(np.mean((logits > 0) == labels))
    labels[:, 1] = 0
    defined = {"num_bags", "accuracy", "subset_accuracy", "brier", "ece"}
    assert set(bag_metrics(labels, logits, "multilabel")) == defined | {f"{n}_micro" for n in ("auroc", "f1")} | {
        "average_precision_micro"
    }


def test_regression_by_hand() -> None:
    got = bag_metrics(np.array([1.0, 2.0, 3.0]), np.array([[1.0], [2.0], [5.0]]), "regression")
    assert got == pytest.approx({"num_bags": 3, "mae": 2 / 3, "rmse": np.sqrt(4 / 3), "r2": 1 - 4 / 2})
    assert "r2" not in bag_metrics(np.array([1.0, 1.0]), np.array([1.0, 2.0]), "regression")


def test_no_bag_at_all() -> None:
    assert bag_metrics(np.zeros(0), np.zeros(0), "binary") == {"num_bags": 0}


@pytest.mark.parametrize(
    ("labels", "logits", "task", "message"),
    [
        ([0, 1], [0.0, 1.0], "ranking", "expected one of binary"),
        ([0, 1, 1], [0.0, 1.0], "binary", "do not go together"),
        ([0, 1], [[0.0, 1.0], [1.0, 0.0]], "binary", "do not go together"),
        ([0, 1], [0.0, 1.0], "multiclass", "do not go together"),
        ([0, 2], [0.0, 1.0], "binary", r"expected labels 0 to 1, got \[0, 2\]"),
        ([0, 1], [0.0, np.nan], "binary", "1 of 2 bags have logits that are not finite"),
        ([0.0, np.nan], [0.0, 1.0], "regression", "label is not finite"),
    ],
)
def test_bag_errors(labels: list, logits: list, task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bag_metrics(np.array(labels), np.array(logits), task)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_instance_metrics_against_scikit_learn(dtype: type) -> None:
    rng = np.random.default_rng(2)
    y_inst = rng.choice([-1, 0, 1], 5000, p=[0.3, 0.68, 0.02]).astype(np.int8)
    scores = (rng.normal(size=5000) + y_inst).round(1).astype(dtype)  # rounded: many ties
    kept, before = y_inst >= 0, scores.copy()
    got = instance_metrics(y_inst, scores)
    assert got["num_instances"] == kept.sum() < 5000
    assert got["instance_auroc"] == pytest.approx(sk.roc_auc_score(y_inst[kept], scores[kept]), abs=1e-12)
    expected = sk.average_precision_score(y_inst[kept], scores[kept])
    assert got["instance_average_precision"] == pytest.approx(expected, abs=1e-12)
    precision, recall, thresholds = sk.precision_recall_curve(y_inst[kept], scores[kept])
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-300))[:-1]
    assert got["instance_best_f1"] == pytest.approx(f1.max(), abs=1e-12)
    assert got["instance_best_threshold"] == thresholds[f1 >= f1.max() - 1e-12].max()
    at_one = instance_metrics(y_inst, scores, threshold=1.0)["instance_f1"]
    assert at_one == pytest.approx(sk.f1_score(y_inst[kept], scores[kept] >= 1), abs=1e-12)
    np.testing.assert_array_equal(scores, before)


def test_instance_metrics_undefined(caplog: pytest.LogCaptureFixture) -> None:
    assert instance_metrics(np.array([0, 0, -1]), np.array([1.0, 2.0, 3.0])) == {"num_instances": 2}
    assert "no instance is labelled positive" in caplog.text
    assert instance_metrics(np.zeros(0, np.int8), np.zeros(0)) == {"num_instances": 0}
    assert instance_metrics(np.array([0, 7]), np.array([1.0, 2.0])) == {}
    assert "these go from 0 to 7" in caplog.text


def test_instance_errors() -> None:
    with pytest.raises(ValueError, match="NaN"):
        instance_metrics(np.array([0, 1]), np.array([np.nan, 1.0]))
    with pytest.raises(ValueError, match="one score each"):
        instance_metrics(np.array([0, 1]), np.array([1.0]))


def test_instance_metrics_is_lean() -> None:
    rng = np.random.default_rng(3)
    scores, y_inst = rng.normal(size=1_000_000).astype(np.float32), rng.integers(0, 200, 1_000_000)
    y_inst = (y_inst == 0).astype(np.int8)
    tracemalloc.start()
    try:
        instance_metrics(y_inst, scores)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5.5 * len(scores)
