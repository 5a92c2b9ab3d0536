"""Time and memory of graph building and what an order along Hilbert's curve is worth; no test, prints a table.

    python tests/graphs/measure_graphs.py [side = 1000] [threads = all]

for side**2 lattice points. With one thread it counts CPU seconds, which other work on the machine changes least.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable

import numba
import numpy as np
import torch

from bigbag.adjacency import Adjacency
from bigbag.graphs import (
    add_self_loops,
    build_adjacency,
    infer_stride,
    normalize_adjacency,
    permute,
    space_filling_order,
)


def best_of(run: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of some runs, after one that compiles."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    seconds = []
    for _ in range(times):
        start = clock()
        run()
        seconds.append(clock() - start)
    return min(seconds)


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that numpy holds at once during a run."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@numba.njit(parallel=True, fastmath=True)
def spmm(crow, col, x, out):  # type: ignore[no-untyped-def]
    for i in numba.prange(len(crow) - 1):
        out[i] = 0
        for e in range(crow[i], crow[i + 1]):
            for p in range(x.shape[1]):
                out[i, p] += x[col[e], p]


def measure_building(coords: np.ndarray, name: str) -> None:
    lexsort = best_of(lambda: np.lexsort((coords[:, 1], coords[:, 0])))
    graph = best_of(lambda: build_adjacency(coords, radius=2**0.5))
    adj = build_adjacency(coords, radius=2**0.5)
    output = adj.crow.nbytes + adj.col.nbytes
    peak = peak_bytes(lambda: build_adjacency(coords, radius=2**0.5))
    print(f"{name:>16} {coords.dtype!s:8} lexsort {lexsort:.3f} s, graph {graph:.3f} s ", end="")
    print(f"= {graph / lexsort:.1f} x; peak {peak / 2**20:.0f} MiB = {peak / output:.2f} x the result")


def measure_rest(coords: np.ndarray) -> None:
    adj = build_adjacency(coords, radius=2**0.5)
    order = space_filling_order(coords)
    few = coords[:100_000]
    x = np.random.default_rng(0).random((len(few), 1024)).astype(np.float32)
    steps: dict[str, Callable[[], object]] = {
        "knn=8": lambda: build_adjacency(coords, knn=8),
        "knn=6, union": lambda: build_adjacency(coords, knn=6, symmetrize="union"),
        "add_self_loops": lambda: add_self_loops(adj),
        "normalize symmetric": lambda: normalize_adjacency(adj, "symmetric"),
        "space_filling_order": lambda: space_filling_order(coords),
        "permute": lambda: permute(adj, order),
        "infer_stride": lambda: infer_stride(coords),
    }
    for name, run in steps.items():
        print(f"{name:>24} {best_of(run, 2):.3f} s")
    near = np.argsort(coords[:, 0] * 100_000 + coords[:, 1])[: len(few)]
    for dtype in (np.float32, np.float16):
        features = x.astype(dtype)
        seconds = best_of(lambda features=features: build_adjacency(coords[near], radius=2**0.5, features=features), 1)
        print(f"{'features ' + dtype.__name__:>24} {seconds:.3f} s ({len(few)} x 1024)")


def measure_order(coords: np.ndarray, width: int) -> None:
    x = np.random.default_rng(0).random((len(coords), width)).astype(np.float32)
    out = np.empty_like(x)

    def milliseconds(adj: Adjacency) -> float:
        numba.set_num_threads(torch.get_num_threads())
        return 1e3 * best_of(lambda: spmm(adj.crow.numpy(), adj.col.numpy(), x, out), 3)

    adj = build_adjacency(coords, radius=2**0.5)
    shuffled = milliseconds(adj)
    rows = milliseconds(permute(adj, np.lexsort((coords[:, 1], coords[:, 0]))))
    curve = milliseconds(permute(adj, space_filling_order(coords)))
    print(f"SpMM, width {width:>4}: random order {shuffled:.0f} ms, row by row {rows:.0f}, ", end="")
    print(f"Hilbert {curve:.0f} (random / Hilbert {shuffled / curve:.1f}, row by row / Hilbert {rows / curve:.2f})")


def main() -> None:
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else torch.get_num_threads()
    numba.set_num_threads(threads)
    torch.set_num_threads(threads)  # after Numba, whose first call resets what it shares with torch
    lattice = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2)
    shuffled = lattice[np.random.default_rng(0).permutation(len(lattice))]
    print(f"{len(lattice)} lattice points, 8 neighbours, {torch.get_num_threads()} threads")
    for dtype in (np.int64, np.int32, np.float32):
        measure_building(shuffled.astype(dtype), "random order")
    measure_building(lattice, "row by row")
    measure_rest(shuffled)
    for width in (64, 128, 512):
        measure_order(shuffled, width)


if __name__ == "__main__":
    main()
