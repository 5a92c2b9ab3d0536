"""The benchmark of whole models: what it measures, and what it says of contenders that fail."""

import csv

import pytest
import torch

from bigbag.bench.models import lattice, main, make_step, run_job

JOB = {"instances": 4000, "width": 64, "threads": 1, "steps": 1, "seconds": 1, "recompute": False, "dtype": "float32"}


def test_lattice_is_square():
    assert lattice(5).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1]]


def test_both_libraries_do_the_same_step():
    pytest.importorskip("torchmil")
    losses = [make_step(library, "ABMIL", 50, 16, torch.float32, False)[1]() for library in ("bigbag", "torchmil")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_peak_memory_is_that_of_the_step():
    """The pre-activations, (4,000, 128) floats, are kept for the backward pass."""
    found = run_job(JOB | {"library": "bigbag", "model": "ABMIL"}, 120)
    assert found["seconds"] > 0 and found["flops"] == 4 * 4000 * 64 * 128 + 6 * 4000 * (128 + 64)
    assert 4000 * 128 * 4 < found["peak_bytes"] < 64 << 20


def test_a_contender_that_fails_or_takes_too_long_is_reported():
    assert "NoSuchMIL" in run_job(JOB | {"library": "bigbag", "model": "NoSuchMIL"}, 120)["error"]
    assert run_job(JOB | {"library": "bigbag", "model": "ABMIL"}, 0.01)["error"].startswith("timed out")


def test_command_writes_a_row_per_contender(tmp_path, capsys):
    path = tmp_path / "models.csv"
    arguments = ["--models", "MeanMIL", "--sizes", "500", "--width", "8", "--threads", "1", "--csv", str(path)]
    assert main(arguments) == 0
    rows = list(csv.DictReader(path.open()))
    assert [(row["dtype"], row["recompute"]) for row in rows] == [
        (dtype, recompute) for dtype in ("float32", "bfloat16") for recompute in ("False", "True")
    ]
    assert "MeanMIL" in capsys.readouterr().out
