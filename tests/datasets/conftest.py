"""Data sets in torchmil's layout, written by hand."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

SIZES = {"slide.with.dots": 30, "b": 1, "c": 23, "d": 17}
LABELS = {"slide.with.dots": 1, "b": 0, "c": 1, "d": 0}
SPLITS = {"slide.with.dots": "train", "b": "train", "c": "test", "d": "test"}


def write_bag(name: str, folders: dict[str, Path], patch_size: int = 512, width: int = 6) -> None:
    """One bag: distinct lattice places of a patch, from an origin off the lattice's zero."""
    size, label = SIZES[name], LABELS[name]
    rng = np.random.default_rng(size)
    cells = rng.permutation(36)[:size]
    y_inst = np.zeros((size, 1), np.int64)
    y_inst[: size // 3] = label
    arrays = {
        "features": rng.normal(size=(size, width)).astype(np.float32),
        "labels": np.array([label]),
        "inst_labels": y_inst,
        "coords": (np.stack([cells % 6, cells // 6], 1) * patch_size + [700, 1300]).astype(np.int32),
    }
    for kind, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", arrays[kind])


def write_splits(root: Path, rows: list[tuple[str, str]]) -> None:
    with open(root / "splits.csv", "w", newline="") as file:
        csv.writer(file).writerows([("bag_name", "split"), *rows])


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """Four bags in one folder for each kind of data."""
    paths = {kind: tmp_path / kind for kind in ("features", "labels", "inst_labels", "coords")}
    for name in SIZES:
        write_bag(name, paths)
    return paths


@pytest.fixture
def slides_root(tmp_path) -> Path:
    """The layout of CAMELYON16 and PANDA."""
    folder = tmp_path / "patches_512"
    kinds = {"features": "features/features_UNI", "inst_labels": "patch_labels", "labels": "labels", "coords": "coords"}
    for name in SIZES:
        write_bag(name, {kind: folder / path for kind, path in kinds.items()})
    write_splits(tmp_path, list(SPLITS.items()))
    return tmp_path


@pytest.fixture
def sequences_root(tmp_path) -> Path:
    """The layout of RSNA, with the frame labels of TAD."""
    for name in SIZES:
        for labels in ("slice_labels", "frame_labels"):
            kinds = {"features": "features/features_resnet50", "inst_labels": labels, "labels": "labels"}
            write_bag(name, {kind: tmp_path / path for kind, path in kinds.items()})
    write_splits(tmp_path, [item for item in SPLITS.items() for _ in range(2)])
    return tmp_path


@pytest.fixture
def assert_same_bags() -> Callable[..., None]:
    """Compare all bags of two data sets key by key; types may differ, values may not."""

    def check(ours, theirs) -> None:
        assert len(ours) == len(theirs) > 0
        for mine, other in zip(ours, theirs):
            assert set(mine.keys()) == set(other.keys())
            for key in mine.keys():  # noqa: SIM118  (a TensorDict iterates over rows)
                a, b = (value.to_dense() if value.is_sparse else value for value in (mine[key], other[key]))
                assert a.shape == b.shape, key
                np.testing.assert_allclose(a.double(), b.double(), rtol=1e-6, atol=1e-7, err_msg=key)

    return check
