"""Every Triton kernel compiles for A100 and H100 as its launcher calls it: no spills, shared memory that fits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SHARED_LIMIT_BYTES = {80: 166912, 90: 232448}
SCRIPT = Path(__file__).with_name("compile_gpu.py")
KERNELS = {
    "attention_pool": {"_attend", "_combine", "_weigh", "_grad_projection", "_grad_rows"},
    "attention_scores": {"_score_rows", "_differentiate_rows"},
    "depthwise_conv": {"_convolve", "_grad_taps"},
    "gaussian": {"_draw", "_pool_draws", "_pool_draws_backward"},
    "gaussian_mean": {"_log_products", "_means", "_sums", "_gradients"},
    "masked_attention": {"_forward", "_grad_q", "_grad_kv"},
    "nystrom": {"_spread", "_gather", "_row_grads", "_landmark_grads"},
    "segments": {"_sum_splits", "_combine_sums", "_max_splits"},
    "spmm": {"_spmm", "_edge_dots", "_edge_softmax", "_edge_softmax_backward"},
    "topk": {"_threshold", "_collect", "_pool", "_pool_rows"},
}
# Products of matrices, which must not fall back to plain multiplications in 16 bits.
PRODUCTS = {"_attend", "_grad_rows", "_forward", "_grad_q", "_grad_kv", "_spread", "_gather", "_pool"}


def test_every_kernel_that_is_launched_is_compiled() -> None:
    files = {path.stem: path.read_text() for path in (SCRIPT.parents[2] / "kernels" / "gpu").glob("*.py")}
    launched = {name: set(re.findall(r"\b(_\w+)\[", text)) for name, text in files.items()}
    defined = {name: set(re.findall(r"@triton\.jit.*\ndef (\w+)", text)) for name, text in files.items()}
    assert {name: found & defined[name] for name, found in launched.items()} == KERNELS
    # What is not launched is part of a kernel that is, in its file or in another.
    every = "".join(files.values())
    for name in files:
        assert all(len(re.findall(rf"\b{helper}\(", every)) > 1 for helper in defined[name] - KERNELS[name])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "files",
    [
        ("attention_pool", "attention_scores", "gaussian_mean", "masked_attention", "segments"),
        ("depthwise_conv", "gaussian", "nystrom", "spmm", "topk"),
    ],
)
def test_kernels_compile_without_spills(
    files: tuple[str, ...], capability: int, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("triton.backends.nvidia")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(SCRIPT.parents[2])}
    # A cache of its own would compile everything anew in every run; Triton's own cache is keyed by the source.
    command = [sys.executable, str(SCRIPT), str(capability), "bfloat16,float32", ",".join(files)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        record_property("kernel", json.dumps(row))
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED_LIMIT_BYTES[capability], row
        if row["kernel"] in PRODUCTS and row["dtype"] == "bfloat16":
            assert row["tensor_cores"], row
    assert {row["kernel"] for row in rows} >= set().union(*(KERNELS[file] for file in files))
