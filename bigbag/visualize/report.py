"""The report of a run: one self-contained HTML page, without scripts and without anything from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigbag.files import write_atomically
from bigbag.visualize.html import details, esc, footer, note, page, settings, table
from bigbag.visualize.mistakes import mistakes_section
from bigbag.visualize.performance import in_sentence, lead, metric_name, number, performance_section, training_section
from bigbag.visualize.run_folder import SPLITS, PredictionTable, RunFolder, read_run
from bigbag.visualize.slides import slides_section

_HEADLINE = {
    "binary": ("auroc", "balanced_accuracy", "accuracy", "f1", "instance_auroc"),
    "multiclass": ("auroc", "balanced_accuracy", "accuracy", "f1"),
    "multilabel": ("auroc", "average_precision", "accuracy", "f1"),
    "regression": ("r2", "mae", "rmse"),
    "survival": ("c_index",),
    "survival_discrete": ("c_index",),
}


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` of a run from the files in its folder.

    ``config.yaml``, ``results.json`` (metrics by split, ``best_epoch`` counted from 1, ``left_out``) and
    ``predictions.csv`` (key, split, label, logit, probability, num_instances) must be there. ``metrics.jsonl``,
    ``environment.json`` and ``attention/*.npz`` are shown where they are there; a file of ``attention/`` holds ``key``,
    ``scores (N,)`` and, where known, ``coords (N, 2)``, ``y_inst (N,)``, ``patches (N, h, w[, 3])`` or ``rgb (N, 3)``.
    Heatmaps that ``bigbag predict`` wrote into the folder or one in it are linked to from the table of bags.

    Args:
        run_dir: folder of the run.

    Returns:
        the path of the page.

    Raises:
        FileNotFoundError: a file that must be there is not.
        ValueError: a file does not have the form that a run gives it.
    """
    run = read_run(run_dir)
    split = _headline_split(run)
    bags = run.predictions.labelled(split)
    sections = [
        ("slides", "Where the model looks", slides_section(run)),
        ("performance", f"How it performs: {split} bags", performance_section(run, split, bags)),
        ("mistakes", "Bags, worst predictions first", mistakes_section(run, bags)),
        ("training", "Training", training_section(run)),
        ("left-out", "Left out", _left_out(run)),
        ("details", "Everything else", _everything_else(run)),
    ]
    name = str(run.config.get("name") or run.path.resolve().name)
    path = run.path / "report.html"
    lead_text = _headline(run, split, bags)
    write_atomically(
        path, page("bigbag report", name, _facts(run), lead_text, sections, footer(run.path, run.environment))
    )
    return path


def _headline_split(run: RunFolder) -> str:
    """The first of test, val, train, others that has predictions; test where there are none at all."""
    found = set(run.predictions.splits)
    return next((split for split in (*SPLITS, *sorted(found)) if split in found), "test")


def _facts(run: RunFolder) -> str:
    """Model, data and device in one line."""
    model, environment = run.config.get("model"), run.environment
    parts = [f"model {model['name']}"] if isinstance(model, dict) and "name" in model else []
    parts.append(f"task {run.task}")
    data = environment.get("data", {})
    counts = [data.get(name) if isinstance(data, dict) else None for name in ("bags", "instances")]
    sums = [sum(count.values()) for count in counts if isinstance(count, dict)]
    if len(sums) == 2:
        parts.append(f"{sums[0]:,} bags, {sums[1]:,} instances")
    devices = environment.get("devices")
    if isinstance(devices, dict):
        parts += [str(devices[key]) for key in ("device", "backend", "precision") if key in devices]
    return esc(" · ".join(parts))


def _headline(run: RunFolder, split: str, bags: PredictionTable) -> str:
    metrics = run.metrics(split)
    cards: list[str] = []
    for key in _HEADLINE[run.task]:
        if key == "instance_auroc" and key not in metrics:
            continue
        value = metrics.get(key)
        shown = '<dd class="none">not defined</dd>' if value is None else f"<dd>{esc(number(value))}</dd>"
        first = ' class="first"' if not cards else ""
        cards.append(f"<div{first}><dt>{esc(split.capitalize())} {esc(in_sentence(key))}</dt>{shown}</div>")
    notes = ""
    if split != "test":
        notes += note(f"There are no predictions for a test split: what follows is for the {split} split.")
    if any(metrics.get(key) is None for key in _HEADLINE[run.task] if key != "instance_auroc"):
        notes += note(f"A metric that the {split} bags do not define, for want of a class, is not given a value.")
    rows = _metric_rows(run)
    columns = ["Metric", *(name for name in _split_names(run))]
    title = "All metrics of all splits" + (", with 95 % intervals by patient" if run.intervals else "")
    every = details(title, table(columns, rows)) if rows else ""
    return f'<p class="lead">{esc(lead(run, split, bags))}</p>{notes}<dl class="cards">{"".join(cards)}</dl>{every}'


def _split_names(run: RunFolder) -> list[str]:
    return sorted(
        (name for name, value in run.results.items() if isinstance(value, dict) and "num_bags" in value),
        key=lambda name: SPLITS.index(name) if name in SPLITS else len(SPLITS),
    )


def _metric_rows(run: RunFolder) -> list[list[str]]:
    splits = _split_names(run)
    keys = dict.fromkeys(key for split in splits for key in run.results[split])
    return [
        [
            esc(metric_name(key)),
            *(_cell(run.results[split].get(key), run.intervals.get((split, key))) for split in splits),
        ]
        for key in sorted(keys, key=lambda key: key.startswith("num_"))
    ]


def _cell(value: Any, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "–"
    within = "" if interval is None else f" <small>{number(interval[0])} to {number(interval[1])}</small>"
    return f"{esc(number(value))}{within}"


def _left_out(run: RunFolder) -> str:
    """Bags and instances that did not take part, with reasons."""
    left_out, capped = run.results.get("left_out") or [], run.results.get("capped")
    parts = []
    if capped:
        parts.append(note("Bags were cut to a maximum number of instances.") + settings(capped))
    if left_out:
        rows = [_left_out_row(item) for item in left_out]
        parts.append(table(["Bag", "Reason"], rows, f"{len(rows)} bags of the source are not part of this run."))
    return "".join(parts) or "<p>Nothing: every bag of the source took part with all its instances.</p>"


def _left_out_row(item: Any) -> list[str]:
    if isinstance(item, dict):
        name = item.get("name", item.get("key", ""))
        return [esc(name), esc(item.get("reason", "")) or "–"]
    name, *reason = item if isinstance(item, list) and item else [item]
    return [esc(name), esc(" ".join(map(str, reason))) or "–"]


def _everything_else(run: RunFolder) -> str:
    parts = []
    for name, value in run.environment.items():
        title = name.replace("_", " ").capitalize()
        parts.append(details(title, settings(value if isinstance(value, dict) else {name: value})))
    if not run.environment:
        parts.append("<p>This run has no <code>environment.json</code>: versions and devices are not known.</p>")
    config = f'<pre tabindex="0">{esc(run.config_text)}</pre>'
    return details("Settings (config.yaml)", config) + "".join(parts)
