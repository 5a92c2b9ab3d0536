"""Bytes and milliseconds of a graph stored with a bag against one rebuilt at every reading.

python tests/data/measure_graph.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import numpy as np

from bigbag import Bag
from bigbag.config import GraphConfig
from bigbag.data import open_store, pack
from bigbag.data.graph import with_graph
from bigbag.data.sources import MemorySource


def best_ms(function: Callable[..., object], *arguments: object, repeats: int = 7) -> float:
    function(*arguments)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    for side in (100, 316):
        rng = np.random.default_rng(0)
        cells = np.sort(rng.permutation(side**2)[: int(0.8 * side**2)])
        coords = np.stack(np.divmod(cells, side), 1).astype(np.int32)
        bag = Bag(rng.normal(size=(len(coords), 1024)).astype(np.float16), 1, "slide", coords)
        for graph in (None, GraphConfig(), GraphConfig(features=True)):
            line = f"{len(coords):7d} instances, features={graph and graph.features}: "
            if graph is not None:
                line += f"build {best_ms(with_graph, bag, graph.model_dump(), 'slide'):.2f} ms, "
            with tempfile.TemporaryDirectory() as folder:
                pack(MemorySource([bag], ["train"]), folder, graph=graph, progress=False)
                store = open_store(folder)
                num_bytes = store.manifest.shards[0].bytes / len(coords)
                print(f"{line}read {best_ms(store.read, 0):.2f} ms, {num_bytes:.0f} bytes an instance")


if __name__ == "__main__":
    main()
