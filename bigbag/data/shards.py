"""One bag in a shard: members of an uncompressed WebDataset tar, written and read back without a copy.

A bag ``k`` is stored as ``k.x.npy`` and, where present, ``k.coords.npy``, ``k.positions.npy``, ``k.y_inst.npy``,
``k.adj.crow.npy``, ``k.adj.col.npy``, ``k.adj.weight.npy``, and as ``k.json`` with its true name, label, patient, split
and the SHA-256 of each member. WebDataset alone can read a shard; nothing in it is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import mmap
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from bigbag.bags import Adjacency, Bag
from bigbag.data.manifest import BagInfo, Manifest
from bigbag.data.npy import NpyBytes, npy_view

Members = dict[str, Any]
"""Name -> bytes, or :class:`~bigbag.data.npy.NpyBytes`."""
_PROBES = 8
_COPY_BYTES = 1 << 20


def encode_bag(bag: Bag, info: BagInfo) -> Members:
    """The members of ``bag``: name without the key -> bytes. ``info.shard`` and ``info.sha256`` are not used."""
    members: Members = {"x.npy": NpyBytes(bag.x)}
    if bag.coords is not None:
        members["coords.npy"] = NpyBytes(bag.coords)
    if bag.positions is not None:
        members["positions.npy"] = NpyBytes(bag.positions)
    if bag.y_inst is not None:
        members["y_inst.npy"] = NpyBytes(_smallest_int(bag.y_inst))
    if bag.adj is not None:
        members["adj.crow.npy"] = NpyBytes(bag.adj.crow.numpy())
        members["adj.col.npy"] = NpyBytes(bag.adj.col.numpy())
        if bag.adj.weight is not None:
            members["adj.weight.npy"] = NpyBytes(bag.adj.weight.numpy())
    about = {
        "name": info.name,
        "label": info.label,
        "patient": info.patient,
        "split": info.split,
        "num_instances": bag.num_instances,
        "symmetric": bag.adj is not None and bag.adj.symmetric,
        "stride": bag.stride,
        "attributes": dict(bag.attributes),
        "sha256": {name: _sha256(content) for name, content in sorted(members.items())},
    }
    members["json"] = json.dumps(about, allow_nan=False).encode()
    return members


def _pieces(content: Any) -> tuple[memoryview, ...]:
    return content.pieces if isinstance(content, NpyBytes) else (memoryview(content),)


def _sha256(content: Any) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(content):
        digest.update(piece)
    return digest.hexdigest()


def decode_bag(members: Mapping[str, Any], info: BagInfo, manifest: Manifest, where: str) -> Bag:
    """The bag stored in ``members``, its arrays being views of them.

    Raises:
        ValueError: a member is missing or damaged, or does not fit the manifest.
    """
    try:
        return _decode(members, info, manifest)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; pack the set again") from None


def _decode(members: Mapping[str, Any], info: BagInfo, manifest: Manifest) -> Bag:
    missing = {"x.npy", "json"} - members.keys()
    if missing:
        raise ValueError(f"member {sorted(missing)[0]} is missing")
    x = npy_view(members["x.npy"], "x.npy")
    if x.shape[1:] != manifest.feature_shape or x.dtype.name != manifest.feature_dtype:
        raise ValueError(
            f"features {x.shape[1:]} {x.dtype}, but the manifest says {manifest.feature_shape} "
            f"{manifest.feature_dtype}: shard and manifest do not belong together"
        )
    if len(x) != info.num_instances:
        raise ValueError(
            f"{len(x)} instances, but the manifest says {info.num_instances}: shard and manifest do not belong together"
        )
    optional = {
        name: npy_view(members[f"{name}.npy"], f"{name}.npy")
        for name in ("coords", "positions", "y_inst")
        if f"{name}.npy" in members
    }
    about = _parse_about(members["json"])
    adj = _decode_adjacency(members, about.get("symmetric") is True, len(x))
    attributes = about.get("attributes", {})
    return Bag(x=x, y=info.label, key=info.name, adj=adj, stride=info.stride, attributes=attributes, **optional)


def _parse_about(content: Any) -> dict[str, Any]:
    try:
        about = json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"member json is damaged ({error})") from None
    if not isinstance(about, dict) or not isinstance(about.get("attributes", {}), dict):
        raise ValueError("member json is damaged (expected an object, with another one as its attributes)")
    return about


def _decode_adjacency(members: Mapping[str, Any], symmetric: bool, num_nodes: int) -> Adjacency | None:
    if not {"adj.crow.npy", "adj.col.npy"} & members.keys():
        return None
    for name in ("adj.crow.npy", "adj.col.npy"):
        if name not in members:
            raise ValueError(f"member {name} is missing")
    # Copied, since torch has no read-only tensors: kernels would write to a map of the shard unchecked.
    arrays = {
        name: npy_view(members[f"adj.{name}.npy"], f"adj.{name}.npy").copy()
        for name in ("crow", "col", "weight")
        if f"adj.{name}.npy" in members
    }
    _check_graph(arrays["crow"], arrays["col"], arrays.get("weight"), num_nodes)
    crow, col, weight = (
        torch.from_numpy(arrays[name]) if name in arrays else None for name in ("crow", "col", "weight")
    )
    assert crow is not None and col is not None
    return Adjacency(crow, col, weight, symmetric)


def _check_graph(crow: np.ndarray, col: np.ndarray, weight: np.ndarray | None, num_nodes: int) -> None:
    """Kernels follow the indices of a graph unchecked, so they are checked here: O(T + E), less than reading x costs.

    Raises:
        ValueError: not a CSR graph over ``num_nodes`` nodes.
    """
    if crow.dtype != np.int64 or col.dtype != np.int32 or crow.shape != (num_nodes + 1,) or col.ndim != 1:
        raise ValueError(
            f"the graph has rows {crow.shape} {crow.dtype} and columns {col.shape} {col.dtype}, expected "
            f"({num_nodes + 1},) int64 and (E,) int32"
        )
    if crow[0] != 0 or crow[-1] != len(col) or (crow[1:] < crow[:-1]).any():
        raise ValueError(f"adj.crow does not ascend from 0 to the {len(col)} edges of adj.col")
    if len(col) and not 0 <= int(col.min()) <= int(col.max()) < num_nodes:
        raise ValueError(f"adj.col names node {max(int(col.max()), -int(col.min()))} of a graph of {num_nodes}")
    if weight is not None and (weight.shape != col.shape or weight.dtype.kind != "f"):
        raise ValueError(f"adj.weight is {weight.shape} {weight.dtype}, expected a float for each of {len(col)} edges")


def check_digests(members: Mapping[str, Any], info: BagInfo, where: str) -> None:
    """Compare every member of a bag with its SHA-256.

    Raises:
        ValueError: the first member that differs.
    """

    def fail(member: str) -> None:
        raise ValueError(
            f"{where}: member {member} does not have the SHA-256 it was packed with, so its bytes have changed: copy "
            "the shard again, or pack the set again"
        )

    if hashlib.sha256(members["json"]).hexdigest() != info.sha256:
        fail("json")
    digests = _parse_about(members["json"])["sha256"]
    for name, expected in digests.items():
        if name not in members or hashlib.sha256(members[name]).hexdigest() != expected:
            fail(name)


def _smallest_int(values: np.ndarray) -> np.ndarray:
    for dtype in (np.int8, np.int16, np.int32):
        limits = np.iinfo(dtype)
        if values.size == 0 or (values.min() >= limits.min and values.max() <= limits.max):
            return values.astype(dtype)
    return values.astype(np.int64)


class _HashingFile:
    """A file being written, with the SHA-256 and number of all bytes so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.file: BinaryIO = file
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.num_bytes += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.num_bytes


class _Reader:
    """What is in memory, to be read like a file, without a copy of the whole."""

    def __init__(self, content: Any) -> None:
        self._waiting = list(_pieces(content))

    def read(self, size: int = -1, /) -> bytes:
        found = []
        while size and self._waiting:
            first, self._waiting[0] = self._waiting[0][:size], self._waiting[0][size:]
            if not self._waiting[0]:
                del self._waiting[0]
            found.append(first)
            size -= len(first)
        return b"".join(found)


class ShardWriter:
    """Writes one shard under a temporary name and renames it when it is whole.

    The same bags give the same bytes: time 0, members in alphabetical order. Headers are USTAR's, and for members from
    8 GiB on PAX's (POSIX.1-2001).
    """

    def __init__(self, path: Path, temporary: Path) -> None:
        self.path, self.temporary = path, temporary
        self.num_bags = 0
        self._file = open(temporary, "wb", buffering=1 << 20)  # noqa: SIM115, closed by publish or discard
        self._stream = _HashingFile(self._file)
        stream: Any = self._stream
        self._tar = tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, copybufsize=_COPY_BYTES)

    @property
    def num_bytes(self) -> int:
        return self._stream.num_bytes

    def add(self, key: str, members: Members) -> None:
        for name in sorted(members):
            item = tarfile.TarInfo(f"{key}.{name}")
            item.size, item.mode, item.uname, item.gname = len(members[name]), 0o444, "bigbag", "bigbag"
            self._tar.addfile(item, _Reader(members[name]))
        self.num_bags += 1

    @property
    def sha256(self) -> str:
        return self._stream.sha256.hexdigest()

    def close(self) -> None:
        """End the tar and flush it to disk, still under its temporary name."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Give the closed shard its name."""
        self._file.close()
        os.replace(self.temporary, self.path)

    def discard(self) -> None:
        """Forget what was written; the space on disk is free again."""
        self._stream.file = io.BytesIO()  # where the tar writer puts what it still holds when it is collected
        os.ftruncate(self._file.fileno(), 0)
        with contextlib.suppress(OSError):
            self._file.close()
        self.temporary.unlink(missing_ok=True)


class MappedShard:
    """A shard mapped into memory, and where in it the members of each bag are.

    Args:
        file: the shard; it may be closed afterwards.
        where: name of the shard in error messages.
        num_bytes: its size according to the manifest.

    Raises:
        ValueError: not a tar, or not as large as the manifest says.
    """

    def __init__(self, file: BinaryIO, where: str, num_bytes: int) -> None:
        found = os.fstat(file.fileno()).st_size
        if found != num_bytes:
            raise ValueError(wrong_size(where, found, num_bytes))
        self.where = where
        self._index: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for item in tar:
                    key, _, name = item.name.partition(".")
                    self._index.setdefault(key, {})[name] = (item.offset_data, item.size)
        except tarfile.TarError as error:
            raise ValueError(f"{where}: damaged tar file ({error}); copy it again, or pack the set again") from None
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file = open(os.dup(file.fileno()), "rb", buffering=0)  # noqa: SIM115, as long as the map
        self._probe = bytearray(1)

    def _is_warm(self, start: int, end: int) -> bool:
        """Whether some pages between ``start`` and ``end``, both among them, are in memory: cheaper than advice."""
        try:
            return all(
                os.preadv(self._file.fileno(), [self._probe], start + i * (end - 1 - start) // _PROBES, os.RWF_NOWAIT)
                for i in range(_PROBES + 1)
            )
        except OSError:  # they are not, or the file system cannot tell
            return False

    def members(self, key: str) -> Members:
        """Name -> bytes of the members of bag ``key``, as views of the map; the kernel is told to read them now.

        Raises:
            ValueError: no such bag.
        """
        if key not in self._index:
            raise ValueError(f"{self.where}: bag {key!r} is not in the shard; pack the set again")
        places = self._index[key].values()
        start = min(offset for offset, _ in places) // mmap.PAGESIZE * mmap.PAGESIZE
        end = max(offset + size for offset, size in places)
        if end > len(self._map):
            raise ValueError(f"{self.where}: bag {key!r} ends behind the end of the file; copy the shard again")
        if not self._is_warm(start, end):
            # Page faults alone read a cold file in pieces of 128 KiB, several times slower than the disk can.
            self._map.madvise(mmap.MADV_WILLNEED, start, end - start)
        view = memoryview(self._map)
        return {name: view[offset : offset + size] for name, (offset, size) in self._index[key].items()}


def wrong_size(where: str, found: int, expected: int) -> str:
    """The message about a shard of another size than the manifest says."""
    return (
        f"{where}: {found} bytes, expected {expected}: the shard is truncated or belongs to another set; copy it "
        "again, or pack the set again"
    )
