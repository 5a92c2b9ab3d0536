"""From a bag of a source to the members of a shard: loaded, checked, encoded, in threads."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from bigbag.bags import Bag
from bigbag.data.manifest import BagInfo
from bigbag.data.prepare import load, prepare
from bigbag.data.report import Finding, alike
from bigbag.data.shards import Members, encode_bag
from bigbag.data.sources.base import Source, SourceEntry
from bigbag.data.validate import BagError, label_warning


@dataclass(frozen=True)
class Encoded:
    """One bag, looked at.

    Attributes:
        info: what is known of it.
        members: its members, ready to be written; None where it has a problem.
        source_features: shape and type of its features in the source.
        findings: what is odd about it.
        fact: what the report needs besides.
        problem: what is wrong with it.
    """

    info: BagInfo
    members: Members | None = None
    source_features: list[Any] = field(default_factory=list)
    findings: tuple[Finding, ...] = ()
    fact: dict[str, Any] = field(default_factory=dict)
    problem: Finding | None = None

    @property
    def fields(self) -> list[str]:
        """Names of the optional fields that the bag holds."""
        assert self.members is not None
        first = {"adj": "adj.crow.npy", "coords": "coords.npy", "y_inst": "y_inst.npy"}
        return [name for name, member in first.items() if member in self.members]

    def refused(self, check: str, message: str) -> Encoded:
        """The bag with a problem instead of members."""
        return replace(self, members=None, problem=Finding(check, "error", self.info.name, message))


def encode_all(
    source: Source, todo: Sequence[tuple[SourceEntry, str]], options: dict[str, Any], workers: int
) -> Iterator[tuple[SourceEntry, Encoded]]:
    """Encoded bags in order, at most ``workers`` of them ahead of the consumer."""
    if workers == 1:
        for entry, key in todo:
            yield entry, encode(source, entry, key, options)
        return
    # Threads, not processes: reading, casting and hashing release the interpreter lock, and nothing is copied over.
    with ThreadPoolExecutor(workers) as pool:
        waiting = iter(todo)
        running: deque[tuple[SourceEntry, Future[Encoded]]] = deque()
        try:
            while True:
                for entry, key in islice(waiting, workers - len(running)):
                    running.append((entry, pool.submit(encode, source, entry, key, options)))
                if not running:
                    return
                entry, future = running.popleft()
                yield entry, future.result()
        finally:
            for _, future in running:
                future.cancel()


def encode(source: Source, entry: SourceEntry, key: str, options: dict[str, Any]) -> Encoded:
    """Load one bag, check it and encode it; what is wrong with it comes back as ``problem``."""
    encoded = Encoded(BagInfo(key, entry.name, entry.split, entry.label, entry.patient, 0))
    try:
        return _encode(load(source, entry), entry, encoded, options)
    except BagError as error:
        return encoded.refused(error.check, str(error))


def _encode(bag: Bag, entry: SourceEntry, encoded: Encoded, options: dict[str, Any]) -> Encoded:
    features = [list(bag.x.shape[1:]), bag.x.dtype.name]
    bag, remarks, step = prepare(bag, entry, options["dtype"], options.get("graph"))
    found = list(remarks)
    contradiction = label_warning(bag, entry)
    found += [("instance_labels", contradiction)] if contradiction else []
    info = replace(encoded.info, num_instances=bag.num_instances, stride=bag.stride)
    members = encode_bag(bag, info)
    return Encoded(
        info=replace(info, sha256=hashlib.sha256(members["json"]).hexdigest()),
        members=members,
        source_features=features,
        findings=tuple(Finding(check, "warning", entry.name, message) for check, message in found),
        fact={
            "coords": bag.coords is not None,
            "step": step,
            "attributes": alike(bag.attributes),
            "level0_magnification": _number(bag.attributes.get("level0_magnification")),
            "x_sha256": json.loads(bytes(members["json"]))["sha256"]["x.npy"],
        },
    )


def _number(value: Any) -> float | None:
    try:
        return float(value) or None
    except (TypeError, ValueError):
        return None
