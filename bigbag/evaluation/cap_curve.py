"""What a cap on instances costs: the same model trained and tested on at most 256, 512, ... instances of each bag.

Most code bases make bags fit by a random subsample. This is the price of it on a data set, as a curve of the test
metric over the cap; its last point is whole bags.
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigbag.config import ConfigError, load_config
from bigbag.engine.run import open_configured_store
from bigbag.evaluation.compare import NAMES, Spread, markdown, runs_csv, shown_metrics, spread, spread_text
from bigbag.evaluation.study import Outcome, Planned, Study, fold_settings
from bigbag.files import write_atomically

_log = logging.getLogger(__name__)

CAPS = (256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Point:
    """The runs with one cap.

    Attributes:
        cap: most instances of a bag; None = whole bags.
        metrics: of the test bags, mean and 95 % interval over the runs.
        instances_left_out: share of all instances that the cap leaves out, of every bag of the set.
        num_runs: runs that finished.
    """

    cap: int | None
    metrics: Mapping[str, Spread]
    instances_left_out: float
    num_runs: int


def plan_cap_curve(
    path: str | Path,
    overrides: Sequence[str],
    caps: Sequence[int] | None,
    seeds: Sequence[int],
    folds: int | None = None,
) -> Study:
    """The runs of caps x seeds x folds of the config's model, and those on whole bags.

    Run k with cap n lies in ``out/name/cap<n>-seed<k>``, on whole bags in ``out/name/whole-seed<k>``. A cap changes the
    instances of training in every epoch, and those of evaluation once (``data.max_instances``). Caps that leave every
    bag whole have no run of their own, which is said.

    Args:
        path: the config file; it must not cap instances itself.
        overrides: ``key.sub=value`` settings over it.
        caps: most instances of a bag; None: ``CAPS``.
        seeds: seeds of each cap.
        folds: as for :func:`bigbag.evaluation.compare.plan_comparison`.

    Raises:
        ConfigError: a cap below 1, or one in the config.
        FileNotFoundError: the set is not packed.
    """
    config = load_config(path, overrides)
    if config.data.max_instances is not None:
        raise ConfigError("cap-curve: data.max_instances is set: leave it out, whole bags are the last point")
    caps = CAPS if caps is None else caps
    if any(cap < 1 for cap in caps):
        raise ConfigError(f"cap-curve: caps are {list(caps)}, expected at least 1 instance each")
    largest = max(open_configured_store(config).sizes)
    idle = sorted({cap for cap in caps if cap >= largest})
    if idle:
        shown = ", ".join(map(str, idle))
        _log.info("caps of %s leave every bag whole, the largest of %d instances: no runs of their own", shown, largest)
    runs = []
    for cap in [*sorted(set(caps) - set(idle)), None]:
        for seed in seeds:
            for labels, settings in fold_settings(config, folds):
                name = ("whole" if cap is None else f"cap{cap}") + f"-seed{seed}"
                name += f"-fold{labels['fold']}" if labels else ""
                own = (f"seed={seed}", f"data.max_instances={'null' if cap is None else cap}", *settings)
                runs.append(Planned(name, {"cap": "" if cap is None else cap, "seed": seed, **labels}, own))
    return Study(path, overrides, runs)


def summarise_cap_curve(study: Study, outcomes: Sequence[Outcome]) -> list[Point]:
    """One point per cap, whole bags last; caps without a finished run are left out."""
    names = (*(name for name in shown_metrics(study.config.task.type) if name != "mean"), "instance_auroc")
    total = sum(study.store.sizes)
    points = []
    for cap in dict.fromkeys(outcome.planned.labels["cap"] for outcome in outcomes):
        done = [outcome for outcome in outcomes if outcome.planned.labels["cap"] == cap and not outcome.error]
        if done:
            values = {name: [o.test[name] for o in done if name in o.test] for name in names}
            metrics = {name: spread(found, name) for name, found in values.items() if found}
            left_out = sum(max(0, size - int(cap)) for size in study.store.sizes) / total if cap else 0.0
            points.append(Point(int(cap) if cap else None, metrics, left_out, len(done)))
    return points


def write_cap_curve(study: Study, outcomes: Sequence[Outcome]) -> list[Point]:
    """Write ``runs.csv``, one row a run, and ``table.csv`` and ``table.md``, one row a cap."""
    points = summarise_cap_curve(study, outcomes)
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    study.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(study.folder / "runs.csv", runs_csv(outcomes, names))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = [f"{name}{part}" for name in names for part in ("", "_low", "_high")]
    writer.writerow(["cap", *ends, "instances_left_out", "num_runs"])
    for point in points:
        spreads = [point.metrics.get(name, Spread(math.nan)) for name in names]
        numbers = ["" if math.isnan(v) else f"{v:.9g}" for own in spreads for v in (own.mean, own.low, own.high)]
        writer.writerow([point.cap or "whole", *numbers, f"{point.instances_left_out:.6f}", point.num_runs])
    write_atomically(study.folder / "table.csv", text.getvalue())
    write_atomically(study.folder / "table.md", markdown(table_cells(points)))
    return points


def table_cells(points: Sequence[Point]) -> list[list[str]]:
    """Columns, then one row per cap: mean and 95 % interval over the runs."""
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    columns = ["Instances per bag", *(NAMES[name] for name in names), "Left out", "Runs"]
    rows = []
    for point in points:
        cells = [spread_text(point.metrics[name]) if name in point.metrics else "" for name in names]
        cap = "whole" if point.cap is None else f"{point.cap:,}"
        rows.append([cap, *cells, f"{100 * point.instances_left_out:.1f} %", str(point.num_runs)])
    return [columns, *rows]
