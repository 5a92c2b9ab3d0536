"""The Triton kernels' numerics without a GPU: the proof, run in processes of its own under TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Pieces of about the same time, which the workers of the tests share: words in the names of tests, of which each is in
# the first piece that has a word of its name, the last one taking the rest; and the fewest tests that each must find.
PIECES = {
    "masked attention": (("masked_attention", "class_token"), 30),
    "dilated attention, exact smoothing": (("dilated_attention", "smooth_exact"), 15),
    "nystrom, topk": (("nystrom", "topk"), 30),
    "pooling, segments": (("attention_pool", "attention_scores", "segment"), 130),
    "depthwise convolution": (("depthwise_conv",), 30),
    "expected attention": (("expected_attention",), 20),
    "the rest": ((), 70),
}


def expression(piece: str) -> str:
    """What pytest's -k takes for a piece."""
    before, own = [], PIECES[piece][0]
    for words, _ in PIECES.values():
        if words == own:
            break
        before += words
    chosen = [f"({' or '.join(own)})"] if own else []
    return " and ".join(["triton", *chosen, *(f"not {word}" for word in before)])


@pytest.mark.slow
@pytest.mark.parametrize("piece", PIECES)
def test_triton_kernels_pass_interpreted(piece: str) -> None:
    pytest.importorskip("triton")
    # Triton patches its language when it is imported, hence the process.
    command = [sys.executable, "-m", "pytest", "tests/ops", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command += ["-k", expression(piece), "-p", "no:hypothesispytest", "--assert=plain"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed.group(1)) >= PIECES[piece][1], done.stdout[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]
