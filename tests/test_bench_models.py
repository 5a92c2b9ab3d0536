"""The benchmark of whole models: what it measures, and what it says of contenders that fail."""

import csv

import pytest
import torch

from bigbag.bench import models
from bigbag.bench.models import lattice, make_step, measure, run_job, step_flops
from bigbag.cli import main
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
    # ABMIL: the hidden layer and the sum, without gradients of the features; its scores; the classifier once a bag.
    assert step_flops("ABMIL", 10_000, 64) == pytest.approx(4e4 * 64 * 128 + 6e4 * 128 + 4e4 * 64 + 6 * 64, rel=1e-9)
    # Exact attention has the square: q k^T and a v, 2 x 2 N^2 D forward, for each of its one layer of width 512.
    growth = step_flops("TransformerABMIL", 40_000, 64) / step_flops("TransformerABMIL", 20_000, 64)
    assert 3.5 < growth < 4
    # Rows that a model makes of a bag do not count once per instance: GTP's clusters.
    assert step_flops("GTP", 100_000, 64) < 3 * 2 * 100_000 * sum(
        p.numel() for p in GTP((64,)).parameters() if p.dim() == 2
    )


def test_operations_of_the_autoencoder():
    """Its last layer is never computed: of 2 N P K for each of weights and squares, those of x W and its gradient."""
    rows, width, hidden, latent = 10_000, 64, 256, 64
    encoder = 4 * rows * width * hidden + 6 * rows * hidden * (latent + 1)
    decoder = 6 * rows * (latent * hidden + hidden) + 4 * rows * (width * hidden + hidden**2)
    of_parameters = 4 * width * hidden**2 + 2 * rows * width  # W^T W, W times the gradient to it, and that to the bias
    pool = 6 * rows * (latent * 128 + 128 + latent) + 6 * latent
    found = step_flops("VAEABMIL", rows, width)
    assert found == pytest.approx(encoder + decoder + of_parameters + pool, rel=1e-9)


def test_operations_of_dilated_attention_are_those_of_the_bag_s_own_size():
    def attention(rows: int) -> int:
        """Two layers of 256 columns: 4 FLOP forward and 10 backward for each pair that shares a thinned-out segment."""
        pairs = 0.0
        for length, dilation in ((1024, 1), (4096, 4), (16384, 16)):
            for head in range(8):
                for start in range(0, rows, length):
                    pairs += len(range(head % dilation, min(length, rows - start), dilation)) ** 2 / 8
        return round(2 * 14 * 256 * pairs)

    first, second, third = (step_flops("LongNetMIL", rows, 64) - attention(rows) for rows in (700, 1400, 2100))
    assert third - second == second - first > 0


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
    small = ["--models", "MeanMIL", "--sizes", "500", "--width", "8", "--threads", "1"]
    assert main(["bench", "models", *small, "--csv", str(path)]) == 0
    rows = list(csv.DictReader(path.open()))
    assert [(row["dtype"], row["recompute"]) for row in rows] == [
        (dtype, recompute) for dtype in ("float32", "bfloat16") for recompute in ("False", "True")
    ]
    assert "MeanMIL" in capsys.readouterr().out


def test_unknown_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "models", "--models", "MeanMIL,ABMLI"])
    assert "unknown 'ABMLI' (choose from ABMIL, " in capsys.readouterr().err
