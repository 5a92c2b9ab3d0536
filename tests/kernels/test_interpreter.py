"""The Triton kernels' numerics without a GPU: the proof, run in processes of its own under TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Two halves, so that two workers of the tests share them; and the fewest tests that each must find.
HALVES = {
    "proof of segments and graphs": (["test_proof.py"], "not attention", 110),
    "proof of attention, and the rest": (["."], "attention or not test_proof", 110),
}


@pytest.mark.slow
@pytest.mark.parametrize("half", HALVES)
def test_triton_kernels_pass_interpreted(half: str) -> None:
    pytest.importorskip("triton")
    files, which, at_least = HALVES[half]
    # Triton patches its language when it is imported, hence the process.
    command = [sys.executable, "-m", "pytest", *(f"tests/ops/{name}" for name in files), "-q", "-n", "0"]
    command += ["-p", "no:cacheprovider", "-k", f"triton and ({which})"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed.group(1)) >= at_least, done.stdout[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]
