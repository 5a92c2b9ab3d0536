"""Which layout a folder is of, and why."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from bigbag.data.sources.patho_bench import task_column

FORMATS = {
    "torchmil_folder": ("torchmil", "TorchmilFolder"),
    "nnmil": ("nnmil", "NnMil"),
    "openmil": ("openmil", "OpenMil"),
    "mil_baseline": ("openmil", "MilBaseline"),
    "trident": ("trident", "Trident"),
    "patho_bench": ("patho_bench", "PathoBench"),
    "kaczmarj": ("kaczmarj", "Kaczmarj"),
    "clam": ("clam", "Clam"),
    "stamp": ("stamp", "Stamp"),
    "slideflow": ("slideflow", "Slideflow"),
    "gigapath": ("gigapath", "GigaPath"),
    "pt_dicts": ("openmil", "PtFiles"),
    "owkin": ("owkin", "Owkin"),
    "mil_table": ("tables", "MilTable"),
    "plain": ("plain", "Plain"),
}
"""Module and class of each layout in ``bigbag.data.sources``, in the order in which they are tried."""


def format_class(name: str) -> Any:
    """The class of a layout."""
    module, class_name = FORMATS[name]
    return getattr(importlib.import_module(f"bigbag.data.sources.{module}"), class_name)


def detect_format(root: str | Path, labels: str | None = None) -> tuple[str, str]:
    """Name of the layout of ``root``, and the reason in words.

    Args:
        root: folder, or table that lists files.
        labels: table of labels, which tells a task of Patho-Bench.

    Raises:
        ValueError: no such folder, or none of the layouts.
    """
    place = Path(root)
    if not place.exists():
        raise ValueError(f"{root}: no such file or folder; check --from")
    for name in FORMATS:
        reason = format_class(name).detect(place)
        if reason is None:
            continue
        if name == "trident" and task_column(labels) is not None:
            return "patho_bench", f"{reason}, and {labels} is a task of Patho-Bench"
        return name, reason
    raise ValueError(
        f"{root}: holds none of the layouts that bigbag knows ({', '.join(FORMATS)}): name the one it is meant to be "
        "with --format, whose error says what is missing"
    )
