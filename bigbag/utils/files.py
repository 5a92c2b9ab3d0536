"""Small helpers for files."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path


def read_csv(file: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file, each a dict from column name to text."""
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def keep_only_existing_files(path: str | Path, names: Iterable[str], ext: str = ".npy") -> list[str]:
    """Those of ``names`` for which there is a file ``path/<name><ext>``, in their order."""
    return [name for name in names if Path(f"{path}/{name}{ext}").is_file()]
