"""The manifest: what a packed set holds, known to every rank without reading a shard.

``manifest.json`` is written last, so a folder without one is not a set. Everything in it is checked when it is read,
since a manifest may come from another machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bigbag.bags import Label
from bigbag.files import write_atomically

FORMAT = "bigbag-shards"
VERSION = 1
MANIFEST_NAME = "manifest.json"

_SAFE_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")
_DTYPES = ("float16", "float32", "float64", "uint8")


@dataclass(frozen=True)
class BagInfo:
    """One bag of a set, known without reading it.

    Attributes:
        key: name of the bag inside its shard: letters, digits, ``_`` and ``-``.
        name: the user's name of the bag.
        split: "train", "val", "test", ..., or None.
        label: a number, a list of numbers, or None where unknown.
        patient: patient or case, or None.
        num_instances: number of instances.
        shard: file name of the shard, "" for a set in memory.
        sha256: digest of the bag's ``json`` member, which lists the digests of the others; "" for a set in memory.
        stride: distance of adjacent patches in the source's unit, level-0 pixels as a rule; None where it is unknown.
    """

    key: str
    name: str
    split: str | None
    label: Label | None
    patient: str | None
    num_instances: int
    shard: str = ""
    sha256: str = ""
    stride: float | None = None


@dataclass(frozen=True)
class ShardInfo:
    """One shard of a set: its file name, size in bytes, SHA-256 and number of bags."""

    file: str
    bytes: int
    sha256: str
    num_bags: int


@dataclass(frozen=True)
class Manifest:
    """Everything known about a packed set.

    Attributes:
        source: description of the source the bags came from.
        options: the packing options that determine the bytes of the shards.
        feature_shape: shape of one instance, ``(P,)`` for feature vectors.
        feature_dtype: numpy name of the precision the features are stored in.
        patch_shape: ``(height, width)`` where the features are the pixels of a patch, else None.
        splits: name of each split and its number of bags.
        bags: all bags, in the order of the shards.
        shards: all shards.
        left_out: bags that were not packed, ``{"name": ..., "reason": ...}`` each.
        warnings: what packing found odd but not wrong.
        fields: what every bag holds beside ``x``, of "adj", "coords", "y_inst"; None: the set was packed before this
            was recorded.
        shard_url: address of a shard with ``{shard}`` in place of its file name, where the shards do not lie beside the
            manifest; may be a ``pipe:`` command.
    """

    source: dict[str, Any]
    options: dict[str, Any]
    feature_shape: tuple[int, ...]
    feature_dtype: str
    patch_shape: tuple[int, int] | None
    splits: dict[str, int]
    bags: tuple[BagInfo, ...]
    shards: tuple[ShardInfo, ...]
    left_out: tuple[dict[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    fields: tuple[str, ...] | None = None
    shard_url: str | None = field(default=None)

    def digest(self) -> str:
        """SHA-256 of the manifest as it is written: names a set of bags down to the last byte."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The text of ``manifest.json``, the same bytes for the same set."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        lines = [f"{json.dumps(key)}: {_json_lines(value)}" for key, value in content.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``, atomically."""
        write_atomically(folder / MANIFEST_NAME, self.to_json())

    @staticmethod
    def parse(text: str | bytes, where: str) -> Manifest:
        """Read the text of a manifest found at ``where``.

        Raises:
            ValueError: not a manifest, one of another format or version, or one that contradicts itself.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not a manifest, {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{where}: format is {found!r}, expected {FORMAT!r}: this is not a set packed by bigbag")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{where}: format version {content.get('version')!r}, this bigbag reads version {VERSION}: "
                "pack the set again, or install the bigbag that packed it"
            )
        try:
            manifest = _adapter().validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: damaged manifest, {field}: {first['msg']}: run bigbag pack again") from None
        _check(manifest, where)
        return manifest


def count_splits(bags: Sequence[BagInfo]) -> dict[str, int]:
    """Number of bags of each split, in order of first appearance; bags without a split are not counted."""
    counts: dict[str, int] = {}
    for bag in bags:
        if bag.split is not None:
            counts[bag.split] = counts.get(bag.split, 0) + 1
    return counts


def make_keys(names: Sequence[str]) -> list[str]:
    """A key for every name, unique, of letters, digits, ``_`` and ``-`` only, and fit for a tar member name.

    WebDataset cuts a member name at its first dot, so that two slides called ``A.x`` and ``A.y`` would become one.
    A name that has to be changed gets a piece of its SHA-256 appended.
    """
    keys = [_make_key(name) for name in names]
    taken: dict[str, str] = {}
    for name, key in zip(names, keys):
        if key in taken:
            raise ValueError(f"bags {taken[key]!r} and {name!r} both get the key {key!r}: rename one of them")
        taken[key] = name
    return keys


def _make_key(name: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if safe == name and len(name) <= 80 and name[:1].isalnum():
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{safe.strip('_-')[:64] or 'bag'}-{digest}"


def _json_lines(value: Any) -> str:
    """JSON of ``value``, with one line for each element of a list of records."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (dict, str)):
        return "[\n" + ",\n".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"
    return json.dumps(value, allow_nan=False)


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _check(manifest: Manifest, where: str) -> None:
    for problem in _problems(manifest):
        raise ValueError(f"{where}: damaged manifest, {problem}: run bigbag pack again")


def _problems(manifest: Manifest) -> Iterator[str]:
    counts = {shard.file: 0 for shard in manifest.shards}
    for shard in manifest.shards:
        if not _SAFE_FILE.fullmatch(shard.file):
            yield f"shard name {shard.file!r} is not a plain file name ending in .tar"
    for bag in manifest.bags:
        if bag.shard not in counts:
            yield f"bag {bag.name!r} is in shard {bag.shard!r}, which is not listed"
        elif bag.num_instances < 0:
            yield f"bag {bag.name!r} has {bag.num_instances!r} instances"
        else:
            counts[bag.shard] += 1
    for shard in manifest.shards:
        if counts[shard.file] != shard.num_bags:
            yield f"shard {shard.file} should have {shard.num_bags} bags, but {counts[shard.file]} are listed"
    if not isinstance(manifest.options.get("graph"), (dict, type(None))):
        yield f"options.graph is {manifest.options['graph']!r}, expected the settings of a graph or null"
    if min(manifest.feature_shape + (manifest.patch_shape or ()), default=0) < 0:
        yield f"feature_shape is {manifest.feature_shape}, patch_shape {manifest.patch_shape}: expected sizes"
    if manifest.shard_url is not None and "{shard}" not in manifest.shard_url:
        yield f"shard_url is {manifest.shard_url!r}, expected an address with {{shard}} in it"
    if manifest.feature_dtype not in _DTYPES:
        yield f"feature_dtype is {manifest.feature_dtype!r}, expected one of {', '.join(_DTYPES)}"
    if len({bag.name for bag in manifest.bags}) != len(manifest.bags):
        yield "a bag is listed twice"
