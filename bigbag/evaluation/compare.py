"""All models on one data set, by one command: train each of them, and make a table.

Every run is a process of its own, so that its peak memory is its own. A run that has finished is not repeated; one that
was interrupted goes on.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bigbag.config import Config, ConfigError, load_config
from bigbag.data import BagStore, split_bags
from bigbag.engine.run import open_configured_store, run_identity
from bigbag.files import write_atomically, write_json
from bigbag.models import MODELS
from bigbag.models.build import arguments_of

_COST = "cost.json"
_METRICS = {
    "auroc": "Test AUROC",
    "accuracy": "Accuracy",
    "f1": "F1",
    "instance_auroc": "Instance AUROC",
}


@dataclass(frozen=True)
class Run:
    """One model with one seed, and what came of it.

    Attributes:
        model: its name.
        seed: its seed.
        test: test metrics by name.
        seconds: wall time of training, evaluation and report.
        peak_rss_bytes: largest resident memory of the process, mapped shards included.
        error: why there is no result, or "".
    """

    model: str
    seed: int
    test: dict[str, Any]
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    error: str = ""


def compare(path: str | Path, overrides: Sequence[str], models: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Train and evaluate models on the packed set of a config, and write ``table.csv`` and ``table.md``.

    Run k of model M lies in ``out/name/M-seed<k>``, the tables in ``out/name``. A model gets those arguments of
    ``compare.common`` that it takes, and over them ``compare.models[M]``. A run that fails is listed with its error.

    Args:
        path: the config file.
        overrides: ``key.sub=value`` settings over it.
        models: names of models.
        seeds: seeds of each model.

    Returns:
        the runs, in order of model and seed.

    Raises:
        ConfigError: a model that there is not.
    """
    config = load_config(path, overrides)
    unknown = [name for name in (*models, *config.compare.models) if name not in MODELS]
    if unknown:
        raise ConfigError(f"compare: unknown model {unknown[0]!r}; known models: {', '.join(MODELS)}")
    store = open_configured_store(config)
    runs = []
    for name in models:
        for seed in seeds:
            runs.append(_run(path, overrides, config, store, name, seed))
            print(_line(runs[-1]), flush=True)
            _write_tables(config.run_dir, runs)
    return runs


def model_settings(config: Config, name: str) -> dict[str, Any]:
    """The model section of the run of model ``name``."""
    known = arguments_of(name)
    common = {key: value for key, value in config.compare.common.items() if key in known}
    return {"name": name, **common, **config.compare.models.get(name, {})}


def _run(path: str | Path, overrides: Sequence[str], config: Config, store: BagStore, model: str, seed: int) -> Run:
    settings = [
        *overrides,
        f"name={config.name}/{model}-seed{seed}",
        f"seed={seed}",
        f"model={json.dumps(model_settings(config, model))}",
    ]
    own = load_config(path, settings)
    if not _is_finished(own, store):
        started = time.perf_counter()
        status, peak = _train(path, settings, own.run_dir / "output.txt")
        if status:
            lines = (own.run_dir / "output.txt").read_text(errors="replace").strip().splitlines()
            return Run(model, seed, {}, error=lines[-1] if lines else f"exit status {status}")
        write_json(own.run_dir / _COST, {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak})
    results = json.loads((own.run_dir / "results.json").read_text())
    return Run(model, seed, results["test"], **json.loads((own.run_dir / _COST).read_text()))


def _train(path: str | Path, settings: Sequence[str], output: Path) -> tuple[int, int]:
    """Run ``bigbag train`` in a process of its own; exit status and the most resident bytes it had."""
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bigbag.cli", "train", "--config", str(path), *settings]
    with open(output, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _is_finished(config: Config, store: BagStore) -> bool:
    """Whether the run's folder holds the whole run of these settings on these bags and splits."""
    identity = config.run_dir / "identity.json"
    if not (identity.is_file() and (config.run_dir / _COST).is_file()):
        return False
    wanted = run_identity(config, store, split_bags(store, config.data.splits))
    return json.loads(identity.read_text()) == wanted


def _line(run: Run) -> str:
    if run.error:
        return f"{run.model:<28} seed {run.seed}  failed: {run.error}"
    shown = "  ".join(f"{key} {run.test[key]:.3f}" for key in _METRICS if key in run.test)
    return f"{run.model:<28} seed {run.seed}  {shown}  {run.seconds:.0f} s  {run.peak_rss_bytes / 2**20:.0f} MiB"


def _write_tables(folder: Path, runs: Sequence[Run]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "seed", *_METRICS, "seconds", "peak_rss_bytes", "error"])
    for run in runs:
        numbers = [f"{run.test[key]:.9g}" if key in run.test else "" for key in _METRICS]
        writer.writerow([run.model, run.seed, *numbers, f"{run.seconds:.1f}", run.peak_rss_bytes, run.error])
    write_atomically(folder / "table.csv", text.getvalue())
    write_atomically(folder / "table.md", _markdown(runs))


def _markdown(runs: Sequence[Run]) -> str:
    """One row per model, the best test AUROC first; mean and standard deviation where there are several seeds."""
    columns = ["Model", *_METRICS.values(), "Seconds", "Peak RSS, MiB"]
    rows = []
    for model in dict.fromkeys(run.model for run in runs):
        own = [run for run in runs if run.model == model and not run.error]
        cells = [_spread([run.test[key] for run in own if key in run.test]) for key in _METRICS]
        if own:
            cells += [
                f"{mean(run.seconds for run in own):.0f}",
                f"{max(run.peak_rss_bytes for run in own) / 2**20:.0f}",
            ]
        failed = sum(bool(run.error) for run in runs if run.model == model)
        name = f"{model} ({failed} failed)" if failed else model
        order = mean(run.test.get("auroc", 0.0) for run in own) if own else -1.0
        rows.append((order, [name, *cells, *[""] * (len(columns) - 1 - len(cells))]))
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *(row for _, row in sorted(rows, key=lambda r: -r[0]))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
