"""The report's table of bags, the worst predictions first, each with a link to where it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

import numpy as np

from bigbag.data.manifest import make_keys
from bigbag.engine.metrics import THRESHOLD, discordant_pairs, risk_of
from bigbag.visualize.html import details, esc, table
from bigbag.visualize.performance import measurement
from bigbag.visualize.run_folder import PredictionTable, RunFolder
from bigbag.visualize.slides import anchors

_SHOWN_MISTAKES = 12
_LISTED_BAGS = 500

Listed = tuple[list[str], str, list[list[str]]]
"""Columns of a table, what it is sorted by, its rows."""


def mistakes_section(run: RunFolder, bags: PredictionTable) -> str:
    """All bags, the worst predictions first."""
    if not len(bags.keys):
        return "<p>No labelled bag.</p>"
    columns, sorted_by, rows = (_survival if run.task.startswith("survival") else _labelled)(run, bags)
    page = f"<p>{sorted_by}</p>" + table(columns, rows[:_SHOWN_MISTAKES], css="bags")
    if len(rows) > _SHOWN_MISTAKES:
        page += details(
            f"The other {len(rows) - _SHOWN_MISTAKES} bags", table(columns, rows[_SHOWN_MISTAKES:], css="bags")
        )
    if len(bags.keys) > _LISTED_BAGS:
        page += (
            f'<p class="muted">{len(bags.keys) - _LISTED_BAGS} better predicted bags are in predictions.csv only.</p>'
        )
    return page


def _labelled(run: RunFolder, bags: PredictionTable) -> Listed:
    """By the distance of the prediction from the label."""
    task, links = run.task, _links(run)
    error = _error(task, bags)
    order = np.argsort(-error, kind="stable")
    columns = ["Bag", "Label", "Value" if task == "regression" else "Probability", "Instances", "Verdict"]
    rows = [_row(task, bags, int(i), float(error[i]), links.get(bags.keys[i], [])) for i in order[:_LISTED_BAGS]]
    num_wrong = sum('class="wrong"' in row[4] for row in rows)
    counted = task != "regression" and len(bags.keys) <= _LISTED_BAGS
    wrong = f"{num_wrong} of {len(bags.keys)} bags are wrong. " if counted else ""
    return columns, f"{wrong}Sorted by how far the prediction is from the label.", rows


def _survival(run: RunFolder, bags: PredictionTable) -> Listed:
    """By the number of discordant pairs: what each bag takes from the concordance index (Harrell et al., JAMA 1982)."""
    (time, event), risk, links = bags.labels.T, risk_of(bags.logits, run.task), _links(run)
    discordant, comparable = discordant_pairs(time, event, risk)
    order = np.argsort(-discordant, kind="stable")
    rows = []
    for i in order[:_LISTED_BAGS].tolist():
        verdict = f"{discordant[i]:g} of {comparable[i]:g}" if comparable[i] else "none to compare"
        became = f"{measurement(time[i])}, {'event' if event[i] else 'censored'}"
        cell = " ".join([esc(bags.keys[i]), *links.get(bags.keys[i], [])])
        rows.append([cell, became, f"{risk[i]:.3f}", f"{bags.sizes[i]:,}", verdict])
    text = (
        "A pair of bags is discordant where the one with the earlier event has the lower risk; a tie is half. Sorted "
        "by the discordant pairs of each bag, out of those in which it is known which event came first: the "
        "concordance index is the share of such pairs that are not discordant."
    )
    return ["Bag", "Time", "Risk", "Instances", "Discordant pairs"], text, rows


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
        if task == "multiclass":
            right, wrong = values.argmax() == label[0], f"taken for {values.argmax()}"
        else:
            num_wrong = np.count_nonzero((values >= THRESHOLD) != (label > 0))
            right, wrong = num_wrong == 0, f"{num_wrong} of {len(label)} wrong"
        verdict = '<span class="right">right</span>' if right else f'<span class="wrong">{wrong}</span>'
    shown = values[[int(label[0])]] if task == "multiclass" else values
    labels = {"binary": ["negative", "positive"][int(label[0])]} if task == "binary" else {}
    name = labels.get(task, " ".join(map(measurement, label)))
    cell = " ".join([esc(bags.keys[i]), *links])
    said = map(measurement, shown) if task == "regression" else (f"{v:.3f}" for v in shown)
    return [cell, name, " ".join(said), f"{bags.sizes[i]:,}", verdict]
