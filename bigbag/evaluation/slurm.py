"""A study as SLURM jobs: an array with one task per run, and a job that collects when it is done."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bigbag.config import ConfigError
from bigbag.engine.preemption import EXIT_PREEMPTED
from bigbag.evaluation.study import Study

# The shell outlives the signals and passes them on; a run that saved and left is queued again.
_REQUEUE = f"""run=$!
trap 'kill -TERM $run' TERM USR1
while wait $run; status=$?; kill -0 $run 2>/dev/null; do :; done
if [[ $status == {EXIT_PREEMPTED} ]]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" && sleep 120
fi
exit $status
"""


def array_ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)


def write_jobs(study: Study, command: Sequence[str], options: Sequence[str], limit: int | None = None) -> list[Path]:
    """Write the scripts of a study's jobs into ``out/name/slurm``, in the order in which they are to be submitted.

    Runs that wait for others are an array of their own. Finished runs are left out.

    Args:
        study: the study.
        command: arguments of ``bigbag`` that plan it, ``--index`` and ``--collect`` left out.
        options: options of sbatch for the arrays, such as ``--partition=gpu``.
        limit: most tasks that run at a time; None: as many as there is room for.

    Returns:
        the scripts; the last one collects.
    """
    folder = study.folder / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    open_runs = [i for i, outcome in enumerate(study.collect()) if outcome.error]
    stages = [[i for i in open_runs if not study.runs[i].after], [i for i in open_runs if study.runs[i].after]]
    scripts = []
    for number, indices in enumerate(stage for stage in stages if stage):
        array = array_ranges(indices) + (f"%{limit}" if limit else "")
        lines = [
            f"--array={array}",
            "--requeue",
            "--open-mode=append",
            "--signal=B:USR1@120",
            f"--output={folder}/%A_%a.txt",
            *options,
        ]
        path = folder / f"runs{number}.sbatch"
        path.write_text(_script(study, lines, [*command, "--index"]) + ' "$SLURM_ARRAY_TASK_ID" &\n' + _REQUEUE)
        scripts.append(path)
    path = folder / "collect.sbatch"
    path.write_text(_script(study, [f"--output={folder}/collect.txt"], [*command, "--collect"]) + "\n")
    return [*scripts, path]


def submit_jobs(scripts: Sequence[Path]) -> list[str]:
    """Submit scripts with sbatch, each after the end of the one before it, whatever its success; returns the job ids.

    Raises:
        ConfigError: there is no sbatch here, or it refuses.
    """
    jobs: list[str] = []
    for script in scripts:
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        try:
            done = subprocess.run(["sbatch", "--parsable", *after, str(script)], capture_output=True, text=True)
        except FileNotFoundError:
            raise ConfigError(
                f"--slurm submit: there is no sbatch here; submit {script.parent}/*.sbatch where there is one"
            ) from None
        if done.returncode:
            raise ConfigError(f"sbatch {script}: {done.stderr.strip()}")
        jobs.append(done.stdout.strip().partition(";")[0])
    return jobs


def _script(study: Study, options: Sequence[str], command: Sequence[str]) -> str:
    """A batch script that runs ``bigbag`` with ``command``, in this folder, with this Python."""
    head = [f"--job-name=bigbag-{study.config.name.replace('/', '-')}", *options]
    directives = "".join(f"#SBATCH {option}\n" for option in head)
    run = shlex.join([sys.executable, "-m", "bigbag.cli", *command])
    return f"#!/bin/bash\n{directives}cd {shlex.quote(os.getcwd())} || exit\n{run}"
