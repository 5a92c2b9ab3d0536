"""Compile what the launchers of ``kernels/gpu`` would launch, without a GPU; one JSON line per kernel.

    python tests/kernels/compile_gpu.py 80|90 [dtype ...]

A stub driver names the target. Every ``kernel[grid](...)`` becomes ``kernel.warmup(...)``, so the launchers themselves
supply the exact signatures, specialisations and tiles; what they return is garbage.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
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


def usage(ptx: str, capability: int) -> dict[str, int]:
    """Registers and spilled bytes, from ptxas."""
    ptxas = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(ptxas), "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    patterns = {"registers": r"Used (\d+) registers", "spill_bytes": r"(\d+) bytes spill stores"}
    found = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    return {name: int(match.group(1)) for name, match in found.items() if match is not None}


def main(capability: int, dtypes: list[str]) -> None:
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
            row |= usage(ptx, capability)
            row["tensor_cores"] = "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else ""
            print(json.dumps(row), flush=True)

        return run

    JITFunction.__getitem__ = compile_instead  # type: ignore[method-assign]
    from bigbag.kernels.gpu import attention_pool, segments

    offsets = torch.tensor([0, 1000, 1040])
    heads = 2
    for name in dtypes:
        dtype = getattr(torch, name)
        # The width of common encoders, and one that is a multiple of nothing.
        for width, dim in ((1024, 128), (1023, 100)):
            x = torch.randn(1040, width).to(dtype)
            for act, gated, keep in (("tanh", True, False), ("gelu", True, True), ("relu", False, False)):
                context = {"dtype": name, "width": width, "act": act, "gated": gated, "keep": keep}
                total = dim * (1 + gated)
                weight, bias, w2 = torch.randn(total, width).to(dtype), torch.zeros(total), torch.zeros(heads, dim)
                *_, a, kept = attention_pool.forward(x, offsets, weight, bias, w2, act, gated, keep)
                grad_z = torch.zeros(2, heads, width)
                attention_pool.backward(grad_z, None, x, offsets, weight, bias, w2, a, kept, act, gated, False)
            context = {"dtype": name, "width": width}
            segments.sum_rows(x, offsets)
            segments.max_rows(x, offsets)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] or ["bfloat16", "float16", "float32"])
