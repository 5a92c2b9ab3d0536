"""A large bag trains in little memory beyond itself."""

import json
import os
import re
import subprocess
import sys

import pytest

INSTANCES, WIDTH = 80_000, 1024
SCRIPT = """
import re, sys, json, threading, time
import numpy as np
from bigbag import Bag
from bigbag.config import build_config
from bigbag.data import open_store, pack
from bigbag.data.sources.base import SourceEntry
from bigbag.engine.run import train
from bigbag.engine.world import World

out, model, instances, width = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
data = json.loads(sys.argv[5])

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1))

class Source:
    patch_shape = None
    sizes = {"small": 50, "other": 60, "large": instances}
    def entries(self):
        return [SourceEntry(name, "train", int(name != "other")) for name in self.sizes]
    def load(self, entry):
        x = np.random.default_rng(0).integers(-99, 99, (self.sizes[entry.name], width), dtype=np.int8)
        return Bag(x.astype(np.float16), entry.label, entry.name)
    def description(self):
        return {}

def run(name, shards):
    feed = {"shards": shards, "num_workers": 0, **data}
    config = build_config({"name": name, "out": out, "data": feed, "model": model,
                           "train": {"epochs": 1, "batch_bags": 1}})
    train(config, world=World())

pack(Source(), out + "/large", progress=False)
Source.sizes = {"small": 50, "other": 60}
pack(Source(), out + "/small", progress=False)
run("first", out + "/small")  # imports, thread pools, compiled kernels
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
run("second", out + "/large")
done = True
watcher.join()
print("GREW", peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    "model, allowed_bytes_per_instance",
    [
        # Pre-activations of both branches, in fp32, recomputed when a pack is large: scores and little else.
        ({"name": "ABMIL", "gated": True}, 64),
        # Outputs of the projection, their copy end to end, and their gradient.
        ({"name": "ABMIL", "gated": True, "feat_ext": {"name": "MLP", "linear_sizes": [128], "activations": ["relu"]}},
         4 * 128 * 4),
    ],
    ids=["raw features", "trainable projection"],
)  # fmt: skip
def test_memory_beyond_the_bag(tmp_path, model, allowed_bytes_per_instance):
    grew = growth(tmp_path, model, INSTANCES, {})
    bag = INSTANCES * WIDTH * 2
    fixed = 150 * 2**20  # chunks under way, twice in fp32, and the allocator's slack; independent of the bag
    print(f"anonymous memory grew by {grew / 2**20:.0f} MiB, the bag is {bag / 2**20:.0f} MiB")
    assert grew < bag + fixed + allowed_bytes_per_instance * INSTANCES


def growth(folder, model, instances: int, data: dict) -> int:
    """Most anonymous memory of a run on a set with a bag of so many instances, beyond that of a run on small ones."""
    arguments = [str(folder), json.dumps(model), str(instances), str(WIDTH), json.dumps(data)]
    # Freed tensors go back to the kernel at once: the peak is then that of live ones, not the allocator's history.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"GREW (\d+)", done.stdout).group(1))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("linear_sizes", [None, [128]], ids=["raw features", "trainable projection"])
def test_a_bag_over_the_budget_stays_in_its_shard(tmp_path, linear_sizes):
    """Memory is that of chunks: four times the instances take a few numbers more for each, and no features."""
    model = {"name": "ABMIL", "gated": True}
    if linear_sizes is not None:
        model["feat_ext"] = {"name": "MLP", "linear_sizes": linear_sizes, "activations": ["relu"]}
    grew = []
    for instances in (INSTANCES // 2, 2 * INSTANCES):
        folder = tmp_path / str(instances)
        folder.mkdir()
        grew.append(growth(folder, model, instances, {"budget_bytes": 8 * 2**20}))
    print(f"anonymous memory grew by {grew[0] / 2**20:.0f} and {grew[1] / 2**20:.0f} MiB")
    # Scores, their weights and gradients, in fp32: of 2048 bytes of features.
    assert grew[1] - grew[0] < 1.5 * INSTANCES * 64
    assert grew[1] < 2 * INSTANCES * WIDTH * 2 / 4
