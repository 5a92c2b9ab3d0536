"""GigaPath's fine-tuning (Xu et al. 2024): ``<slide>.h5`` with 'features' and 'coords', or ``pt_files/<slide>.pt``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bigbag.bags import Bag
from bigbag.data.lattice import settled_stride
from bigbag.data.sources.arrays import read_file
from bigbag.data.sources.folder import Files, FolderSource, by_name, files_in, first_sound, need_files
from bigbag.data.sources.h5 import dataset_names, open_h5

_WIDTH = 1536


@dataclass
class GigaPath(FolderSource):
    """Slides of GigaPath; tables have slide_id, pat_id and label, or one column for each of several labels.

    Args:
        tile_size: side of a tile in the unit of ``coords``.
    """

    tile_size: float = 256.0

    name: ClassVar[str] = "gigapath"

    @classmethod
    def detect(cls, root: Path) -> str | None:
        def look(path: Path) -> str | None:
            with open_h5(path) as file:
                if {"features", "coords"} <= set(dataset_names(file)) and file["features"].shape[-1:] == (_WIDTH,):
                    return f"*.h5 hold 'features' of width {_WIDTH} and 'coords' without attributes"
            return None

        return first_sound(files_in(root, (".h5",)) if root.is_dir() else [], look)

    def files(self) -> Files:
        found = by_name(files_in(Path(self.root), (".h5", ".pt")))
        return need_files({slide: (path,) for slide, path in found.items()}, self.root, "<slide>.h5 or <slide>.pt")

    def read(self, files: Sequence[Path]) -> Bag:
        contents = read_file(files[0])
        coords = contents.coords()
        stride = None if coords is None else settled_stride(coords, self.tile_size)
        return Bag(x=contents.features(), coords=coords, stride=stride)
