"""What a bag must satisfy to be packed: one clear error for each way in which it can be wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bigbag.bags import Adjacency, Bag, Label
from bigbag.data.sources.base import SourceEntry

_CHUNK = 1 << 22
# Sign, exponent, mantissa: NaN and infinity are the numbers whose exponent bits are all ones.
_EXPONENT: dict[np.dtype, tuple[Any, int]] = {
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float64): (np.uint64, 0x7FF0000000000000),
}


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, by an integer test on the exponent bits in bounded memory."""
    if values.dtype not in _EXPONENT:
        return True
    integer, mask = _EXPONENT[values.dtype]
    bits = np.ascontiguousarray(values).reshape(-1).view(integer)
    buffer = np.empty(min(_CHUNK, bits.size), dtype=integer)
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK]
        exponent = np.bitwise_and(part, integer(mask), out=buffer[: part.size])
        if exponent.max() == mask:
            return False
    return True


def plain_label(label: Any) -> Label | None:
    """``label`` without numpy: an int, a float, a list of them, or None."""
    if label is None:
        return None
    value = np.asarray(label).tolist()
    if isinstance(value, list):
        return [int(number) if isinstance(number, bool) else number for number in value]
    return int(value) if isinstance(value, bool) else value


def check_entries(entries: Sequence[SourceEntry], unlabelled: str) -> None:
    """Check what is known of the bags before any is read.

    Raises:
        ValueError: no bags, a bag without a name, a name twice, a missing or non-finite label.
    """
    if not entries:
        raise ValueError("the source has no bags: check its folder and its arguments")
    seen: dict[str, SourceEntry] = {}
    for entry in entries:
        if not entry.name:
            raise ValueError(f"a bag read from {entry.path!r} has an empty name: give every bag a unique name")
        if entry.name in seen:
            raise ValueError(
                f"two bags are called {entry.name!r} ({seen[entry.name].path or 'generated'} and "
                f"{entry.path or 'generated'}): names must be unique; rename one of them"
            )
        seen[entry.name] = entry
        if entry.label is None and unlabelled == "error":
            raise ValueError(
                f"bag {entry.name!r}{_at(entry)}: label is missing; add it to the labels of the source, or pack "
                'for prediction only with unlabelled="keep"'
            )
        numbers: Sequence[float] = _as_list(entry.label)
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise ValueError(f"bag {entry.name!r}{_at(entry)}: label {entry.label!r}, expected finite numbers")


def check_bag(bag: Bag, entry: SourceEntry, dtype: str) -> Bag:
    """The bag as it will be stored: features cast to ``dtype``, everything checked.

    Raises:
        ValueError: the first thing that is wrong, with bag, path, field, expected, got and the remedy.
    """
    where = f"bag {entry.name!r}{_at(entry)}"
    if bag.x.ndim < 2:
        raise ValueError(f"{where}: x has shape {bag.x.shape}, expected (N, P), one row per instance")
    for field in ("x", "coords", "y_inst"):
        values = getattr(bag, field)
        kinds = "biu" if field == "y_inst" else "biuf"
        if values is not None and (values.dtype.kind not in kinds or values.dtype == np.longdouble):
            raise ValueError(f"{where}: {field} is of type {values.dtype}, expected {_kind_names(kinds)}")
    if bag.coords is not None and (bag.coords.ndim != 2 or not all_finite(bag.coords)):
        raise ValueError(f"{where}: coords has shape {bag.coords.shape}, expected finite (N, c) positions")
    if bag.y_inst is not None and bag.y_inst.shape != (bag.num_instances,):
        raise ValueError(
            f"{where}: y_inst has shape {bag.y_inst.shape}, expected ({bag.num_instances},), one label per instance"
        )
    if bag.adj is not None:
        _check_adjacency(bag.adj, where)
    return replace(bag, x=_cast(bag.x, dtype, where))


def label_warning(bag: Bag, entry: SourceEntry) -> str | None:
    """A remark where binary instance labels contradict the bag's label ``y = max(y_inst)``, else None."""
    if bag.y_inst is None or not isinstance(entry.label, (int, float)) or entry.label not in (0, 1):
        return None
    known = bag.y_inst[bag.y_inst >= 0]
    if known.size == 0 or known.max() > 1:
        return None
    if entry.label == 0 and known.max() == 1:
        return f"bag {entry.name!r}{_at(entry)}: label 0, but {int((known == 1).sum())} instances are labelled 1"
    if entry.label == 1 and known.max() == 0 and known.size == bag.num_instances:
        return f"bag {entry.name!r}{_at(entry)}: label 1, but all {known.size} instances are labelled 0"
    return None


def _cast(x: np.ndarray, dtype: str, where: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.ascontiguousarray(x, dtype=dtype)
    if dtype == "uint8" and not np.array_equal(stored, x):
        raise ValueError(f"{where}: x holds values that uint8 cannot, expected integers from 0 to 255; use float16")
    if all_finite(stored):
        return stored
    flat = x.reshape(len(x), -1)
    bad = ~np.isfinite(flat)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"{where}: x[{row}, {column}] is {flat[row, column]}, expected finite numbers; {int(bad.sum())} values "
            f"in {int(bad.any(1).sum())} of {len(x)} instances are NaN or infinite: extract the features again"
        )
    row, column = np.argwhere(~np.isfinite(stored.reshape(len(x), -1)))[0]
    raise ValueError(
        f"{where}: x[{row}, {column}] = {flat[row, column]} overflows {dtype} (largest number "
        f"{np.finfo(dtype).max}); store float32, or scale the features"
    )


def _check_adjacency(adj: Adjacency, where: str) -> None:
    crow, col, num_nodes = adj.crow, adj.col, adj.num_nodes
    if int(crow[0]) != 0 or int(crow[-1]) != adj.num_edges or bool((crow.diff() < 0).any()):
        raise ValueError(f"{where}: adj.crow must rise from 0 to the number of edges, {adj.num_edges}")
    if adj.num_edges and (int(col.min()) < 0 or int(col.max()) >= num_nodes):
        raise ValueError(
            f"{where}: adj.col holds {int(col.min())} to {int(col.max())}, expected instances from 0 to {num_nodes - 1}"
        )
    if adj.weight is not None and (adj.weight.shape != col.shape or not bool(torch.isfinite(adj.weight).all())):
        raise ValueError(f"{where}: adj.weight must have one finite number for each of {adj.num_edges} edges")


def _at(entry: SourceEntry) -> str:
    return f" ({entry.path})" if entry.path else ""


def _as_list(label: Label | None) -> Sequence[float]:
    if label is None:
        return []
    return [label] if isinstance(label, (int, float)) else label


def _kind_names(kinds: str) -> str:
    return "integers" if kinds == "biu" else "numbers"
