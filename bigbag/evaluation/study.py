"""Many runs of one config as one piece of work: planned at once, each in a process of its own, resumable, countable.

A study is a list of planned runs. Each has its folder under ``out/name``; a run that has finished is not repeated, one
that was interrupted goes on from its checkpoint. Runs can be started in order here, or one by one by their index, on
any machine that sees the folder; what is there is collected at any time.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from bigbag.config import Config, ConfigError, load_config
from bigbag.data import BagStore, split_bags
from bigbag.engine.preemption import EXIT_PREEMPTED, LEAVE_SIGNALS
from bigbag.engine.run import open_configured_store, run_identity
from bigbag.files import alone_in, write_json

logger = logging.getLogger(__name__)

_COST, _FAILED, _ATTEMPTS = "cost.json", "failed.json", "attempts.json"
_NOTE_EVERY_S = 5.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Planned:
    """A run to be done.

    Attributes:
        name: its folder below that of the study.
        labels: what it is, for tables: model, seed, fold, ...
        settings: ``key.sub=value`` settings over those of the study.
        choose: None, or how settings follow from the outcome of other runs, ``after``.
        after: names of the runs that must have finished before it starts.
    """

    name: str
    labels: Mapping[str, Any]
    settings: tuple[str, ...]
    after: tuple[str, ...] = ()
    choose: Callable[[Sequence[Outcome]], tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        planned: the run.
        results: its ``results.json``; empty where there is none.
        seconds: wall time of training, evaluation and report; of an interrupted run that of all its attempts, what was
            done twice included. NaN where there are no results.
        peak_rss_bytes: largest resident memory of the process, mapped shards included.
        error: why there are no results, or "".
        waiting: True for a run that has not been tried, or is under way.
    """

    planned: Planned
    results: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = math.nan
    peak_rss_bytes: int = 0
    error: str = ""
    waiting: bool = False

    @property
    def test(self) -> Mapping[str, Any]:
        """The metrics of the test bags."""
        return self.results.get("test", {})


class Study:
    """Runs of one config.

    Args:
        path: the config file.
        overrides: ``key.sub=value`` settings over it.
        runs: what is planned; a run comes after those it waits for.
    """

    def __init__(self, path: str | Path, overrides: Sequence[str], runs: Sequence[Planned]) -> None:
        self.path, self.overrides, self.runs = path, tuple(overrides), tuple(runs)
        self.config = load_config(path, overrides)
        self._by_name = {run.name: run for run in self.runs}

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    def run(self, report: Callable[[Outcome], None]) -> list[Outcome]:
        """Do all runs, in order; ``report`` hears of each when it is done."""
        outcomes = []
        for planned in self.runs:
            outcomes.append(self.run_one(planned))
            report(outcomes[-1])
        return outcomes

    def run_one(self, planned: Planned) -> Outcome:
        """Do one run, unless it has finished, or another process on this machine is at it.

        Raises:
            ValueError: bags that cannot be parted as the settings ask.
            FileNotFoundError: missing shards.
        """
        settings = self.settings_of(planned)
        if isinstance(settings, Outcome):
            return settings
        config = load_config(self.path, settings)
        identity = self._identity(config)  # what is wrong with bags or splits is wrong for all runs: say it once
        with alone_in(config.run_dir) as alone:
            if not alone:
                return Outcome(planned, error=f"another process is at it, in {config.run_dir}", waiting=True)
            if not self._results(config):
                self._attempt(settings, config.run_dir, identity)
        return self.outcome(planned)

    def _attempt(self, settings: Sequence[str], folder: Path, identity: Mapping[str, str]) -> None:
        """Train, from the beginning or from where an earlier attempt got to; write what it cost, or why it failed."""
        (folder / _FAILED).unlink(missing_ok=True)
        attempts = _Attempts(folder)
        status = _train(self.path, settings, folder / "output.txt", attempts)
        if status == EXIT_PREEMPTED:
            sys.exit(status)  # the run has saved; the same command goes on with it
        if status:
            lines = (folder / "output.txt").read_text(errors="replace").strip().splitlines()
            error = lines[-1] if lines else f"exit status {status}"
            write_json(folder / _FAILED, {"error": error, "identity": identity})
        else:
            write_json(folder / _COST, attempts.cost())

    def collect(self) -> list[Outcome]:
        """What came of all runs so far; starts nothing."""
        return [self.outcome(planned) for planned in self.runs]

    def outcome(self, planned: Planned) -> Outcome:
        """What came of a run so far."""
        settings = self.settings_of(planned)
        if isinstance(settings, Outcome):
            return settings
        config = load_config(self.path, settings)
        results = self._results(config)
        if results:
            return Outcome(planned, results, **_read(config.run_dir / _COST))
        failed = _read(config.run_dir / _FAILED)
        # What failed with other settings says nothing of these.
        error = failed["error"] if failed and failed.get("identity") == self._identity(config) else None
        return Outcome(planned, error=error or "not finished", waiting=not error)

    def settings_of(self, planned: Planned) -> list[str] | Outcome:
        """All settings of a run; or why it cannot start yet."""
        settings = [*self.overrides, f"name={self.config.name}/{planned.name}", *planned.settings]
        if planned.choose is None:
            return settings
        before = [self.outcome(self._by_name[name]) for name in planned.after]
        missing = [outcome for outcome in before if outcome.error]
        if missing:
            reason = f"waits for {len(missing)} of {len(before)} runs; {missing[0].planned.name}: {missing[0].error}"
            return Outcome(planned, error=reason, waiting=all(outcome.waiting for outcome in missing))
        return [*settings, *planned.choose(before)]

    @cached_property
    def store(self) -> BagStore:
        """The packed set."""
        return open_configured_store(self.config)

    def _results(self, config: Config) -> dict[str, Any]:
        """The results in a run's folder, if it holds the whole run of these settings on these bags and splits."""
        if not _read(config.run_dir / _COST):
            return {}
        same = _read(config.run_dir / "identity.json") == self._identity(config)
        return _read(config.run_dir / "results.json") if same else {}

    def _identity(self, config: Config) -> dict[str, str]:
        return run_identity(config, self.store, split_bags(self.store, config.data.splits))


class _Attempts:
    """Time and memory of all attempts at a run, kept on disk while it goes on, so that a killed one counts too."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _ATTEMPTS
        before = _read(self._path)
        self._seconds, self._peak = before.get("seconds", 0.0), before.get("peak_rss_bytes", 0)
        self._started = self._written = time.perf_counter()

    def note(self, peak_rss_bytes: int = 0) -> None:
        """Called over and over while the run goes on, and at its end."""
        self._peak = max(self._peak, peak_rss_bytes)
        if peak_rss_bytes or time.perf_counter() - self._written >= _NOTE_EVERY_S:
            self._written = time.perf_counter()
            write_json(self._path, self.cost())

    def cost(self) -> dict[str, float]:
        seconds = self._seconds + time.perf_counter() - self._started
        return {"seconds": seconds, "peak_rss_bytes": self._peak}


def _read(path: Path) -> dict[str, Any]:
    """A JSON file that a run wrote; empty where it is absent or damaged: then it is made again."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _train(path: str | Path, settings: Sequence[str], output: Path, attempts: _Attempts) -> int:
    """Run ``bigbag train`` in a process of its own, which ends when we do; its exit status.

    SIGTERM and SIGUSR1 are passed on: the run saves and leaves (:mod:`bigbag.engine.preemption`), and so do we.
    """
    command = [sys.executable, "-m", "bigbag.cli", "train", "--config", str(path), *settings]
    told: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, lambda n, _: told.append(n)) for number in LEAVE_SIGNALS if main}
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_us() -> None:  # even if we are killed: what goes on unseen would be started a second time
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    try:
        with open(output, "wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, preexec_fn=end_with_us)
        status, usage = _wait(process, told, attempts)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    attempts.note(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    process.returncode = os.waitstatus_to_exitcode(status)
    if -process.returncode in told:  # it was not listening yet
        process.returncode = EXIT_PREEMPTED
    return process.returncode


def _wait(process: subprocess.Popen[bytes], told: Sequence[int], attempts: _Attempts) -> tuple[int, Any]:
    """The status and usage of a process when it has ended; what is appended to ``told`` meanwhile is passed on to it.

    It looks every 0.1 s: a signal that comes just before a wait without end would not interrupt it.
    """
    passed_on = 0
    try:
        while True:
            for number in told[passed_on:]:
                os.kill(process.pid, number)  # Popen would reap it, and its usage with it
                passed_on += 1
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                return status, usage
            attempts.note()
            time.sleep(0.1)
    except BaseException:
        process.kill()
        raise


def fold_settings(config: Config, folds: int | None) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Labels and settings of each fold; one without either where ``folds`` is None.

    A fifth of the training bags validates where the config does not say.
    """
    if folds is None:
        yield {}, ()
        return
    if folds < 2:
        raise ConfigError(f"--folds {folds}: expected at least 2, since a fold trains on the others")
    own = config.data.splits
    validate = () if own.val_fraction or own.val_folds else ("data.splits.val_fraction=0.2",)
    for fold in range(folds):
        yield {"fold": fold}, (f"data.splits.folds={folds}", f"data.splits.fold={fold}", *validate)


def nested(config: Config, outer: Planned, grid: Mapping[str, Sequence[str]], inner: int) -> list[Planned]:
    """A run whose settings inner folds choose: the runs of the inner folds, then the run itself.

    Every combination of the values of ``grid`` is trained with each inner fold as validation bags. The combination of
    the best mean of ``train.monitor``, and the mean of its best epochs, are what the run is trained with, on the bags
    of all inner folds; it has no validation bags of its own, and its last epoch counts.

    Args:
        config: the config of the study.
        outer: the run.
        grid: setting -> values, as text.
        inner: number of inner folds.
    """
    settings = [setting for setting in outer.settings if not setting.startswith("data.splits.val_")]
    combinations: list[tuple[str, ...]] = [()]
    for key, values in grid.items():
        combinations = [(*before, f"{key}={value}") for before in combinations for value in values]
    runs = []
    for number, combination in enumerate(combinations):
        for fold in range(inner):
            folds = (f"data.splits.val_folds={inner}", f"data.splits.val_fold={fold}")
            name = f"{outer.name}/try{number}-inner{fold}"
            labels = {**outer.labels, "try": number, "inner": fold}
            runs.append(Planned(name, labels, (*settings, "data.splits.val_fraction=null", *folds, *combination)))

    def choose(before: Sequence[Outcome]) -> tuple[str, ...]:
        sign = 1 if config.monitor_mode == "max" else -1
        of = [[o for o in before if o.planned.labels["try"] == number] for number in range(len(combinations))]
        values = [sign * mean(o.results["val"][config.monitor] for o in tried) for tried in of]
        best = max(range(len(combinations)), key=values.__getitem__)
        epochs = max(1, round(mean(outcome.results["best_epoch"] for outcome in of[best])))
        return (*combinations[best], f"train.epochs={epochs}")

    last = (*settings, "data.splits.val_fraction=null", "data.splits.val_folds=null")
    return [*runs, Planned(outer.name, outer.labels, last, tuple(run.name for run in runs), choose)]


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """``["optim.lr=1e-3,1e-4"]`` as ``{"optim.lr": ["1e-3", "1e-4"]}``.

    Raises:
        ConfigError: no values, or a setting that is there twice.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        if key in grid:
            raise ConfigError(f"--grid {text}: {key} is there twice, expected all of its values after one --grid")
        grid[key] = list(dict.fromkeys(value for value in values.split(",") if value))
        if not grid[key]:
            raise ConfigError(f"--grid {text}: expected key.sub=value,value,...")
    return grid
