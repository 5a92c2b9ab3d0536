"""Anonymous memory of packing and of training on one bag larger than it: the figures of README.

    python -m tests.engine.measure_out_of_core FOLDER INSTANCES [launch/train.py settings]

FOLDER gets a packed set of 2 KiB for each instance, and is left there. The source is a sparse file.
"""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import yaml

from bigbag import Bag
from bigbag.data import pack
from bigbag.data.sources.base import SourceEntry

ROOT, WIDTH, EVERY = Path(__file__).parents[2], 1024, 64


def anonymous_mib(process: str = "self") -> float:
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(found.group(1)) / 1024 if found else 0.0


class SparseFile:
    """A large bag of zeros but for one random row in ``EVERY``, and a small one."""

    patch_shape = None

    def __init__(self, file: Path, instances: int) -> None:
        self.file = file
        x = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(instances, WIDTH))
        for start in range(0, instances, 4096 * EVERY):
            rows = x[start : start + 4096 * EVERY : EVERY]
            rows[:] = np.random.default_rng(start).normal(size=rows.shape)
        x.flush()

    def entries(self) -> list[SourceEntry]:
        return [SourceEntry(name, "train", label) for label, name in enumerate(("small", "large"))]

    def load(self, entry: SourceEntry) -> Bag:
        x = np.load(self.file, mmap_mode="r")
        return Bag(x if entry.name == "large" else x[:100], entry.label, entry.name)

    def description(self) -> dict:
        return {"file": self.file.name}


def main(folder: Path, instances: int, settings: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "set/manifest.json").exists():
        source, peak, done = SparseFile(folder / "x.npy", instances), 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max(peak, anonymous_mib())

        watcher = threading.Thread(target=watch)
        watcher.start()
        pack(source, folder / "set", progress=False, workers=1)
        done.set()
        watcher.join()
        (folder / "x.npy").unlink()
        print(f"packing: RssAnon up to {peak:.0f} MiB")
    config = {
        "name": "large",
        "out": str(folder / f"runs-{time.time():.0f}"),
        "data": {"shards": str(folder / "set"), "budget_bytes": 64 * 2**20},
        "model": {"name": "ABMIL", "gated": True},
        "train": {"epochs": 1, "batch_bags": 2},
        "report": {"num_slides": 0},
    }
    (folder / "large.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "launch/train.py"), "--config", str(folder / "large.yaml"), *settings]
    start, largest = time.perf_counter(), 0.0
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while run.poll() is None:
        largest = max(largest, anonymous_mib(str(run.pid)))
        time.sleep(0.02)
    assert run.returncode == 0
    seconds = time.perf_counter() - start
    print(
        f"training on {instances:,} x {WIDTH}, {' '.join(settings)}: RssAnon up to {largest:.0f} MiB, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
