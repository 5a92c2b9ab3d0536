"""HDF5 files of features: checked before they are read, and read at the speed of the disk.

Several extractors write chunks of one row. HDF5 then looks every row up in a tree and copies it through its cache.
Where the chunks are plain bytes, their addresses are listed once and the bytes are read from there: 20,000 x 1024
float32 take 28 ms instead of 96 ms of ``file[name][:]``, their coordinates 16 ms instead of 75 ms (warm page cache,
2 cores of an AMD EPYC; ``python tests/data/measure_h5.py``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_SMALL_CHUNK_BYTES = 256 * 1024
# Deflate stores at least 1 byte for 1032: a file that promises more than that lies about its size.
_MAX_RATIO = 1100


@contextmanager
def open_h5(path: str | Path) -> Iterator[Any]:
    """The open file.

    Raises:
        ValueError: h5py is not installed, or this is no HDF5 file (any more).
    """
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path}: reading HDF5 needs h5py; install it with pip install 'bigbag[formats]'") from None
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: not a readable HDF5 file ({error}): write or copy it again") from None
    with file:
        try:
            yield file
        except (OSError, KeyError, RuntimeError, ValueError, TypeError, OverflowError) as error:
            if isinstance(error, ValueError) and str(path) in str(error):
                raise  # what bigbag has to say of the file
            raise ValueError(f"{path}: damaged HDF5 file ({error}): write or copy it again") from None


def dataset_names(file: Any) -> tuple[str, ...]:
    """Names of the data sets at the top of a file that lie in the file itself."""
    import h5py

    inside = [name for name in file if isinstance(file.get(name, getlink=True), h5py.HardLink)]
    return tuple(name for name in inside if file.get(name, getclass=True) is h5py.Dataset)


def find_dataset(file: Any, names: Sequence[str]) -> Any | None:
    """The first data set of one of these names, or None."""
    found = dataset_names(file)
    return next((file[name] for name in names if name in found), None)


def need_dataset(file: Any, names: Sequence[str]) -> Any:
    """The first data set of one of these names.

    Raises:
        ValueError: none of them is in the file.
    """
    dataset = find_dataset(file, names)
    if dataset is None:
        there = ", ".join(dataset_names(file)) or "nothing"
        raise ValueError(f"{file.filename}: holds {there}, expected a data set called {' or '.join(names)}")
    return dataset


def attributes_of(item: Any) -> dict[str, Any]:
    """Attributes of a file or data set as plain Python: TRIDENT's ``'None'`` and NaN are None, JSON texts are read."""
    return {str(name): _plain(value) for name, value in item.attrs.items()}


def read_dataset(dataset: Any) -> np.ndarray:
    """All of a data set of numbers, as a new array.

    Raises:
        ValueError: no numbers, stored outside the file, or a file that is too short for the shape it promises.
    """
    where = f"{dataset.file.filename}, {dataset.name.lstrip('/')}"
    if dataset.shape is None or dataset.dtype.kind not in "biuf":
        raise ValueError(f"{where}: is of type {dataset.dtype}, expected numbers")
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{where}: is stored in another file; copy it into this one (h5repack does)")
    plain = dataset.id.get_create_plist().get_nfilters() == 0
    stored = dataset.id.get_storage_size()
    if dataset.nbytes > stored * (1 if plain else _MAX_RATIO):
        raise ValueError(
            f"{where}: promises {dataset.shape} of {dataset.dtype}, {dataset.nbytes} bytes, but only {stored} are in "
            "the file: it was not written whole; write it again"
        )
    if plain and _has_small_rows(dataset):
        return _gather_rows(dataset, where)
    result = np.empty(dataset.shape, dataset.dtype)
    if dataset.size:
        dataset.read_direct(result)
    return result


def _has_small_rows(dataset: Any) -> bool:
    """Whether each chunk is some whole rows, few enough that looking chunks up costs more than reading them."""
    chunks = dataset.chunks
    return (
        chunks is not None
        and len(dataset) > 16 * chunks[0]
        and chunks[1:] == dataset.shape[1:]
        and int(np.prod(chunks)) * dataset.dtype.itemsize <= _SMALL_CHUNK_BYTES
        and hasattr(dataset.id, "chunk_iter")
        and dataset.file.userblock_size == 0
    )


def _gather_rows(dataset: Any, where: str) -> np.ndarray:
    """Read chunks of whole rows by their addresses, runs of neighbouring chunks at once."""
    rows = dataset.chunks[0]
    num_chunks = -(-len(dataset) // rows)
    first_row, address = np.zeros(num_chunks, np.int64), np.full(num_chunks, -1, np.int64)
    seen = 0

    def note(chunk: Any) -> None:
        nonlocal seen
        if seen < num_chunks:
            first_row[seen], address[seen] = chunk.chunk_offset[0], chunk.byte_offset
        seen += 1

    dataset.id.chunk_iter(note)
    size = rows * (dataset.nbytes // len(dataset))
    with open(dataset.file.filename, "rb", buffering=0) as file:
        if seen != num_chunks or address.min() < 0 or int(address.max()) + size > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{where}: damaged list of chunks ({seen} of {num_chunks}): write or copy the file again")
        order = np.argsort(first_row)
        if not np.array_equal(first_row[order], np.arange(num_chunks) * rows):
            raise ValueError(f"{where}: damaged list of chunks, a row is there twice: write or copy the file again")
        result = _read_runs(file.fileno(), address[order], size)
    # The last chunk may reach beyond the last row.
    return result[: dataset.nbytes].view(dataset.dtype).reshape(dataset.shape)


def _read_runs(descriptor: int, address: np.ndarray, size: int) -> np.ndarray:
    """Pieces of ``size`` bytes at each address, end to end; neighbours in the file are read at once."""
    result = np.empty(len(address) * size, np.uint8)
    starts = np.flatnonzero(np.diff(address, prepend=address[0] - 2 * size) != size)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(address)]):
        target, place = result[start * size : end * size].data, int(address[start])
        while target:
            count = os.preadv(descriptor, [target], place)
            if not count:
                raise OSError("the file has become shorter while it was read")
            target, place = target[count:], place + count
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        if value == "None":
            return None
        if value[:1] in "{[":
            try:
                return json.loads(value)
            except ValueError:
                return value
        return value
    if isinstance(value, float | np.floating) and np.isnan(value):
        return None
    listed = np.asarray(value).tolist() if isinstance(value, np.ndarray | np.generic) else value
    return listed if isinstance(listed, int | float | bool | list) else str(listed)
