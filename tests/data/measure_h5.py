"""Seconds to read a file of TRIDENT (chunks of one row) by ``file[name][:]`` and by bigbag, from a warm page cache.

python tests/data/measure_h5.py [rows]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from bigbag.data.sources.h5 import open_h5, read_dataset


def seconds(read: Callable[[], np.ndarray], expected: np.ndarray) -> float:
    start = time.perf_counter()
    found = read()
    taken = time.perf_counter() - start
    assert np.array_equal(found, expected)
    return taken


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    values = {"features": np.ones((rows, 1024), np.float32), "coords": np.arange(2 * rows).reshape(rows, 2)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.h5"
        with h5py.File(path, "w") as file:
            for name, value in values.items():
                shape = value.shape
                file.create_dataset(name, data=value, chunks=(1, shape[1]), maxshape=(None, shape[1]))
        np.save(path.with_suffix(".npy"), values["features"])
        for name, value in values.items():
            with open_h5(path) as file:
                times = [
                    (seconds(lambda: file[name][:], value), seconds(lambda: read_dataset(file[name]), value))  # noqa: B023
                    for _ in range(5)
                ]
            plain, fast = (min(column) for column in zip(*times))
            print(f"{name}: h5py {plain:.4f} s, bigbag {fast:.4f} s, {plain / fast:.1f} times as fast")
        print(
            f"np.load of the features: {seconds(lambda: np.load(path.with_suffix('.npy')), values['features']):.4f} s"
        )


if __name__ == "__main__":
    main()
