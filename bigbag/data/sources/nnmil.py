"""nnMIL: ``<slide>.h5`` with 'features' and 'coords' beside ``dataset.json`` and ``dataset.csv``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bigbag.bags import Bag
from bigbag.data.lattice import settled_stride
from bigbag.data.sources.arrays import read_file
from bigbag.data.sources.folder import Files, FolderSource, by_name, files_in, need_files
from bigbag.data.sources.labels import Annotations, read_labels
from bigbag.data.sources.trident import level0_stride

_LISTS = ("dataset.json", "dataset.csv")


@dataclass
class NnMil(FolderSource):
    """Slides of nnMIL; ``labels`` is ``dataset.csv`` (slide_id, patient_id, label or status and time, split)."""

    name: ClassVar[str] = "nnmil"

    @classmethod
    def detect(cls, root: Path) -> str | None:
        there = all((root / name).is_file() for name in _LISTS)
        return f"{' and '.join(_LISTS)} are there" if there else None

    def files(self) -> Files:
        found = by_name(files_in(Path(self.root), (".h5",), deep=True))
        return need_files({slide: (path,) for slide, path in found.items()}, self.root, "<slide>.h5")

    def annotations(self) -> Annotations | None:
        return read_labels(self.labels or str(Path(self.root) / "dataset.csv"), self.reading())

    def read(self, files: Sequence[Path]) -> Bag:
        contents = read_file(files[0])
        coords, about = contents.coords(), contents.attributes.get("coords", {})
        stride = None if coords is None else settled_stride(coords, level0_stride(about))
        return Bag(x=contents.features(), coords=coords, stride=stride)
