"""TRIDENT: features and coordinates of a slide in one HDF5 file (``trident/IO.py``, Zhang et al. 2025).

JOB/20x_512px_0px_overlap/features_<encoder>/<slide>.h5     'features' (N, P), 'coords' (N, 2) at level 0
JOB/20x_512px_0px_overlap/patches/<slide>_patches.h5        'coords' with the same attributes
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
from bigbag.data.sources.folder import Files, FolderSource, by_name, files_in, first_sound, need_files
from bigbag.data.sources.h5 import attributes_of, dataset_names, find_dataset, need_dataset, open_h5, read_dataset

_KEPT = ("patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap", "level0_width",
         "level0_height", "encoder")  # fmt: skip


@dataclass
class Trident(FolderSource):
    """Slides of TRIDENT; arguments beside those of :class:`bigbag.data.sources.folder.FolderSource`:

    The stride is that of level 0, ``(patch_size - overlap) * level0_magnification / target_magnification``: on a slide
    scanned at 40x and patched at 20x twice the patch size.

    Args:
        features: the encoder, ``uni_v1``, where the job has several.
        patches: the folder of patches, ``20x_512px_0px_overlap``, where the job has several.
    """

    features: str | None = None
    patches: str | None = None

    name: ClassVar[str] = "trident"

    @classmethod
    def detect(cls, root: Path) -> str | None:
        def look(path: Path) -> str | None:
            with open_h5(path) as file:
                coords = find_dataset(file, ("coords",))
                if "features" in dataset_names(file) and coords is not None and "patch_size_level0" in coords.attrs:
                    place = path.relative_to(root).parent / "*.h5"
                    return f"{place} hold 'features', and 'coords' with the attribute patch_size_level0"
            return None

        found = (first_sound(files_in(folder, (".h5",)), look) for folder in _feature_folders(root))
        return next(filter(None, found), None)

    def files(self) -> Files:
        folder = self._folder()
        slides = by_name(files_in(folder, (".h5", ".pt")))
        patches = folder.parent / "patches"
        found = {}
        for slide, path in slides.items():
            beside = patches / f"{slide}_patches.h5"
            found[slide] = (path, beside) if beside.is_file() else (path,)
        return need_files(found, folder, "<slide>.h5 with 'features' and 'coords'")

    def read(self, files: Sequence[Path]) -> Bag:
        coords: np.ndarray | None = None
        about: dict[str, Any] = {}
        if files[0].suffix == ".h5":
            with open_h5(files[0]) as file:
                x = rows_of(read_dataset(need_dataset(file, FEATURES)), files[0])
                dataset = find_dataset(file, COORDS)
                if dataset is not None:
                    coords, about = coords_of(read_dataset(dataset)), attributes_of(dataset)
                about |= attributes_of(need_dataset(file, FEATURES))
        else:
            x = read_file(files[0]).features()
        if len(files) > 1 and (coords is None or "patch_size_level0" not in about):
            with open_h5(files[1]) as file:
                dataset = need_dataset(file, COORDS)
                coords, about = coords_of(read_dataset(dataset)), {**about, **attributes_of(dataset)}
        stride = None if coords is None else settled_stride(coords, level0_stride(about))
        return Bag(
            x=x, coords=coords, stride=stride, attributes={k: about[k] for k in _KEPT if about.get(k) is not None}
        )

    def details(self) -> dict[str, Any]:
        return {"features": self._folder().name}

    def _folder(self) -> Path:
        folders = _feature_folders(Path(self.root))
        if self.features is not None:
            wanted = self.features.removeprefix("features_")
            folders = [f for f in folders if f.name.removeprefix("features_") == wanted] or _none(
                self.root, self.features
            )
        if self.patches is not None:
            folders = [f for f in folders if f.parent.name == self.patches] or _none(self.root, self.patches)
        if len(folders) > 1:
            listed = ", ".join(str(f.relative_to(self.root)) for f in folders)
            raise ValueError(
                f"{self.root}: has several folders of features ({listed}): choose with features= and patches=, or give "
                "one of them as the root"
            )
        if not folders:
            raise ValueError(f"{self.root}: has no folder features_<encoder> of TRIDENT; check root of the source")
        return folders[0]


def level0_stride(about: Mapping[str, Any]) -> float | None:
    """Distance of adjacent patches in level-0 pixels, by the attributes of ``coords``; None where they do not say."""
    size0, size, overlap = (_number(about.get(name)) for name in ("patch_size_level0", "patch_size", "overlap"))
    source, target = (_number(about.get(name)) for name in ("level0_magnification", "target_magnification"))
    if size is not None and overlap and source and target:
        return (size - overlap) * source / target
    if size0 is not None and size and overlap:
        return size0 * (size - overlap) / size
    if size0 is None and size is not None and source and target:
        return size * source / target
    return size0


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _feature_folders(root: Path) -> list[Path]:
    """Folders of features below a job, a folder of patches, or a folder of features."""
    if not root.is_dir():
        return []
    if files_in(root, (".h5",)) or root.name.startswith("features_"):
        return [root]
    found = [*root.glob("features_*"), *root.glob("*px*overlap*/features_*")]
    return sorted(path for path in found if path.is_dir())


def _none(root: str, wanted: str) -> list[Path]:
    raise ValueError(f"{root}: has no folder of features for {wanted!r}; check features and patches of the source")
