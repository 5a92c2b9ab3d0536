"""What bags must satisfy to be packed: one clear message for each way in which they can be wrong or odd."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bigbag.bags import Adjacency, Bag, Label
from bigbag.data.divide import Splittable
from bigbag.data.names import bare_name
from bigbag.data.report import Finding, Severity
from bigbag.data.sources.base import SourceEntry

_CHUNK = 1 << 22
# Sign, exponent, mantissa: NaN and infinity are the numbers whose exponent bits are all ones.
_EXPONENT: dict[np.dtype, tuple[Any, int]] = {
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float64): (np.uint64, 0x7FF0000000000000),
}


def _largest_exponent(values: np.ndarray) -> tuple[int, int]:
    """The largest exponent bits of floats, and those of NaN and infinity; 0 is that of zeros and subnormal numbers."""
    integer, mask = _EXPONENT[values.dtype]
    bits = np.ascontiguousarray(values).reshape(-1).view(integer)
    buffer = np.empty(min(_CHUNK, bits.size), dtype=integer)
    largest = 0
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK]
        largest = max(largest, int(np.bitwise_and(part, integer(mask), out=buffer[: part.size]).max()))
        if largest == mask:
            break
    return largest, mask


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, by an integer test on the exponent bits in bounded memory."""
    if values.dtype not in _EXPONENT:
        return True
    largest, nonfinite = _largest_exponent(values)
    return largest != nonfinite


def plain_label(label: Any) -> Label | None:
    """``label`` without numpy: an int, a float, a list of them, or None."""
    if label is None:
        return None
    value = np.asarray(label).tolist()
    if isinstance(value, list):
        return [int(number) if isinstance(number, bool) else number for number in value]
    return int(value) if isinstance(value, bool) else value


class BagError(ValueError):
    """What is wrong with a bag, and the check (of :data:`bigbag.data.report.CHECKS`) that found it."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(message)
        self.check = check


def entry_errors(entries: Sequence[SourceEntry], unlabelled: str) -> Iterator[tuple[SourceEntry, Finding]]:
    """What is wrong with single bags before any is read: no name, a name twice, a missing or non-finite label."""
    seen: dict[str, SourceEntry] = {}
    for entry in entries:

        def error(check: str, message: str, entry: SourceEntry = entry) -> tuple[SourceEntry, Finding]:
            return entry, Finding(check, "error", entry.name, message)

        if not entry.name:
            yield error("names", f"a bag read from {entry.path!r} has an empty name: give every bag a unique name")
        elif entry.name in seen:
            yield error(
                "unique_names",
                f"two bags are called {entry.name!r} ({seen[entry.name].path or 'generated'} and "
                f"{entry.path or 'generated'}): names must be unique; rename one of them",
            )
        elif entry.label is None and unlabelled == "error":
            yield error(
                "labels",
                f"{where_of(entry)}: label is missing; add it to the labels of the source, or pack for prediction "
                'only with unlabelled="keep"',
            )
        elif not all(isinstance(n, (int, float)) and math.isfinite(n) for n in _as_list(entry.label)):
            yield error("labels", f"{where_of(entry)}: label {entry.label!r}, expected finite numbers")
        seen.setdefault(entry.name, entry)


def set_findings(entries: Sequence[SourceEntry], leakage: Severity) -> Iterator[Finding]:
    """What is wrong or odd about all bags together before any is read: leakage (how bad it is), and names."""
    for patient, of in sorted(leaking_patients(entries, [entry.split for entry in entries]).items()):
        message = f"patient {patient!r} has bags in {' and '.join(of)}"
        if leakage == "error":
            message += ": put all of them into one split (--splits), or keep these splits (--leakage keep)"
        yield Finding("leakage", leakage, "", message)
    alike: dict[str, list[SourceEntry]] = defaultdict(list)
    for entry in entries:
        alike[bare_name(entry.name)].append(entry)
    for same in alike.values():
        if len({entry.name for entry in same}) > 1:
            leaks = len({entry.split for entry in same}) > 1
            listed = " and ".join(repr(entry.name) for entry in same)
            message = f"{listed} differ by folder or extension only{': one slide in two splits?' if leaks else ''}"
            yield Finding("leakage" if leaks else "unique_names", "warning", same[1].name, message)
    extended = [entry.name for entry in entries if bare_name(entry.name) != entry.name]
    if extended:
        message = f"{len(extended)} names have a folder or an extension, the first of them {extended[0]!r}"
        yield Finding("names", "warning", "", message)
    dotted = [entry.name for entry in entries if "." in bare_name(entry.name)]
    if dotted:
        message = f"{len(dotted)} names have dots in them, the first of them {dotted[0]!r}; they are kept as they are"
        yield Finding("names", "note", "", message)
    without = sum(entry.label is None for entry in entries)
    if without:
        yield Finding("labels", "note", "", f"{without} bags have no label and can only be predicted")


def leaking_patients(bags: Sequence[Splittable], splits: Sequence[str | None]) -> dict[str, list[str]]:
    """Patients with bags in several splits, and these splits."""
    found: dict[str, set[str]] = defaultdict(set)
    for bag, split in zip(bags, splits):
        if bag.patient is not None and split is not None:
            found[bag.patient].add(split)
    return {patient: sorted(of) for patient, of in found.items() if len(of) > 1}


def check_bag(bag: Bag, entry: SourceEntry, dtype: str) -> Bag:
    """The bag as it will be stored: features cast to ``dtype``, everything checked.

    Raises:
        ValueError: the first thing that is wrong, with bag, path, field, expected, got and the remedy.
    """
    where = where_of(entry)
    if bag.x.ndim < 2:
        raise BagError("type", f"{where}: x has shape {bag.x.shape}, expected (N, P), one row per instance")
    for field in ("x", "coords", "y_inst"):
        values = getattr(bag, field)
        kinds = "biu" if field == "y_inst" else "biuf"
        if values is not None and (values.dtype.kind not in kinds or values.dtype == np.longdouble):
            raise BagError("type", f"{where}: {field} is of type {values.dtype}, expected {_kind_names(kinds)}")
    if bag.coords is not None and (bag.coords.ndim != 2 or not all_finite(bag.coords)):
        check = "type" if bag.coords.ndim != 2 else "finite"
        raise BagError(check, f"{where}: coords has shape {bag.coords.shape}, expected finite (N, c) positions")
    if bag.y_inst is not None and bag.y_inst.shape != (bag.num_instances,):
        raise BagError(
            "lengths",
            f"{where}: y_inst has shape {bag.y_inst.shape}, expected ({bag.num_instances},), one label per instance",
        )
    if bag.adj is not None:
        _check_adjacency(bag.adj, where)
    _check_attributes(bag.attributes, where)
    return replace(bag, x=_cast(bag.x, dtype, where))


def label_warning(bag: Bag, entry: SourceEntry) -> str | None:
    """A remark where binary instance labels contradict the bag's label ``y = max(y_inst)``, else None."""
    if bag.y_inst is None or not isinstance(entry.label, (int, float)) or entry.label not in (0, 1):
        return None
    known = bag.y_inst[bag.y_inst >= 0]
    if known.size == 0 or known.max() > 1:
        return None
    if entry.label == 0 and known.max() == 1:
        return f"{where_of(entry)}: label 0, but {int((known == 1).sum())} instances are labelled 1"
    if entry.label == 1 and known.max() == 0 and known.size == bag.num_instances:
        return f"{where_of(entry)}: label 1, but all {known.size} instances are labelled 0"
    return None


def _cast(x: np.ndarray, dtype: str, where: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.ascontiguousarray(x, dtype=dtype)
    if dtype == "uint8" and not np.array_equal(stored, x):
        raise BagError(
            "type", f"{where}: x holds values that uint8 cannot, expected integers from 0 to 255; use float16"
        )
    if stored.dtype not in _EXPONENT:
        return stored
    largest, nonfinite = _largest_exponent(stored)
    if largest == 0 and stored.dtype.itemsize < x.dtype.itemsize and x.any():
        raise BagError(
            "finite",
            f"{where}: x is {np.abs(x).max()} at most, below the normal numbers of {dtype} (from "
            f"{np.finfo(dtype).tiny}), which would keep little or nothing of it; store float32, or scale the features",
        )
    if largest != nonfinite:
        return stored
    flat = x.reshape(len(x), -1)
    bad = ~np.isfinite(flat)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise BagError(
            "finite",
            f"{where}: x[{row}, {column}] is {flat[row, column]}, expected finite numbers; {int(bad.sum())} values "
            f"in {int(bad.any(1).sum())} of {len(x)} instances are NaN or infinite: extract the features again",
        )
    row, column = np.argwhere(~np.isfinite(stored.reshape(len(x), -1)))[0]
    raise BagError(
        "finite",
        f"{where}: x[{row}, {column}] = {flat[row, column]} overflows {dtype} (largest number "
        f"{np.finfo(dtype).max}); store float32, or scale the features",
    )


def _check_attributes(attributes: Mapping[str, Any], where: str) -> None:
    for name, value in attributes.items():
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BagError(
                "type", f"{where}: attribute {name!r} is {value!r}, which JSON can't hold ({error})"
            ) from None


def _check_adjacency(adj: Adjacency, where: str) -> None:
    crow, col, num_nodes = adj.crow, adj.col, adj.num_nodes
    if int(crow[0]) != 0 or int(crow[-1]) != adj.num_edges or bool((crow.diff() < 0).any()):
        raise BagError("graph", f"{where}: adj.crow must rise from 0 to the number of edges, {adj.num_edges}")
    if adj.num_edges and (int(col.min()) < 0 or int(col.max()) >= num_nodes):
        raise BagError(
            "graph",
            f"{where}: adj.col holds {int(col.min())} to {int(col.max())}, expected instances from 0 to "
            f"{num_nodes - 1}",
        )
    if adj.weight is not None and (adj.weight.shape != col.shape or not bool(torch.isfinite(adj.weight).all())):
        raise BagError("graph", f"{where}: adj.weight must have one finite number for each of {adj.num_edges} edges")


def where_of(entry: SourceEntry) -> str:
    """Name and path of a bag, for messages."""
    return f"bag {entry.name!r} ({entry.path})" if entry.path else f"bag {entry.name!r}"


def _as_list(label: Label | None) -> Sequence[float]:
    if label is None:
        return []
    return [label] if isinstance(label, (int, float)) else label


def _kind_names(kinds: str) -> str:
    return "integers" if kinds == "biu" else "numbers"
