"""MNIST-bags: bags of handwritten digits, positive where they hold a target digit."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigbag.bags import Bag
from bigbag.data.sources.base import SourceEntry
from bigbag.data.sources.memory import MemorySource

_FILES = {"train": "train", "test": "t10k"}
_MEAN, _STD = 0.1307, 0.3081


class MNISTBags:
    """Bags of MNIST digits (a :class:`bigbag.data.sources.Source`).

    A bag has ``max(1, int(N(mean_size, std_size^2)))`` digits, drawn evenly and with replacement from the training or
    the test images; its label is 1 where one of them is ``target``. With one seed for both splits, as the authors'
    program has, and the same numbers of bags, these are the authors' bags.

    Instances have ``x (N, 784)`` float32, pixels in [0, 1], and ``y_inst (N,)``, 1 = target digit.

    M. Ilse, J. Tomczak, M. Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018.

    Args:
        root: folder of MNIST's four IDX files, ``train-images-idx3-ubyte`` and so on, plain or ``.gz``.
        target: the digit that makes a bag positive.
        mean_size: mean of the sizes of bags, in digits.
        std_size: standard deviation of the sizes.
        num_train: number of training bags.
        num_test: number of test bags.
        seed: seed of each split.
        normalize: standardise pixels by MNIST's mean 0.1307 and standard deviation 0.3081, as the authors do.

    Raises:
        ValueError: a file that is missing or no IDX file, or a target that is no digit.
    """

    def __init__(
        self,
        root: str | Path,
        target: int = 9,
        mean_size: float = 10,
        std_size: float = 2,
        num_train: int = 200,
        num_test: int = 50,
        seed: int = 1,
        normalize: bool = False,
    ) -> None:
        if target not in range(10):
            raise ValueError(f"target is {target!r}, expected a digit from 0 to 9")
        self.patch_shape = None if normalize else (28, 28)
        self._settings = {
            "name": "mnist_bags",
            "target": target,
            "mean_size": mean_size,
            "std_size": std_size,
            "num_train": num_train,
            "num_test": num_test,
            "seed": seed,
            "normalize": normalize,
        }
        bags, splits = [], []
        for split, num_bags in (("train", num_train), ("test", num_test)):
            images = read_idx(_find(root, f"{_FILES[split]}-images-idx3-ubyte")).reshape(-1, 784)
            digits = read_idx(_find(root, f"{_FILES[split]}-labels-idx1-ubyte"))
            rng = np.random.RandomState(seed)
            for index in range(num_bags):
                size = max(1, int(rng.normal(mean_size, std_size)))
                rows = rng.randint(0, len(digits), size)
                x = images[rows].astype(np.float32) / 255
                y_inst = (digits[rows] == target).astype(np.int8)
                x = (x - np.float32(_MEAN)) / np.float32(_STD) if normalize else x
                bags.append(Bag(x, y=int(y_inst.max()), key=f"{split}-{index:05d}", y_inst=y_inst))
                splits.append(split)
        self._source = MemorySource(bags, splits)

    def entries(self) -> Sequence[SourceEntry]:
        return self._source.entries()

    def load(self, entry: SourceEntry) -> Bag:
        return self._source.load(entry)

    def description(self) -> dict[str, Any]:
        """The constructor's arguments and a digest of the bags."""
        return self._source.description() | self._settings


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an IDX file (Y. LeCun's format), plain or gzipped.

    Raises:
        ValueError: not such a file, or one of another length than its header says.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: can't be read ({error})") from None
    rank = content[3] if len(content) >= 4 else 0
    start = 4 + 4 * rank
    if content[:3] != b"\0\0\x08" or not rank or len(content) < start:
        raise ValueError(f"{path}: not an IDX file of bytes")
    shape = struct.unpack(f">{rank}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path}: the header promises {shape}, but {len(content) - start} bytes follow")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find(root: str | Path, name: str) -> Path:
    for path in (Path(root, f"{name}.gz"), Path(root, name)):
        if path.is_file():
            return path
    raise ValueError(f"{Path(root, name)}: no such file (nor .gz); check root of the source")
