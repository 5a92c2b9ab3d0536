"""Compile what the launchers of masked_attention would launch, without a GPU; one JSON line per kernel.

python tests/ops/compile_masked_attention.py 80|90 dtype,... head_dim,... kind,...      (kind "none": no bias)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from compile_gpu import StubDriver, usage


def main(capability: int, dtypes: list[str], dims: list[int], kinds: list[str]) -> None:
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
            row |= {"warps": kernel.metadata.num_warps, **usage(ptx, capability)}
            row["tensor_cores"] = "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else ""
            print(json.dumps(row), flush=True)

        return run

    JITFunction.__getitem__ = compile_instead  # type: ignore[method-assign]
    from bigbag.kernels.gpu import masked_attention

    rows, heads = 300, 4
    offsets, coords = torch.tensor([0, 200, rows]), torch.zeros(rows, 2)
    # kind: columns of the weights, their rows, thresholds, masked, dropout
    cases = {
        "none": (0, 1, [], False, 0.0),
        "distance": (1, 1, [], True, 0.1),
        "product": (50, rows, [0.5, 1.5, 3.6], True, 0.1),
        "radial": (8, 1, [0.5, 1.5, 3.6], False, 0.0),
    }
    for name in dtypes:
        for dim in dims:
            for kind in kinds:
                columns, weight_rows, limits, masked, dropout = cases[kind]
                context.update(dtype=name, dim=dim, kind=kind)
                q = torch.zeros(rows, heads, dim, dtype=getattr(torch, name))
                mask = torch.ones(rows, dtype=torch.bool) if masked else None
                bias = (coords, coords, torch.zeros(weight_rows, heads, columns), kind, limits)
                args = (q, q, q, offsets, offsets, mask, *(bias if columns else (None, None, None, "", [])))
                args += (dropout, 7, 0.125)
                out, lse = masked_attention.forward(*args)
                masked_attention.backward(out, out, lse, *args, columns > 0)


if __name__ == "__main__":
    names, widths, biases = (argument.split(",") for argument in sys.argv[2:5])
    main(int(sys.argv[1]), names, [int(width) for width in widths], biases)
