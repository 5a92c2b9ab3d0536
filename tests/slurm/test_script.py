"""What launch/slurm/train.sbatch says where it can't start; no cluster is needed for that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "train.sbatch"


@pytest.mark.parametrize(
    "folder, python, status, said",
    [
        (None, None, 1, "SLURM_SUBMIT_DIR: is not set: start this script by sbatch"),
        ("elsewhere", sys.executable, 2, "elsewhere: expected launch/train.py and {python} in it: submit from the"),
        (
            "root",
            None,
            2,
            "root: expected launch/train.py and .venv/bin/python in it: submit from the project's root, or",
        ),
    ],
)
def test_where_it_cannot_start_one_line_says_why(tmp_path, folder, python, status, said):
    for name in ("elsewhere", "root/launch"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "root/launch/train.py").touch()
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "SLURM_SUBMIT_DIR")}
    given = {"SLURM_SUBMIT_DIR": folder and str(tmp_path / folder), "PYTHON": python}
    environment = kept | {key: value for key, value in given.items() if value}
    done = subprocess.run(["bash", SCRIPT, "--config", "x.yaml"], env=environment, capture_output=True, text=True)
    assert done.returncode == status and len(done.stderr.splitlines()) == 1
    assert said.format(python=python) in done.stderr
