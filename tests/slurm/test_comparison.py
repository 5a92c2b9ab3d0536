"""`bigbag compare --slurm submit` on a real cluster: an array of runs, then a job that makes table and figure."""

import csv
import json
import sys

import pytest

from .conftest import ROOT

pytestmark = pytest.mark.slow


def test_an_array_of_runs_ends_in_a_table_and_a_figure(cluster, digits):
    folder = digits.parent / "runs/compared"
    command = [sys.executable, "-m", "bigbag.cli", "compare", "--config", str(digits), "--models", "ABMIL,MeanMIL"]
    options = ["name=compared", "train.epochs=1", "--slurm", "submit", "--sbatch=--cpus-per-task=1"]
    said = cluster.run(*command, *options, cwd=ROOT)
    array, collecting = said.rpartition("submitted: ")[2].strip().split(", ")
    state = cluster.wait_for_end(collecting)
    texts = {path.name: path.read_text() for path in (folder / "slurm").glob("*.txt")}
    assert state == "COMPLETED" and set(texts) == {f"{array}_0.txt", f"{array}_1.txt", "collect.txt"}, texts
    with (folder / "table.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"ABMIL", "MeanMIL"}
    for model, row in rows.items():
        (path,) = (p for p in folder.glob("**/results.json") if model in str(p.relative_to(folder)))
        test = json.loads(path.read_text())["test"]
        assert test["num_bags"] == 6 and float(row["auroc"]) == pytest.approx(test["auroc"], abs=1e-3)
    assert "| ABMIL |" in texts["collect.txt"] and [path.stat().st_size for path in folder.glob("*.png")] > [1000]
