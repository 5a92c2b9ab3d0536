"""From a bag of a source to the members of a shard: loaded, checked, encoded, in threads."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from bigbag.bags import Bag, LengthError
from bigbag.data.graph import with_graph
from bigbag.data.lattice import on_lattice
from bigbag.data.manifest import BagInfo
from bigbag.data.report import Finding, alike
from bigbag.data.shards import MAX_MEMBER_BYTES, Members, encode_bag
from bigbag.data.sources.base import Source, SourceEntry
from bigbag.data.survey import coord_remarks, survey_coords
from bigbag.data.validate import BagError, check_bag, label_warning, where_of


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
        return _encode(_load(source, entry), entry, encoded, options)
    except BagError as error:
        return encoded.refused(error.check, str(error))


def _encode(bag: Bag, entry: SourceEntry, encoded: Encoded, options: dict[str, Any]) -> Encoded:
    where, graph = where_of(entry), options.get("graph")
    if bag.num_instances == 0:
        raise BagError(
            "empty",
            f"{where}: has no instances, expected at least 1; repair it, or leave empty bags out with "
            'empty="leave_out" (data.empty_bags: leave_out), which lists them',
        )
    features = [list(bag.x.shape[1:]), bag.x.dtype.name]
    stored = check_bag(bag, entry, options["dtype"])
    bag = _checked("type", where, lambda: on_lattice(bag, None if graph is None else graph["stride"]))
    found: list[tuple[str, str]] = []
    step = None
    if bag.coords is not None:
        survey = survey_coords(bag.coords if bag.positions is None else bag.positions)
        step = survey.step
        found += [(check, f"{where}: {message}") for check, message in coord_remarks(bag, survey)]
    if graph is not None:
        bag, warning = _checked("graph", "", lambda: with_graph(bag, graph, where))
        found += [("graph", warning)] if warning else []
    bag = replace(bag, x=stored.x)
    contradiction = label_warning(bag, entry)
    found += [("instance_labels", contradiction)] if contradiction else []
    info = replace(encoded.info, num_instances=bag.num_instances, stride=bag.stride)
    members = encode_bag(bag, info)
    largest = max(members, key=lambda name: len(members[name]))
    if len(members[largest]) > MAX_MEMBER_BYTES:
        raise BagError(
            "type",
            f"{where}: {largest} takes {len(members[largest])} bytes, a tar member at most {MAX_MEMBER_BYTES}: store a "
            "narrower dtype",
        )
    return Encoded(
        info=replace(info, sha256=hashlib.sha256(members["json"]).hexdigest()),
        members=members,
        source_features=features,
        findings=tuple(Finding(check, "warning", entry.name, message) for check, message in found),
        fact={
            "step": step,
            "attributes": alike(bag.attributes),
            "level0_magnification": _number(bag.attributes.get("level0_magnification")),
            "x_sha256": json.loads(bytes(members["json"]))["sha256"]["x.npy"],
        },
    )


def _load(source: Source, entry: SourceEntry) -> Bag:
    try:
        bag = source.load(entry)
    except (ValueError, OSError) as error:
        text = str(error)
        named = repr(entry.name) in text or (entry.path and entry.path in text)
        where = "" if named else f"{where_of(entry)}: "
        raise BagError("lengths" if isinstance(error, LengthError) else "readable", f"{where}{text}") from error
    return replace(bag, y=entry.label, key=entry.name)


def _checked(check: str, where: str, step: Callable[[], Any]) -> Any:
    """The result of ``step``, whose ``ValueError`` is what ``check`` found."""
    try:
        return step()
    except ValueError as error:
        raise BagError(check, f"{where}: {error}" if where else str(error)) from error


def _number(value: Any) -> float | None:
    try:
        return float(value) or None
    except (TypeError, ValueError):
        return None
