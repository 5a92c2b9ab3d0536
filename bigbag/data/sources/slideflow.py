"""slideflow (Dolezal et al. 2024): ``<slide>.pt`` beside ``<slide>.index.npz`` with the locations of the tiles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bigbag.bags import Bag
from bigbag.data.lattice import settled_stride
from bigbag.data.sources.arrays import read_file
from bigbag.data.sources.clam import check_rows
from bigbag.data.sources.folder import Files, FolderSource, by_name, files_in, need_files

_INDEX = ".index.npz"


@dataclass
class Slideflow(FolderSource):
    """Slides of slideflow; locations are the centres of tiles in level-0 pixels, whose stride is measured."""

    name: ClassVar[str] = "slideflow"

    @classmethod
    def detect(cls, root: Path) -> str | None:
        found = [path for path in files_in(root, (".npz",)) if path.name.endswith(_INDEX)] if root.is_dir() else []
        return f"*{_INDEX} lie beside *.pt" if found and found[0].with_name(_pt_of(found[0])).is_file() else None

    def files(self) -> Files:
        found = {}
        for slide, path in by_name(files_in(Path(self.root), (".pt",))).items():
            index = path.with_name(path.name.removesuffix(".pt") + _INDEX)
            found[slide] = (path, index) if index.is_file() else (path,)
        return need_files(found, self.root, f"<slide>.pt and <slide>{_INDEX}")

    def read(self, files: Sequence[Path]) -> Bag:
        x, coords = read_file(files[0]).features(), None
        if len(files) > 1:
            coords = read_file(files[1]).features(("arr_0",))
            check_rows(x, coords, files[0], files[1])
        stride = None if coords is None else settled_stride(coords, None)
        return Bag(x=x, coords=coords, stride=stride, attributes={**_config(files[0].parent), "anchor": "centre"})


def _config(folder: Path) -> dict[str, Any]:
    """Size of the tiles and extractor, where ``bags_config.json`` says so."""
    try:
        config = json.loads((folder / "bags_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    extractor = config.get("extractor") if isinstance(config, dict) else None
    name = extractor.get("class") if isinstance(extractor, dict) else extractor
    found = {"tile_px": config.get("tile_px"), "tile_um": config.get("tile_um"), "extractor": name}
    return {key: value for key, value in found.items() if isinstance(value, int | float | str)}


def _pt_of(index: Path) -> str:
    return index.name.removesuffix(_INDEX) + ".pt"
