"""The benchmark measures what it says, and gives no ratio where the proof fails."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from bigbag import bench
from bigbag.ops import segments


def test_writes_a_row_for_every_contender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.csv"
    arguments = ["ops", "--op", "segment_sum", "--sizes", "50,800", "--rounds", "2", "--device", "cpu"]
    arguments += ["--csv", str(path)]
    assert bench.main(arguments) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["contender"], row["instances"]) for row in rows]
    assert found == [("eager", "50"), ("cpu", "50"), ("eager", "800"), ("cpu", "800")]
    assert rows[0]["ratio_to_eager"] == "1.00" and all(float(row["median_ms"]) > 0 for row in rows)
    # Forward and backward hold at least the gradient of x.
    assert float(rows[3]["extra_mib"]) * 2**20 >= 800 * bench.SEGMENT_WIDTH * 4 * 0.8
    assert "segment_sum" in capsys.readouterr().out


def test_gives_no_ratio_for_an_implementation_that_fails_its_proof(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = segments._OPS["sum", "cpu"]
    monkeypatch.setitem(segments._OPS, ("sum", "cpu"), lambda x, offsets: right(x, offsets) * 1.01)
    arguments = ["ops", "--op", "segment_sum", "--sizes", "50", "--rounds", "1", "--device", "cpu"]
    assert bench.main(arguments) == 1
    output = capsys.readouterr()
    assert "proof failed" in output.out and "errs by" in output.err


def test_peak_extra_bytes_counts_what_lives_at_once() -> None:
    def step() -> None:
        for _ in range(3):
            torch.empty(1 << 18)

    assert bench.peak_extra_bytes(step, "cpu") == 4 << 18


def test_eager_baselines_compute_the_same_thing() -> None:
    from bigbag import Segments, ops

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 7, generator=generator)
    cut = Segments.from_sizes((20, 40))
    for op in ("segment_sum", "segment_mean", "segment_max", "segment_softmax"):
        torch.testing.assert_close(bench._eager_segments(op, x, cut), getattr(ops, op)(x, cut, impl="reference"))
    w1, wg = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    b1, bg, w2 = torch.randn(5, generator=generator), torch.randn(5, generator=generator), torch.ones(1, 5)
    z, _ = ops.attention_pool(x, Segments.from_sizes((60,)), w1, b1, w2, wg, bg, impl="reference")
    torch.testing.assert_close(bench._eager_pool(x[None], w1, b1, w2, wg, bg), z[:, 0])
