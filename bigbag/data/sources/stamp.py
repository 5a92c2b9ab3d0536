"""STAMP (El Nahhas et al. 2025): coordinates in micrometres, slides of a patient together.

<extractor>/<slide>.h5     'feats' (N, P), 'coords' (N, 2) in um; attributes unit, tile_size_um, extractor, ...
clini table: PATIENT, <label>;  slide table: PATIENT, FILENAME (with .h5)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from bigbag.bags import Bag
from bigbag.data.names import bare_name
from bigbag.data.sources.arrays import coords_of, rows_of
from bigbag.data.sources.folder import Files, FolderSource, files_in, first_sound, need_files
from bigbag.data.sources.h5 import attributes_of, dataset_names, find_dataset, need_dataset, open_h5, read_dataset

_FEATURES = ("feats", "patch_embeddings")
_KEPT = ("stamp_version", "extractor", "unit", "tile_size_um", "tile_size_px", "tile_size", "code_hash")
_MARUGOTO_PX, _MARUGOTO_UM = 224.0, 256.0


@dataclass
class Stamp(FolderSource):
    """Slides of STAMP; ``labels`` is the clini table, ``slides`` the slide table, and a bag is a patient.

    Coordinates are micrometres, whose stride is the tile size. Files of STAMP's forerunner without a unit count pixels
    of tiles of 224 pixels and 256 micrometres, and are converted.

    Args:
        bags: "patient": one bag of all slides of a patient, as STAMP does; "slide": one bag for each slide.
    """

    bags: Literal["slide", "patient"] = "patient"

    name: ClassVar[str] = "stamp"

    @classmethod
    def detect(cls, root: Path) -> str | None:
        def look(path: Path) -> str | None:
            with open_h5(path) as file:
                found = [name for name in _FEATURES if name in dataset_names(file)]
            return f"{path.relative_to(root)} holds {found[0]!r}" if found else None

        return first_sound(files_in(root, (".h5",), deep=True) if root.is_dir() else [], look)

    def files(self) -> Files:
        found = {self.name_of(str(path)): (path,) for path in files_in(Path(self.root), (".h5",), deep=True)}
        return need_files(found, self.root, "<slide>.h5 with 'feats'")

    def name_of(self, text: str) -> str:
        """Path below the root without ``.h5``: STAMP's slide tables name it so, folders included."""
        try:
            text = Path(text).relative_to(self.root).as_posix()
        except ValueError:
            text = text.replace("\\", "/")
        folder, _, name = text.removesuffix(".h5").rpartition("/")
        return f"{folder}/{bare_name(name)}".lstrip("/")

    def read(self, files: Sequence[Path]) -> Bag:
        with open_h5(files[0]) as file:
            about = attributes_of(file)
            if about.get("feat_type", "tile") != "tile":
                raise ValueError(
                    f"{files[0]}: holds the encoding of a {about['feat_type']}, expected tiles: point the source at "
                    "the output of STAMP's preprocessing"
                )
            x = rows_of(read_dataset(need_dataset(file, _FEATURES)), files[0])
            dataset = find_dataset(file, ("coords",))
            coords = None if dataset is None else coords_of(read_dataset(dataset))
        size = about.get("tile_size_um", about.get("tile_size"))
        unit = about.get("unit")
        if unit not in (None, "um"):
            raise ValueError(
                f"{files[0]}: attribute unit is {unit!r}, expected 'um' (micrometres), or none in files of STAMP's "
                "forerunner: convert coords and tile_size_um, and set it"
            )
        if coords is not None and unit is None:
            coords, size = coords.astype(np.float64) / _MARUGOTO_PX * _MARUGOTO_UM, _MARUGOTO_UM
        stride = float(size) if isinstance(size, int | float) and coords is not None else None
        attributes = {name: about[name] for name in _KEPT if name in about}
        return Bag(x=x, coords=coords, stride=stride, attributes={**attributes, "unit": "um"})
