"""The command line: ``bigbag pack | plan | train | evaluate | predict | report | compare | cap-curve | bench``.

``launch/*.py`` call the same functions. Whatever a user can cause ends in one line on standard error and exit status
2, Ctrl-C in one line and 130, SIGTERM likewise and 143; a training that SIGTERM or SIGUSR1 asked to leave ends with
status 85, its checkpoint written.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbag.config import Config, ConfigError, load_config
from bigbag.config.option_types import numbers
from bigbag.datasets.command import add_pack_options, data_config, say_what_was_found
from bigbag.evaluation.options import (
    add_evaluation_options,
    add_grid_options,
    add_predict_options,
    add_study_options,
)
from bigbag.memory import use_one_heap

if TYPE_CHECKING:
    from bigbag.evaluation.study import Outcome, Study


_BENCHMARKS = {
    "ops": "bigbag.bench",
    "models": "bigbag.bench.models",
    "loader": "bigbag.bench.loader",
    "ranks": "bigbag.bench.ranks",
    "tune": "bigbag.bench.tune",
}
"""Benchmark -> the module whose ``main`` takes its options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    use_one_heap()
    arguments = [_with_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in more):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    options.overrides += more  # settings after an option, which argparse does not count to those before it
    options.command_line = arguments
    _quiet_known_noise()
    try:
        with _sigterm_interrupts(options.command):
            return options.command(options) or 0
    except BrokenPipeError:
        if options.traceback:
            raise
        return _end_without_output()
    except (ValueError, OSError, MemoryError) as error:
        if options.traceback:
            raise
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
        remedy = ": make room where the command writes; the same command again goes on where it can" if full else ""
        print(f"{rank}error: {error}{remedy}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt as interrupt:
        if options.traceback:
            raise
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        said = "interrupted" if number == signal.SIGINT else "terminated"
        print(f"{said}: the same command again goes on where it can", file=sys.stderr, flush=True)
        return 128 + int(number)


@contextmanager
def _sigterm_interrupts(command: Any) -> Iterator[None]:
    """Within the block SIGTERM does what Ctrl-C does: temporary folders go, and processes that were started end.

    Not in ``train``, which leaves in its own way (:mod:`bigbag.engine.preemption`).
    """
    if command is _train or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _with_home(word: str) -> str:
    """``--out=~/runs`` as ``--out ~/runs`` arrives here: shells expand only words that begin with ``~``."""
    option, equals, value = word.partition("=")
    return f"{option}={os.path.expanduser(value)}" if equals and option.startswith("--") else word


def _end_without_output() -> int:
    """Who read the output is gone, as ``head`` is after its lines: the end of it, and no error to be told there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still in the buffer has a place to go
    print("the reader of the output is gone: the same command again goes on where it can", file=sys.stderr, flush=True)
    return 128 + signal.SIGPIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bigbag", description="Deep multiple-instance learning on whole bags.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, function: Any, text: str, needs_config: bool | None = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function, overrides=[])
        command.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
        if needs_config is not None:
            command.add_argument("--config", required=needs_config, help="YAML file of the run")
            command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings over the file's")
        return command

    pack = add("pack", _pack, "Pack bags into shards: those of --from, or of data.source in a config.", False)
    add_pack_options(pack)
    pack.add_argument("--workers", type=int, default=1, help="threads that load bags")
    pack.add_argument("--overwrite", action="store_true", help="replace a finished set of other bags")
    train = add("train", _train, "Train, evaluate and report; resume where the run's folder holds a checkpoint.")
    train.add_argument("--restart", action="store_true", help="delete the run's folder and start again")
    text = "Tell what a run will take of a device's memory, and the settings that make it fit; status 1: it won't."
    plan = add("plan", _plan, text)
    plan.add_argument("--ranks", type=int, default=1, help="processes of the run, on this machine")
    text = "Evaluate the best model of a run again and report; or only what is saved, with --predictions."
    evaluate = add("evaluate", _evaluate, text, needs_config=False)
    add_evaluation_options(evaluate)
    text = "Predict new slides with the best model of a run; draw what it sees in them."
    add_predict_options(add("predict", _predict, text, needs_config=None))
    report = add("report", _report, "Write report.html of a run from the files in its folder.")
    report.set_defaults(local_rank=0)
    compare = add("compare", _compare, "Train several models on one packed set and make a table of them.")
    compare.add_argument("--models", default="all", help="names with commas between them, or all")
    add_grid_options(compare)
    add_study_options(compare)
    cap_curve = add("cap-curve", _cap_curve, "Show what a cap on the instances of a bag costs, as table and figure.")
    cap_curve.add_argument("--caps", type=numbers, help="with commas between them; default: 256, 512, ..., 16384")
    add_study_options(cap_curve)
    for command in (train, evaluate):
        command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher appends it
    text = "Measure operators, models, the loader or ranks, or tune kernels: `bigbag bench ops --help` has its options."
    bench = add("bench", _bench, text, needs_config=None)
    bench.add_argument("benchmark", choices=_BENCHMARKS)
    bench.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of the benchmark")
    return parser


def _quiet_known_noise() -> None:
    """Show bigbag's own messages, on one rank, and only warnings of the libraries under it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("bigbag").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logging.getLogger("bigbag.ops").setLevel(logging.WARNING)  # the banner names the implementations
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def _config(options: argparse.Namespace) -> Config:
    return load_config(options.config, options.overrides)


def _pack(options: argparse.Namespace) -> None:
    from bigbag.data import pack, parse_splits_option
    from bigbag.data.sources.resplit import Resplit
    from bigbag.datasets import open_source

    data = data_config(options)
    if data.source is None:
        raise ConfigError(f"{options.config}: data.source says what to pack, and is missing; or give --from")
    source = open_source(data.source.name, **data.source.arguments)
    say_what_was_found(source)
    if options.splits is not None:
        source = Resplit(source, parse_splits_option(options.splits))
    pack(
        source,
        data.shards,
        dtype=data.storage_dtype,
        shard_bytes=data.shard_bytes,
        empty=data.empty_bags,
        left_out_ok=data.missing_bags == "leave_out",
        invalid=data.invalid_bags,
        leakage=data.leakage,
        unlabelled=options.unlabelled,
        graph=data.graph,
        workers=options.workers,
        overwrite=options.overwrite,
    )


def _train(options: argparse.Namespace) -> int:
    from bigbag.engine import preemption
    from bigbag.engine.backend import choose_backend
    from bigbag.engine.run import delete_run, train
    from bigbag.engine.world import joined_world, leave

    config = _config(options)
    engine = config.engine
    with joined_world(choose_backend(engine.backend), engine.threads, engine.timeout_s) as world:
        if options.restart and world.is_main:
            delete_run(config.run_dir)
        world.barrier()
        preemption.watch()
        try:
            results = train(config, world=world)
        except preemption.Preempted:
            if world.is_main:
                print("asked to leave: a checkpoint is written, and the same command goes on from there", flush=True)
            leave(preemption.EXIT_PREEMPTED)
        _conclude(config, results, world.is_main)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from bigbag.engine.environment import memory_lines
    from bigbag.engine.run import plan

    memory = plan(_config(options), options.ranks)
    print("\n".join(memory_lines(memory.to_json())))
    return 0 if memory.fits else 1


def _evaluate(options: argparse.Namespace) -> None:
    if options.predictions:
        from bigbag.evaluation.command import evaluate_predictions

        evaluate_predictions(options)
        return
    if not options.config:
        raise ConfigError("evaluate: expected --config FILE, or --predictions FILE for saved predictions")
    from bigbag.engine.backend import choose_backend
    from bigbag.engine.run import evaluate
    from bigbag.engine.world import joined_world

    config = _config(options)
    engine = config.engine
    with joined_world(choose_backend(engine.backend), engine.threads, engine.timeout_s) as world:
        results = evaluate(config, world=world)
        _conclude(config, results, world.is_main)


def _predict(options: argparse.Namespace) -> None:
    from bigbag.engine.world import joined_world
    from bigbag.visualize.predict_command import predict_command

    with joined_world("torch", options.threads) as world:
        predict_command(options, world)


def _report(options: argparse.Namespace) -> None:
    from bigbag.visualize import write_report

    print(f"report: {write_report(_config(options).run_dir)}")


def _compare(options: argparse.Namespace) -> None:
    from bigbag.evaluation.compare import plan_comparison, shown_metrics, with_mean, write_comparison
    from bigbag.evaluation.study import parse_grid
    from bigbag.evaluation.study_command import carry_out
    from bigbag.models import MODELS
    from bigbag.visualize.comparison import draw_comparison
    from bigbag.visualize.study_report import write_comparison_report

    config = _config(options)
    models = list(MODELS) if options.models == "all" else options.models.split(",")
    seeds = range(config.seed, config.seed + options.seeds)
    grid = parse_grid(options.grid)
    study = plan_comparison(options.config, options.overrides, models, seeds, options.folds, options.inner, grid)
    names = shown_metrics(config.task.type)

    def show(outcome: Outcome) -> str:
        return _outcome_line(outcome, with_mean(outcome.test), (*names, "instance_auroc"))

    def finish(outcomes: Sequence[Outcome]) -> None:
        lines = write_comparison(study, outcomes)
        figure = draw_comparison(lines, names, study.folder)
        _say_what_was_written(study, figure, write_comparison_report(study, lines, outcomes, names))

    carry_out(study, options, options.command_line, show, finish)


def _cap_curve(options: argparse.Namespace) -> None:
    from bigbag.evaluation.cap_curve import plan_cap_curve, write_cap_curve
    from bigbag.evaluation.compare import shown_metrics
    from bigbag.evaluation.study_command import carry_out
    from bigbag.visualize.comparison import draw_cap_curve
    from bigbag.visualize.study_report import write_cap_curve_report

    config = _config(options)
    seeds = range(config.seed, config.seed + options.seeds)
    study = plan_cap_curve(options.config, options.overrides, options.caps, seeds, options.folds)
    names = shown_metrics(config.task.type)

    def show(outcome: Outcome) -> str:
        return _outcome_line(outcome, outcome.test, (*names, "instance_auroc"))

    def finish(outcomes: Sequence[Outcome]) -> None:
        points = write_cap_curve(study, outcomes)
        figure = draw_cap_curve(points, names[0], study.folder)
        _say_what_was_written(study, figure, write_cap_curve_report(study, points, outcomes, names[0]))

    carry_out(study, options, options.command_line, show, finish)


def _bench(options: argparse.Namespace) -> int:
    status: int = import_module(_BENCHMARKS[options.benchmark]).main(options.options)
    return status


def _say_what_was_written(study: Study, figure: Path, report: Path) -> None:
    table = study.folder / "table.csv"
    print(f"\n{table.with_suffix('.md').read_text()}\ntable: {table}\nfigure: {figure}\nreport: {report}")


def _outcome_line(outcome: Outcome, metrics: Mapping[str, Any], names: Sequence[str]) -> str:
    shown = [f"{name} {metrics[name]:.3f}" for name in names if name in metrics]
    return "  ".join([*shown, f"{outcome.seconds:.0f} s", f"{outcome.peak_rss_bytes / 2**20:.0f} MiB"])


def _conclude(config: Config, results: dict[str, Any], is_main: bool) -> None:
    """Write the report and say how it went."""
    if not is_main:
        return
    from bigbag.engine.metrics import headline
    from bigbag.evaluation.command import evaluate_run
    from bigbag.visualize import write_report

    evaluate_run(config)
    path = write_report(config.run_dir)
    for split in ("val", "test"):
        if split in results:
            shown = "  ".join(f"{k} {v:.4f}" for k, v in headline(results[split], config.monitor).items())
            print(f"{split:<5} {results[split]['num_bags']} bags  {shown}")
    print(f"metrics with intervals: {config.run_dir / 'metrics.csv'}\nreport: {path}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
