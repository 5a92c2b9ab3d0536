"""Bags of one part of a data set, as its ``splits.csv`` says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigbag.data.sources.torchmil import read_split_rows
from bigbag.datasets.processed import ProcessedMILDataset

logger = logging.getLogger(__name__)


class PartitionedDataset(ProcessedMILDataset):
    """Bags of ``root/splits.csv``, whose columns are ``bag_name`` and ``split`` (a bag may fill several lines).

    Bags without a file of features are left out, with a warning; they are listed in ``left_out``.
    """

    def _choose(self, root: str | Path, partition: str | None, features_path: str) -> list[str]:
        """Names of the bags of ``partition`` (None: of all) whose features exist.

        Raises:
            ValueError: no such partition, or, of all, a bag in two of them.
        """
        path = Path(root) / "splits.csv"
        rows = read_split_rows(path)
        known = list(dict.fromkeys(split for _, _, split in rows))
        if partition is not None and partition not in known:
            raise ValueError(f"{path}: no bag is in {partition!r}, expected one of {', '.join(known)}")
        self._splits: dict[str, str] = {}
        for line, name, split in rows:
            if partition not in (None, split):
                continue
            if self._splits.setdefault(name, split) != split:
                raise ValueError(
                    f"{path}, line {line}: bag {name!r} is in {self._splits[name]} and in {split}, so that results on "
                    "one would leak from the other; remove one of its lines, or open one partition"
                )
        self.left_out: Sequence[dict[str, str]] = [
            {"name": name, "reason": f"in splits.csv, but {features_path}/{name}.npy does not exist"}
            for name in self._splits
            if not Path(features_path, f"{name}.npy").is_file()
        ]
        if self.left_out:
            names = ", ".join(item["name"] for item in self.left_out[:5])
            logger.warning(f"{path}: left out, without a file in {features_path}: {len(self.left_out)} bags ({names})")
        missing = {item["name"] for item in self.left_out}
        return [name for name in self._splits if name not in missing]

    def _split(self, name: str) -> str | None:
        return self._splits[name]

    def description(self) -> dict[str, Any]:
        return super().description() | {"features": Path(str(self.features_path)).name}
