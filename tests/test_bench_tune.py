"""Candidate tiles reach the launcher, are compared with what it computes, and only where they are meant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigbag.bench import tune
from bigbag.bench.cases import MEASURED

ROOT = Path(__file__).parents[1]


def test_candidates_are_of_operators_that_are_measured() -> None:
    pytest.importorskip("triton")
    assert {op for op, _ in tune.CANDIDATES} <= set(MEASURED)
    for candidate in (c for listed in tune.CANDIDATES.values() for c in listed):
        with tune.applied(candidate):  # finds the launcher's function
            pass
    names = [str(candidate) for candidate in tune.CANDIDATES["attention_pool", "bfloat16"]]
    assert len(set(names)) == len(names)


def test_settings_replace_those_of_the_calls_that_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from bigbag.kernels.gpu import nystrom

    monkeypatch.setattr(nystrom, "_options", lambda *_, owner: {"BLOCK_T": 32, "BLOCK_M": 32})
    with tune.applied(tune.Candidate("nystrom._options", {"BLOCK_T": 128}, {"owner": "rows"})):
        assert nystrom._options(owner="rows") == {"BLOCK_T": 128, "BLOCK_M": 32}
        assert nystrom._options(owner="landmarks") == {"BLOCK_T": 32, "BLOCK_M": 32}
    assert nystrom._options(owner="rows") == {"BLOCK_T": 32, "BLOCK_M": 32}


_TUNE = """
import sys
from bigbag.bench import tune
from bigbag.cli import main
from bigbag.kernels.gpu import spmm

cdiv = spmm.triton.cdiv
spmm.triton.cdiv = lambda total, block: cdiv(total, block) - (block == 8)  # with 8 rows, the last of them are left out
tiles = tune._tiles("R C", (16, 16), (3, 16), (8, 16))
tune.CANDIDATES["spmm", "float32"] = tune._candidates("spmm._tiles", tiles)
options = ["--op", "spmm", "--size", "60", "--width", "16", "--device", "cpu", "--dtype", "float32", "--rounds", "1"]
sys.exit(main(["bench", "tune", *options]))
"""


def test_a_candidate_that_computes_something_else_is_named() -> None:
    """Interpreted: of three candidates one is sound, one is no power of two, and one leaves out rows."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _TUNE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    (sound,) = [line for line in done.stdout.splitlines() if "R 16, C 16" in line]
    (refused,) = [line for line in done.stdout.splitlines() if "R 3, C 16" in line]
    (wrong,) = [line for line in done.stdout.splitlines() if "R 8, C 16" in line]
    assert sound.endswith("R 16, C 16") and "failed" in refused and "differs by" in wrong
