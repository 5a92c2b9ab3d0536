"""The benchmark of whole models: what it measures, and what it says of contenders that fail."""

import csv

import pytest
import torch

from bigbag.bench import models
from bigbag.bench.models import lattice, main, make_step, measure, run_job, step_flops
from bigbag.models import GTP

JOB = {
    "instances": 4000,
    "width": 64,
    "threads": 1,
    "device": "cpu",
    "memory_gib": None,
    "steps": 1,
    "max_seconds": 1,
    "recompute": False,
    "dtype": "float32",
}


def test_lattice_is_square():
    assert lattice(5).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1]]


def test_both_libraries_do_the_same_step():
    pytest.importorskip("torchmil")
    losses = [make_step(library, "ABMIL", 50, 16, torch.float32, False)() for library in ("bigbag", "torchmil")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_operations_are_counted_where_they_happen():
    # ABMIL: the hidden layer (without the gradient of the features), its scores, the sum; the classifier once a bag.
    assert step_flops("ABMIL", 10_000, 64) == pytest.approx(4e4 * 64 * 128 + 6e4 * (128 + 64) + 6 * 64, rel=1e-9)
    # Exact attention has the square: q k^T and a v, 2 x 2 N^2 D forward, for each of its one layer of width 512.
    growth = step_flops("TransformerABMIL", 40_000, 64) / step_flops("TransformerABMIL", 20_000, 64)
    assert 3.5 < growth < 4
    # Rows that a model makes of a bag do not count once per instance: GTP's clusters.
    assert step_flops("GTP", 100_000, 64) < 3 * 2 * 100_000 * sum(
        p.numel() for p in GTP((64,)).parameters() if p.dim() == 2
    )


def test_peak_memory_is_that_of_the_step():
    """The pre-activations, (4,000, 128) floats, are kept for the backward pass."""
    found = run_job(JOB | {"library": "bigbag", "model": "ABMIL"}, 120)
    assert found["seconds"] > 0
    assert 4000 * 128 * 4 < found["peak_bytes"] < 64 << 20


def test_a_contender_that_fails_or_takes_too_long_is_reported():
    assert "NoSuchMIL" in run_job(JOB | {"library": "bigbag", "model": "NoSuchMIL"}, 120)["error"]
    assert run_job(JOB | {"library": "bigbag", "model": "ABMIL"}, 0.01)["error"].startswith("timed out")


def test_command_writes_a_row_per_contender(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "run_job", lambda job, _: measure(job))  # in this process, which has imported all
    path = tmp_path / "models.csv"
    arguments = ["--models", "MeanMIL", "--sizes", "500", "--width", "8", "--threads", "1", "--csv", str(path)]
    assert main(arguments) == 0
    rows = list(csv.DictReader(path.open()))
    assert [(row["dtype"], row["recompute"]) for row in rows] == [
        (dtype, recompute) for dtype in ("float32", "bfloat16") for recompute in ("False", "True")
    ]
    assert "MeanMIL" in capsys.readouterr().out


def test_unknown_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--models", "MeanMIL,ABMLI"])
    assert "unknown model 'ABMLI' (choose from ABMIL, " in capsys.readouterr().err
