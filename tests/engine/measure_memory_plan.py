"""The predicted and the measured peak of a run, both in MiB: planned for 50 epochs, as runs have, of which one runs.

    python -m tests.engine.measure_memory_plan FOLDER '{"name": "PatchGCN"}' 60000,3000,20000,30000 [WIDTH]

The sizes are those of the bags, in fp16 on a lattice; the last one validates.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np

from bigbag import Bag
from bigbag.config import Config, build_config
from bigbag.data import pack
from bigbag.data.sources.base import SourceEntry
from bigbag.engine.memory_plan import MemoryPlan, plan_memory
from bigbag.engine.run import train
from bigbag.engine.world import World
from bigbag.memory import use_one_heap

_EPOCHS = 50


class Lattices:
    patch_shape = None

    def __init__(self, sizes: list[int], width: int) -> None:
        self.sizes, self.width = sizes, width

    def entries(self) -> list[SourceEntry]:
        last = len(self.sizes) - 1
        return [SourceEntry(str(i), "val" if i == last else "train", i % 2) for i in range(len(self.sizes))]

    def load(self, entry: SourceEntry) -> Bag:
        size = self.sizes[int(entry.name)]
        x = np.random.default_rng(0).integers(-99, 99, (size, self.width), dtype=np.int8)
        side = int(size**0.5) + 1
        coords = np.stack(np.divmod(np.arange(size), side), 1)
        return Bag(x.astype(np.float16) / np.float16(50), entry.label, entry.name, coords=coords)

    def description(self) -> dict:
        return {}


def planned_for_all(config: Config, *others: object) -> MemoryPlan:
    """The plan of the whole run: the longer it takes, the further its steps are measured."""
    train = config.train.model_copy(update={"epochs": _EPOCHS})
    return plan_memory(config.model_copy(update={"train": train}), *others)


def main(folder: str, model: str, sizes: str, width: str = "512") -> None:
    use_one_heap()
    data = {"shards": f"{folder}/shards", "graph": {}}
    run = {"epochs": 1, "batch_bags": 1, "monitor": "loss"}
    config = build_config({"name": "run", "out": folder, "data": data, "model": json.loads(model), "train": run})
    source = Lattices([int(size) for size in sizes.split(",")], int(width))
    pack(source, data["shards"], progress=False, graph=config.data.graph)
    with mock.patch("bigbag.engine.run.plan_memory", planned_for_all):
        train(config, world=World())
    memory = json.loads(Path(folder, "run", "environment.json").read_text())["memory"]
    told, measured = memory["peak_bytes"], memory["measured_peak_bytes"]
    parts = {name[:-6]: value >> 20 for name, value in memory.items() if name.endswith("bytes") and value is not None}
    print(f"{config.model.name}: predicted / measured = {told / measured:.2f}  {parts}")


if __name__ == "__main__":
    main(*sys.argv[1:])
