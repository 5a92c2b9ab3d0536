"""Patho-Bench: TRIDENT's features with a task.

k=all.tsv       case_id, slide_id, <label>, fold_0, fold_1, ... of train, val, test
config.yaml     task_col: <label>
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml

from bigbag.data.sources.labels import Reading
from bigbag.data.sources.trident import Trident


@dataclass
class PathoBench(Trident):
    """Slides of TRIDENT under a task of Patho-Bench; arguments beside those of :class:`Trident`:

    ``labels`` is the task's TSV; the column of the label is the one that ``task_col`` of ``config.yaml`` beside it
    names. Its folds are splits: ``bigbag pack --splits TSV``, or ``data.splits: {table: TSV, fold: 0}``.
    """

    name: ClassVar[str] = "patho_bench"

    @classmethod
    def detect(cls, root: Path) -> str | None:
        return None  # its features are TRIDENT's; the table alone tells

    def reading(self) -> Reading:
        how = super().reading()
        task = task_column(self.labels)
        return how if task is None or "label" in how.columns else replace(how, columns={**how.columns, "label": task})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is None:
            raise ValueError("patho_bench: labels is missing, expected the task's table, k=all.tsv")


def task_column(table: str | None) -> str | None:
    """Column of the label by the ``config.yaml`` beside the table, None where there is none."""
    if table is None or not (path := Path(table).with_name("config.yaml")).is_file():
        return None
    try:
        config: Any = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    column = config.get("task_col") if isinstance(config, dict) else None
    return None if column is None else str(column)
