"""Every Triton kernel compiles for A100 and H100 as its launcher calls it: no spills, shared memory that fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_LIMIT_BYTES = {80: 166912, 90: 232448}
SCRIPT = Path(__file__).with_name("compile_gpu.py")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spills(capability: int, record_property: pytest.RecordProperty) -> None:
    pytest.importorskip("triton.backends.nvidia")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # A cache of its own would compile everything anew in every run; Triton's own cache is keyed by the source.
    command = [sys.executable, str(SCRIPT), str(capability), "bfloat16", "float32"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        record_property("kernel", json.dumps(row))
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED_LIMIT_BYTES[capability], row
    kernels = {row["kernel"] for row in rows}
    assert kernels == {"_scores", "_grad_projection", "_sum_splits", "_combine_sums", "_max_splits", "_row_dots"}
    projections = [r for r in rows if r["kernel"] == "_scores" and r["dtype"] == "bfloat16"]
    assert projections and all(r["tensor_cores"] for r in projections), projections
