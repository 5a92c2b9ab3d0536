"""Tables that users have: CSV, TSV or Excel with a header, and the columns that the field calls by many names."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MISSING = frozenset({"", "nan", "none", "na", "n/a", "null", "<na>", "not available", "not reported"})
"""Cells, in lower case, that hold nothing."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "slide": (
        "slide_id", "slide", "slide_name", "bag_name", "bag", "bag_id", "wsi", "wsi_name", "filename", "file_name",
        "file", "image_id", "image", "image_name", "name", "slide_path", "path", "key", "0",
    ),
    "patient": (
        "patient_id", "patient", "pat_id", "case_id", "case", "participant", "subject_id", "subject", "submitter_id",
    ),
    "label": (
        "label", "labels", "target", "bag_label", "slide_label", "wsi_label", "class", "y", "diagnosis", "isup_grade",
        "ground_truth",
    ),
    "split": ("split", "set", "subset", "partition"),
    "time": (
        "time", "time_label", "survival_months", "survival_days", "survival_time", "os_time", "os.time", "os_months",
        "os_days", "days", "months", "duration", "event_time", "followup",
    ),
    "event": (
        "event", "status", "status_label", "os_status", "os_event", "vital_status", "death", "dead", "os",
        "censorship", "censored",
    ),
}  # fmt: skip
"""Names of columns by what they mean, in lower case, the likeliest first. ``censorship`` means 1 - event."""

FOLD = re.compile(r"(?:fold|split)[_ -]?\d*")
"""Columns that assign folds."""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        path: the file.
        columns: names of its columns.
        rows: cells of each line, by column; missing ones are "".
        lines: number of each row's line in the file.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    lines: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        return iter(zip(self.lines, self.rows))

    def column(self, role: str, given: Mapping[str, str]) -> str | None:
        """The column of a role of :data:`COLUMNS`: the one ``given``, else the likeliest name; None: none is there.

        Raises:
            ValueError: the given column is not in the table.
        """
        if role in given:
            return self.need(given[role], role)
        there = {name.strip().lower(): name for name in reversed(self.columns)}
        return next((there[name] for name in COLUMNS[role] if name in there), None)

    def need(self, name: str, role: str) -> str:
        """``name``, which has to be a column.

        Raises:
            ValueError: it is not.
        """
        if name not in self.columns:
            raise ValueError(f"{self.path}: has no column {name!r} for {role}; it has {', '.join(self.columns)}")
        return name


def read_table(path: str | Path) -> Table:
    """A CSV, TSV or Excel table; commas, semicolons and tabs are told apart by the header.

    Raises:
        ValueError: no such file, no header, no lines, two columns of one name, a line with more cells than the header,
            a quote that is not closed, or no text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such table; expected a .csv, .tsv or .xlsx file with a header")
    if path.suffix.lower() in (".xlsx", ".xls"):
        numbered = list(enumerate(_excel_lines(path), 1))
    else:
        numbered = _text_lines(path)
    lines = [(number, [cell.strip() for cell in cells]) for number, cells in numbered]
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if len(lines) < 2:
        raise ValueError(f"{path}: has no lines below its header; expected one for each slide")
    columns = tuple(lines[0][1])
    lower = [name.lower() for name in columns]
    twice = next((name for i, name in enumerate(columns) if name and lower[i] in lower[:i]), None)
    if twice is not None:
        raise ValueError(f"{path}: two columns are called {twice!r}; rename or remove one of them")
    for number, cells in lines:
        if len(cells) > len(columns):
            raise ValueError(f"{path}, line {number}: {len(cells)} cells under a header of {len(columns)} columns")
    rows = tuple(dict(zip(columns, [*cells, *[""] * (len(columns) - len(cells))])) for _, cells in lines[1:])
    return Table(path, columns, rows, tuple(number for number, _ in lines[1:]))


def _text_lines(path: Path) -> list[tuple[int, list[str]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",\t;", key=first.count), strict=True)
            return [(reader.line_num, cells) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a table of text ({error}); save it as CSV in UTF-8") from None


def _excel_lines(path: Path) -> list[list[str]]:
    try:
        import openpyxl
    except ImportError:
        raise ValueError(
            f"{path}: reading Excel needs openpyxl (pip install 'bigbag[formats]'), or save the table as CSV"
        ) from None
    try:
        sheet = openpyxl.load_workbook(path, read_only=True, data_only=True).worksheets[0]
        return [["" if cell is None else str(cell) for cell in row] for row in sheet.iter_rows(values_only=True)]
    except Exception as error:  # a damaged file fails in any part of openpyxl
        raise ValueError(f"{path}: not a readable Excel table ({error}); save it as CSV") from None


def is_missing(cell: str) -> bool:
    return cell.lower() in MISSING


def leftover(table: Table, used: Sequence[str | None]) -> list[str]:
    """Columns with a name that are neither used nor assign folds."""
    return [name for name in table.columns if name and name not in used and not FOLD.fullmatch(name.lower())]
