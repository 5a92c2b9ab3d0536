"""Stores: read any bag of a packed set, or of a list in memory, by its index."""

from __future__ import annotations

import hashlib
import json
import logging
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from bigbag.bags import Bag
from bigbag.data.cache import ShardCache, check_url, default_cache_folder
from bigbag.data.manifest import MANIFEST_NAME, BagInfo, Manifest, ShardInfo, make_keys
from bigbag.data.shards import MappedShard, check_digests, decode_bag, wrong_size
from bigbag.data.validate import plain_label

logger = logging.getLogger(__name__)

_MAX_OPEN_LOCAL = 64
_MAX_OPEN_REMOTE = 4  # each of them may keep a shard on disk that the cache has already removed
_MAX_MANIFEST_BYTES = 1 << 30
_TIMEOUT_S = 60


class BagStore(ABC):
    """A set of bags that can be read in any order, by several threads at once, from any process (stores are picklable).

    Attributes:
        infos: what is known of each bag without reading it.
        feature_shape: shape of one instance.
        feature_dtype: numpy name of the precision of the features.
        patch_shape: ``(height, width)`` where the features are the pixels of a patch, else None.
        description: JSON-able: where the bags come from.
        left_out: bags that are not in the set though its source has them, ``{"name": ..., "reason": ...}`` each.
        fields: what every bag holds beside ``x``, of "adj", "coords", "y_inst"; None where that is not known.
        graph: settings of the graph that packing built, None where it built none.
        keeps_leakage: whether packing was told to keep patients that are in two splits.
    """

    infos: tuple[BagInfo, ...]
    feature_shape: tuple[int, ...]
    feature_dtype: str
    patch_shape: tuple[int, int] | None
    description: dict[str, Any]
    left_out: tuple[dict[str, str], ...] = ()
    fields: tuple[str, ...] | None = None
    graph: dict[str, Any] | None = None
    keeps_leakage: bool = False

    @abstractmethod
    def read(self, index: int) -> Bag:
        """The bag ``infos[index]``; ``key`` is its true name. Its arrays may be read-only views of a file."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 that changes with any bag, name, label or split of the set."""

    def __len__(self) -> int:
        return len(self.infos)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of instances of each bag."""
        return tuple(info.num_instances for info in self.infos)


class MemoryStore(BagStore):
    """Bags held in memory.

    Args:
        bags: all of the same feature shape and dtype, with unique keys; bags without a key are named "0", "1", ...
        splits: split of each bag, or None.
        patients: patient of each bag, or None.
        patch_shape: ``(height, width)`` where the features are the pixels of a patch.

    Raises:
        ValueError: no bags, features that differ, keys that are not unique, or lists of another length.
    """

    def __init__(
        self,
        bags: Sequence[Bag],
        splits: Sequence[str | None] | None = None,
        patients: Sequence[str | None] | None = None,
        patch_shape: tuple[int, int] | None = None,
    ) -> None:
        if not bags:
            raise ValueError("MemoryStore: expected at least one bag, got none")
        for name, values in (("splits", splits), ("patients", patients)):
            if values is not None and len(values) != len(bags):
                raise ValueError(f"MemoryStore: {len(values)} {name} for {len(bags)} bags")
        first = bags[0]
        for bag in bags:
            if bag.x.shape[1:] != first.x.shape[1:] or bag.x.dtype != first.x.dtype:
                raise ValueError(
                    f"MemoryStore: bag {bag.key!r} has features {bag.x.shape[1:]} {bag.x.dtype}, expected "
                    f"{first.x.shape[1:]} {first.x.dtype} as in bag {first.key!r}"
                )
        names = [bag.key or str(i) for i, bag in enumerate(bags)]
        if len(set(names)) != len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise ValueError(f"MemoryStore: two bags have the key {twice!r}: keys must be unique")
        self.bags = tuple(bags)
        self.infos = tuple(
            BagInfo(
                key=key,
                name=name,
                split=None if splits is None else splits[i],
                label=plain_label(bag.y),
                patient=None if patients is None else patients[i],
                num_instances=bag.num_instances,
                stride=bag.stride,
            )
            for i, (bag, name, key) in enumerate(zip(bags, names, make_keys(names)))
        )
        self.feature_shape = tuple(first.x.shape[1:])
        self.feature_dtype = first.x.dtype.name
        self.patch_shape = patch_shape
        self.description = {"name": "memory", "num_bags": len(bags)}
        names_of_fields = ("adj", "coords", "y_inst")
        self.fields = tuple(name for name in names_of_fields if all(getattr(bag, name) is not None for bag in bags))

    def read(self, index: int) -> Bag:
        bag, info = self.bags[index], self.infos[index]
        return replace(bag, y=info.label, key=info.name)

    def digest(self) -> str:
        digest = hashlib.sha256()
        for info, bag in zip(self.infos, self.bags):
            digest.update(json.dumps([info.name, info.split, info.label, info.patient]).encode())
            for values in (bag.x, bag.coords, bag.y_inst):
                digest.update(b"-" if values is None else f"{values.shape}{values.dtype}".encode() + values.tobytes())
            for part in () if bag.adj is None else (bag.adj.crow, bag.adj.col, bag.adj.weight):
                digest.update(b"-" if part is None else part.numpy().tobytes())
        return digest.hexdigest()


class ShardStore(BagStore):
    """A packed set; use :func:`open_store`.

    Args:
        manifest: what the set holds.
        location: folder or URL of the shards.
        check_digests: compare each bag with its SHA-256 when a process first reads it.
        cache: where copies of remote shards go; None for a local set.
    """

    def __init__(
        self, manifest: Manifest, location: str, *, check_digests: bool = False, cache: ShardCache | None = None
    ) -> None:
        self.manifest = manifest
        self.location = location
        self.infos = manifest.bags
        self.feature_shape = manifest.feature_shape
        self.feature_dtype = manifest.feature_dtype
        self.patch_shape = manifest.patch_shape
        self.description = manifest.source
        self.left_out = manifest.left_out
        self.fields = manifest.fields
        self.graph = manifest.options.get("graph")
        self.keeps_leakage = manifest.options.get("leakage") == "keep"
        self.check_digests = check_digests
        self._cache = cache
        self._shards = {shard.file: shard for shard in manifest.shards}
        self._start()

    def _start(self) -> None:
        self._open: OrderedDict[str, MappedShard] = OrderedDict()
        self._checked: set[int] = set()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_checked", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def url(self, shard: str) -> str:
        """Path or address of a shard."""
        if self.manifest.shard_url is not None:
            return self.manifest.shard_url.replace("{shard}", shard)
        return f"{self.location.rstrip('/')}/{shard}"

    def read(self, index: int) -> Bag:
        info = self.infos[index]
        mapped = self._mapped(self._shards[info.shard])
        members = mapped.members(info.key)
        where = f"{mapped.where}, bag {info.name!r}"
        if self.check_digests and index not in self._checked:
            check_digests(members, info, where)
            self._checked.add(index)
        return decode_bag(members, info, self.manifest, where)

    def digest(self) -> str:
        return self.manifest.digest()

    def _mapped(self, shard: ShardInfo) -> MappedShard:
        with self._lock:
            if shard.file in self._open:
                self._open.move_to_end(shard.file)
                return self._open[shard.file]
        # Not under the lock, since fetching may take long. Two threads may map one shard; the cache fetches it once.
        url = self.url(shard.file)
        with open(url, "rb") if self._cache is None else self._cache.open(shard, url) as file:
            mapped = MappedShard(file, url, shard.bytes)
        with self._lock:
            self._open[shard.file] = mapped
            # A shard that is let go stays mapped for as long as some bag still views it.
            while len(self._open) > (_MAX_OPEN_LOCAL if self._cache is None else _MAX_OPEN_REMOTE):
                self._open.popitem(last=False)
        return mapped


def open_store(
    path_or_url: str | Path,
    *,
    check_digests: bool = False,
    cache_dir: str | Path | None = None,
    cache_bytes: int = 50 * 2**30,
    allow_pipe: bool = False,
) -> ShardStore:
    """Open a packed set.

    A local set is mapped into memory. Shards at ``http://``, ``https://``, ``file://`` or ``pipe:`` addresses are read
    by WebDataset, one bag in memory at a time, into a cache on the local disk, and mapped there.

    Args:
        path_or_url: folder or URL of the set, or its ``manifest.json``.
        check_digests: compare each bag with its SHA-256 when a process first reads it.
        cache_dir: folder for copies of remote shards; None: ``bigbag/shards`` in the user's cache folder.
        cache_bytes: most bytes of all these copies together.
        allow_pipe: allow a manifest whose ``shard_url`` is a ``pipe:`` command, which runs a shell.

    Raises:
        ValueError: no manifest there, one of another format, a shard that is missing or of the wrong size, or an
            address that is not allowed.
    """
    place = str(path_or_url)
    remote = place.startswith(("http://", "https://", "file://"))
    if not remote and ("://" in place or place.startswith("pipe:")):
        raise ValueError(
            f"{place!r}: expected a folder, or an http(s):// or file:// address; for pipe: put the command into the "
            "manifest's shard_url, with {shard} for the name of the shard"
        )
    manifest, location = _fetch_manifest(place) if remote else _read_manifest(Path(place))
    if not remote and manifest.shard_url is None:
        store = ShardStore(manifest, location, check_digests=check_digests)
        _check_local_shards(store)
        return store
    cache = ShardCache(
        default_cache_folder() if cache_dir is None else Path(cache_dir), manifest.digest(), int(cache_bytes)
    )
    store = ShardStore(manifest, location, check_digests=check_digests, cache=cache)
    for shard in manifest.shards:
        check_url(store.url(shard.file), allow_pipe)
    total = sum(shard.bytes for shard in manifest.shards)
    if total > cache_bytes:
        logger.warning(
            "%s has %d bytes of shards, the cache holds %d: every epoch fetches shards again; raise data.cache_bytes",
            place, total, cache_bytes,
        )  # fmt: skip
    return store


def _read_manifest(path: Path) -> tuple[Manifest, str]:
    file = path if path.name == MANIFEST_NAME else path / MANIFEST_NAME
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent}: no such folder; pack the set first (bigbag pack)")
    if not file.is_file():
        raise ValueError(
            f"{file.parent}: no {MANIFEST_NAME}, so this is not a packed set, or its packing was interrupted: run "
            "bigbag pack (again), which completes it"
        )
    return Manifest.parse(file.read_bytes(), str(file)), str(file.parent)


def _fetch_manifest(url: str) -> tuple[Manifest, str]:
    check_url(url, allow_pipe=False)
    location = url.removesuffix(MANIFEST_NAME).rstrip("/")
    address = f"{location}/{MANIFEST_NAME}"
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as response:
            content = response.read(_MAX_MANIFEST_BYTES + 1)
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(
            f"{address}: no manifest could be read there ({error}): check the address, or pack and upload the set "
            "again; the manifest goes up last"
        ) from None
    if len(content) > _MAX_MANIFEST_BYTES:
        raise ValueError(f"{address}: larger than {_MAX_MANIFEST_BYTES} bytes, which is no manifest of bags")
    return Manifest.parse(content, address), location


def _check_local_shards(store: ShardStore) -> None:
    for shard in store.manifest.shards:
        path = Path(store.url(shard.file))
        if not path.is_file():
            raise ValueError(
                f"{path}: the shard is missing, the manifest lists it: copy it again, or pack the set again"
            )
        found = path.stat().st_size
        if found != shard.bytes:
            raise ValueError(wrong_size(str(path), found, shard.bytes))
