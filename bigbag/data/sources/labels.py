"""Labels and patients of slides, from a table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigbag.bags import Label
from bigbag.data.names import bare_name
from bigbag.data.split_tables import split_name
from bigbag.data.table import COLUMNS, Table, is_missing, leftover, read_table

_TCGA = re.compile(r"(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})(?:-|$)")
_SPLITS = ("train", "val", "test")
_EVENTS = {"1": 1, "0": 0, "true": 1, "false": 0, "yes": 1, "no": 0, "dead": 1, "deceased": 1, "alive": 0, "living": 0,
           "event": 1, "censored": 0, "1:deceased": 1, "0:living": 0}  # fmt: skip


@dataclass(frozen=True)
class Annotation:
    """What a table says of one slide, or of all slides of one patient; ``line`` is where."""

    label: Label | None
    patient: str | None
    split: str | None
    line: int


@dataclass(frozen=True)
class Annotations:
    """A table of labels, understood.

    Attributes:
        path: the table.
        slides: what it says, by name of slide; empty where it names patients only.
        patients: what it says, by patient; empty where it names slides.
        classes: texts of the classes in the order of their numbers; empty where labels are numbers.
        columns: the column taken for each role.
    """

    path: str
    slides: dict[str, Annotation]
    patients: dict[str, Annotation]
    classes: tuple[str, ...]
    columns: dict[str, Any]

    def find(self, slide: str, patient: str | None) -> Annotation | None:
        """What is said of ``slide``, or of its patient where the table names patients only."""
        return self.patients.get(patient or slide) if self.patients else self.slides.get(slide)


@dataclass(frozen=True)
class Reading:
    """How a table of labels is to be read.

    Attributes:
        columns: column of each role ("slide", "patient", "label", "split", "time", "event") where it is not the one
            that its name tells; "label" may be a list of columns, for a label of several numbers.
        classes: texts of the classes in the order of their numbers; empty: sorted.
        name_of: from a cell or a file's name to the name of the slide.
    """

    columns: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()
    name_of: Callable[[str], str] = bare_name

    def __post_init__(self) -> None:
        for role in self.columns:
            if role not in COLUMNS:
                raise ValueError(f"columns: no role is called {role!r}; there are {', '.join(COLUMNS)}")


def read_labels(path: str, how: Reading) -> Annotations:
    """Labels, patients and splits of a table with one line for each slide or each patient.

    The label is the column that is named or whose name says so; else time and event, if both are there; else the only
    column that is left over. Texts become class numbers in sorted order. ``status`` and the like may be words.

    Raises:
        ValueError: no column of slides or patients, no or several columns that could be the label, a label that is no
            number among numbers, or a slide with two labels.
    """
    table = _unfolded(_read_parts(path) if "{split}" in path else read_table(path))
    given = {role: name for role, name in how.columns.items() if isinstance(name, str)}
    slide, patient, split = (table.column(role, given) for role in ("slide", "patient", "split"))
    if slide is None and patient is None and table.columns[0] == "":
        slide = ""  # pandas writes an index without a name
    if slide is None and patient is None:
        raise ValueError(
            f"{path}: columns {', '.join(table.columns)}: none of them is known to name slides or patients; say which: "
            "columns={slide: ...} (--column slide=...)"
        )
    label = _label_columns(table, how, given, [slide, patient, split])
    columns = {"slide": slide, "patient": patient, "split": split, "label": label}
    raw = [[row[name] for name in label] for row in table.rows]
    labels, classes = _numbers(table, raw, columns, how.classes)
    slides: dict[str, Annotation] = {}
    patients: dict[str, Annotation] = {}
    for (line, row), value in zip(table, labels):
        person = _cell(row, patient)
        part = _cell(row, split)
        found = Annotation(value, person, None if part is None else split_name(part), line)
        name = person if slide is None else how.name_of(row[slide])
        if name is None or is_missing(name):
            raise ValueError(f"{path}, line {line}: {slide or patient} is empty")
        _put(patients if slide is None else slides, name, found, path)
    return Annotations(path, slides, patients, classes, {role: name for role, name in columns.items() if name})


def _read_parts(path: str) -> Table:
    """One table of several: ``{split}`` in their name is train, val, test, and becomes a column."""
    tables = {name: Path(path.replace("{split}", name)) for name in _SPLITS}
    read = {name: read_table(file) for name, file in tables.items() if name == "train" or file.is_file()}
    first = read["train"]
    for table in read.values():
        if table.columns != first.columns:
            raise ValueError(f"{table.path}: columns {', '.join(table.columns)}, expected those of {first.path}")
    rows = tuple({**row, "split": name} for name, table in read.items() for row in table.rows)
    lines = tuple(line for table in read.values() for line in table.lines)
    return Table(Path(path), (*(name for name in first.columns if name != "split"), "split"), rows, lines)


def _unfolded(table: Table) -> Table:
    """A table of ``train, train_label, val, ...`` (TransMIL, MIL_BASELINE) with one line for each slide."""
    parts = {split: next((n for n in (split, f"{split}_slide_path") if n in table.columns), None) for split in _SPLITS}
    found = {split: name for split, name in parts.items() if name is not None and f"{split}_label" in table.columns}
    if not found:
        return table
    cells = [
        (line, {"slide": row[name], "label": row[f"{split}_label"], "split": split})
        for split, name in found.items()
        for line, row in table
        if not is_missing(row[name])
    ]
    rows, lines = tuple(row for _, row in cells), tuple(line for line, _ in cells)
    return Table(table.path, ("slide", "label", "split"), rows, lines)


def tcga_patient(name: str) -> str | None:
    """The patient in the barcode of a TCGA slide, ``TCGA-XX-XXXX``, or None for other names."""
    match = _TCGA.match(name)
    return match[1] if match else None


def _label_columns(table: Table, how: Reading, given: dict[str, str], used: Sequence[str | None]) -> list[str]:
    named = how.columns.get("label")
    if isinstance(named, list | tuple):
        return [table.need(str(name), "label") for name in named]
    label = table.column("label", given)
    time, event = table.column("time", given), table.column("event", given)
    survival = [time, event] if time is not None and event is not None else []
    if "label" not in given and survival and ("time" in given or "event" in given or label is None):
        return [name for name in survival if name]
    if label is not None:
        return [label]
    left = leftover(table, used)
    if len(left) == 1:
        return left
    there = ", ".join(left) or "no other columns"
    raise ValueError(
        f"{table.path}: none of its columns is known to hold labels; there are {there}: say which, "
        "columns={label: ...} (--column label=...), or time and event"
    )


def _numbers(
    table: Table, raw: list[list[str]], columns: Mapping[str, Any], classes: Sequence[str]
) -> tuple[list[Label | None], tuple[str, ...]]:
    """Labels as numbers, and the texts of the classes where they were texts."""
    names = columns["label"]
    if len(names) == 2 and names[1].lower() in COLUMNS["event"]:
        return [_survival(table, line, names, cells) for line, cells in zip(table.lines, raw)], ()
    if len(names) > 1:
        return [_several(table, line, names, cells) for line, cells in zip(table.lines, raw)], ()
    return number_labels(str(table.path), list(zip(table.lines, (row[0] for row in raw))), classes)


def number_labels(
    path: str, cells: Sequence[tuple[int, str]], classes: Sequence[str]
) -> tuple[list[Label | None], tuple[str, ...]]:
    """Labels of one column: numbers as they are, texts as class numbers; and the texts of the classes.

    Args:
        path: the table, for messages.
        cells: line and text of each label.
        classes: texts of the classes in the order of their numbers; empty: sorted, unless all labels are numbers.

    Raises:
        ValueError: a label that is none of ``classes``, or one that is no number among numbers.
    """
    known = [cell for _, cell in cells if not is_missing(cell)]
    numbers = [_as_number(cell) is not None for cell in known]
    if not classes and all(numbers):
        return [None if is_missing(cell) else _as_number(cell) for _, cell in cells], ()
    if not classes and any(numbers):
        line, odd = next((line, cell) for line, cell in cells if not is_missing(cell) and _as_number(cell) is None)
        raise ValueError(
            f"{path}, line {line}: label {odd!r} among numbers such as {known[numbers.index(True)]!r}: correct it, or "
            "name all classes in their order: classes=[...] (--option classes=[...])"
        )
    order = tuple(str(name) for name in classes) or tuple(sorted(set(known)))
    for line, cell in cells:
        if not is_missing(cell) and cell not in order:
            raise ValueError(f"{path}, line {line}: label {cell!r}, expected one of {', '.join(order)}")
    return [None if is_missing(cell) else order.index(cell) for _, cell in cells], order


def _survival(table: Table, line: int, names: Sequence[str], cells: Sequence[str]) -> list[float] | None:
    if any(is_missing(cell) for cell in cells):
        return None
    time, event = _as_number(cells[0]), _event(cells[1])
    if time is None or event is None:
        wrong = 0 if time is None else 1
        raise ValueError(
            f"{table.path}, line {line}: {names[wrong]} is {cells[wrong]!r}, expected "
            + ("a time" if time is None else "1 or dead for an event, 0 or alive for none")
        )
    return [time, 1 - event if names[1].lower().startswith("censor") else event]


def _event(cell: str) -> int | None:
    number = _as_number(cell)
    return int(number) if number in (0, 1) else _EVENTS.get(cell.lower())


def _several(table: Table, line: int, names: Sequence[str], cells: Sequence[str]) -> list[float] | None:
    if any(is_missing(cell) for cell in cells):
        return None
    values = [_as_number(cell) for cell in cells]
    for name, cell, value in zip(names, cells, values):
        if value is None:
            raise ValueError(f"{table.path}, line {line}: {name} is {cell!r}, expected a number")
    return [value for value in values if value is not None]


def _as_number(cell: str) -> int | float | None:
    if cell.lower() in ("true", "false"):
        return int(cell.lower() == "true")
    try:
        value = float(cell)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else value


def _cell(row: Mapping[str, str], column: str | None) -> str | None:
    return None if column is None or is_missing(row[column]) else row[column]


def _put(where: dict[str, Annotation], name: str, found: Annotation, path: str) -> None:
    before = where.setdefault(name, found)
    if (before.label, before.patient, before.split) != (found.label, found.patient, found.split):
        raise ValueError(
            f"{path}: lines {before.line} and {found.line} both describe {name!r}, but differently "
            f"({before.label}, {before.patient}, {before.split} and {found.label}, {found.patient}, {found.split})"
        )
