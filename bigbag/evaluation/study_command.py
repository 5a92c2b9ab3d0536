"""What ``bigbag compare`` and ``bigbag cap-curve`` have in common: how the options say a study is carried out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from bigbag.config import ConfigError
from bigbag.evaluation.slurm import submit_jobs, write_jobs
from bigbag.evaluation.study import Outcome, Study


def carry_out(
    study: Study,
    options: argparse.Namespace,
    command: Sequence[str],
    show: Callable[[Outcome], str],
    finish: Callable[[Sequence[Outcome]], None],
) -> None:
    """Do what the options say with the runs of a study.

    Args:
        study: the study.
        options: those of :func:`bigbag.evaluation.options.add_study_options`.
        command: the command line that they were read from.
        show: one line about a run that has finished.
        finish: makes tables and figures.

    Raises:
        ConfigError: the folder holds a run, whose report and figures those of the study would replace.
        ValueError: runs failed, after everything else was done; or an index that there is not.
    """

    def say(outcome: Outcome) -> None:
        state = f"failed: {outcome.error}" if outcome.error else show(outcome)
        print(f"{outcome.planned.name:<36} {outcome.error if outcome.waiting else state}", flush=True)

    if (study.folder / "identity.json").is_file():
        raise ConfigError(
            f"{study.folder} holds a run, whose report.html would be replaced: choose another name (name=...)"
        )
    if options.list:
        for index, outcome in enumerate(study.collect()):
            print(f"{index:>4}  ", end="")
            say(outcome)
        return
    if options.index is not None:
        if not 0 <= options.index < len(study.runs):
            raise ConfigError(f"--index {options.index}: expected 0 to {len(study.runs) - 1}")
        outcome = study.run_one(study.runs[options.index])
        say(outcome)
        _complain([outcome])
        return
    if options.slurm:
        scripts = write_jobs(study, _without(command), options.sbatch, options.limit)
        print("\n".join(f"written: {script}" for script in scripts))
        if options.slurm == "submit":
            print(f"submitted: {', '.join(submit_jobs(scripts))}")
        return
    outcomes = study.collect() if options.collect else study.run(say)
    if not all(outcome.waiting for outcome in outcomes):  # tables of nothing would take the place of earlier ones
        finish(outcomes)
    _complain(outcomes)


def _without(command: Sequence[str]) -> list[str]:
    """The command line without the options of SLURM."""
    kept, skip = [], False
    for word in command:
        name, equals, _ = word.partition("=")
        if skip or name in ("--slurm", "--sbatch", "--limit"):
            skip = not skip and not equals
            continue
        kept.append(word)
    return kept


def _complain(outcomes: Sequence[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        first = failed[0]
        raise ValueError(
            f"{len(failed)} of {len(outcomes)} runs have no result; the first, {first.planned.name}: {first.error}"
        )
