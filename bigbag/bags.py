"""The data that travels: ``Bag``, ``Segments``, ``Adjacency`` and ``PackedBags``.

A *bag* is one labelled set of instances. A *pack* is several bags laid end to end: ``T`` instances in all, cut by
``B + 1`` offsets. Everything in bigbag computes on packs; padded ``(B, N, P)`` tensors with a mask exist only at the
door (:meth:`PackedBags.from_padded`, :meth:`PackedBags.to_padded`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.parts import Parts, part_bounds
from bigbag.segments import Segments

Label = int | float | Sequence[int | float]

_ALIGN_BYTES = 64
_PER_INSTANCE = ("x", "coords", "y_inst", "positions")
_PIECE = 1 << 20  # values that are converted at once


class LengthError(ValueError):
    """Arrays of one bag that do not have the same number of rows."""


def _as_array(value: Any, what: str) -> np.ndarray | None:
    if isinstance(value, Tensor):
        if value.dtype == torch.bfloat16:
            raise ValueError(f"Bag.{what}: numpy has no bfloat16; pass float16 or float32")
        value = value.detach().cpu().numpy()
    return None if value is None else np.asarray(value)


@dataclass(frozen=True)
class Bag:
    """One bag on the host, as numpy arrays (which may be read-only memory maps).

    Attributes:
        x: ``(N, P)`` instance features, or ``(N, ...)`` raw instances.
        y: label of the bag: a number, or a sequence of numbers for several outputs. None where it is unknown.
        key: name of the bag, unique in its data set.
        coords: ``(N, c)`` positions, or None.
        y_inst: ``(N,)`` integer instance labels, -1 = unknown, or None.
        adj: graph over the instances, or None.
        stride: distance of adjacent patches in the unit of ``coords`` (level-0 pixels, micrometres) as a source gives
            them; None where it is unknown, or where ``coords`` are no lattice or count patches already.
        positions: ``(N, c)`` the source's own coordinates, of step ``stride``, where packing has made ``coords`` count
            patches; else None.
        attributes: what else the source says of the bag, JSON-able: the magnification, the encoder, ...
    """

    x: np.ndarray
    y: Label | None = None
    key: str = ""
    coords: np.ndarray | None = None
    y_inst: np.ndarray | None = None
    adj: Adjacency | None = None
    stride: float | None = None
    positions: np.ndarray | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _PER_INSTANCE:
            value = _as_array(getattr(self, name), name)
            object.__setattr__(self, name, value)
            if value is not None and (value.ndim == 0 or len(value) != len(self.x)):
                raise LengthError(
                    f"bag {self.key!r}: {name} has shape {value.shape}, expected {len(self.x)} rows, one per instance"
                    + ("" if len(self.x) else ": x has no instances")
                )
        if self.adj is not None and self.adj.num_nodes != len(self.x):
            raise ValueError(f"bag {self.key!r}: adj has {self.adj.num_nodes} nodes for {len(self.x)} instances")

    @property
    def num_instances(self) -> int:
        return len(self.x)

    def part(self, rank: int, num_ranks: int) -> Bag:
        """This rank's instances where ``num_ranks`` share the bag, a run of N / num_ranks of them, as views.

        Edges to other parts are kept: their columns count from the part's first instance too, and lie beyond its rows.
        """
        start, end = part_bounds(len(self.x), rank, num_ranks)
        cut = {name: None if (rows := getattr(self, name)) is None else rows[start:end] for name in _PER_INSTANCE}
        adj = None if self.adj is None else self.adj.part(start, end)
        return replace(self, adj=adj, **cut)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PackedBags:
    """B bags laid end to end.

    Attributes:
        x: ``(T, P)`` features (or ``(T, ...)`` raw instances), in the precision they are stored in.
        offsets: ``(B + 1,)`` int64; bag ``b`` owns rows ``offsets[b] : offsets[b + 1]``.
        sizes: the number of instances of each bag, on the host.
        y: ``(B,)`` or ``(B, K)`` labels, or None.
        y_inst: ``(T,)`` int64 instance labels, -1 = unknown, or None.
        coords: ``(T, c)`` positions, or None.
        adj: one block-diagonal graph over the T instances, or None.
        keys: the names of the bags.
        padded_size: N of the padded batch that the pack came from, or None.
        padded_index: ``(T,)`` int64, place of each instance in that batch's flattened ``(B * N)``; None means that
            the instances of each bag come first in their row.
        parts: where the bags are shared out over ranks (:func:`bigbag.ops.join.join_parts`): who holds what.
    """

    x: Tensor
    offsets: Tensor
    sizes: tuple[int, ...]
    y: Tensor | None = None
    y_inst: Tensor | None = None
    coords: Tensor | None = None
    adj: Adjacency | None = None
    keys: tuple[str, ...] = ()
    padded_size: int | None = field(default=None, repr=False)
    padded_index: Tensor | None = field(default=None, repr=False)
    parts: Parts | None = field(default=None, repr=False)

    @property
    def num_bags(self) -> int:
        return len(self.sizes)

    @property
    def num_instances(self) -> int:
        return self.x.shape[0]

    @cached_property
    def segments(self) -> Segments:
        return Segments(self.offsets, self.sizes, self.parts)

    @property
    def device(self) -> torch.device:
        return self.x.device

    def with_x(self, x: Tensor) -> PackedBags:
        """The same bags with other instance features."""
        return replace(self, x=x)

    @staticmethod
    def from_bags(
        bags: Sequence[Bag],
        *,
        dtype: torch.dtype | None = None,
        allocate: Callable[[int], Tensor] | None = None,
        share_x: bool = False,
    ) -> PackedBags:
        """Lay ``bags`` end to end in one buffer, so that moving the pack to a device is a single copy.

        Optional fields (``y``, ``coords``, ``adj``) are kept where every bag has them, ``y_inst`` where one has it: the
        instances of the others are unknown.

        Args:
            bags: at least one bag, all of the same feature shape and dtype.
            dtype: precision of ``x`` in the pack, converted while it is copied; None: that of the bags.
            allocate: gives a byte tensor of at least so many bytes to lay the pack in; None: a new one.
            share_x: ``x`` of the one bag there is stays where it is, as it is stored: in a mapped file, whose pages are
                read when they are needed. It must not be written to.

        Raises:
            ValueError: no bag, or bags of different feature shapes (both keys are named); ``share_x`` of several bags.
        """
        if not bags:
            raise ValueError("PackedBags.from_bags: expected at least one bag, got none")
        _check_same_features(bags)
        if share_x and len(bags) > 1:
            raise ValueError(f"PackedBags.from_bags: share_x is for one bag by itself, got {len(bags)}")
        sizes = tuple(bag.num_instances for bag in bags)
        arrays: dict[str, list[np.ndarray]] = {} if share_x else {"x": [bag.x for bag in bags]}
        arrays["offsets"] = [np.asarray([0, *accumulate(sizes)], dtype=np.int64)]
        if all(bag.y is not None for bag in bags):
            labels = np.asarray([bag.y for bag in bags])
            arrays["y"] = [labels.astype(np.int64 if labels.dtype.kind in "iub" else np.float32)]
        if any(bag.y_inst is not None for bag in bags):
            arrays["y_inst"] = [
                np.full(bag.num_instances, -1) if bag.y_inst is None else bag.y_inst.astype(np.int64) for bag in bags
            ]
        if all(bag.coords is not None for bag in bags):
            arrays["coords"] = [bag.coords for bag in bags]  # type: ignore[misc]
        graphs = [bag.adj for bag in bags if bag.adj is not None]
        if len(graphs) == len(bags):
            arrays |= _block_diagonal(graphs)
        parts = _concatenate_in_one_buffer(arrays, {} if dtype is None else {"x": dtype}, allocate or _new_buffer)
        if share_x:
            parts["x"] = _tensor_of(bags[0].x)
        adj = None
        if len(graphs) == len(bags):
            symmetric = all(graph.symmetric for graph in graphs)
            adj = Adjacency(parts.pop("crow"), parts.pop("col"), parts.pop("weight", None), symmetric)
        return PackedBags(sizes=sizes, adj=adj, keys=tuple(bag.key for bag in bags), **parts)

    @staticmethod
    def from_padded(
        X: Tensor,
        mask: Tensor | None = None,
        adj: Tensor | None = None,
        coords: Tensor | None = None,
        y: Tensor | None = None,
        y_inst: Tensor | None = None,
    ) -> PackedBags:
        """Pack a padded batch, dropping the rows that ``mask`` rules out.

        Args:
            X: ``(B, N, ...)``.
            mask: ``(B, N)``, any dtype; zero or False marks padding, anywhere in a row. None: every row counts.
            adj: ``(B, N, N)``, dense or torch sparse COO. Edges of masked instances are dropped.
            coords: ``(B, N, c)``.
            y: ``(B, ...)``.
            y_inst: ``(B, N)``.

        Raises:
            ValueError: shapes that do not fit ``X``.
        """
        batch, length = X.shape[:2]
        for name, value, rank in (("mask", mask, 2), ("adj", adj, 3), ("coords", coords, 3), ("y_inst", y_inst, 2)):
            expected = (batch, length, length)[:rank] if name == "adj" else (batch, length)
            if value is None:
                continue
            # Further dimensions belong to what each instance has; a mask has none.
            fits = value.dim() == rank if name in ("mask", "adj") else value.dim() >= rank
            if not fits or tuple(value.shape[: len(expected)]) != expected:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected} to go with X")
        sizes = [length] * batch if mask is None else (mask != 0).sum(1).tolist()
        # A batch without padding, as a bag alone always is, need not be copied.
        padded = mask is not None and any(size < length for size in sizes)
        index = torch.nonzero((mask != 0).reshape(-1)).squeeze(1) if mask is not None and padded else None

        def pack(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            flat = value.reshape(batch * length, *value.shape[2:])
            return flat if index is None else flat.index_select(0, index)

        x = pack(X)
        assert x is not None
        segments = Segments.from_sizes(sizes, X.device)
        return PackedBags(
            x=x,
            offsets=segments.offsets,
            sizes=segments.sizes,
            y=y,
            y_inst=pack(y_inst),
            coords=pack(coords),
            adj=None if adj is None else Adjacency.from_padded(adj, index, segments.num_instances),
            keys=tuple(str(i) for i in range(batch)),
            padded_size=length,
            padded_index=index,
        )

    def to_padded(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """``(T, ...)`` per-instance values as ``(B, N, ...)``, with ``fill`` in the padded places.

        N is that of the batch the pack came from, otherwise the largest bag of the pack.
        """
        length = self.padded_size if self.padded_size is not None else max(self.sizes, default=0)
        if self.padded_size is not None and self.padded_index is None:
            return values.reshape(self.num_bags, length, *values.shape[1:])
        index = self.padded_index
        if index is None:
            bag = self.segments.bag_of_instance
            index = torch.arange(self.num_instances, device=values.device) - self.offsets[bag] + bag * length
        flat = values.new_full((self.num_bags * length, *values.shape[1:]), fill)
        return flat.index_copy(0, index, values).reshape(self.num_bags, length, *values.shape[1:])

    def mask(self) -> Tensor:
        """``(B, N)`` bool: True where :meth:`to_padded` puts an instance."""
        return self.to_padded(torch.ones(self.num_instances, dtype=torch.bool, device=self.device), False)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBags:
        """The pack on ``device``; one copy if its tensors share one buffer."""
        return self._map_buffer(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBags:
        """The pack in page-locked memory, from which copies to the device need not wait."""
        return self._map_buffer(lambda t: t.pin_memory())

    def _map_buffer(self, move: Callable[[Tensor], Tensor]) -> PackedBags:
        """Apply ``move`` to every tensor, or once to the buffer that they all are views of."""
        tensors = [t for t in (getattr(self, f.name) for f in fields(self)) if isinstance(t, Tensor)]
        if self.adj is not None:
            tensors += [t for t in (self.adj.crow, self.adj.col, self.adj.weight) if t is not None]
        storage = self.x.untyped_storage()
        if all(t.untyped_storage().data_ptr() == storage.data_ptr() and t.is_contiguous() for t in tensors):
            whole = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
            moved = move(whole)

            def view(t: Tensor) -> Tensor:
                start = t.storage_offset() * t.element_size()
                return moved[start : start + t.numel() * t.element_size()].view(t.dtype).view(t.shape)
        else:

            def view(t: Tensor) -> Tensor:
                return move(t)

        changes: dict[str, Any] = {
            f.name: view(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        if self.adj is not None:
            weight = None if self.adj.weight is None else view(self.adj.weight)
            changes["adj"] = replace(self.adj, crow=view(self.adj.crow), col=view(self.adj.col), weight=weight)
        return replace(self, **changes)


def _check_same_features(bags: Sequence[Bag]) -> None:
    first = bags[0]
    for bag in bags:
        if bag.x.shape[1:] != first.x.shape[1:] or bag.x.dtype != first.x.dtype:
            raise ValueError(
                f"bag {bag.key!r} has features {bag.x.shape[1:]} {bag.x.dtype}, but bag {first.key!r} has "
                f"{first.x.shape[1:]} {first.x.dtype}: bags of one data set share feature shape and dtype"
            )


def _new_buffer(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def _block_diagonal(graphs: Sequence[Adjacency]) -> dict[str, list[np.ndarray]]:
    """Arrays which, end to end, are the CSR of :meth:`Adjacency.block_diagonal`; numpy alone keeps to this thread."""
    nodes = [0, *accumulate(graph.num_nodes for graph in graphs)]
    edges = [0, *accumulate(graph.num_edges for graph in graphs)]
    arrays = {
        "crow": [np.zeros(1, np.int64), *(graph.crow.numpy()[1:] + first for graph, first in zip(graphs, edges))],
        "col": [graph.col.numpy() + np.int32(first) for graph, first in zip(graphs, nodes)],
    }
    if any(graph.weight is not None for graph in graphs):
        arrays["weight"] = [
            np.ones(graph.num_edges, np.float32) if graph.weight is None else graph.weight.numpy() for graph in graphs
        ]
    return arrays


def _concatenate_in_one_buffer(
    arrays: dict[str, list[np.ndarray]], dtypes: dict[str, torch.dtype], allocate: Callable[[int], Tensor]
) -> dict[str, Any]:
    """Concatenate each list along its first axis, all results being views of one byte buffer.

    Each comes in its own precision, or in that of ``dtypes``.
    """
    layout: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]] = {}
    end = 0
    for name, parts in arrays.items():
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        dtype = dtypes.get(name, _torch_dtype(parts[0]))
        size = dtype.itemsize * math.prod(shape)
        layout[name] = (end, end + size, shape, dtype)
        end += -(-size // _ALIGN_BYTES) * _ALIGN_BYTES
    buffer = allocate(end)
    tensors = {}
    for name, (start, stop, shape, dtype) in layout.items():
        target = buffer[start:stop].view(dtype).view(shape)
        row = 0
        for part in arrays[name]:
            _copy(part, target[row : row + len(part)])
            row += len(part)
        tensors[name] = target
    return tensors


def _tensor_of(array: np.ndarray) -> Tensor:
    """``array`` as a tensor that must only be read: torch has no read-only tensors, and warns of a map of a shard."""
    interface = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}
    # What refers to the memory keeps ``array``, and with it the map.
    return torch.from_numpy(np.asarray(SimpleNamespace(__array_interface__=interface, owner=array)))


def _copy(source: np.ndarray, target: Tensor) -> None:
    """Copy ``source`` into ``target``, in the precision of ``target``; torch uses all its threads for it."""
    values = _tensor_of(source)
    if target.dtype != torch.bfloat16:
        target.copy_(values)
        return
    # float16 has no fast way to bfloat16 but by way of float32, in pieces that stay in the cache.
    scratch = torch.empty(_PIECE)
    for piece, part in zip(values.reshape(-1).split(_PIECE), target.view(-1).split(_PIECE)):
        part.copy_(scratch[: len(part)].copy_(piece))


def _torch_dtype(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype
