"""CLAM (Lu et al. 2021) and the many projects that write its layout (MHIM, RRT, PackMIL, ...).

FEATURES/h5_files/<slide>.h5     'features' (N, P), 'coords' (N, 2) at level 0, no attributes
FEATURES/pt_files/<slide>.pt     the same features in the same order
RESULTS/patches/<slide>.h5       'coords' with patch_size, patch_level, downsample [, custom_downsample]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bigbag.bags import Bag
from bigbag.data.lattice import settled_stride
from bigbag.data.sources.arrays import COORDS, FEATURES, coords_of, read_file, rows_of
from bigbag.data.sources.folder import Files, FolderSource, by_name, files_in, need_files
from bigbag.data.sources.h5 import attributes_of, find_dataset, need_dataset, open_h5, read_dataset

_KEPT = ("patch_size", "patch_level", "downsample", "custom_downsample", "level_dim")


@dataclass
class Clam(FolderSource):
    """Slides of CLAM; arguments beside those of :class:`bigbag.data.sources.folder.FolderSource`:

    The stride is ``patch_size * downsample[patch_level]`` of the coordinate files; without these it is measured.

    Args:
        patches: folder of the coordinate files, ``RESULTS/patches``; None: ``patches`` in the root or beside it.
        h5_path: folder of h5 files with the coordinates of ``pt_files``; None: ``h5_files`` in the root.
    """

    patches: str | None = None
    h5_path: str | None = None

    name: ClassVar[str] = "clam"

    @classmethod
    def detect(cls, root: Path) -> str | None:
        for folder, suffix in (("h5_files", ".h5"), ("pt_files", ".pt")):
            if (root / folder).is_dir() and files_in(root / folder, (suffix,)):
                return f"{folder}/*{suffix} are there"
        return None

    def files(self) -> Files:
        root = Path(self.root)
        features: dict[str, Path] = {}
        for folder in (root / "h5_files", root / "pt_files", root):
            if folder.is_dir():
                features |= {k: v for k, v in by_name(files_in(folder, (".h5", ".pt"))).items() if k not in features}
        beside = [_files_of(folder) for folder in self._beside()]
        found = {slide: (path, *(f[slide] for f in beside if slide in f)) for slide, path in features.items()}
        return need_files(found, root, "h5_files/<slide>.h5 or pt_files/<slide>.pt")

    def read(self, files: Sequence[Path]) -> Bag:
        coords, about = None, dict[str, Any]()
        if files[0].suffix == ".h5":
            with open_h5(files[0]) as file:
                x = rows_of(read_dataset(need_dataset(file, FEATURES)), files[0])
                dataset = find_dataset(file, COORDS)
                if dataset is not None:
                    coords, about = coords_of(read_dataset(dataset)), attributes_of(dataset)
        else:
            x = read_file(files[0]).features()
        for path in files[1:]:
            with open_h5(path) as file:
                dataset = need_dataset(file, COORDS)
                about |= attributes_of(dataset)
                if coords is None:
                    coords = coords_of(read_dataset(dataset))
                    check_rows(x, coords, files[0], path)
        stride = None if coords is None else settled_stride(coords, clam_stride(about))
        return Bag(x=x, coords=coords, stride=stride, attributes={name: about[name] for name in _KEPT if name in about})

    def _beside(self) -> list[Path]:
        root = Path(self.root)
        given = [Path(path) for path in (self.h5_path, self.patches) if path is not None]
        for path in given:
            if not path.is_dir():
                raise ValueError(f"{path}: no such folder; check patches and h5_path of the source")
        if self.patches is None:
            given += [path for path in (root / "patches", root.parent / "patches") if path.is_dir()][:1]
        return given


def clam_stride(about: Mapping[str, Any]) -> float | None:
    """``patch_size * downsample[patch_level]`` in level-0 pixels, or None where the attributes do not say."""
    size, level, factor = about.get("patch_size"), about.get("patch_level"), about.get("downsample")
    if not isinstance(size, int | float):
        return None
    if isinstance(factor, list):
        factor = factor[0]
    if not isinstance(factor, int | float):
        if level != 0:
            return None  # level dimensions alone do not say how far the level is from level 0
        factor = 1
    custom = about.get("custom_downsample", 1)
    return float(size * factor * (custom if isinstance(custom, int | float) else 1))


def check_rows(x: np.ndarray, coords: np.ndarray, features_path: Path, coords_path: Path) -> None:
    """Features and coordinates from two files have to be of the same patches.

    Raises:
        ValueError: another number of them.
    """
    if len(x) != len(coords):
        raise ValueError(
            f"{features_path} has {len(x)} patches, {coords_path} {len(coords)}: they are not of the same run; extract "
            "the features again, or leave the coordinates out"
        )


def _files_of(folder: Path) -> dict[str, Path]:
    return by_name(files_in(folder, (".h5",)))
