"""Compile the Triton kernels of ``kernels/gpu/spmm.py`` as their launchers call them; one JSON line per kernel.

    python tests/ops/compile_graphs.py 80|90 [dtype ...]

A stub driver names the target, so no GPU is needed; what the launchers return is garbage.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction


def main(capability: int, dtypes: list[str]) -> None:
    path = Path(__file__).parents[1] / "kernels" / "compile_gpu.py"
    spec = importlib.util.spec_from_file_location("compile_gpu", path)
    assert spec is not None and spec.loader is not None
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    driver.set_active(tools.StubDriver(capability))

    def compile_instead(self: JITFunction, grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            kernel = self.warmup(*args, grid=grid, **kwargs)
            row = {"kernel": self.__name__, "sm": capability, "dtype": name, "width": width}
            row |= {"shared_bytes": kernel.metadata.shared, **tools.usage(kernel.asm["ptx"], capability)}
            print(json.dumps(row), flush=True)

        return run

    JITFunction.__getitem__ = compile_instead  # type: ignore[method-assign]
    from bigbag.kernels.gpu import spmm

    num_rows, num_edges = 1040, 5000
    crow, col = torch.zeros(num_rows + 1, dtype=torch.int64), torch.zeros(num_edges, dtype=torch.int32)
    crow[-1] = num_edges
    scalar, per_row = torch.ones(1), torch.ones(num_rows)
    for name in dtypes:
        # A common width, and one that is a multiple of nothing.
        for width in (512, 99):
            x = torch.randn(num_rows, width).to(getattr(torch, name))
            spmm.spmm(crow, col, None, x)
            spmm.spmm(crow, col, torch.ones(num_edges, 1), x, scalar, None, x, scalar)
            spmm.spmm(crow, col, torch.ones(num_edges, 3), x[:, :99], per_row, per_row, x[:, :99], scalar)
            for step in (1, 2):
                spmm.power_step(crow, col, None, x, x, torch.ones(4), step, x, x)
            spmm.edge_dots(crow, col, x, x, 1)
            spmm.edge_distances(crow, col, x)
    width = 4
    spmm.edge_softmax(crow, torch.ones(num_edges, 4))
    spmm.edge_softmax_backward(crow, torch.ones(num_edges, 4), torch.ones(num_edges, 4))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] or ["bfloat16", "float16", "float32"])
