"""The report's table of bags, the worst predictions first, each with a link to where it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

import numpy as np

from bigbag.data.manifest import make_keys
from bigbag.engine.metrics import THRESHOLD
from bigbag.visualize.html import details, esc, table
from bigbag.visualize.run_folder import PredictionTable, RunFolder
from bigbag.visualize.slides import anchors

_SHOWN_MISTAKES = 12
_LISTED_BAGS = 500


def mistakes_section(run: RunFolder, bags: PredictionTable) -> str:
    """All bags, the worst predictions first."""
    task = run.task
    if not len(bags.keys):
        return "<p>No labelled bag.</p>"
    if task.startswith("survival"):
        return "<p>A single bag has no right or wrong risk; predictions.csv lists all of them.</p>"
    error = _error(task, bags)
    order = np.argsort(-error, kind="stable")
    columns = ["Bag", "Label", "Value" if task == "regression" else "Probability", "Instances", "Verdict"]
    links = _links(run)
    rows = [_row(task, bags, int(i), float(error[i]), links.get(bags.keys[i], [])) for i in order[:_LISTED_BAGS]]
    wrong = (
        "" if task == "regression" else f"{sum('wrong' in row[4] for row in rows)} of {len(bags.keys)} bags are wrong. "
    )
    if len(bags.keys) > _LISTED_BAGS:
        wrong = ""
    page = f"<p>{wrong}Sorted by how far the prediction is from the label.</p>"
    page += table(columns, rows[:_SHOWN_MISTAKES], css="bags")
    if len(rows) > _SHOWN_MISTAKES:
        page += details(
            f"The other {len(rows) - _SHOWN_MISTAKES} bags", table(columns, rows[_SHOWN_MISTAKES:], css="bags")
        )
    if len(bags.keys) > _LISTED_BAGS:
        page += (
            f'<p class="muted">{len(bags.keys) - _LISTED_BAGS} better predicted bags are in predictions.csv only.</p>'
        )
    return page


def _links(run: RunFolder) -> dict[str, list[str]]:
    """Links to the pictures of each bag: its attention on this page, and heatmaps that ``bigbag predict`` wrote.

    Heatmaps are looked for in ``heatmaps/`` of the run's folder and of the folders in it. Addresses are relative, so
    that they hold when the folder is moved.
    """
    links = {key: [f'<a href="#{anchor}">attention</a>'] for key, anchor in anchors(run).items()}
    found = [*run.path.glob("heatmaps/*.png"), *run.path.glob("*/heatmaps/*.png")]
    for path in sorted(path for path in found if not path.name.endswith(".overlay.png")):
        address = quote(path.relative_to(run.path).as_posix())
        # A heatmap has the name of the slide, a prediction the key that is made of it.
        for key in {path.stem, *make_keys([path.stem])}:
            links.setdefault(key, []).append(f'<a href="{esc(address)}">heatmap</a>')
    return links


def _error(task: str, bags: PredictionTable) -> np.ndarray:
    if task == "multiclass":
        return 1 - bags.probabilities[np.arange(len(bags.keys)), bags.labels.astype(np.int64)]
    values = bags.logits if task == "regression" else bags.probabilities
    return np.abs(values - bags.labels).reshape(len(bags.keys), -1).max(1)


def _row(task: str, bags: PredictionTable, i: int, error: float, links: Sequence[str]) -> list[str]:
    label, values = np.atleast_1d(bags.labels[i]), np.atleast_1d(bags.probabilities[i])
    if task == "regression":
        verdict = f"off by {error:.3g}"
    elif task == "binary":
        called = bool(bags.logits[i] >= 0)
        kind = "false alarm" if called else "missed"
        verdict = (
            '<span class="right">right</span>' if called == bool(label[0]) else f'<span class="wrong">{kind}</span>'
        )
    else:
        right = values.argmax() == label[0] if task == "multiclass" else np.array_equal(values >= THRESHOLD, label > 0)
        verdict = '<span class="right">right</span>' if right else '<span class="wrong">wrong</span>'
    shown = values[[int(label[0])]] if task == "multiclass" else values
    labels = {"binary": ["negative", "positive"][int(label[0])]} if task == "binary" else {}
    name = labels.get(task, " ".join(f"{v:g}" for v in label))
    cell = " ".join([esc(bags.keys[i]), *links])
    return [cell, name, " ".join(f"{v:.3f}" for v in shown), f"{bags.sizes[i]:,}", verdict]
