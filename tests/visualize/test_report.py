from __future__ import annotations

import base64
import csv
import html
import json
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from scipy import ndimage, stats
from sklearn.datasets import load_digits

from bigbag.data.manifest import make_keys
from bigbag.engine.metrics import bag_metrics, instance_metrics, probabilities
from bigbag.evaluation.predictions import read_predictions
from bigbag.evaluation.survival import kaplan_meier
from bigbag.visualize import write_report
from bigbag.visualize.charts import survival_chart, wilson_interval
from bigbag.visualize.performance import measurement, metric_name
from bigbag.visualize.run_folder import read_run


def make_slide(rng: np.random.Generator, side: int, lesion: bool) -> dict[str, Any]:
    """A tissue-shaped bag of digits, the zeros of a lesion in it, and attention that mostly finds them."""
    images, digits = load_digits(return_X_y=True)
    noise = ndimage.gaussian_filter(rng.normal(size=(side, side)), side / 9)
    middle = np.hypot(*(np.indices((side, side)) - side / 2)) / side
    row, col = np.nonzero(noise / noise.std() - 6 * middle > -2.2)
    y_inst = np.zeros(len(row), np.int8)
    if lesion:
        centre = rng.integers(len(row))
        radius = rng.uniform(1.2, 4.5)
        y_inst[np.hypot(row - row[centre], col - col[centre]) < radius] = 1
    pick = np.where(
        y_inst, rng.choice(np.flatnonzero(digits == 0), len(row)), rng.choice(np.flatnonzero(digits), len(row))
    )
    stain = rng.uniform(0.75, 1.0)
    scores = rng.normal(0, 0.9, len(row)) + rng.choice([0, 2.5], len(row), p=[0.985, 0.015]) + 3.8 * y_inst
    return {
        "scores": scores.astype(np.float32),
        "coords": np.stack([col, row], 1).astype(np.int32),
        "y_inst": y_inst,
        "patches": (images[pick] / 16 * stain).astype(np.float16).reshape(-1, 8, 8),
    }


def make_run(
    folder: Path, *, task: str = "binary", num_test: int = 60, side: int = 110, num_slides: int = 3, seed: int = 0
) -> Path:
    """A run folder such as the engine writes."""
    rng = np.random.default_rng(seed)
    (folder / "attention").mkdir(parents=True)
    num_outputs = 1 if task in ("binary", "regression") else 4
    config = {
        "name": "digits-abmil",
        "data": {"shards": "data/digits", "budget_instances": 131072},
        "model": {"name": "ABMIL", "att_dim": 128, "gated": True},
        "task": {"type": task, "num_outputs": num_outputs},
        "train": {"epochs": 12, "monitor": "auroc" if task != "regression" else "r2"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rows, results = [], {}
    for split, count in (("val", 30), ("test", num_test)):
        if task == "regression":
            labels = rng.normal(size=count)
            logits = labels + rng.normal(0, 0.4, count)
        elif task == "binary":
            labels = np.arange(count) % 2
            logits = rng.normal(0, 1.6, count) + 5.2 * labels - 2.6
        else:
            labels = rng.integers(0, 4, count) if task == "multiclass" else rng.integers(0, 2, (count, 4))
            logits = rng.normal(size=(count, 4)) + 2 * (np.eye(4)[labels] if task == "multiclass" else labels - 0.5)
        sizes = rng.integers(2000, 20000, count)
        chances = probabilities(logits, task)
        for i in range(count):
            label = labels[i].tolist()
            row = [f"{split}-{i:04d}", split, json.dumps(label), *np.atleast_1d(logits[i]), *np.atleast_1d(chances[i])]
            rows.append([*row, sizes[i]])
        results[split] = bag_metrics(labels, logits, task) | {"loss": 0.31}
    suffixes = [""] if num_outputs == 1 else [f"_{k}" for k in range(num_outputs)]
    columns = [f"{name}{suffix}" for name in ("logit", "probability") for suffix in suffixes]
    with (folder / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["key", "split", "label", *columns, "num_instances"], *rows])
    write_log(folder, rng)
    slides = [make_slide(rng, side, lesion=True) for _ in range(num_slides)]
    for i, slide in enumerate(slides):
        np.savez_compressed(folder / f"attention/{i:02d}-test.npz", key=f"test-{2 * i + 1:04d}", **slide)
    if slides:
        y_inst, scores = (np.concatenate([slide[name] for slide in slides]) for name in ("y_inst", "scores"))
        results["test"] |= instance_metrics(y_inst, scores)
    left_out = [
        {"name": "train-0013", "reason": "no instance"},
        {"name": "test_<b>x</b>", "reason": "features hold NaN"},
    ]
    (folder / "results.json").write_text(json.dumps({**results, "best_epoch": 9, "left_out": left_out}))
    environment = {
        "versions": {"python": "3.11.9", "bigbag": "0.1.0", "torch": "2.13.0"},
        "devices": {"device": "cpu", "ranks": 1, "backend": "torch", "precision": "fp32"},
        "operators": {"attention_pool": "cpu", "segment_sum": "cpu"},
        "memory": {"peak_bytes": 600 << 20, "measured_peak_bytes": 585 << 20, "largest_pack_bytes": 16777216},
        "data": {"bags": {"train": 120, "val": 30, "test": 60}, "instances": {"train": 1320000, "val": 1, "test": 2}},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def write_log(folder: Path, rng: np.random.Generator) -> None:
    lines = []
    for epoch in range(12):
        for step in range(epoch * 15, epoch * 15 + 15):
            loss = 0.7 * np.exp(-step / 50) + 0.05 * rng.random()
            event = {"kind": "train", "epoch": epoch, "step": step, "loss": loss, "lr": 1e-3 * (1 - step / 180)}
            lines.append(event | {"grad_norm": rng.gamma(2), "instances_per_s": 9e4 + 1e4 * rng.normal()})
        val = {
            "auroc": 1 - 0.45 * np.exp(-epoch / 3),
            "accuracy": 0.9,
            "r2": 0.8,
            "loss": 0.7 * np.exp(-epoch / 4) + 0.1,
        }
        train_loss = 0.7 * np.exp(-epoch / 3.4) + 0.03
        lines.append({"kind": "epoch", "epoch": epoch, "step": 15 * epoch + 15, "train_loss": train_loss, "val": val})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return write_report(run_dir).read_text()


def small_run(folder: Path, **changes: Any) -> Path:
    return make_run(folder / "run", side=30, **{"num_slides": 1, "num_test": 20, **changes})


def section(page: str, anchor: str) -> str:
    found = re.search(rf'<section id="{anchor}">(.*?)</section>', page, re.S)
    assert found, anchor
    return found[1]


def rows_of(part: str) -> list[list[str]]:
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", part)
    return [[html.unescape(re.sub("<.*?>", "", cell)) for cell in re.split("</t[hd]>", row)[:-1]] for row in rows]


def test_headline_is_what_the_results_say(run_dir: Path, page: str) -> None:
    results = json.loads((run_dir / "results.json").read_text())["test"]
    cards = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd></div>", page))
    assert cards["Test AUROC"] == f"{results['auroc']:.3f}"
    assert cards["Test F1 score"] == f"{results['f1']:.3f}"
    assert cards["Test instance AUROC"] == f"{results['instance_auroc']:.3f}"


def test_lead_and_confusion_matrix_count_the_predictions(run_dir: Path, page: str) -> None:
    with (run_dir / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    counts = [[0, 0], [0, 0]]
    for row in rows:
        counts[int(row["label"])][float(row["probability"]) >= 0.5] += 1
    confusion = section(page, "performance")
    assert [int(n) for n in re.findall(r"<b>(\d+)</b><span>", confusion)] == [*counts[0], *counts[1]]
    assert (
        f"Of 30 positive test bags the model misses {counts[1][0]}; of 30 negative ones it calls {counts[0][1]}" in page
    )


def test_calibration_is_that_of_the_predictions(run_dir: Path, page: str) -> None:
    with (run_dir / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    label, probability = (np.array([float(row[name]) for row in rows]) for name in ("label", "probability"))
    place = np.minimum((probability * 15).astype(int), 14)
    error = sum(abs((label - probability)[place == b].sum()) for b in range(15)) / len(rows)
    assert f"Expected calibration error {error:.3f};" in section(page, "performance")


def test_intervals_stand_beside_the_metrics(run_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_dir, tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    row = {
        "split": "test",
        "unit": "bag",
        "metric": "auroc",
        "value": results["test"]["auroc"],
        "low": 0.613,
        "high": 0.871,
    }
    other = {**row, "unit": "patient", "low": 0.1, "high": 0.2}
    (folder / "metrics.json").write_text(json.dumps({"metrics": [row, other, {**row, "metric": "f1", "low": None}]}))
    page = write_report(folder).read_text()
    (auroc,) = [cells for cells in rows_of(page) if cells[0] == "AUROC"]
    assert f"{results['test']['auroc']:.3f} 0.613 to 0.871" in auroc
    assert "with 95 % intervals by patient" in page and "0.2" not in " ".join(auroc)


def test_memory_is_told_beside_the_prediction(page: str) -> None:
    assert "Peak memory of a device: 585 MiB (600 MiB predicted)." in section(page, "training")


def test_wilson_interval_is_that_of_scipy() -> None:
    from scipy.stats import binomtest

    low, high = wilson_interval(np.array([0.0, 0.3, 1.0]), np.array([5, 10, 2]))
    for k, n, found in zip((0, 3, 2), (5, 10, 2), zip(low, high)):
        interval = binomtest(k, n).proportion_ci(method="wilson")
        assert found == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_every_bag_is_listed_worst_first(run_dir: Path, page: str) -> None:
    rows = rows_of(section(page, "mistakes"))
    errors = [round(abs((row[1] == "positive") - float(row[2])), 3) for row in rows]
    assert len(rows) == 60 and errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
    wrong = [row[4] for row in rows if row[4] != "right"]
    assert wrong == [{"positive": "missed", "negative": "false alarm"}[row[1]] for row in rows[: len(wrong)]]
    assert f"{len(wrong)} of 60 bags are wrong" in page


def test_text_from_the_run_is_escaped(page: str) -> None:
    assert "<b>x</b>" not in page
    assert rows_of(section(page, "left-out")) == [["train-0013", "no instance"], ["test_<b>x</b>", "features hold NaN"]]


def test_page_is_self_contained_and_small(run_dir: Path, page: str) -> None:
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 20
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert (run_dir / "report.html").stat().st_size < 6_000_000
    assert all(re.search(r' alt="', image) for image in re.findall("<img[^>]*>", page))
    assert all("aria-label=" in svg for svg in re.findall("<svg[^>]*>", page))


def test_same_run_gives_the_same_page(run_dir: Path, page: str) -> None:
    assert write_report(str(run_dir)).read_text() == page


def test_slides_tell_how_attention_meets_truth(run_dir: Path, page: str) -> None:
    slides = section(page, "slides")
    assert slides.count("<article") == 3 and slides.count('class="strip"') == 3
    with np.load(run_dir / "attention/00-test.npz") as stored:
        scores, y_inst = stored["scores"], stored["y_inst"]
    num = int(y_inst.sum())
    hits = int(y_inst[np.argsort(-scores)[:num]].sum())
    assert f"{hits} of the {num} most attended are positive" in slides
    assert f"{int(y_inst[np.argsort(-scores)[:12]].sum())} of 12 are known to be positive" in slides
    assert slides.count('<path class="lesion" d="M') == 4 * 3


def test_bags_link_to_their_pictures(tmp_path: Path) -> None:
    folder = small_run(tmp_path)
    text = (folder / "predictions.csv").read_text()
    (key,) = make_keys(["TCGA-A #1.uuid"])
    (folder / "predictions.csv").write_text(text.replace("test-0004,", f"{key},"))
    for name in ("heatmaps/test-0003.png", "predicted/heatmaps/TCGA-A #1.uuid.png", "heatmaps/test-0003.overlay.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    page = write_report(folder).read_text()
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>', section(page, "mistakes"))
    links = {row.split(" <")[0]: re.findall('href="(.*?)"', row) for row in rows}
    assert links["test-0001"] == ["#slide-0"] and 'id="slide-0"' in page
    assert links["test-0003"] == ["heatmaps/test-0003.png"]
    assert [unquote(link) for link in links[key]] == ["predicted/heatmaps/TCGA-A #1.uuid.png"] and "#" not in links[
        key
    ][0]
    assert sum(map(len, links.values())) == 3


def test_ranking_curves_have_bands(tmp_path: Path, page: str) -> None:
    performance = section(page, "performance")
    assert performance.count("Bands are 95 % intervals.") == 2
    roc = base64.b64decode(re.findall(r"svg\+xml;base64,([^\"]*)", performance)[0]).decode()
    assert "FillBetweenPolyCollection" in roc
    many = section(write_report(small_run(tmp_path, task="multilabel")).read_text(), "performance")
    assert many.count("Bands are 95 % intervals.") == 2 and re.search("ROC: label 0 AUROC.*label 3 AUROC", many)


def test_disagreement_of_files_is_shown(tmp_path: Path) -> None:
    folder = small_run(tmp_path)
    assert "do not agree" not in write_report(folder).read_text()
    results = json.loads((folder / "results.json").read_text())
    results["test"]["auroc"] = 0.5
    (folder / "results.json").write_text(json.dumps(results))
    assert re.search(r"do not agree on test: AUROC [01]\.\d+ against 0\.500\.", write_report(folder).read_text())


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "regression"])
def test_other_tasks(tmp_path: Path, task: str) -> None:
    folder = small_run(tmp_path, task=task)
    run, page = read_run(folder), write_report(folder).read_text()
    assert run.task == task
    metrics = json.loads((folder / "results.json").read_text())["test"]
    key, name = ("r2", "R²") if task == "regression" else ("auroc", "AUROC")
    assert f"<dt>Test {name}</dt><dd>{metrics[key]:.3f}</dd>" in page
    assert len(rows_of(section(page, "mistakes"))) == 20
    assert "do not agree" not in page
    verdicts = [row[4] for row in rows_of(section(page, "mistakes"))]
    bags = run.predictions.labelled("test")
    if task == "multiclass":
        taken = bags.logits.argmax(1)
        wrong = sorted(f"taken for {t}" for t in taken[taken != bags.labels])
        assert sorted(verdict for verdict in verdicts if verdict != "right") == wrong
        true = int(bags.labels[1])
        assert f"test-0001: class {true}, predicted {taken[1]} with {bags.probabilities[1].max():.3f}" in page
    if task == "multilabel":
        num_wrong = ((bags.logits >= 0) != bags.labels).sum(1)
        assert sorted(verdicts) == sorted("right" if n == 0 else f"{n} of 4 wrong" for n in num_wrong)
        assert f"{(num_wrong > 0).sum()} of 20 bags are wrong" in page
    if task == "multiclass":
        counts = [int(n) for n in re.findall(r"<b>(\d+)</b>", section(page, "performance"))]
        right = sum(counts[k * 5] for k in range(4))
        assert sum(counts) == 20 and f"{right} of 20 test bags get the right class" in page
        config = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(config.replace("type: multiclass", "type: binary"))
        with pytest.raises(ValueError, match="task binary does not go with"):
            read_run(folder)


@pytest.mark.parametrize("task", ["survival", "survival_discrete"])
def test_survival_by_risk_split_at_the_median_of_validation(tmp_path: Path, task: str) -> None:
    folder = small_run(tmp_path)
    rng = np.random.default_rng(3)
    columns = [""] if task == "survival" else ["_0", "_1", "_2"]
    lines = ["key,split,label," + ",".join(f"logit{c}" for c in columns) + ",num_instances,patient"]
    truth: dict[str, list[tuple[float, float, float]]] = {"val": [], "test": []}
    for split, count, shift in (("val", 31, -0.8), ("test", 40, 0.0)):
        for i in range(count):
            logits = (rng.normal() + shift) * np.ones(len(columns)) + 0.3 * np.arange(len(columns))
            time, event = np.ceil(rng.exponential(20 * np.exp(-logits[0]))), int(rng.random() < 0.7)
            lines.append(f'{split}-{i},{split},"[{time}, {event}]",{",".join(map(str, logits))},5,')
            risk = logits[0] if task == "survival" else -np.cumprod(1 / (1 + np.exp(logits))).sum()
            truth[split].append((time, event, risk))
    (folder / "predictions.csv").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(f"task: {{type: {task}, num_outputs: {len(columns)}}}\n")
    results = {"test": bag_metrics(np.array(truth["test"])[:, :2], read_run_logits(folder, "test"), task)}
    (folder / "results.json").write_text(json.dumps(results))
    whole = write_report(folder).read_text()
    page = section(whole, "performance")
    median = float(np.median([risk for _, _, risk in truth["val"]]))
    time, event, risk = np.array(truth["test"]).T
    low, high = (event[own] for own in (risk <= median, risk > median))
    assert len(low) != len(high), "the median of the test bags would give the same groups"
    assert f"low risk ({len(low)} bags, {int(low.sum())} events) and high risk ({len(high)} bags" in page
    expected = stats.CensoredData(
        uncensored=time[(event == 1) & (risk <= median)], right=time[(event == 0) & (risk <= median)]
    )
    other = stats.CensoredData(
        uncensored=time[(event == 1) & (risk > median)], right=time[(event == 0) & (risk > median)]
    )
    p_value = stats.logrank(expected, other).pvalue
    assert f"Logrank test: p = {p_value:.3f}." in page or f"Logrank test: p = {p_value:.1e}." in page
    assert f"Split at {median:.3g}, the median risk of the validation split" in page
    assert f"Concordance index {results['test']['c_index']:.3f}." in page
    rows = rows_of(section(whole, "mistakes"))
    of_bag = {row[0]: [float(n) for n in row[4].split(" of ")] for row in rows if "none" not in row[4]}
    wrong, pairs = np.zeros(40), np.zeros(40)
    for i, j in product(range(40), repeat=2):
        if event[i] and (time[j] > time[i] or (time[j] == time[i] and not event[j])):
            pairs[[i, j]] += 1
            wrong[[i, j]] += 1.0 if risk[j] > risk[i] else 0.5 * (risk[j] == risk[i])
    assert of_bag == {f"test-{i}": [wrong[i], pairs[i]] for i in range(40) if pairs[i]}
    listed = [of_bag[row[0]][0] for row in rows if row[0] in of_bag]
    assert len(rows) == 40 and listed == sorted(listed, reverse=True) and listed[0] > listed[-1]
    assert 1 - wrong.sum() / pairs.sum() == pytest.approx(results["test"]["c_index"], abs=1e-12)
    shutil.rmtree(folder / "attention")
    assert "holds no file; runs save that of positive bags of a binary task only" in re.sub(
        "<.*?>", "", write_report(folder).read_text()
    )
    first = int(rows[0][0].removeprefix("test-"))
    assert rows[0][1:3] == [f"{time[first]:g}, {'event' if event[first] else 'censored'}", f"{risk[first]:.3f}"]


def test_the_band_of_a_survival_curve_lasts_until_the_share_is_zero() -> None:
    """The last event is of the last bag at risk: from 4 to 9 the share is 1/4, and its interval known."""
    svg = survival_chart([("all", kaplan_meier(np.array([1.0, 2, 3, 4, 9]), np.array([1, 1, 1, 0, 1])))])
    (band,) = re.findall(r'<g id="FillBetweenPolyCollection_1">.*?<path[^>]* d="([^"]*)"', svg, re.S)
    line = re.findall(r'<path d="([^"]*)"[^>]*stroke: #3b6ea8', svg)[0]  # the others are in the legend
    right = [max(float(x) for x in re.findall(r"[ML] ([\d.]+) ", path)) for path in (band, line)]
    assert right[0] == pytest.approx(right[1], abs=1e-3)


def test_names_and_values_for_readers() -> None:
    assert metric_name("f1_weighted") == "F1 score, weighted" and metric_name("auroc_12") == "AUROC, 12"
    assert metric_name("instance_auroc") == "Instance AUROC" and metric_name("instance_best_f1") == "Instance best f1"
    assert [measurement(v) for v in (2.67117, 1825.0, 3, 9999.7, -12345.6)] == [
        "2.671",
        "1825",
        "3",
        "10,000",
        "-12,346",
    ]


def read_run_logits(folder: Path, split: str) -> np.ndarray:
    return read_predictions(folder / "predictions.csv").labelled(split).logits


def test_without_the_optional_parts(tmp_path: Path) -> None:
    folder = small_run(tmp_path)
    for name in ("metrics.jsonl", "environment.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "attention")
    (folder / "config.yaml").write_text("{}")
    lines = (folder / "predictions.csv").read_text().splitlines()
    (folder / "predictions.csv").write_text("\n".join([lines[0], *(line for line in lines if ",val," in line)]) + "\n")
    page = write_report(folder).read_text()
    for text in ("there are no training curves", "saved no attention", "no predictions for a test split", "not known"):
        assert text in page
    assert len(rows_of(section(page, "mistakes"))) == 30


def test_test_bags_of_one_class(tmp_path: Path) -> None:
    folder = small_run(tmp_path)
    lines = (folder / "predictions.csv").read_text().splitlines()
    (folder / "predictions.csv").write_text("\n".join(line for line in lines if not re.search("test,0", line)) + "\n")
    (folder / "results.json").write_text(json.dumps({"test": {"num_bags": 10, "accuracy": 1.0}, "best_epoch": 3}))
    page = write_report(folder).read_text()
    assert '<dt>Test AUROC</dt><dd class="none">not defined</dd>' in page
    assert "these bags all have the same label" in section(page, "performance")


def test_no_bag_at_all(tmp_path: Path) -> None:
    folder = small_run(tmp_path)
    header = (folder / "predictions.csv").read_text().splitlines()[0]
    (folder / "predictions.csv").write_text(header + "\n")
    page = write_report(folder).read_text()
    assert "No bag of the test split" in page and "do not agree on test: Bags 0 against 20." in page


@pytest.mark.parametrize("missing", ["coords", "y_inst", "patches", "patches, then colours"])
def test_slides_with_less(tmp_path: Path, missing: str) -> None:
    folder = small_run(tmp_path)
    path = next((folder / "attention").iterdir())
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files if name != missing.split(",")[0]}
    if "," in missing:
        arrays["rgb"] = np.full((len(arrays["scores"]), 3), 90, np.uint8)
    np.savez(path, **arrays)
    slides = section(write_report(folder).read_text(), "slides")
    expected = {
        "coords": "no positions, so there is no map",
        "y_inst": '<svg class="on-slide"',
        "patches": "neither patches nor colours",
        "patches, then colours": "in colours made from its features",
    }
    assert expected[missing] in slides
    assert ("known to be positive (" in slides) == (missing != "y_inst")


def test_a_log_that_breaks_off_is_read_to_there(tmp_path: Path) -> None:
    folder = small_run(tmp_path)
    whole = read_run(folder).log
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-20])
    assert read_run(folder).log == whole[:-1]
    (folder / "metrics.jsonl").write_text(text.replace('{"kind": "epoch"', '{"kind" "epoch"', 1))
    with pytest.raises(ValueError, match=r"metrics.jsonl:16: not JSON"):
        read_run(folder)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist, so there is no config"):
        write_report(tmp_path / "nowhere")
    folder = small_run(tmp_path)
    (folder / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no results\.json; a run writes"):
        write_report(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "predictions.csv",
            "key,split,label\na,test,1\n",
            "expected a column logit or probability, or numbered ones, got key, split",
        ),
        ("predictions.csv", "key,split,label,logit,num_instances\na,test,1,oops,5\n", r"csv:2: logit: .*'oops'"),
        ("predictions.csv", "key,split,label,logit,num_instances\na,test,7,0.5,5\n", r"labels 0 to 1, got \[7.0\]"),
        ("results.json", "{\n oops", "results.json:2: not JSON"),
        ("config.yaml", "- a\n", "expected settings by name, got list: `bigbag train` writes it again"),
        ("config.yaml", "task: {type: survival}\n", r"csv: task survival does not go with labels \(.*expected time"),
        ("results.json", "", "results.json:1: not JSON .*: `bigbag train` writes it again"),
        ("results.json", '{"left_out": 3}', "results.json: left_out: expected list, got int: `bigbag train`"),
        ("results.json", b"\xff\xfe{}", r"results.json: not text in UTF-8 \(invalid start byte at byte 0\)"),
        ("environment.json", '{"data": {', "environment.json:1: not JSON .*: remove it"),
        ("environment.json", "[]", "environment.json: expected a JSON object, got list: remove it"),
        ("metrics.json", '{"metrics": [{"unit": "bag"}]}', "metrics.json: a metric without .*: remove it"),
        ("metrics.jsonl", '{"kind": "epoch", "epoch": 0}\n', "jsonl:1: step: got None, not a number: remove the line"),
        ("metrics.jsonl", b"\x80", r"metrics.jsonl: not text in UTF-8"),
        (
            "predictions.csv",
            "key,split,label,logit,num_instances\na,test,1,0.5,-5\n",
            "csv:2: num_instances .* below 0",
        ),
        ("attention/00.npz", b"PK\x03\x04", "00.npz: not a readable .npz file"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    folder = small_run(tmp_path)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / "report.html").write_text("the report before")
    files = set(folder.iterdir())
    with pytest.raises(ValueError, match=message):
        write_report(folder)
    assert (folder / "report.html").read_text() == "the report before" and set(folder.iterdir()) == files


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def in_browser(page: str, folder: Path) -> tuple[dict[str, dict[str, int]], str]:
    """Load a page in frames of 390 and 1280 px; what they measure, and what the browser's console says."""
    frames = "".join(
        f'<iframe id="w{w}" style="width:{w}px;border:0" srcdoc="{html.escape(page)}"></iframe>' for w in (390, 1280)
    )
    script = """<pre id="out"></pre><script>addEventListener("load", () => {
      const out = {};
      for (const frame of document.querySelectorAll("iframe")) {
        const page = frame.contentDocument, images = [...page.images];
        out[frame.id] = {scroll: page.documentElement.scrollWidth, images: images.length,
          broken: images.filter(i => !i.complete || i.naturalWidth === 0).length,
          headings: page.querySelectorAll("h1, h2, h3").length, articles: page.querySelectorAll("article").length,
          maps: [...page.querySelectorAll("svg image")].filter(i => i.getBoundingClientRect().width > 80).length};
      }
      document.getElementById("out").textContent = JSON.stringify(out);
    })</script>"""
    path = folder / "frames.html"
    path.write_text(f"<!DOCTYPE html><title>frames</title>{frames}{script}")
    quiet = ("background-networking", "sync", "gpu")
    flags = ["--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", *(f"--disable-{x}" for x in quiet)]
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(CHROMIUM), *flags, profile, "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    measured = re.search(r'<pre id="out">(.*?)</pre>', done.stdout)
    assert measured, done.stderr
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(measured[1])), console


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor chromium-browser is installed")
def test_page_in_a_real_browser(page: str, tmp_path: Path) -> None:
    measured, console = in_browser(page, tmp_path)
    assert console == ""
    for width in (390, 1280):
        view = measured[f"w{width}"]
        assert view["scroll"] == width, f"the page is {view['scroll']} px wide on a screen of {width} px"
        assert view["images"] > 10 and view["broken"] == 0
        assert (view["articles"], view["headings"], view["maps"]) == (3, 1 + 6 + 3, 12)
    spoiled = page.replace(
        "<main>", '<main><img src="http://127.0.0.1:9/x.png" alt=""><p style="min-width: 999px">wide</p>'
    )
    measured, console = in_browser(spoiled, tmp_path)
    assert "Content Security Policy" in console, "the console is not being read"
    assert measured["w390"]["scroll"] > 390 and measured["w390"]["broken"] == 1
