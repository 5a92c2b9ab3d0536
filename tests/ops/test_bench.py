"""The benchmark measures what it says, and gives no ratio where the proof fails."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from bigbag import bench, ops
from bigbag.bench import measure
from bigbag.bench.cases import make_case
from bigbag.cli import main
from bigbag.memory import peak_bytes
from bigbag.ops import segments

SUM = ["bench", "ops", "--op", "segment_sum", "--rounds", "1", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="module")
def machine_measured_once() -> Iterator[None]:
    """16-bit products take a machine without instructions for them seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "copy_bandwidth", cache(bench.copy_bandwidth))
        patch.setattr(measure, "gemm_rate", cache(measure.gemm_rate))
        yield


def test_writes_a_row_for_every_contender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "out.csv", tmp_path / "out.png"
    arguments = [*SUM, "--sizes", "50,800", "--widths", "64", "--rounds", "2"]
    assert main([*arguments, "--csv", str(path), "--plot", str(picture)]) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["contender"], row["dtype"], row["instances"]) for row in rows]
    ours = ("index_add, scatter_reduce", "float32"), ("cpu", "float32"), ("cpu", "bfloat16")
    assert found == [(*contender, size) for size in ("50", "800") for contender in ours]
    assert rows[0]["ratio"] == "1.00" and all(float(row["median_ms"]) > 0 for row in rows)
    # Forward and backward hold at least the gradient of x.
    assert float(rows[4]["extra_mib"]) * 2**20 >= 800 * 64 * 4 * 0.8
    assert "segment_sum" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_precision_alone_beside_the_same_baseline(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    arguments = [*SUM, "--sizes", "50", "--dtypes", dtype]
    assert main([*arguments, "--csv", str(path)]) == 0
    with path.open() as file:
        found = [(row["contender"], row["dtype"]) for row in csv.DictReader(file)]
    assert found == [("index_add, scatter_reduce", "float32"), ("cpu", dtype)]


def test_leaves_out_what_takes_quadratic_time(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "ops", "--op", "masked_attention", "--sizes", "1000000", "--rounds", "1", "--device", "cpu"]
    assert main(arguments) == 0
    assert "left out" in capsys.readouterr().err


def test_gives_no_ratio_for_an_implementation_that_fails_its_proof(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = segments._OPS["sum", "cpu"]
    monkeypatch.setitem(segments._OPS, ("sum", "cpu"), lambda x, offsets: right(x, offsets) * 1.01)
    arguments = [*SUM, "--sizes", "50"]
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert "proof failed" in output.out and "errs by" in output.err


def test_peak_bytes_counts_what_lives_at_once() -> None:
    def step() -> None:
        for _ in range(3):
            torch.empty(1 << 18)

    assert peak_bytes(step) == 4 << 18


def test_every_operator_is_measured() -> None:
    assert {op.name for op in ops._OPERATORS} < set(bench.cases.MEASURED)


def test_what_has_no_samples_is_compared_with_its_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(bench.proof("chebyshev_conv", "cpu", dtype, "cpu") is None for dtype in (torch.float32, torch.bfloat16))
    right = bench.cases.ops.chebyshev_conv
    monkeypatch.setattr(bench.cases.ops, "chebyshev_conv", lambda *args, **options: right(*args, **options) * 1.01)
    assert "errs by" in str(bench.proof("chebyshev_conv", "cpu", torch.float32, "cpu"))


@pytest.mark.parametrize("op", bench.cases.MEASURED)
def test_baselines_compute_the_same_thing(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.cases, "LANDMARKS", 8)
    case = make_case(op, 64, 16, "cpu")
    leaves = {name: value.clone().requires_grad_() for name, value in case.leaves.items()}
    expected = case.baseline[1](leaves)
    incoming = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, list(leaves.values()), incoming)
    for function in case.ours.values():
        found = function(leaves, "reference")
        torch.testing.assert_close(found.view(expected.shape), expected, rtol=1e-4, atol=1e-4)
        grads = torch.autograd.grad(found, list(leaves.values()), incoming.view(found.shape))
        for grad, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-3 * max(1.0, float(other.abs().max())))


def test_what_memory_does_not_suffice_for_is_left_out_aloud(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its baseline there is no ratio."""

    def refuse(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory for this")

    monkeypatch.setattr(bench.cases.baselines, "segment", refuse)
    path = tmp_path / "out.csv"
    arguments = [*SUM, "--sizes", "50", "--csv", str(path)]
    assert main(arguments) == 0
    said = "segment_sum, 50 instances, index_add, scatter_reduce, torch.float32: no memory for this"
    assert said in capsys.readouterr().err
    with path.open() as file:
        found = [(row["contender"], row["dtype"], row["ratio"]) for row in csv.DictReader(file)]
    assert found == [("cpu", "float32", ""), ("cpu", "bfloat16", "")]
