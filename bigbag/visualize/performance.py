"""The report's sections on how well a run predicts bags: training curves, ROC, confusion, bag sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bigbag.engine.metrics import THRESHOLD, bag_metrics, reliability_curve
from bigbag.engine.metrics.calibration import calibration_error
from bigbag.engine.metrics.ranking import ranking
from bigbag.evaluation.bootstrap import groups_of
from bigbag.evaluation.curves import Band, ranking_bands
from bigbag.visualize import charts
from bigbag.visualize.html import absent, chart, details, esc, note
from bigbag.visualize.run_folder import PredictionTable, RunFolder
from bigbag.visualize.survival import survival_figure

NAMES = {
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "subset_accuracy": "Subset accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "kappa": "Kappa",
    "quadratic_kappa": "Quadratic kappa",
    "brier": "Brier score",
    "ece": "Calibration error",
    "f1": "F1 score",
    "mae": "Mean absolute error",
    "rmse": "Root mean square error",
    "r2": "R²",
    "c_index": "Concordance index",
    "c_index_ipcw": "Concordance index, IPCW",
    "num_events": "Observed events",
    "loss": "Loss",
    "num_bags": "Bags",
    "num_instances": "Instances with a label",
}
_MAX_BANDS = 4
_PEAKS = ("measured_peak_bytes", "peak_bytes")


def metric_name(key: str) -> str:
    """Its name for readers; that of a mean or of a class, such as ``f1_weighted``, begins with that of the metric."""
    if key in NAMES:
        return NAMES[key]
    if key.startswith("instance_"):
        return f"Instance {in_sentence(key.removeprefix('instance_'))}"
    metric, _, what = key.rpartition("_")
    return f"{NAMES[metric]}, {what}" if metric in NAMES else key.replace("_", " ")


def in_sentence(key: str) -> str:
    """The name of a metric, small where it does not begin a sentence."""
    name = metric_name(key)
    return name if name[:2].isupper() or name[1:2].isdigit() or name[1:2] == "²" else name[0].lower() + name[1:]


def number(value: Any) -> str:
    """A metric as text: counts whole, the rest to three decimals, but nothing short of 1 as 1.000."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if 0.9995 <= value < 1:
        return f"{value:.4f}" if value < 0.99995 else "> 0.9999"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def measurement(value: float) -> str:
    """A label, a prediction or a time in its own unit: four digits, above 10,000 the whole number."""
    return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:,.0f}"


def training_section(run: RunFolder) -> str:
    """Loss, validation metric, speed; learning rate and gradient norm behind a click."""
    steps = [event for event in run.log if event["kind"] == "train"]
    epochs = [event for event in run.log if event["kind"] == "epoch"]
    if not steps and not epochs:
        return "<p>This run has no <code>metrics.jsonl</code>: there are no training curves.</p>"
    best = run.results.get("best_epoch")
    at_best = next((event["step"] for event in epochs if event["epoch"] + 1 == best), None)
    marked = None if at_best is None else (float(at_best), f"best epoch ({best})")
    faint = _series(steps, "loss")
    averages = [("training", *_series(epochs, "train_loss")), ("validation", *_series(epochs, "val", "loss"))]
    lines = [line for line in averages if len(line[1])]
    last = ", ".join(f"{name} {y[-1]:.3g}" for name, _, y in lines)
    svg = charts.series_chart(lines, "step", "loss", faint=faint if len(faint[0]) else None, marked=marked)
    figures = [chart(svg, "Loss", f"Loss over training steps; at the end: {last or 'no epoch was finished'}.")]
    figures.append(_validation_chart(run, epochs, marked))
    figures += _step_charts(steps, (("instances_per_s", "Speed", "instances / s"),))
    more = _step_charts(steps, (("lr", "Learning rate", "learning rate"), ("grad_norm", "Gradient norm", "norm")))
    rest = details("Learning rate and gradient norm", f'<div class="charts">{"".join(more)}</div>') if more else ""
    counted = f"{len(epochs)} epochs" if len(epochs) != 1 else "1 epoch"
    chosen = "" if best is None else f"; the weights of epoch {best} were kept, and all predictions here are theirs"
    return f'<p>{esc(counted)}{esc(chosen)}.{esc(_memory(run))}</p><div class="charts">{"".join(figures)}</div>{rest}'


def _memory(run: RunFolder) -> str:
    """What the run took of a device's memory, and what it was thought to take."""
    memory = run.environment.get("memory")
    measured, predicted = (memory.get(key) if isinstance(memory, dict) else None for key in _PEAKS)
    if not isinstance(measured, int):
        return ""
    before = f" ({predicted / 2**20:,.0f} MiB predicted)" if isinstance(predicted, int) else ""
    return f" Peak memory of a device: {measured / 2**20:,.0f} MiB{before}."


def _validation_chart(run: RunFolder, epochs: Sequence[dict[str, Any]], marked: tuple[float, str] | None) -> str:
    monitor = run.config["train"].get("monitor") if isinstance(run.config.get("train"), dict) else None
    for name in dict.fromkeys([monitor, "auroc", "c_index", "accuracy", "r2", "mae"]):
        steps, values = _series(epochs, "val", str(name))
        if name != "loss" and len(steps):
            svg = charts.series_chart(
                [(metric_name(str(name)), steps, values)], "step", metric_name(str(name)), marked=marked
            )
            alt = f"Validation {metric_name(str(name))} over training steps, from {values[0]:.3f} to {values[-1]:.3f}."
            return chart(svg, f"Validation {in_sentence(str(name))}", alt)
    return absent("Validation", "No validation metric was logged: the run has no validation split, or too small a one.")


def _step_charts(steps: Sequence[dict[str, Any]], wanted: Sequence[tuple[str, str, str]]) -> list[str]:
    figures = []
    for key, title, ylabel in wanted:
        x, y = _series(steps, key)
        if len(x):
            svg = charts.series_chart([(title, x, y)], "step", ylabel)
            figures.append(chart(svg, title, f"{title} over training steps: median {np.median(y):.3g} {ylabel}."))
    return figures


def _series(events: Sequence[dict[str, Any]], *path: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the events that have a number at ``path``."""
    points: dict[int, float] = {}
    for event in events:
        value: Any = event
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float) and np.isfinite(value):
            points[event.get("step", len(points))] = value  # a step that was run again counts once
    return np.array(list(points), dtype=np.float64), np.array(list(points.values()), dtype=np.float64)


def lead(run: RunFolder, split: str, bags: PredictionTable) -> str:
    """One sentence that says how good the model is."""
    if run.task == "binary" and len(bags.keys):
        (right_negative, false_alarms), (missed, right_positive) = _counts(bags, 2).tolist()
        return (
            f"Of {missed + right_positive} positive {split} bags the model misses {missed}; of "
            f"{right_negative + false_alarms} negative ones it calls {false_alarms} positive (threshold {THRESHOLD})."
        )
    if run.task == "multiclass" and len(bags.keys):
        num_right = int(np.trace(_counts(bags, bags.logits.shape[1])))
        return f"{num_right} of {len(bags.keys)} {split} bags get the right class."
    if run.task.startswith("survival") and len(bags.keys):
        num_events = int(np.count_nonzero(bags.labels[:, 1]))
        return f"{len(bags.keys)} {split} bags, {num_events} with an observed event; the others are censored."
    return f"{len(bags.keys)} {split} bags with a label."


def performance_section(run: RunFolder, split: str, bags: PredictionTable) -> str:
    """Curves, confusion and bag sizes of the labelled bags of ``split``."""
    if not len(bags.keys):
        text = f"<p>No bag of the {esc(split)} split has both a prediction and a label.</p>"
        return _cross_check(run, split, bags) + text
    figures: list[str] = []
    if run.task == "regression":
        figures += _agreement(bags)
    elif run.task.startswith("survival"):
        figures.append(survival_figure(run, split, bags))
    else:
        figures += _ranking(run.task, bags)
        if run.task != "multilabel":
            figures.append(_confusion(run.task, bags))
        figures.append(_calibration(run.task, bags))
    figures += _sizes(run.task, bags)
    return f'{_cross_check(run, split, bags)}<div class="charts">{"".join(figures)}</div>'


def _cross_check(run: RunFolder, split: str, bags: PredictionTable) -> str:
    """Say so where the metrics of predictions.csv and those in results.json differ."""
    stated = run.metrics(split)
    found = bag_metrics(bags.labels, bags.logits, run.task) if len(bags.keys) else {"num_bags": 0}
    differ = [k for k, v in found.items() if isinstance(stated.get(k), int | float) and abs(stated[k] - v) > 2e-3]
    text = ", ".join(f"{metric_name(k)} {number(found[k])} against {number(stated[k])}" for k in differ)
    remedy = "One of them is damaged or of another evaluation: evaluate the run again."
    return note(f"predictions.csv and results.json do not agree on {split}: {text}. {remedy}") if differ else ""


def _ranking(task: str, bags: PredictionTable) -> list[str]:
    """ROC and precision-recall with their bands; one curve per class or label where there are several."""
    if task == "binary":
        curves = [("", bags.labels, bags.logits)]
    elif task == "multiclass":
        curves = [(f"class {k}", bags.labels == k, bags.probabilities[:, k]) for k in range(bags.logits.shape[1])]
    else:
        curves = [(f"label {k}", bags.labels[:, k], bags.logits[:, k]) for k in range(bags.logits.shape[1])]
    drawn = [(name, y.astype(bool), s) for name, y, s in curves if 0 < y.sum() < len(y)]
    if not drawn:
        reason = "Not defined: these bags all have the same label."
        return [absent("ROC", reason), absent("Precision and recall", reason)]
    captions = ["Bands are 95 % intervals by patient." if any(bags.patients) else "Bands are 95 % intervals."]
    pairs: list[tuple[Band, Band]] | None = None
    if len(drawn) <= _MAX_BANDS:
        groups = groups_of(bags.patients)
        pairs = [ranking_bands(y, s, groups) for _, y, s in drawn]
    else:
        captions = [f"Without bands: there are more than {_MAX_BANDS} curves."]
    if len(drawn) < len(curves):
        captions.append(f"{len(curves) - len(drawn)} without bags of both kinds not drawn.")
    values = [ranking(y, s, np.ones((1, len(y)))) for _, y, s in drawn]
    figures = []
    for which, (title, short, draw) in enumerate(
        (("ROC", "AUROC", charts.roc_chart), ("Precision and recall", "AP", charts.precision_recall_chart))
    ):
        named = [(f"{name} {short} {v[which][0]:.3f}".strip(), y, s) for (name, y, s), v in zip(drawn, values)]
        svg = draw(named, [pair[which] for pair in pairs] if pairs else [])
        alt = f"{title}: {'; '.join(name for name, _, _ in named)}."
        figures.append(chart(svg, title, alt, esc(" ".join(captions))))
    return figures


def _counts(bags: PredictionTable, num_classes: int) -> np.ndarray:
    """``(K, K)``: bags by true class (row) and predicted class (column)."""
    decided = bags.logits.argmax(1) if bags.logits.ndim == 2 else (bags.logits >= 0).astype(np.int64)
    cells = bags.labels.astype(np.int64) * num_classes + decided
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def _confusion(task: str, bags: PredictionTable) -> str:
    classes = ["negative", "positive"] if task == "binary" else [f"class {k}" for k in range(bags.logits.shape[1])]
    counts = _counts(bags, len(classes))
    rows = []
    for i, name in enumerate(classes):
        total = int(counts[i].sum())
        cells = []
        for j, count in enumerate(counts[i].tolist()):
            share = count / total if total else 0.0
            colour = "35, 114, 74" if i == j else "181, 51, 46"
            text = f"<b>{count}</b><span>{share:.0%}</span>" if total else f"<b>{count}</b>"
            cells.append(f'<td style="background: rgba({colour}, {0.06 + 0.34 * share:.2f})">{text}</td>')
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in classes)
    rule = f"at threshold {THRESHOLD}" if task == "binary" else "most probable class"
    return (
        f'<figure><p class="title">Confusion matrix, {rule}</p><div class="scroll"><table class="confusion">'
        f'<thead><tr><th scope="col">true \\ predicted</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        "<figcaption>Bags, and their share of the row.</figcaption></figure>"
    )


def _calibration(task: str, bags: PredictionTable) -> str:
    """Reliability of the probabilities: of the positive class, of the most probable class, or of all labels."""
    if task == "multiclass":
        outcomes = bags.probabilities.argmax(1) == bags.labels
        probabilities, what = bags.probabilities.max(1), "bags with the right class"
    else:
        outcomes, probabilities = bags.labels.reshape(-1), bags.probabilities.reshape(-1)
        what = "positive bags" if task == "binary" else "labels that are set"
    outcomes = outcomes.astype(np.float64)
    error = float(calibration_error(outcomes, probabilities, np.ones((1, len(outcomes))))[0])
    svg = charts.calibration_chart(*reliability_curve(outcomes, probabilities), what)
    said = f"Expected calibration error {error:.3f}; larger dots are bins of more bags, bars 95 % intervals."
    return chart(svg, "Calibration", f"Share of {what} over the predicted probability. {said}", esc(said))


def _groups(task: str, bags: PredictionTable) -> list[tuple[str, np.ndarray]]:
    """Names and indices of the bags by label, for colouring."""
    if task == "binary":
        pairs = [(name, np.flatnonzero(bags.labels == k)) for k, name in enumerate(("negative", "positive"))]
    elif task == "multiclass":
        pairs = [(f"class {k}", np.flatnonzero(bags.labels == k)) for k in range(bags.logits.shape[1])]
    else:
        pairs = [("bags", np.arange(len(bags.keys)))]
    return pairs


def _sizes(task: str, bags: PredictionTable) -> list[str]:
    groups = _groups(task, bags)
    sizes = bags.sizes
    svg = charts.histogram_chart([(n, sizes[i]) for n, i in groups], "instances in the bag", log_x=True)
    spread = f"Bag sizes from {sizes.min():,} to {sizes.max():,} instances, median {int(np.median(sizes)):,}."
    figures = [chart(svg, "Bag sizes", spread, esc(spread))]
    if task in ("multilabel", "regression") or task.startswith("survival"):
        return figures
    scores = (
        bags.probabilities if task == "binary" else bags.probabilities[np.arange(len(sizes)), bags.labels.astype(int)]
    )
    what = "predicted probability" if task == "binary" else "probability of the true class"
    threshold = THRESHOLD if task == "binary" else None
    svg = charts.histogram_chart([(n, scores[i]) for n, i in groups], what, marked=threshold)
    figures.append(chart(svg, "Scores", f"Histogram of the {what} by true label."))
    svg = charts.size_chart([(n, sizes[i], scores[i]) for n, i in groups], what, threshold=threshold)
    alt = f"The {what} of each bag over its number of instances."
    figures.append(chart(svg, "Score by bag size", alt, "A cloud that tilts means that size decides, not content."))
    return figures


def _agreement(bags: PredictionTable) -> list[str]:
    labels, values = bags.labels.reshape(-1), bags.logits.reshape(-1)
    svg = charts.agreement_chart(labels, values)
    error = charts.histogram_chart([("bags", values - labels)], "predicted - label")
    return [
        chart(svg, "Predicted and true values", "Predicted values over labels."),
        chart(charts.residual_chart(values, values - labels), "Residuals", "Errors over predicted values."),
        chart(error, "Errors", f"Histogram of the errors; mean {np.mean(values - labels):.3g}."),
    ]
