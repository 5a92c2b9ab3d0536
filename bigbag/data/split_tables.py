"""Tables of splits: those that the field writes, read; and the one that every run leaves behind."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from bigbag.data.divide import Splittable
from bigbag.data.names import bare_name
from bigbag.data.table import read_table

logger = logging.getLogger(__name__)

_BAG_COLUMNS = ("bag_name", "name", "slide_id", "slide", "slide_name", "bag", "bag_id", "wsi", "image_id", "image",
                "filename", "file_name", "file", "key")  # fmt: skip
_PATIENT_COLUMNS = ("case_id", "case", "patient", "patient_id", "pat_id", "participant", "submitter_id")
_SPLIT_COLUMNS = ("split", "set", "subset", "partition")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
           "tune": "val", "test": "test", "testing": "test"}  # fmt: skip
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False, "yes": True, "no": False}
_FOLD = re.compile(r"(?:fold|split)[_ -]?(\d+)")
_NONE = ("", "nan", "none", "na", "null")
_LAYOUTS = (
    "a column of names and one called split (train, val, test), or fold_0, fold_1, ... of the same values, or fold "
    "(the number of the fold that tests the bag), or train, val, test of true and false; or columns train, val, test "
    "of names"
)

Assigned = list[tuple[str, str, int]]  # name, split, line


def read_splits(path: str | Path, bags: Sequence[Splittable], fold: int = 0) -> list[str | None]:
    """The split of each bag by a table.

    A line that names a patient instead of a bag stands for all bags of the patient. Names match with or without
    folder and extension. Bags that are not in the table have no split; these, and names that are no bag, are counted
    in a warning.

    Args:
        path: CSV or TSV with a header, in one of these layouts: names and ``split``; names and ``fold_0``, ``fold_1``,
            ... (Patho-Bench); names and ``fold``, the fold that tests the bag; names and the truth values ``train``,
            ``val``, ``test`` (CLAM's ``splits_0_bool.csv``); or columns ``train``, ``val``, ``test`` of names (CLAM's
            ``splits_0.csv``). ``{fold}`` in it stands for the number of the fold.
        bags: the bags, with name and patient.
        fold: number of the fold, where the table or its name has several.

    Raises:
        ValueError: no such file, another layout, a bag in two splits, no fold of that number, or no bag that is known.
    """
    file = Path(str(path).replace("{fold}", str(fold)))
    return _match(parse_splits(file, fold), bags, str(file))


def count_folds(path: str) -> int:
    """Number of folds of a table: of its columns, or of its files where the name has ``{fold}``.

    Raises:
        ValueError: a table without folds.
    """
    if "{fold}" in path:
        count = 0
        while Path(path.replace("{fold}", str(count))).is_file():
            count += 1
        if count:
            return count
        raise ValueError(f"{path.replace('{fold}', '0')}: no such file, expected the first fold there")
    columns, rows = _read(Path(path))
    numbers = {int(match[1]) for name in columns if (match := _FOLD.fullmatch(name))}
    if not numbers and "fold" in columns:
        numbers = {_fold_number(path, row["fold"], line) for line, row in rows if row["fold"].lower() not in _NONE}
    if not numbers:
        raise ValueError(f"{path}: has no folds (columns {', '.join(columns)})")
    return max(numbers) + 1


def splits_table(bags: Sequence[Splittable], splits: Sequence[str | None]) -> str:
    """The table that a run saves as ``splits.csv``, and that :func:`read_splits` reads back."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "split", "patient", "label"])
    for bag, split in zip(bags, splits):
        label = bag.label if isinstance(bag.label, int | float) or bag.label is None else json.dumps(list(bag.label))
        writer.writerow([bag.name, split or "", bag.patient or "", "" if label is None else label])
    return text.getvalue()


def parse_splits(file: Path, fold: int) -> Assigned:
    """Name, split and line of every assignment in a table; see :func:`read_splits`."""
    columns, rows = _read(file)
    names = _name_column(columns)
    split = next((name for name in _SPLIT_COLUMNS if name in columns), None)
    folds = {int(match[1]): name for name in columns if (match := _FOLD.fullmatch(name))}
    parts = {_SPLITS[name]: name for name in columns if name in _SPLITS}
    if split is not None and names is not None:
        return [(row[names], split_name(row[split]), line) for line, row in rows if row[split].lower() not in _NONE]
    if folds and names is not None:
        if fold not in folds:
            raise ValueError(f"{file}: has the folds {', '.join(map(str, sorted(folds)))}, but not fold {fold}")
        cells = [(row[names], row[folds[fold]], line) for line, row in rows]
        return [(name, split_name(cell), line) for name, cell, line in cells if cell.lower() not in _NONE]
    if "train" in parts:
        return _by_parts(rows, parts, columns[0] if names is None else names)
    if "fold" in columns and names is not None:
        numbers = [(row[names], _fold_number(file, row["fold"], line), line) for line, row in rows]
        if fold not in {number for _, number, _ in numbers}:
            raise ValueError(f"{file}: no bag is in fold {fold}")
        return [(name, "test" if number == fold else "train", line) for name, number, line in numbers]
    raise ValueError(f"{file}: columns {', '.join(columns)}; expected {_LAYOUTS}")


def _by_parts(rows: list[tuple[int, dict[str, str]]], parts: dict[str, str], names: str) -> Assigned:
    """Columns train, val and test: truth values beside a name, or names themselves."""
    cells = [(line, row, split, row[column]) for line, row in rows for split, column in parts.items()]
    filled = [(line, row, split, cell) for line, row, split, cell in cells if cell.lower() not in _NONE]
    if names not in parts.values() and all(cell.lower() in _BOOLEANS for *_, cell in filled):
        return [(row[names], split, line) for line, row, split, cell in filled if _BOOLEANS[cell.lower()]]
    return [(cell, split, line) for line, _, split, cell in filled]


def _match(assigned: Assigned, bags: Sequence[Splittable], where: str) -> list[str | None]:
    exact: dict[str, list[int]] = {}
    bare: dict[str, list[int]] = {}
    for i, bag in enumerate(bags):
        exact.setdefault(bag.name, []).append(i)
        bare.setdefault(bare_name(bag.name), []).append(i)
    patients: dict[str, list[int]] = {}
    for i, bag in enumerate(bags):
        if bag.patient is not None:
            patients.setdefault(bag.patient, []).append(i)
    splits: list[str | None] = [None] * len(bags)
    strangers = []
    for name, split, line in assigned:
        found = exact.get(name) or bare.get(bare_name(name)) or patients.get(name)
        if not found:
            strangers.append(name)
            continue
        for i in found:
            if splits[i] not in (None, split):
                raise ValueError(f"{where}, line {line}: bag {bags[i].name!r} is in {splits[i]} and in {split}")
            splits[i] = split
    without = [bag.name for bag, split in zip(bags, splits) if split is None]
    if len(without) == len(bags):
        shown = f"{strangers[0]!r}" if strangers else "nothing"
        raise ValueError(f"{where}: names none of the {len(bags)} bags: it has {shown}, a bag is {bags[0].name!r}")
    for names, text in ((strangers, "names in it are no bags of the set"), (without, "bags have no split in it")):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            logger.warning("%s: %d %s: %s", where, len(names), text, shown)
    return splits


def _read(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Column names in lower case, and the lines with their numbers."""
    table = read_table(path)
    columns = [name.lower() for name in table.columns]
    return columns, [(line, {name.lower(): cell for name, cell in row.items()}) for line, row in table]


def _name_column(columns: Sequence[str]) -> str | None:
    """The column of bags, else of patients, else the first one where it has no name, as an index has none."""
    found = [name for name in (*_BAG_COLUMNS, *_PATIENT_COLUMNS) if name in columns]
    return found[0] if found else "" if columns[0] == "" else None


def split_name(cell: str) -> str:
    """train, val or test for their many names; other names as they are."""
    return _SPLITS.get(cell.lower(), cell)


def _fold_number(path: str | Path, cell: str, line: int) -> int:
    try:
        return int(float(cell))
    except ValueError:
        raise ValueError(f"{path}, line {line}: fold is {cell!r}, expected a number") from None
