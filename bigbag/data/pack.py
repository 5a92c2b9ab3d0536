"""Packing: every bag of a source, checked and written once to shards and a manifest."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bigbag.bags import Bag
from bigbag.data.graph import with_graph
from bigbag.data.lattice import on_lattice
from bigbag.data.manifest import BagInfo, Manifest, ShardInfo, count_splits, make_keys
from bigbag.data.progress import PROGRESS_NAME, Progress, entries_digest, exclusive, fingerprint, finished_set, resume
from bigbag.data.shards import MAX_MEMBER_BYTES, Members, ShardWriter, encode_bag
from bigbag.data.sources.base import Source, SourceEntry
from bigbag.data.validate import check_bag, check_entries, label_warning, plain_label
from bigbag.files import write_json

if TYPE_CHECKING:
    from bigbag.config import GraphConfig

logger = logging.getLogger(__name__)

_SPLIT_ORDER = ("train", "val", "test")
_MEMBER_OVERHEAD = 1024  # header and padding of one member in a tar


@dataclass(frozen=True)
class _Encoded:
    """One bag ready to be written; ``members`` is None where the bag is left out."""

    info: BagInfo
    source_features: list[Any]
    members: Members | None
    warnings: tuple[str, ...] = ()

    @property
    def fields(self) -> list[str]:
        """Names of the optional fields that the bag holds."""
        assert self.members is not None
        first = {"adj": "adj.crow.npy", "coords": "coords.npy", "y_inst": "y_inst.npy"}
        return [name for name, member in first.items() if member in self.members]


def pack(
    source: Source,
    out: str | Path,
    *,
    dtype: Literal["float16", "float32", "float64", "uint8"] = "float16",
    shard_bytes: int = 256 * 2**20,
    workers: int = 1,
    progress: bool = True,
    empty: Literal["error", "leave_out"] = "error",
    left_out_ok: bool = False,
    unlabelled: Literal["error", "keep"] = "error",
    graph: GraphConfig | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write the bags of ``source`` to shards in the folder ``out``.

    A packing that was interrupted goes on after the last finished shard when it is run again, and then gives the same
    bytes as one that was not. A shard holds bags of one split.

    Args:
        source: where the bags come from.
        out: folder for shards and manifest; made if absent.
        dtype: precision the features are stored in.
        shard_bytes: bytes after which a new shard is started; a larger bag is a shard of its own.
        workers: threads that load, check and encode bags; each holds one bag in memory.
        progress: show a progress bar.
        empty: what to do with a bag of no instances: stop, or leave it out and list it in the manifest.
        left_out_ok: go on where the source itself has to leave bags out (``source.left_out``); they are listed in the
            manifest.
        unlabelled: "keep" packs bags without a label, which can be predicted but not trained on.
        graph: build a graph over the instances of each bag and store it; see :mod:`bigbag.data.graph`.
        overwrite: replace a finished set of another source or other options.

    Returns:
        The manifest of the finished set.

    Raises:
        ValueError: a bag or an option that is wrong, with the remedy.
        OSError: the disk is full or fails; finished shards are kept.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"dtype": dtype, "shard_bytes": shard_bytes, "empty": empty}
    options |= {"left_out_ok": left_out_ok, "unlabelled": unlabelled}
    if graph is not None:
        options["graph"] = graph.model_dump(mode="json")
    _check_options(options, workers)
    entries = _ordered_entries(source, unlabelled)
    left_out = _left_out_by(source, left_out_ok)
    with exclusive(folder):
        if not overwrite:
            done = finished_set(folder, source, options, entries)
            if done is not None:
                (folder / PROGRESS_NAME).unlink(missing_ok=True)  # left where the very last step was interrupted
                return done
        state = resume(folder, fingerprint(source, options, entries), left_out, overwrite)
        _write_shards(folder, source, entries, state, options, workers, progress)
        manifest = _manifest(source, options, entries, state)
        manifest.write(folder)
        (folder / PROGRESS_NAME).unlink()
    for name, items in (("left out", manifest.left_out), ("warning", manifest.warnings)):
        for item in items:
            logger.warning("pack: %s: %s", name, item)
    return manifest


def _check_options(options: dict[str, Any], workers: int) -> None:
    choices = {
        "dtype": ("float16", "float32", "float64", "uint8"),
        "empty": ("error", "leave_out"),
        "unlabelled": ("error", "keep"),
    }
    for name, allowed in choices.items():
        if options[name] not in allowed:
            raise ValueError(f"pack: {name} is {options[name]!r}, expected one of {', '.join(allowed)}")
    for name, value in (("shard_bytes", options["shard_bytes"]), ("workers", workers)):
        if value < 1:
            raise ValueError(f"pack: {name} is {value}, expected at least 1")


def _ordered_entries(source: Source, unlabelled: str) -> list[SourceEntry]:
    """Entries with plain labels, split by split, so that a shard holds one split."""
    entries = [replace(entry, label=plain_label(entry.label)) for entry in source.entries()]
    check_entries(entries, unlabelled)
    names = {split: i for i, split in enumerate(dict.fromkeys([*_SPLIT_ORDER, *(e.split for e in entries)]))}
    return sorted(entries, key=lambda entry: names[entry.split])


def _left_out_by(source: Source, left_out_ok: bool) -> list[dict[str, str]]:
    left_out = [dict(item) for item in getattr(source, "left_out", ())]
    if left_out and not left_out_ok:
        listed = "; ".join(f"{item['name']}: {item['reason']}" for item in left_out[:5])
        raise ValueError(
            f"{len(left_out)} bags cannot be packed ({listed}{'; ...' if len(left_out) > 5 else ''}): repair the "
            "source, or pack without them with left_out_ok=True (data.missing_bags: leave_out), which lists them"
        )
    return left_out


def _write_shards(
    folder: Path,
    source: Source,
    entries: Sequence[SourceEntry],
    state: Progress,
    options: dict[str, Any],
    workers: int,
    progress: bool,
) -> None:
    from tqdm import tqdm

    keys = make_keys([entry.name for entry in entries])
    todo = list(zip(entries, keys))[state.num_entries :]
    bar = tqdm(
        total=len(entries), initial=state.num_entries, desc="pack", unit="bag", disable=None if progress else True
    )
    shard: _OpenShard | None = None
    try:
        with bar:
            for entry, bag in _encode_all(source, todo, options, workers):
                _check_like_first(bag, entry, state)
                if shard is not None and bag.members is not None and not shard.fits(bag, options["shard_bytes"]):
                    shard.finish(folder, state)
                    shard = None
                if shard is None:
                    shard = _OpenShard(folder, state, bag.info.split)
                shard.add(bag)
                bar.update()
            if shard is not None:
                shard.finish(folder, state)
                shard = None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"disk full while packing to {folder}: {len(state.shards)} shards ({state.num_entries} of "
                f"{len(entries)} bags) are finished and kept; free space and run the same command again",
            ) from None
        raise
    finally:
        if shard is not None:
            shard.discard()
    if not state.bags:
        raise ValueError("pack: no bag is left to pack: all of them were left out")


def _encode_all(
    source: Source, todo: Sequence[tuple[SourceEntry, str]], options: dict[str, Any], workers: int
) -> Iterator[tuple[SourceEntry, _Encoded]]:
    """Encoded bags in order, at most ``workers`` of them ahead of the consumer."""
    if workers == 1:
        for entry, key in todo:
            yield entry, _encode(source, entry, key, options)
        return
    # Threads, not processes: reading, casting and hashing release the interpreter lock, and nothing is copied over.
    with ThreadPoolExecutor(workers) as pool:
        waiting = iter(todo)
        running: deque[tuple[SourceEntry, Future[_Encoded]]] = deque()
        try:
            while True:
                for entry, key in islice(waiting, workers - len(running)):
                    running.append((entry, pool.submit(_encode, source, entry, key, options)))
                if not running:
                    return
                entry, future = running.popleft()
                yield entry, future.result()
        finally:
            for _, future in running:
                future.cancel()


def _encode(source: Source, entry: SourceEntry, key: str, options: dict[str, Any]) -> _Encoded:
    bag = _load(source, entry)
    features = [list(bag.x.shape[1:]), bag.x.dtype.name]
    info = BagInfo(key, entry.name, entry.split, entry.label, entry.patient, bag.num_instances)
    if bag.num_instances == 0:
        if options["empty"] == "error":
            raise ValueError(
                f"bag {entry.name!r}{_path_of(entry)}: has no instances, expected at least 1; repair it, or leave "
                'empty bags out with empty="leave_out" (data.empty_bags: leave_out), which lists them'
            )
        return _Encoded(info, features, None)
    warnings = []
    where, graph = f"bag {entry.name!r}{_path_of(entry)}", options.get("graph")
    try:
        bag = on_lattice(bag, None if graph is None else graph["stride"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    info = replace(info, stride=bag.stride)
    if graph is not None:
        bag, warning = with_graph(bag, graph, where)
        warnings.append(warning)
    stored = check_bag(bag, entry, options["dtype"])
    warnings.append(label_warning(stored, entry))
    members = encode_bag(stored, info)
    largest = max(members, key=lambda name: len(members[name]))
    if len(members[largest]) > MAX_MEMBER_BYTES:
        raise ValueError(
            f"bag {entry.name!r}{_path_of(entry)}: {largest} takes {len(members[largest])} bytes, a tar member at most "
            f"{MAX_MEMBER_BYTES}: store a narrower dtype"
        )
    info = replace(info, sha256=hashlib.sha256(members["json"]).hexdigest())
    return _Encoded(info, features, members, tuple(warning for warning in warnings if warning))


def _load(source: Source, entry: SourceEntry) -> Bag:
    try:
        bag = source.load(entry)
    except ValueError as error:
        text = str(error)
        where = "" if entry.path in text and entry.name in text else f"bag {entry.name!r}{_path_of(entry)}: "
        raise ValueError(f"{where}{text}") from error
    return replace(bag, y=entry.label, key=entry.name)


def _check_like_first(bag: _Encoded, entry: SourceEntry, state: Progress) -> None:
    """All bags have the width and dtype of the first one that has instances."""
    if bag.members is None:
        return
    if not state.features:
        state.features = [*bag.source_features, entry.name]
    shape, dtype, first = state.features
    if [shape, dtype] != bag.source_features:
        raise ValueError(
            f"bag {entry.name!r}{_path_of(entry)}: x has instances of shape {tuple(bag.source_features[0])} "
            f"{bag.source_features[1]}, expected {tuple(shape)} {dtype} as in bag {first!r}: extract all bags with "
            "the same extractor and precision"
        )


class _OpenShard:
    """The shard being written, and what is to be recorded once it is finished."""

    def __init__(self, folder: Path, state: Progress, split: str | None) -> None:
        number = sum(1 for shard in state.shards if shard.file.startswith(f"{_shard_prefix(split)}-"))
        self.name = f"{_shard_prefix(split)}-{number:06d}.tar"
        self.split = split
        self.writer = ShardWriter(folder / self.name, folder / f".{self.name}.tmp")
        self.bags: list[BagInfo] = []
        self.left_out: list[dict[str, str]] = []
        self.warnings: list[str] = []
        self.fields = state.fields

    def fits(self, bag: _Encoded, shard_bytes: int) -> bool:
        assert bag.members is not None
        size = sum(len(content) + _MEMBER_OVERHEAD for content in bag.members.values())
        return self.split == bag.info.split and (not self.bags or self.writer.num_bytes + size <= shard_bytes)

    def add(self, bag: _Encoded) -> None:
        if bag.members is None:
            self.left_out.append({"name": bag.info.name, "reason": "no instances"})
            return
        self.writer.add(bag.info.key, bag.members)
        self.bags.append(replace(bag.info, shard=self.name))
        self.warnings += bag.warnings
        self.fields = [name for name in bag.fields if self.fields is None or name in self.fields]

    def finish(self, folder: Path, state: Progress) -> None:
        """Close the shard (an empty one is discarded) and record it."""
        if self.bags:
            self.writer.close()
            self.writer.publish()
            state.shards.append(ShardInfo(self.name, self.writer.num_bytes, self.writer.sha256, len(self.bags)))
        else:
            self.writer.discard()
        state.bags += self.bags
        state.left_out += self.left_out
        state.warnings += self.warnings
        state.fields = self.fields
        state.num_entries += len(self.bags) + len(self.left_out)
        write_json(folder / PROGRESS_NAME, asdict(state))

    def discard(self) -> None:
        self.writer.discard()


def _shard_prefix(split: str | None) -> str:
    return "bags" if split is None else make_keys([split])[0]


def _manifest(source: Source, options: dict[str, Any], entries: Sequence[SourceEntry], state: Progress) -> Manifest:
    return Manifest(
        source=json.loads(json.dumps(source.description())),
        options={**options, "entries": entries_digest(entries)},
        feature_shape=tuple(state.features[0]),
        feature_dtype=options["dtype"],
        patch_shape=source.patch_shape,
        splits=count_splits(state.bags),
        bags=tuple(state.bags),
        shards=tuple(state.shards),
        left_out=tuple(state.left_out),
        warnings=tuple(state.warnings),
        fields=tuple(state.fields or ()),
    )


def _path_of(entry: SourceEntry) -> str:
    return f" ({entry.path})" if entry.path else ""
