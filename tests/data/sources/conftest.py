"""Files as each project's own writer writes them: the same calls, names, types, chunks and attributes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

h5py = pytest.importorskip("h5py")

WIDTH = 8


def places(size: int, seed: int = 0, side: int = 7) -> np.ndarray:
    """``(size, 2)`` cells of a lattice; the corner is always there."""
    rng = np.random.default_rng(seed)
    cells = np.sort(np.append(rng.permutation(np.arange(1, side * side))[: size - 1], 0))
    return np.stack(np.divmod(cells, side), 1)


def features(size: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(size, width)).astype(np.float32)


def save_h5(path: Path, assets: dict[str, np.ndarray], attributes: dict[str, dict[str, Any]] | None = None) -> None:
    """TRIDENT's writer: chunks of one row, resizable, None as 'None' and dicts as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in assets.items():
            dataset = file.create_dataset(
                key,
                shape=value.shape,
                maxshape=(None, *value.shape[1:]),
                chunks=(1, *value.shape[1:]),
                dtype=value.dtype,
            )
            dataset[:] = value
            for name, item in (attributes or {}).get(key, {}).items():
                item = json.dumps(item) if isinstance(item, dict) else "None" if item is None else item
                dataset.attrs[name] = item


def trident(
    root: Path, slide: str, coords: np.ndarray, x: np.ndarray | None = None, *, mag: int = 40, target: int = 20,
    size: int = 256, overlap: int = 0, encoder: str = "uni_v1", dtype: Any = np.float32,
) -> Path:  # fmt: skip
    """``coords`` are cells; patches lie ``(size - overlap) * mag / target`` apart. Writes features and patches."""
    folder = root / f"{target}x_{size}px_{overlap}px_overlap"
    x = features(len(coords)).astype(dtype) if x is None else x
    level0 = (np.asarray(coords) * ((size - overlap) * mag // target) + [7 * 256, 3 * 256]).astype(np.int64)
    if not len(coords):
        level0 = level0.reshape(0, 2)
    about = {
        "patch_size": size, "patch_size_level0": size * mag // target, "level0_magnification": mag,
        "target_magnification": target, "overlap": overlap, "name": slide, "savetodir": "f", "level0_width": 9000,
        "level0_height": None,
    }  # fmt: skip
    save_h5(folder / "patches" / f"{slide}_patches.h5", {"coords": level0}, {"coords": about})
    path = folder / f"features_{encoder}" / f"{slide}.h5"
    more = {"name": slide, "savetodir": str(path.parent), "encoder": encoder}
    save_h5(path, {"features": x, "coords": level0}, {"features": more, "coords": about})
    return path


def clam(root: Path, slide: str, x: np.ndarray, coords: np.ndarray) -> None:
    """``extract_features_fp.py``: batches appended to the h5, and the tensor beside it."""
    (root / "h5_files").mkdir(parents=True, exist_ok=True)
    (root / "pt_files").mkdir(parents=True, exist_ok=True)
    with h5py.File(root / "h5_files" / f"{slide}.h5", "w") as file:
        for key, value in (("features", x), ("coords", coords.astype(np.int32))):
            chunk = (32 if key == "features" else 1, *value.shape[1:])
            dataset = file.create_dataset(
                key, shape=value[:5].shape, maxshape=(None, *value.shape[1:]), chunks=chunk, dtype=value.dtype
            )
            dataset[:] = value[:5]
            dataset.resize(len(value), axis=0)
            dataset[5:] = value[5:]
    torch.save(torch.from_numpy(x), root / "pt_files" / f"{slide}.pt")


def clam_patches(folder: Path, slide: str, coords: np.ndarray, **about: Any) -> None:
    """``create_patches_fp.py``."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"patch_size": 256, "patch_level": 0, "downsample": (1.0, 1.0), "downsampled_level_dim": (9000, 8000),
              "level_dim": (9000, 8000), "name": slide, "save_path": str(folder), **about}  # fmt: skip
    with h5py.File(folder / f"{slide}.h5", "w") as file:
        dataset = file.create_dataset("coords", data=coords.astype(np.int64), maxshape=(None, 2), chunks=(1, 2))
        for name, value in values.items():
            dataset.attrs[name] = value


def stamp(path: Path, x: np.ndarray, cells: np.ndarray, key: str = "feats", **about: Any) -> None:
    """``stamp preprocess``: half precision, micrometres."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[key] = x.astype(np.float16)
        file["coords"] = (cells * 256.0).astype(np.float32)
        values = {"stamp_version": "2.3.0", "extractor": "uni2", "unit": "um", "tile_size_um": 256.0,
                  "tile_size_px": 224, "code_hash": "0123abcd", "feat_type": "tile"}  # fmt: skip
        for name, value in {**values, **about}.items():
            if value is not None:
                file.attrs[name] = value


def table(path: Path, rows: Sequence[Sequence[Any]], delimiter: str = ",") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return str(path)


@pytest.fixture
def write() -> SimpleNamespace:
    functions: list[Callable[..., Any]] = [
        places, features, save_h5, trident, clam, clam_patches, stamp, table,
    ]  # fmt: skip
    return SimpleNamespace(**{function.__name__: function for function in functions})


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Pack by the command alone, and give back each bag with what is known of it."""
    from bigbag.cli import main
    from bigbag.data import open_store

    def run(root: Path | str, *more: str, out: str = "shards") -> dict[str, Any]:
        assert main(["pack", "--from", str(root), "--out", str(tmp_path / out), *more]) == 0
        store = open_store(tmp_path / out)
        return {info.name: SimpleNamespace(info=info, bag=store.read(i)) for i, info in enumerate(store.infos)}

    return run
