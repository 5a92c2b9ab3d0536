"""Compile what the launchers of ``kernels/gpu`` would launch, without a GPU; one JSON line per kernel.

    python tests/kernels/compile_gpu.py 80|90 [dtype,... [kernel file,...]]

A stub driver names the target. Every ``kernel[grid](...)`` becomes ``kernel.warmup(...)``, so the launchers themselves
supply the exact signatures, specialisations and tiles; what they return is garbage.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class StubDriver(DriverBase):
    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "void*"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing runs here")


def usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes that it keeps on its stack: what registers spilled."""
    reader = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(reader), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    patterns = {"registers": r"REG:(\d+)", "spill_bytes": r"STACK:(\d+)"}
    return {name: int(re.findall(pattern, text)[0]) for name, pattern in patterns.items()}


def attention_pool_cases(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    from bigbag.kernels.gpu import attention_pool

    offsets = torch.tensor([0, 40000])
    # The width of common encoders, and one that is a multiple of nothing.
    for width, dim, large in ((1024, 128, False), (1024, 128, True), (1023, 100, False)):
        x = torch.empty(40000, width, dtype=dtype)
        attention_pool.LARGE_ROWS = 0 if large else 1 << 30
        for act, gated, keep, heads in (("tanh", True, False, 1), ("gelu", True, True, 2), ("relu", False, False, 2)):
            yield {"width": width, "act": act, "gated": gated, "keep": keep, "heads": heads, "large": large}
            total = dim * (1 + gated)
            weight, bias, w2 = torch.empty(total, width, dtype=dtype), torch.zeros(total), torch.zeros(heads, dim)
            factors = torch.ones(40000, heads) if act == "gelu" else None
            z, scores, *saved = attention_pool.forward(x, offsets, weight, bias, w2, factors, act, gated, keep)
            args = (x, offsets, weight, bias, w2, z, *saved, factors, act, gated, True)
            attention_pool.backward(z, scores, *args)


def attention_scores_cases(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    from bigbag.kernels.gpu import attention_scores

    for dim in (128, 100):
        for act, gated in (("tanh", True), ("gelu", True), ("relu", False)):
            yield {"dim": dim, "act": act, "gated": gated}
            total = dim * (1 + gated)
            args = (torch.randn(1040, total).to(dtype), torch.zeros(total), torch.zeros(2, dim), act, gated)
            attention_scores.backward(attention_scores.forward(*args), *args)


def segments_cases(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    from bigbag.kernels.gpu import segments

    offsets = torch.tensor([0, 1000, 1040])
    for width in (1024, 1023):
        yield {"width": width}
        x = torch.randn(1040, width).to(dtype)
        segments.sum_rows(x, offsets)
        segments.max_rows(x, offsets)
        segments.softmax(torch.zeros(1040, 2), offsets)


def topk_cases(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    from bigbag.kernels.gpu import topk

    offsets = torch.tensor([0, 1000, 1040])
    yield {"columns": 3}
    topk.topk(torch.randn(1040, 3).to(dtype), offsets, 8, True)
    for columns, width in ((64, 1024), (1000, 5)):
        yield {"columns": columns, "width": width}
        weights, x = torch.randn(1040, columns).to(dtype), torch.randn(1040, width).to(dtype)
        topk.pool(weights, x, offsets)
        topk.pool_backward(torch.zeros(2, columns, width), weights, x, offsets, True, True)


def gaussian_cases(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    from bigbag.kernels.gpu import gaussian

    offsets, keys, mu = torch.tensor([0, 1000, 1040]), torch.zeros(1040, dtype=torch.int64), torch.zeros(1040)
    for columns, num_samples in ((1, 1000), (40, 33)):
        yield {"columns": columns, "samples": num_samples}
        values = torch.zeros(1040, columns, dtype=dtype)
        sums = gaussian.pool(mu, mu, values, offsets, keys, num_samples, 20.0)
        gaussian.pool_backward(sums, mu, mu, values, offsets, keys, 20.0)
        gaussian.draw(keys, num_samples)


def gaussian_mean_cases(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    from bigbag.kernels.gpu import gaussian_mean

    yield {"nodes": 41, "levels": 236}
    mu, nodes, products = torch.zeros(1040), torch.zeros(2, 41), torch.zeros(2, 236)
    args = (mu, mu, torch.tensor([0, 1000, 1040]), torch.ones(2), nodes, 20.0)
    gaussian_mean.log_products(*args, 236)
    gaussian_mean.means(*args, products)
    gaussian_mean.gradients(*args, gaussian_mean.sums(*args, products, mu), mu)


def spmm_cases(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    from bigbag.kernels.gpu import spmm

    num_rows, num_edges = 1040, 5000
    crow, col = torch.zeros(num_rows + 1, dtype=torch.int64), torch.zeros(num_edges, dtype=torch.int32)
    crow[-1] = num_edges
    scalar, per_row = torch.ones(1), torch.ones(num_rows)
    for width in (512, 99):
        yield {"width": width}
        x = torch.randn(num_rows, width).to(dtype)
        spmm.spmm(crow, col, None, x)
        spmm.spmm(crow, col, torch.ones(num_edges, 1), x, scalar, None, x, scalar)
        spmm.spmm(crow, col, torch.ones(num_edges, 3), x[:, :99], per_row, per_row, x[:, :99], scalar)
        spmm.edge_dots(crow, col, x, x, 1)
        spmm.edge_distances(crow, col, x)
    yield {"heads": 4}
    edges = torch.ones(num_edges, 4)
    spmm.edge_softmax(crow, edges)
    spmm.edge_softmax_backward(crow, edges, edges)


def masked_attention_cases(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    from bigbag.kernels.gpu import masked_attention

    rows, heads = 300, 4
    offsets, coords = torch.tensor([0, 200, rows]), torch.zeros(rows, 2)
    mask = torch.ones(rows, dtype=torch.bool)
    # kind: columns of the weights, their rows, thresholds, mask, dropout
    biases = {
        "none": (0, 1, [], None, 0.0),
        "distance": (1, 1, [], mask, 0.1),
        "product": (50, rows, [0.5, 1.5, 3.6], mask, 0.1),
        "radial": (8, 1, [0.5, 1.5, 3.6], None, 0.0),
    }
    half = dtype != torch.float32
    for dim, kinds in ((64, biases if half else ("none",)), (128, ("none",) if half else ())):
        for kind in kinds:
            yield {"dim": dim, "kind": kind}
            columns, weight_rows, limits, kept, dropout = biases[kind]
            q = torch.zeros(rows, heads, dim, dtype=dtype)
            bias = (coords, coords, torch.zeros(weight_rows, heads, columns), kind, limits)
            args = (q, q, q, offsets, offsets, kept, *(bias if columns else (None, None, None, "", [])))
            args += (dropout, 7, 0.125)
            out, lse = masked_attention.forward(*args)
            masked_attention.backward(out, out, lse, *args, columns > 0)


def nystrom_cases(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    from bigbag.kernels.gpu import nystrom

    rows, heads, landmarks = 1040, 8, 256
    cut = (torch.tensor([0, 1000, rows]), torch.tensor([256, 40]))
    # TransMIL's heads, and a width that is a multiple of nothing.
    for dim in (64, 19):
        yield {"dim": dim, "landmarks": landmarks}
        q, marks = torch.zeros(rows, heads, dim, dtype=dtype), torch.zeros(2, heads, landmarks, dim)
        out, norms = nystrom.spread(q, marks, marks, *cut)
        nystrom.spread_backward(out, q, marks, marks, norms, *cut)
        y, norms = nystrom.gather(marks, q, q, *cut)
        nystrom.gather_backward(y, marks, q, q, y, norms, *cut)
        nystrom.weigh(marks, q, norms, torch.zeros(2, heads, landmarks), *cut)


def depthwise_conv_cases(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    from bigbag.kernels.gpu import depthwise_conv

    cut = (torch.tensor([0, 1000, 1040]), torch.tensor([25, 0]))
    # TransMIL's positions and residual, and a width that is a multiple of nothing.
    for kernel, channels in (((7, 7), 512), ((33, 1), 512), ((5, 5), 99)):
        yield {"kernel size": kernel, "channels": channels}
        x, taps = torch.zeros(1040, channels, dtype=dtype), torch.zeros(*kernel, channels)
        depthwise_conv.backward(depthwise_conv.forward(x, taps, taps[0, 0], *cut), x, taps, *cut, True, True)


CASES = {
    "attention_pool": attention_pool_cases,
    "attention_scores": attention_scores_cases,
    "depthwise_conv": depthwise_conv_cases,
    "gaussian": gaussian_cases,
    "gaussian_mean": gaussian_mean_cases,
    "masked_attention": masked_attention_cases,
    "nystrom": nystrom_cases,
    "segments": segments_cases,
    "spmm": spmm_cases,
    "topk": topk_cases,
}
"""Kernel file -> what its launchers are called with. A case says what is special about it before it launches."""


def main(capability: int, dtypes: list[str], files: list[str]) -> None:
    driver.set_active(StubDriver(capability))
    seen = set()
    context: dict[str, Any] = {}

    def compile_instead(self: JITFunction, grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            kernel = self.warmup(*args, grid=grid, **kwargs)
            if kernel.hash in seen:
                return
            seen.add(kernel.hash)
            ptx = kernel.asm["ptx"]
            row = {"kernel": self.__name__, "sm": capability, **context, "shared_bytes": kernel.metadata.shared}
            row |= {"warps": kernel.metadata.num_warps, "cubin_bytes": len(kernel.asm["cubin"])}
            row |= usage(kernel.asm["cubin"])
            row["tensor_cores"] = "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else ""
            print(json.dumps(row), flush=True)

        return run

    JITFunction.__getitem__ = compile_instead  # type: ignore[method-assign]
    for file in files:
        for dtype in dtypes:
            for special in CASES[file](getattr(torch, dtype)):
                context = {"file": file, "dtype": dtype, **special}


if __name__ == "__main__":
    names = sys.argv[2].split(",") if len(sys.argv) > 2 else ["bfloat16", "float16", "float32"]
    main(int(sys.argv[1]), names, sys.argv[3].split(",") if len(sys.argv) > 3 else list(CASES))
