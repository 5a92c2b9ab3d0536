"""Small data sets in tables of numbers: one line per instance, with the number of its bag."""

from __future__ import annotations

import gzip
import hashlib
import logging
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bigbag.bags import Bag
from bigbag.data.sources.base import SourceEntry

logger = logging.getLogger(__name__)


class TableSource:
    """Bags of a table (a :class:`bigbag.data.sources.Source`); a bag is positive where any of its lines is.

    With ``fold`` given, the bags of that part of a stratified ``num_folds``-fold split are the test bags, all others
    the training bags, and every feature is standardised with its mean and standard deviation over the training
    instances.

    Args:
        x: ``(T, P)`` features of all instances.
        bag_ids: ``(T,)`` bag of each instance; bags come in the order of their first instance.
        labels: ``(T,)`` label of the bag that each instance belongs to.
        name: name of the data set, the first part of each bag's name.
        path: file that the table was read from, for error messages.
        fold: number of the test fold, from 0; None leaves splits open and features as they are.
        num_folds: number of folds.
        seed: seed of the shuffle before the bags are dealt into folds.

    Raises:
        ValueError: columns of different lengths, a bag with two labels, or a fold that is not there.
    """

    patch_shape: tuple[int, int] | None = None

    def __init__(
        self,
        x: np.ndarray,
        bag_ids: np.ndarray,
        labels: np.ndarray,
        name: str = "table",
        path: str = "",
        fold: int | None = None,
        num_folds: int = 10,
        seed: int = 0,
    ) -> None:
        if not len(x) == len(bag_ids) == len(labels):
            raise ValueError(f"{name}: {len(x)} rows of features, {len(bag_ids)} bag ids, {len(labels)} labels")
        self.name = name
        ids, first, member = np.unique(bag_ids, return_index=True, return_inverse=True)
        self._x = x
        self._rows: dict[str, np.ndarray] = {}
        self._entries: list[SourceEntry] = []
        for i in np.argsort(first):
            rows = np.flatnonzero(member == i)
            found = np.unique(labels[rows])
            if len(found) != 1:
                raise ValueError(f"{name}: bag {ids[i]} has the labels {found.tolist()}, expected one ({path})")
            bag = f"{name}-{ids[i]}"
            self._rows[bag] = rows
            self._entries.append(SourceEntry(bag, label=found[0].item(), path=path))
        if fold is not None:
            self._set_fold(fold, num_folds, seed)

    def _set_fold(self, fold: int, num_folds: int, seed: int) -> None:
        from sklearn.model_selection import StratifiedKFold

        if not 0 <= fold < num_folds:
            raise ValueError(f"{self.name}: fold is {fold}, expected 0 to {num_folds - 1} with num_folds {num_folds}")
        labels = [entry.label for entry in self._entries]
        folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed).split(labels, labels)
        _, test = list(folds)[fold]
        in_test = np.isin(np.arange(len(labels)), test)
        self._entries = [replace(e, split="test" if t else "train") for e, t in zip(self._entries, in_test)]
        seen = self._x[np.concatenate([self._rows[e.name] for e in self._entries if e.split == "train"])]
        deviation = seen.std(0, dtype=np.float64)
        scaled = (self._x - seen.mean(0, dtype=np.float64)) / np.where(deviation > 0, deviation, 1.0)
        self._x = scaled.astype(np.float32)

    def entries(self) -> Sequence[SourceEntry]:
        return self._entries

    def load(self, entry: SourceEntry) -> Bag:
        return Bag(x=self._x[self._rows[entry.name]], y=entry.label, key=entry.name)

    def description(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": hashlib.sha256(np.ascontiguousarray(self._x).tobytes()).hexdigest()}


class Musk1(TableSource):
    """MUSK1: 92 molecules (47 musks), 476 conformations, 166 features (Dietterich et al. 1997).

    Args:
        root: folder of ``musk1_data``, ``musk1_bagids`` and ``musk1_labels`` (``.csv`` or ``.csv.gz``): features x
            instances, and the bag and the label of each instance.
        fold: number of the test fold, as are the arguments after it; see :class:`TableSource`.
        num_folds: number of folds.
        seed: seed of the folds.
    """

    def __init__(self, root: str, fold: int | None = None, num_folds: int = 10, seed: int = 0) -> None:
        path = _find(root, "musk1_data")
        x = np.ascontiguousarray(read_table(path).T, np.float32)
        ids = read_table(_find(root, "musk1_bagids"))[:, 0].astype(np.int64)
        labels = read_table(_find(root, "musk1_labels"))[:, 0].astype(np.int64)
        super().__init__(x, ids, labels, "musk1", str(path), fold, num_folds, seed)


class Musk2(TableSource):
    """MUSK2: 102 molecules (39 musks), 6,598 conformations, 166 features (Dietterich et al. 1997).

    Args:
        root: folder of ``musk2`` (``.csv`` or ``.csv.gz``): label, bag and features of each instance.
        fold: number of the test fold, as are the arguments after it; see :class:`TableSource`.
        num_folds: number of folds.
        seed: seed of the folds.
    """

    def __init__(self, root: str, fold: int | None = None, num_folds: int = 10, seed: int = 0) -> None:
        path = _find(root, "musk2")
        table = read_table(path)
        labels, ids = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
        x = np.ascontiguousarray(table[:, 2:], np.float32)
        super().__init__(x, ids, labels, "musk2", str(path), fold, num_folds, seed)


_BAGS = ("bag", "bag_id", "bag_name", "bags", "molecule_name", "molecule")
_LABELS = ("label", "class", "bag_label", "y", "target")


class MilTable(TableSource):
    """A classic MIL data set in one table, plain or gzipped.

    Three layouts are told apart by their first line: a header that names bag and label, columns without any number
    being left out with a warning; the UCI repository's ``clean1.data`` (bag, instance, features, label); and label,
    bag, features.

    Args:
        root: the table.
        fold: number of the test fold, as are the arguments after it; see :class:`TableSource`.
        num_folds: number of folds.
        seed: seed of the folds.

    Raises:
        ValueError: another layout, or a feature that is no number.
    """

    def __init__(self, root: str, fold: int | None = None, num_folds: int = 10, seed: int = 0) -> None:
        path = Path(root)
        if not path.is_file():
            raise ValueError(f"{root}: no such table; expected one line for each instance, with its bag and label")
        x, ids, labels = _split_columns(path)
        name = path.name.partition(".")[0]
        super().__init__(x, ids, labels, name, str(path), fold, num_folds, seed)

    @classmethod
    def detect(cls, root: Path) -> str | None:
        if not root.is_file() or not {".csv", ".data", ".tsv"} & set(root.suffixes):
            return None
        try:
            bags, label, drop, header = _layout(_lines(root), root)
        except (ValueError, OSError):
            return None
        return "one line for each instance, with its bag and label" if header else "lines of bag, label and features"


def _layout(lines: list[list[str]], path: Path) -> tuple[int, int, list[int], bool]:
    """Columns of bag and label, columns of text, and whether there is a header."""
    if not lines or len(lines[0]) < 3:
        raise ValueError(f"{path}: expected at least a bag, a label and a feature in each line")
    first, width = [cell.strip().lower() for cell in lines[0]], len(lines[0])
    bags, labels = ([i for i, cell in enumerate(first) if cell in names] for names in (_BAGS, _LABELS))
    if bags and labels and len(lines) > 1:
        rest = [i for i in range(width) if i not in (bags[0], labels[0])]
        # A decimal comma is to be refused as a feature, not to be left out as text.
        text = [i for i in rest if not any(_is_number(line[i].replace(",", ".")) for line in lines[1:])]
        return bags[0], labels[0], text, True
    if not _is_number(first[0]) and _is_number(first[-1]) and all(_is_number(cell) for cell in first[2:]):
        return 0, width - 1, [1], False
    if all(_is_number(cell) for cell in first):
        return 1, 0, [], False
    raise ValueError(
        f"{path}: its first line is neither a header with bag and label, nor bag, instance, features, label, nor "
        "label, bag, features"
    )


def _split_columns(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, bag and label of every line."""
    lines = _lines(path)
    bag, label, drop, header = _layout(lines, path)
    rows = lines[1:] if header else lines
    columns = [i for i in range(len(rows[0])) if i not in (bag, label, *drop)]
    if header and drop:
        logger.warning("%s: columns of text are left out: %s", path, ", ".join(lines[0][i] for i in drop))
    try:
        x = np.array([[row[i] for i in columns] for row in rows], np.float64).astype(np.float32)
        labels = np.array([row[label] for row in rows], np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: a feature or label is not a number ({error})") from None
    whole = labels.astype(np.int64)
    return x, np.array([row[bag] for row in rows]), whole if np.array_equal(whole, labels) else labels


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _lines(path: Path) -> list[list[str]]:
    """Cells of the lines that are not blank; tabs, commas and semicolons are told apart by the first of them."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            lines = [line for line in file.read().splitlines() if line.strip()]
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a readable table of text ({error})") from None
    delimiter = max("\t,;", key=lines[0].count) if lines else ","
    cells = [line.split(delimiter) for line in lines]
    for number, row in enumerate(cells, 1):
        if len(row) != len(cells[0]):
            raise ValueError(f"{path}: line {number} that is not blank has {len(row)} cells, the first {len(cells[0])}")
    return cells


def read_table(path: Path) -> np.ndarray:
    """A table of numbers without a header, its columns divided by tabs or commas, plain or gzipped.

    Returns:
        ``(rows, columns)`` float64.

    Raises:
        ValueError: a cell that is no number, or lines of different lengths.
    """
    try:
        table = np.array(_lines(path), dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: not a table of numbers ({error})") from None
    if not table.size:
        raise ValueError(f"{path}: is empty, expected a table of numbers")
    return table


def _find(root: str, stem: str) -> Path:
    for suffix in (".csv.gz", ".csv"):
        path = Path(root) / f"{stem}{suffix}"
        if path.is_file():
            return path
    raise ValueError(f"{Path(root) / stem}.csv: no such file (nor .csv.gz); check root of the source")
