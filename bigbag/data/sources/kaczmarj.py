"""The layout of the public CAMELYON16 and PANDA embeddings on the Hugging Face hub (kaczmarj).

embeddings/<slide>.pt     (N, P)
patches/<slide>.h5        'coords' (N, 2) at level 0 with patch_size, in the same order
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bigbag.bags import Bag
from bigbag.data.lattice import settled_stride
from bigbag.data.sources.arrays import COORDS, coords_of, read_file
from bigbag.data.sources.clam import check_rows
from bigbag.data.sources.folder import Files, FolderSource, by_name, files_in, need_files
from bigbag.data.sources.h5 import attributes_of, need_dataset, open_h5, read_dataset

_KEPT = ("patch_size", "patch_level", "patch_spacing_um_px")


@dataclass
class Kaczmarj(FolderSource):
    """Slides in ``embeddings`` with coordinates in ``patches``."""

    name: ClassVar[str] = "kaczmarj"

    @classmethod
    def detect(cls, root: Path) -> str | None:
        there = (root / "embeddings").is_dir() and (root / "patches").is_dir()
        return "embeddings/*.pt and patches/*.h5 are there" if there else None

    def files(self) -> Files:
        root = Path(self.root)
        if not (root / "embeddings").is_dir():
            raise ValueError(
                f"{root / 'embeddings'}: no such folder, expected <slide>.pt in it; check root of the source"
            )
        patches = by_name(files_in(root / "patches", (".h5",))) if (root / "patches").is_dir() else {}
        slides = by_name(files_in(root / "embeddings", (".pt",)))
        found = {slide: (path, patches[slide]) if slide in patches else (path,) for slide, path in slides.items()}
        return need_files(found, root / "embeddings", "<slide>.pt")

    def read(self, files: Sequence[Path]) -> Bag:
        x = read_file(files[0]).features()
        if len(files) == 1:
            return Bag(x=x)
        with open_h5(files[1]) as file:
            dataset = need_dataset(file, COORDS)
            coords, about = coords_of(read_dataset(dataset)), attributes_of(file) | attributes_of(dataset)
        check_rows(x, coords, files[0], files[1])
        size = about.get("patch_size")
        stride = settled_stride(coords, float(size) if isinstance(size, int | float) else None)
        kept: dict[str, Any] = {name: about[name] for name in _KEPT if name in about}
        return Bag(x=x, coords=coords, stride=stride, attributes=kept)
