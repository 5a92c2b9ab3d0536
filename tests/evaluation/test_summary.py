"""`bigbag evaluate --predictions`: every number of the files it writes, recomputed by other libraries."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

from bigbag.cli import main
from bigbag.evaluation.froc import find, froc
from bigbag.evaluation.predictions import PredictionTable, read_predictions
from bigbag.evaluation.summary import by_patient, compare_models


def write_predictions(path: Path, seed: int = 0, noise: float = 1.0, num: int = 90) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)
    rows = []
    truth = np.random.default_rng(99)
    for i in range(num):
        label = int(truth.random() < 0.4)
        logit = np.float32(label - 0.5 + noise * rng.normal())
        row = {"key": f"s{i}", "split": "val" if i % 3 == 0 else "test", "label": label, "logit": f"{logit:.9g}"}
        rows.append({**row, "num_instances": 10, "patient": f"p{i // 4}"})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def metrics_of(folder: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {(row["split"], row["unit"], row["metric"]): row for row in csv.DictReader(file)}


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_predictions(tmp_path / "predictions.csv")
    assert main(["evaluate", "--predictions", str(tmp_path / "predictions.csv"), "--resamples", "300"]) == 0
    assert "| test | bag | auroc |" in capsys.readouterr().out
    found = metrics_of(tmp_path)
    for split in ("val", "test"):
        own = [row for row in rows if row["split"] == split]
        labels, logits = (np.array([float(row[name]) for row in own]) for name in ("label", "logit"))
        for name, expected in {
            "auroc": sk.roc_auc_score(labels, logits),
            "average_precision": sk.average_precision_score(labels, logits),
            "f1": sk.f1_score(labels, logits >= 0),
            "brier": sk.brier_score_loss(labels, 1 / (1 + np.exp(-logits))),
        }.items():
            row = found[split, "bag", name]
            assert float(row["value"]) == pytest.approx(expected, abs=1e-9)
            assert float(row["low"]) < expected < float(row["high"]) and int(row["count"]) == len(own)
        assert found[split, "bag", "ece"]["low"] == "nan" != found[split, "bag", "ece"]["value"]
        patients = sorted({row["patient"] for row in own})
        of = [[i for i, row in enumerate(own) if row["patient"] == patient] for patient in patients]
        expected = sk.roc_auc_score([labels[i].max() for i in of], [logits[i].mean() for i in of])
        assert float(found[split, "patient", "auroc"]["value"]) == pytest.approx(expected, abs=1e-9)
        assert int(found[split, "patient", "auroc"]["count"]) == len(patients)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["task"] == "binary" and sum(saved["reliability"]["test"]["count"]) == 60


def test_undefined_is_null_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("label,probability\n1,0.75\n1,0.5\n")
    assert main(["evaluate", "--predictions", str(path)]) == 0
    row = metrics_of(tmp_path)["test", "bag", "auroc"]
    assert (row["value"], row["low"], row["reason"]) == ("nan", "nan", "no bag is labelled negative")
    values = {m["metric"]: m for m in json.loads((tmp_path / "metrics.json").read_text())["metrics"]}
    assert values["auroc"]["value"] is None and values["accuracy"]["value"] == 1.0
    assert values["brier"]["value"] == pytest.approx((0.25**2 + 0.5**2) / 2, abs=1e-12)


def test_probabilities_serve_where_there_are_no_logits(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(
        "key,label,probability_0,probability_1,probability_2\na,2,0.2,0.3,0.5\nb,0,1,0,0\nc,1,0.1,0.2,0.7\n"
    )
    table = read_predictions(path)
    assert table.likely_task() == "multiclass"
    np.testing.assert_allclose(np.exp(table.logits), table.probabilities, atol=1e-12)
    with pytest.raises(ValueError, match="expected a column label and logit or probability, or numbered ones, got a"):
        (tmp_path / "other.csv").write_text("a\n1\n")
        read_predictions(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key;label;logit\na;0;1\n", "separate them by commas"),
        ("key,label,logit\na,0,1\nb,1,2\na,0,1\n", ":4: bag 'a' of split test is in line 2 already"),
        ("key,label,logit\na,0,1\n,1,2\n", ":3: key is empty"),
        ("key,label,logit\na,0,1\nb,1,\n", ":3: the score of the bag is missing or not finite"),
        ("key,label,logit\na,0,inf\nb,1,2\n", ":2: the score of the bag is missing or not finite"),
        ("key,label,logit\na,0\nb,1,2\n", ":2: fewer cells than the 3 columns"),
        ("key,label,logit\na,0,1\nb,1,2,3\n", ":3: more cells than the 3 columns"),
        ('key,label,logit_0,logit_1\na,"[0,1]",1,2\nb,[1],2,3\n', ":3: label: expected 2 numbers"),
        ("key,label,logit_0,logit_2\na,0,1,2\n", "expected the columns logit_0, logit_1, got logit_0, logit_2"),
        ("key,label,probability\na,0,0.2\nb,1,1.7\n", ":3: probability: expected 0 to 1"),
        ("key,label,logit\n", "has no rows"),
        ("key,label,logit\na\xe9,0,1\n", "not a CSV file in UTF-8"),
    ],
)
def test_tables_that_would_be_misread_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(text.encode("latin-1"))
    assert main(["evaluate", "--predictions", str(path), "--resamples", "20"]) == 2
    said = capsys.readouterr().err
    assert str(path) in said and expected in said
    assert not (tmp_path / "metrics.csv").exists()


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_text("key,label,logit\na,0,1\nb,,2\n", encoding="utf-8-sig")
    table = read_predictions(path)
    assert table.keys == ("a", "b") and np.array_equal(table.labels, [0, np.nan], equal_nan=True)


def test_what_lies_beside_is_named_where_it_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "predictions.csv"
    write_predictions(path)
    command = ["evaluate", "--predictions", str(path), "--resamples", "20"]
    (tmp_path / "config.yaml").write_text("another: file\n")
    assert main(command) == 2 and "config.yaml: is not the config of a run" in capsys.readouterr().err
    assert main([*command, "--task", "binary"]) == 0
    np.savez(tmp_path / "instances.npz", scores=np.zeros(1000))
    (tmp_path / "instances.npz").write_bytes((tmp_path / "instances.npz").read_bytes()[:500])
    assert main([*command, "--task", "binary"]) == 2
    assert "instances.npz: not a readable .npz file" in capsys.readouterr().err
    assert main([*command, "--task", "multiclass"]) == 2 and f"{path}: task multiclass" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["multiclass", "survival", "regression"])
def test_other_tasks(tmp_path: Path, task: str) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / "predictions.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        outputs = [f"logit_{k}" for k in range(3)] if task == "multiclass" else ["logit"]
        writer.writerow(["key", "label", *outputs, "patient"])
        for i in range(60):
            label = {"multiclass": i % 3, "survival": json.dumps([float(i + 1), i % 2]), "regression": i / 7}[task]
            writer.writerow([i, label, *rng.normal(size=len(outputs)), f"p{i // 2}" if task == "multiclass" else ""])
    options = ["--task", task, "--interval", "bca", "--stratified", "--resamples", "200"]
    assert main(["evaluate", "--predictions", str(path), *options]) == 0
    found = metrics_of(tmp_path)
    name = {"multiclass": "quadratic_kappa", "survival": "c_index_ipcw", "regression": "mae"}[task]
    row = found["test", "bag", name]
    assert float(row["low"]) < float(row["value"]) < float(row["high"])
    assert (("test", "patient", "auroc_2") in found) == (task == "multiclass")


def table(labels: object, logits: object, patients: tuple[str, ...]) -> PredictionTable:
    labels, logits = np.array(labels, float), np.array(logits, float)
    num = len(labels)
    names = tuple(f"s{i}" for i in range(num))
    return PredictionTable(names, ("test",) * num, labels, logits, logits, np.ones(num, np.int64), patients)


def test_patients() -> None:
    bags = table([0, 1, 0, 0], [-1.0, 3.0, 2.0, 0.5], ("a", "a", "", "b"))
    mean, largest = by_patient(bags, "binary"), by_patient(bags, "binary", "max")
    assert mean.keys == ("a", "s2", "b") and mean.labels.tolist() == [1, 0, 0] and mean.sizes.tolist() == [2, 1, 1]
    assert mean.logits.tolist() == [1.0, 2.0, 0.5] and largest.logits.tolist() == [3.0, 2.0, 0.5]
    with pytest.raises(ValueError, match="patient 'a' has bags with different labels"):
        by_patient(bags, "regression")
    with pytest.raises(ValueError, match="patient rule max goes with binary and multilabel"):
        by_patient(bags, "regression", "max")


def test_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_predictions(tmp_path / "good.csv", noise=0.3)
    write_predictions(tmp_path / "bad.csv", seed=1, noise=3.0)
    paths = ["--predictions", str(tmp_path / "good.csv"), "--against", str(tmp_path / "bad.csv")]
    assert main(["evaluate", *paths, "--resamples", "300"]) == 0
    assert "auroc_delong" in capsys.readouterr().out
    with (tmp_path / "difference.csv").open() as file:
        found = {row["metric"]: {k: float(v) for k, v in row.items() if k != "metric"} for row in csv.DictReader(file)}
    good, bad = (read_predictions(tmp_path / name).labelled("test") for name in ("good.csv", "bad.csv"))
    expected = sk.roc_auc_score(good.labels, good.logits) - sk.roc_auc_score(bad.labels, bad.logits)
    assert found["auroc"]["value"] == found["auroc_delong"]["value"] == pytest.approx(expected, abs=1e-12)
    assert 0 < found["auroc"]["low"] < expected < found["auroc"]["high"] and found["auroc"]["p_value"] < 0.05
    with pytest.raises(ValueError, match="not evaluated on the same test bags: .* table only: s.* and 50 more"):
        compare_models(good, bad.take(np.arange(5)), "binary")
    unnamed = tmp_path / "unnamed.csv"
    unnamed.write_text("\n".join(line.partition(",")[2] for line in (tmp_path / "bad.csv").read_text().split()))
    assert main(["evaluate", "--predictions", paths[1], "--against", str(unnamed), "--resamples", "20"]) == 2
    assert "the second table of predictions has no column key" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no bag of the split 'train' has a label: expected a split of test"):
        compare_models(good, bad, "binary", "train")


def test_instances_and_lesions(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    write_predictions(tmp_path / "predictions.csv", num=9)
    coords = np.tile(np.argwhere(np.ones((12, 12)) > 0), (4, 1))
    y_inst = np.zeros(4 * 144, np.int8)
    y_inst[[20, 21, 22, 100, 144 + 50, 288 + 5]] = 1
    scores = (rng.normal(size=4 * 144) + 2 * y_inst).astype(np.float32)
    arrays = {"key": np.array(list("abcde")), "split": np.array(["val", "test", "test", "test", "test"])}
    arrays |= {"sizes": np.array([144, 144, 0, 144, 144]), "scores": scores, "y_inst": y_inst, "coords": coords}
    np.savez(tmp_path / "instances.npz", **arrays)
    assert main(["evaluate", "--predictions", str(tmp_path / "predictions.csv"), "--resamples", "100"]) == 0
    found = metrics_of(tmp_path)
    test = slice(144, None)
    auroc = sk.roc_auc_score(y_inst[test], scores[test])
    assert float(found["test", "instance", "auroc"]["value"]) == pytest.approx(auroc, abs=1e-9)
    threshold = float(found["val", "instance", "best_threshold"]["value"])
    expected = sk.f1_score(y_inst[test], scores[test] >= np.float32(threshold))
    assert float(found["test", "instance", "f1"]["value"]) == pytest.approx(expected, abs=1e-9)
    slides = [find(coords[:144], scores[144 * i : 144 * (i + 1)], y_inst[144 * i : 144 * (i + 1)]) for i in (1, 2, 3)]
    row = found["test", "lesion", "froc"]
    assert float(row["value"]) == pytest.approx(froc(slides).score, abs=1e-9) and int(row["count"]) == 2
    assert int(found["val", "lesion", "froc"]["count"]) == 2
