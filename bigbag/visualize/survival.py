"""The report's figure of survival: Kaplan-Meier curves of the bags of low and of high predicted risk."""

from __future__ import annotations

import numpy as np

from bigbag.engine.metrics import risk_of
from bigbag.evaluation.summary import by_patient
from bigbag.evaluation.survival import kaplan_meier, logrank_test
from bigbag.visualize import charts
from bigbag.visualize.html import chart, esc
from bigbag.visualize.run_folder import PredictionTable, RunFolder


def survival_figure(run: RunFolder, split: str, bags: PredictionTable) -> str:
    """Survival of the bags whose risk is above the median of the training bags, and of the others.

    The median is that of the training split where it was predicted, else of the validation split, else of the bags
    themselves, so that the groups do not depend on the outcomes shown wherever possible. Several bags of a patient
    count once, by the mean of their logits, unless their labels differ.
    """
    units, noun = _units(bags, run.task)
    threshold, source = _threshold(run, split)
    (time, event), risk = units.labels.T, risk_of(units.logits, run.task)
    high = risk > threshold
    curves = [
        (f"{name} ({int(own.sum())} {noun}, {int(event[own].sum())} events)", kaplan_meier(time[own], event[own]))
        for name, own in (("low risk", ~high), ("high risk", high))
        if own.any()
    ]
    p_value = logrank_test(time, event, high)
    said = [f"Split at {threshold:.3g}, the median risk of {source}; bands are 95 % intervals."]
    said.append("Logrank test: not defined." if np.isnan(p_value) else f"Logrank test: {_p_text(p_value)}.")
    value = run.metrics(split).get("c_index")
    if value is not None:
        low, high_end = run.intervals.get((split, "c_index"), (None, None))
        within = "" if low is None else f" (95 % interval {low:.3f} to {high_end:.3f})"
        said.append(f"Concordance index {value:.3f}{within}.")
    text = " ".join(said)
    alt = f"Kaplan-Meier curves of {' and '.join(name for name, _ in curves)}. {text}"
    return chart(charts.survival_chart(curves), "Survival by predicted risk", alt, esc(text))


def _units(bags: PredictionTable, task: str) -> tuple[PredictionTable, str]:
    """One row per patient, where bags of a patient agree on what became of it; and what the rows are called."""
    if not any(bags.patients):
        return bags, "bags"
    try:
        return by_patient(bags, task), "patients"
    except ValueError:
        return bags, "bags"


def _threshold(run: RunFolder, split: str) -> tuple[float, str]:
    """The median risk that splits the bags of ``split``, and of which bags it is."""
    names = {"train": "the training split", "val": "the validation split"}
    source = next((name for name in names if name != split and name in run.predictions.splits), split)
    rows = np.flatnonzero(np.array(run.predictions.splits) == source)
    risks = risk_of(run.predictions.logits[rows], run.task)
    return float(np.median(risks)), names[source] if source != split else f"these {split} bags"


def _p_text(p_value: float) -> str:
    return f"p = {p_value:.3f}" if p_value >= 0.001 else f"p = {p_value:.1e}" if p_value > 1e-12 else "p < 1e-12"
