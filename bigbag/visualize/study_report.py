"""The reports of ``bigbag compare`` and ``bigbag cap-curve``: one page each, as that of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bigbag.evaluation import cap_curve, compare
from bigbag.evaluation.cap_curve import Point
from bigbag.evaluation.compare import NAMES, Line, spread_text
from bigbag.evaluation.study import Outcome, Study
from bigbag.files import read_json, write_atomically
from bigbag.visualize.comparison import cap_curve_svg, cost_svg, metric_svg
from bigbag.visualize.html import chart, details, esc, footer, note, page, settings, table

_SIGNIFICANT = 0.05
_COSTS = {"seconds": "Seconds a run", "peak_rss_bytes": "Peak RSS, MiB"}


def write_comparison_report(
    study: Study, lines: Sequence[Line], outcomes: Sequence[Outcome], names: Sequence[str]
) -> Path:
    """Write ``report.html`` of a comparison into its folder: a chart for each metric and cost, tables, settings.

    Args:
        study: the study.
        lines: the models, the best first.
        outcomes: all runs.
        names: metrics to show, the main one first.

    Returns:
        the path of the page.
    """
    shown = [line for line in lines if line.num_runs]
    charts = [
        _metric_chart(shown, name) for name in (*names, "instance_auroc") if any(name in x.metrics for x in shown)
    ]
    charts += [_cost_chart(shown, *cost) for cost in _COSTS.items()]
    columns, *rows = compare.table_cells(lines, [*names, "instance_auroc"])
    sections = [
        ("figure", "Models", f'<div class="charts">{"".join(charts)}</div>'),
        ("table", "All numbers", _numbers(columns, rows)),
        ("runs", "Runs", _runs(study, outcomes, names)),
        ("details", "Everything else", _everything_else(study, outcomes)),
    ]
    return _write(study, "bigbag comparison", _lead(shown, names[0]), outcomes, sections)


def write_cap_curve_report(study: Study, points: Sequence[Point], outcomes: Sequence[Outcome], name: str) -> Path:
    """Write ``report.html`` of a cap curve into its folder.

    Args:
        study: the study.
        points: caps in rising order, whole bags last.
        outcomes: all runs.
        name: the metric of the curve.

    Returns:
        the path of the page.
    """
    columns, *rows = cap_curve.table_cells(points)
    alt = "; ".join(f"{row[0]} instances: {row[1]}" for row in rows)
    caption = "Mean and 95 % interval over the runs." if any(point.num_runs > 1 for point in points) else ""
    curve = chart(cap_curve_svg(points, name), f"Test {NAMES[name]} by cap", f"{NAMES[name]} by cap: {alt}.", caption)
    sections = [
        ("figure", "What a cap costs", f'<div class="charts">{curve}</div>'),
        ("table", "All numbers", _numbers(columns, rows)),
        ("runs", "Runs", _runs(study, outcomes, [name])),
        ("details", "Everything else", _everything_else(study, outcomes)),
    ]
    return _write(study, "bigbag cap curve", _cap_lead(points, name), outcomes, sections)


def _write(
    study: Study, kind: str, lead: str, outcomes: Sequence[Outcome], sections: Sequence[tuple[str, str, str]]
) -> Path:
    missing = [outcome for outcome in outcomes if outcome.error]
    notes = note(f"{len(missing)} of {len(outcomes)} runs have no result: see Runs.") if missing else ""
    facts = esc(f"{len(outcomes)} runs · task {study.config.task.type} · {len(study.store.sizes)} bags")
    text = f'<p class="lead">{esc(lead)}</p>{notes}'
    path = study.folder / "report.html"
    write_atomically(
        path, page(kind, study.config.name, facts, text, sections, footer(study.folder, _environment(study, outcomes)))
    )
    return path


def _lead(shown: Sequence[Line], name: str) -> str:
    """The best model, and from how many it differs by more than chance."""
    if not shown or name not in shown[0].metrics:
        return "No model has a result yet."
    best, *others = shown
    ties = sum(name in line.metrics and line.metrics[name].mean == best.metrics[name].mean for line in others)
    alike = f", as have {ties} others" if ties > 1 else ", as has another" if ties else ""
    text = f"{best.model} has the best test {NAMES[name]}, {spread_text(best.metrics[name])}{alike}."
    compared = [line for line in others if not math.isnan(line.p_value)]
    if compared:
        num = sum(line.p_value < _SIGNIFICANT for line in compared)
        differ = "differs" if num == 1 else "differ"
        text += f" On the same bags {num} of {len(compared)} others {differ} from it with p < {_SIGNIFICANT}."
    return text


def _cap_lead(points: Sequence[Point], name: str) -> str:
    """What the smallest cap costs."""
    known = [point for point in points if name in point.metrics]
    if len(known) < 2 or known[-1].cap is not None:
        return f"Test {NAMES[name]} by the largest number of instances of a bag."
    first, whole = known[0], known[-1]
    return (
        f"Test {NAMES[name]} is {first.metrics[name].mean:.3f} with a random {first.cap:,} instances of each bag, "
        f"which leave {100 * first.instances_left_out:.0f} % out, and {whole.metrics[name].mean:.3f} with whole bags."
    )


def _numbers(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose intervals, in brackets, stand below their values."""
    cells = [[re.sub(r" (\[.*\])", r" <small>\1</small>", esc(cell)) for cell in row] for row in rows]
    return table(columns, cells, css="numbers")


def _metric_chart(shown: Sequence[Line], name: str) -> str:
    known = [line for line in shown if name in line.metrics]
    listed = "; ".join(f"{line.model} {spread_text(line.metrics[name])}" for line in known)
    runs = max(line.num_runs for line in shown)
    caption = f"Mean and 95 % interval over {'test bags' if runs == 1 else 'runs'}."
    has_interval = any(not math.isnan(line.metrics[name].low) for line in known)
    svg, size = metric_svg(shown, name)
    return chart(svg, NAMES[name], f"{NAMES[name]}: {listed}.", caption if has_interval else "", size)


def _cost_chart(shown: Sequence[Line], key: str, title: str) -> str:
    svg, size = cost_svg(shown, key)
    scale = 2**20 if key == "peak_rss_bytes" else 1
    listed = "; ".join(f"{line.model} {getattr(line, key) / scale:,.0f}" for line in shown)
    return chart(svg, title, f"{title}: {listed}.", size=size)


def _runs(study: Study, outcomes: Sequence[Outcome], names: Sequence[str]) -> str:
    """One row a run, with a link to its own report."""
    names = [name for name in names if any(name in outcome.test for outcome in outcomes)]
    rows = []
    for outcome in outcomes:
        name = outcome.planned.name
        address = f"{quote(name)}/report.html"
        there = (study.folder / name / "report.html").is_file()
        cells = [f'<a href="{address}">{esc(name)}</a>' if there else esc(name)]
        cells += [f"{outcome.test[metric]:.3f}" if metric in outcome.test else "–" for metric in names]
        cells.append(str(outcome.results.get("best_epoch", "–")))
        cells.append("–" if math.isnan(outcome.seconds) else f"{outcome.seconds:.0f}")
        rows.append([*cells, f'<span class="wrong">{esc(outcome.error)}</span>' if outcome.error else "finished"])
    columns = ["Run", *(NAMES[name] for name in names), "Best epoch", "Seconds", "State"]
    return table(columns, rows, css="numbers")


def _environment(study: Study, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Versions and devices of the first run that finished."""
    for outcome in outcomes:
        path = study.folder / outcome.planned.name / "environment.json"
        if not outcome.error and path.is_file():
            return read_json(path, "remove it, since the report does without")
    return {}


def _everything_else(study: Study, outcomes: Sequence[Outcome]) -> str:
    parts = [details("Settings", f'<pre tabindex="0">{esc(study.config.to_yaml())}</pre>')]
    environment = _environment(study, outcomes)
    for name in ("versions", "devices"):
        if isinstance(environment.get(name), dict):
            parts.append(details(f"{name.capitalize()} of the first run", settings(environment[name])))
    return "".join(parts)
