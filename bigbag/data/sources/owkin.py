"""Owkin's features: one ``.npy`` with (tile level, x, y) in front of each feature vector.

<slide>.npy or <slide>/features.npy     (N, 3 + P) float32; x and y count DeepZoom tiles of that level
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from bigbag.bags import Bag
from bigbag.data.names import bare_name
from bigbag.data.sources.arrays import read_file
from bigbag.data.sources.folder import Files, FolderSource, by_name, files_in, first_sound, need_files

_ROWS = 64


@dataclass
class Owkin(FolderSource):
    """Slides of Owkin; coordinates count tiles already."""

    name: ClassVar[str] = "owkin"

    @classmethod
    def detect(cls, root: Path) -> str | None:
        def look(path: Path) -> str | None:
            values = read_file(path).arrays[""]
            if values.ndim != 2 or values.shape[1] <= 3 or not len(values) or values.dtype.kind != "f":
                return None
            head = np.asarray(values[:_ROWS, :3])
            whole = np.array_equal(head, np.rint(head)) and head.min() >= 0
            if not whole or np.ptp(head[:, 0]) != 0 or head[0, 0] <= 0:
                return None
            return f"{path.relative_to(root)} starts with three columns of integers: tile level, x, y"

        return first_sound(files_in(root, (".npy",), deep=True) if root.is_dir() else [], look)

    def name_of(self, text: str) -> str:
        path = Path(text)
        return bare_name(str(path.parent)) if path.name == "features.npy" else bare_name(text)

    def files(self) -> Files:
        found = by_name(files_in(Path(self.root), (".npy",), deep=True), self.name_of)
        return need_files({slide: (path,) for slide, path in found.items()}, self.root, "<slide>.npy of (N, 3 + P)")

    def read(self, files: Sequence[Path]) -> Bag:
        values = read_file(files[0]).features()
        if values.shape[1] <= 3:
            raise ValueError(f"{files[0]}: {values.shape}, expected (N, 3 + P): tile level, x, y and features")
        places = np.asarray(values[:, :3])
        levels = np.unique(places[:, 0])
        if not np.array_equal(places, np.rint(places)) or len(levels) > 1:
            raise ValueError(
                f"{files[0]}: its first three columns are not one tile level and whole x and y; if they are features, "
                "name the format plain"
            )
        coords = places[:, 1:].astype(np.int32)
        return Bag(x=values[:, 3:], coords=coords, attributes={"tile_level": int(levels[0])} if len(levels) else {})
