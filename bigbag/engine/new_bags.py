"""Bags that are to be predicted: those of a source or of a packed set, made as the bags of the run were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bigbag.bags import Bag
from bigbag.data import BagStore
from bigbag.data.graph import with_graph
from bigbag.data.join import join_bags
from bigbag.data.patients import PatientStore
from bigbag.data.prepare import load, prepare
from bigbag.data.sources.base import Source, SourceEntry
from bigbag.data.validate import BagError, where_of
from bigbag.engine.bag_settings import BagSettings


@dataclass(frozen=True)
class SlidePlaces:
    """Where the instances of one slide of a bag lie.

    Attributes:
        name: of the slide.
        size: number of its instances; the slides of a bag follow each other.
        coords: ``(N, c)`` positions in the source's own unit, level-0 pixels as a rule; None where there are none.
        stride: distance of adjacent patches in it, or None.
        attributes: what else the source says.
    """

    name: str
    size: int
    coords: np.ndarray | None
    stride: float | None
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NewBag:
    """A bag that is known, but not read yet.

    Attributes:
        entry: its name, and label, split and patient where they are known.
        members: reads each of the bags that it is joined of.
        stamp: JSON-able, differs where its content does.
        slides: names of its slides, as far as they are known before it is read.
    """

    entry: SourceEntry
    members: tuple[Callable[[], Bag], ...]
    stamp: Any
    slides: tuple[str, ...]

    def read(self) -> tuple[Bag, list[SlidePlaces]]:
        """The bag and where its instances lie.

        Raises:
            ValueError: it can't be read, or is not what the model needs; the message names it.
        """
        bags = [read() for read in self.members]
        places = [place for bag in bags for place in slides_of(bag)]
        if len(bags) == 1:
            return bags[0], places
        return join_bags(bags, key=self.entry.name, y=self.entry.label), places


def bags_of_source(
    source: Source, entries: Sequence[SourceEntry], settings: BagSettings, needs: Sequence[str]
) -> list[NewBag]:
    """The bags of a source, made into what the shards of the run held.

    Args:
        source: where the slides are.
        entries: those of its entries that are wanted, which may know more than the source.
        settings: how the bags of the run were made.
        needs: fields that the model needs beside ``x``; without any, no graph is built.
    """
    graph = settings.graph if needs else None

    def reader(entry: SourceEntry) -> Callable[[], Bag]:
        def read() -> Bag:
            bag = load(source, entry)
            if not bag.num_instances:
                raise BagError("empty", f"{where_of(entry)}: has no instances")
            return prepare(bag, entry, settings.storage_dtype, graph).bag

        return read

    groups: dict[tuple[bool, str], list[SourceEntry]] = {}
    for entry in entries:
        joined = settings.bag == "patient" and entry.patient is not None
        groups.setdefault((joined, str(entry.patient) if joined else entry.name), []).append(entry)
    slides_of_bag = getattr(source, "slides_of", lambda name: [name])
    found = []
    for (_, name), members in groups.items():
        labels = {repr(entry.label): entry.label for entry in members}
        label = members[0].label if len(labels) == 1 else None
        slides = tuple(slide for entry in members for slide in slides_of_bag(entry.name))
        stamp = [[entry.name, _stamp(source, entry)] for entry in members]
        found.append(NewBag(replace(members[0], name=name, label=label), tuple(map(reader, members)), stamp, slides))
    return found


def bags_of_store(store: BagStore, settings: BagSettings, needs: Sequence[str]) -> list[NewBag]:
    """The bags of a packed set; a graph is built where the model needs one and the set has none.

    Raises:
        ValueError: the set has graphs that are built otherwise than those of the run.
    """
    if "adj" in needs and None not in (store.graph, settings.graph) and store.graph != settings.graph:
        raise ValueError(
            f"the set was packed with data.graph {store.graph}, but the model was trained with {settings.graph}: pack "
            "it again with those settings, or without a graph"
        )
    joined: BagStore = PatientStore(store) if settings.bag == "patient" else store
    members = joined.slides if isinstance(joined, PatientStore) else tuple((i,) for i in range(len(store)))

    def reader(index: int) -> Callable[[], Bag]:
        def read() -> Bag:
            bag = store.read(index)
            if "adj" in needs and bag.adj is None and settings.graph is not None:
                bag, _ = with_graph(bag, settings.graph, f"bag {bag.key!r}")
            return bag

        return read

    found = []
    for info, of_bag in zip(joined.infos, members):
        entry = SourceEntry(info.name, info.split, info.label, info.patient)
        stamp = [[store.infos[i].name, store.infos[i].sha256] for i in of_bag]
        slides = tuple(store.infos[i].name for i in of_bag) if settings.source_bags == "slide" else ()
        found.append(NewBag(entry, tuple(reader(i) for i in of_bag), stamp, slides))
    return found


def slides_of(bag: Bag) -> Iterator[SlidePlaces]:
    """The slides that a source joined to ``bag`` (:func:`bigbag.data.lattice.join_slides`), or the one that it is."""
    coords = bag.coords if bag.positions is None else bag.positions
    joined = [bag.attributes.get(name) for name in ("slides", "sizes", "strides", "attributes_of_slides")]
    if None in joined:
        yield SlidePlaces(bag.key, bag.num_instances, coords, bag.stride, bag.attributes)
        return
    start = 0
    for name, size, stride, about in zip(*joined):
        yield SlidePlaces(name, size, None if coords is None else coords[start : start + size], stride, about)
        start += size


def _stamp(source: Source, entry: SourceEntry) -> Any:
    """Sizes and times of the files of a bag; for a generated one what determines it."""
    if not entry.path:
        return source.description()
    files = [Path(path).stat() for path in (entry.path, *entry.parts) if Path(path).is_file()]
    return [[file.st_size, file.st_mtime_ns] for file in files]
