"""What all data sets have in common: bags as dicts of tensors for a ``DataLoader``, and a source for packing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bigbag.bags import Adjacency, Bag, Label
from bigbag.data.padding import as_tensordict
from bigbag.data.sources.base import Source, SourceEntry
from bigbag.data.sources.memory import MemorySource
from bigbag.data.sources.torchmil import to_inst_labels, to_label


class MILDataset(Dataset):
    """Named bags: ``dataset[i]`` for a ``DataLoader``, and a :class:`bigbag.data.sources.Source` for packing.

    A bag is a ``tensordict.TensorDict`` of

    - ``X (N, P)`` features;
    - ``Y`` the label;
    - ``y_inst (N,)`` instance labels, -1 = unknown;
    - ``adj (N, N)`` sparse COO;
    - ``coords (N, c)`` positions;

    as far as the data set has them. ``torchmil.data.collate_fn`` and :func:`bigbag.data.collate_fn` make batches of
    them; ``bigbag.data.pack(dataset, out)`` writes them to shards, and needs no tensordict.
    """

    patch_shape: tuple[int, int] | None = None
    bag_names: list[str]

    def __len__(self) -> int:
        return len(self.bag_names)

    def __getitem__(self, index: int) -> Any:
        """The bag of this index, as a ``tensordict.TensorDict``.

        Raises:
            IndexError: no such bag.
            ValueError: a file that is missing or wrong.
            ImportError: tensordict is not installed.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Index {index} out of range (max: {len(self) - 1})")
        return as_tensordict(self._bag(self.bag_names[index]))

    def get_bag_names(self) -> list[str]:
        """The names of the bags, in the order of their indices."""
        return self.bag_names

    def entries(self) -> Sequence[SourceEntry]:
        """The bags by name, split and label."""
        raise NotImplementedError

    def load(self, entry: SourceEntry) -> Bag:
        """One bag in numpy, for packing."""
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        """What determines the bags."""
        raise NotImplementedError

    def _bag(self, name: str) -> Mapping[str, Tensor]:
        raise NotImplementedError


class InMemoryDataset(MILDataset):
    """Bags that have been generated at construction; ``bags_list`` holds their tensors.

    They are named by the class and their number, and all in the split ``split``.
    """

    bags_list: list[dict[str, Tensor]]
    split: str | None = None

    @cached_property
    def bag_names(self) -> list[str]:  # type: ignore[override]
        return [f"{type(self).__name__}-{index:05d}" for index in range(len(self.bags_list))]

    def __len__(self) -> int:
        return len(self.bags_list)

    def _bag(self, name: str) -> Mapping[str, Tensor]:
        return self.bags_list[int(name.rpartition("-")[2])]

    def entries(self) -> Sequence[SourceEntry]:
        return self._source.entries()

    def load(self, entry: SourceEntry) -> Bag:
        return self._source.load(entry)

    def description(self) -> dict[str, Any]:
        return self._source.description() | {"name": type(self).__name__}

    @cached_property
    def _source(self) -> MemorySource:
        named = zip(self.bag_names, self.bags_list)
        bags = [to_bag(bag, to_label(bag["Y"].numpy(), f"bag {name!r}: Y"), name) for name, bag in named]
        return MemorySource(bags, [self.split] * len(bags))


class SourceDataset(MILDataset):
    """The bags of a source, such as ``Musk1``, ``MNISTBags`` or ``Digits``, for a ``DataLoader``.

    Args:
        source: the source.
        split: take only the bags of this split; None takes all.

    Raises:
        ValueError: no bag is in ``split``.
    """

    def __init__(self, source: Source, split: str | None = None) -> None:
        self.source = source
        self.patch_shape = source.patch_shape
        entries = source.entries()
        self._entries = {entry.name: entry for entry in entries if split is None or entry.split == split}
        if not self._entries:
            known = sorted({str(entry.split) for entry in entries})
            raise ValueError(f"no bag is in the split {split!r}, expected one of {', '.join(known)}")
        self.bag_names = list(self._entries)

    def entries(self) -> Sequence[SourceEntry]:
        return tuple(self._entries.values())

    def load(self, entry: SourceEntry) -> Bag:
        return self.source.load(entry)

    def description(self) -> dict[str, Any]:
        return self.source.description()

    def _bag(self, name: str) -> Mapping[str, Tensor]:
        return from_bag(self.load(self._entries[name]))


def to_bag(tensors: Mapping[str, Tensor], label: Label | None, name: str, where: str = "") -> Bag:
    """The tensors of a bag as a :class:`bigbag.bags.Bag`.

    Args:
        tensors: by "X", "y_inst", "coords", "adj", of which only "X" must be there.
        label: the bag's label.
        name: the bag's name.
        where: files to name in messages.

    Raises:
        ValueError: no features, or instance labels that are not one integer for each instance.
    """
    if "X" not in tensors:
        raise ValueError(f"bag {name!r}: has no features to pack: add 'X' to bag_keys")
    adj = None
    if "adj" in tensors:
        edges = tensors["adj"].coalesce()
        row, col = edges.indices()
        # Graphs of data sets join pairs, whichever of the two comes first.
        adj = Adjacency.from_edges(row, col, edges.values(), len(tensors["X"]), symmetric=True)
    y_inst = tensors["y_inst"].numpy() if "y_inst" in tensors else None
    return Bag(
        x=tensors["X"].numpy(),
        y=label,
        key=name,
        coords=tensors["coords"].numpy() if "coords" in tensors else None,
        y_inst=None if y_inst is None else to_inst_labels(y_inst, f"bag {name!r}{where}, y_inst"),
        adj=adj,
    )


def from_bag(bag: Bag) -> dict[str, Tensor]:
    """The inverse of :func:`to_bag`."""
    tensors = {"X": torch.tensor(bag.x)}
    if bag.y is not None:
        tensors["Y"] = torch.as_tensor(bag.y)
    for name, values in (("y_inst", bag.y_inst), ("coords", bag.coords)):
        if values is not None:
            tensors[name] = torch.tensor(values)
    if bag.adj is not None:
        tensors["adj"] = bag.adj.to_coo()
    return tensors


def digest_of(items: Sequence[Any]) -> str:
    """SHA-256 of JSON-able items."""
    return hashlib.sha256(json.dumps(list(items)).encode()).hexdigest()
