"""One slide in one file of any of the field's types: arrays by name, and nothing that could run code."""

from __future__ import annotations

import csv
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigbag.data.sources.h5 import attributes_of, dataset_names, open_h5, read_dataset

FEATURES = ("features", "feats", "feature", "feat", "embeddings", "embedding", "patch_embeddings", "x", "data", "arr_0")
"""Names under which files keep ``(N, P)`` features, the likeliest first."""
_NOT_IN_NUMPY = [torch.bfloat16, *(kind for name, kind in vars(torch).items() if name.startswith("float8_"))]
COORDS = ("coords", "coordinates", "coord", "positions", "locations", "xy")
"""Names under which files keep ``(N, 2)`` coordinates."""


@dataclass(frozen=True)
class Contents:
    """What a file holds: arrays by name ("" for one that has none), and attributes by array or of the file ("")."""

    path: Path
    arrays: dict[str, np.ndarray]
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def find(self, names: Sequence[str]) -> str | None:
        """The first of ``names`` that is there, whatever its case."""
        there = {name.lower(): name for name in self.arrays}
        return next((there[name.lower()] for name in names if name.lower() in there), None)

    def features(self, names: Sequence[str] = FEATURES) -> np.ndarray:
        """``(N, P)`` features: the first array of these names, else the only one, if that has no name or, with the
        usual names, is not called coordinates.

        Raises:
            ValueError: no such array, or one of another shape.
        """
        name = self.find(names)
        if name is None and len(self.arrays) == 1:
            only = next(iter(self.arrays))
            name = only if not only or (names is FEATURES and self.find(COORDS) is None) else None
        if name is None:
            there = ", ".join(self.arrays) or "no arrays"
            raise ValueError(f"{self.path}: holds {there}, expected features under one of the names {', '.join(names)}")
        return rows_of(self.arrays[name], self.path)

    def coords(self, names: Sequence[str] = COORDS) -> np.ndarray | None:
        """``(N, c)`` coordinates, or None."""
        name = self.find(names)
        return None if name is None else coords_of(self.arrays[name])


def rows_of(values: np.ndarray, path: str | Path) -> np.ndarray:
    """``(N, P)`` features from ``(N, P)`` or ``(1, N, P)``; ``(0,)`` is a bag of no instances.

    Raises:
        ValueError: another shape; a single vector is an encoding of a whole slide.
    """
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.shape == (0,):
        return values.reshape(0, 0)
    if values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 0 and len(values)):
        raise ValueError(
            f"{path}: features have shape {values.shape}, expected (N, P), one row per patch: is this the encoding of "
            "a whole slide? Point the source at the features of its patches"
        )
    if values.ndim != 2:
        raise ValueError(f"{path}: features have shape {values.shape}, expected (N, P), one row per patch")
    return values


def coords_of(values: np.ndarray) -> np.ndarray:
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    return values.reshape(0, 2) if values.shape == (0,) else values


def read_file(path: str | Path) -> Contents:
    """The arrays of a ``.npy``, ``.npz``, ``.pt``, ``.safetensors``, ``.h5`` or ``.csv`` file, mapped where possible.

    Raises:
        ValueError: another type, a damaged file, or one that would have to be unpickled.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: type {path.suffix!r} is not known; expected one of {', '.join(_READERS)}")
    try:
        return reader(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except MemoryError:
        raise ValueError(f"{path}: promises more data than this machine has memory for: is it damaged?") from None


def _read_npy(path: Path) -> Contents:
    try:
        return Contents(path, {"": np.load(path, mmap_mode="r", allow_pickle=False)})
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # a damaged header fails in any part of the parser of Python's syntax
        raise ValueError(f"{path}: not a readable .npy file of numbers ({error}): write it again") from None


def _read_npz(path: Path) -> Contents:
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {item.filename.removesuffix(".npy"): _npz_member(archive, item) for item in archive.infolist()}
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # as above, and zipfile's and zlib's own errors
        raise ValueError(f"{path}: not a readable .npz file of numbers ({error}): write it again") from None
    return Contents(path, arrays)


def _npz_member(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(item) as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        promised = dtype.itemsize * int(np.prod(shape, dtype=object))
        if promised > item.file_size:
            raise ValueError(f"{item.filename} promises {promised} bytes, the file has {item.file_size}")
    with archive.open(item) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _read_pt(path: Path) -> Contents:
    value = load_pt(path)
    if isinstance(value, Mapping):
        arrays = {str(name): to_numpy(item, path) for name, item in value.items() if _is_array(item)}
        rest = {str(name): item for name, item in value.items() if isinstance(item, int | float | str)}
        return Contents(path, arrays, {"": rest})
    if isinstance(value, list | tuple) and value and all(_is_array(item) for item in value):
        return Contents(path, {str(i): to_numpy(item, path) for i, item in enumerate(value)})
    if not _is_array(value):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected a tensor or a dict of tensors")
    return Contents(path, {"": to_numpy(value, path)})


def load_pt(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors, numpy arrays and plain Python only, mapped where the file allows it.

    Raises:
        ValueError: a damaged file, or one that holds other objects, which would run code of theirs.
    """
    kwargs: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(path, mmap=zipfile.is_zipfile(path), **kwargs)
    except (FileNotFoundError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n\n")[0].splitlines()[0]
        raise ValueError(
            f"{path}: holds objects that are neither tensors nor plain numbers, and loading them would run their code; "
            f"bigbag never does ({reason}). Save the tensor alone: torch.save(features, path)"
        ) from None
    except Exception as error:  # a damaged file fails in any part of torch's reader
        raise ValueError(f"{path}: not a readable file of torch.save ({error}): write or copy it again") from None


def _numpy_globals() -> list[Any]:
    """What a numpy array inside ``torch.save`` refers to (TRIDENT saves such); it builds arrays and nothing else."""
    from numpy._core import multiarray

    kinds = [type(np.dtype(name)) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]
    rebuild = multiarray._reconstruct
    return [rebuild, (rebuild, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, *dict.fromkeys(kinds)]


def to_numpy(value: Any, path: str | Path) -> np.ndarray:
    """A tensor or array of the file ``path`` as numpy; floats that numpy lacks, such as bfloat16, as float32.

    Raises:
        ValueError: a tensor that is no plain array: sparse, nested, quantised, without data.
    """
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach()
    try:
        return (value.float() if value.dtype in _NOT_IN_NUMPY else value).cpu().resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError):
        raise ValueError(
            f"{path}: holds a tensor of {value.dtype}, {value.layout}, on {value.device}, expected a plain one of "
            "numbers: save it dense, in float16 or float32"
        ) from None


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray)


def _read_safetensors(path: Path) -> Contents:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(f"{path}: reading it needs safetensors; pip install 'bigbag[formats]'") from None
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return Contents(path, {name: to_numpy(file.get_tensor(name), path) for name in names})
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}): write or copy it again") from None


def _read_h5(path: Path) -> Contents:
    if not path.is_file():
        raise FileNotFoundError(path)
    with open_h5(path) as file:
        # What is called features is read whatever it holds, which read_dataset refuses where these are no numbers.
        wanted = [name for name in dataset_names(file) if name != "imgs"]
        names = [name for name in wanted if name.lower() in FEATURES or _holds_numbers(file[name])]
        arrays = {name: read_dataset(file[name]) for name in names}
        attributes = {name: attributes_of(file[name]) for name in names}
        return Contents(path, arrays, attributes | {"": attributes_of(file)})


def _holds_numbers(dataset: Any) -> bool:
    return dataset.dtype.kind in "biuf" and bool(dataset.shape)


def _read_csv(path: Path) -> Contents:
    """One line per instance; a header may name two columns x and y. A header 0, 1, 2, ... is pandas' own, and a first
    column without a name its index, which is no feature."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first, second = file.readline(), file.readline()
            delimiter = max(",\t;", key=first.count)
            cells = next(csv.reader([first.strip()], delimiter=delimiter), [])
            if not cells:
                raise ValueError("the first line is empty")
            numbered = len(cells) > 1 and cells == [str(i) for i in range(len(cells))]
            has_header = numbered or not all(_is_number(cell) for cell in cells)
            file.seek(0)
            values = np.empty((0, len(cells)), np.float32)
            if second.strip() or not has_header:
                values = np.loadtxt(
                    file, np.float32, delimiter=delimiter, skiprows=int(has_header), ndmin=2, comments=None
                )
            if values.shape[1] != len(cells):
                raise ValueError(f"{values.shape[1]} columns under a header of {len(cells)}")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not a table of numbers ({error}): write or copy it again") from None
    names = [cell.strip().lower() for cell in cells] if has_header else []
    if names[:1] == [""] and len(names) > 1:
        names, values = names[1:], values[:, 1:]
    if "x" in names and "y" in names:
        places = [names.index("x"), names.index("y")]
        rest = [i for i in range(len(names)) if i not in places]
        return Contents(path, {"features": values[:, rest], "coords": values[:, places]})
    return Contents(path, {"": values})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_READERS: dict[str, Callable[[Path], Contents]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_pt,
    ".pth": _read_pt,
    ".safetensors": _read_safetensors,
    ".h5": _read_h5,
    ".hdf5": _read_h5,
    ".csv": _read_csv,
}
FILE_TYPES = tuple(_READERS)
"""Types of files that :func:`read_file` knows."""
