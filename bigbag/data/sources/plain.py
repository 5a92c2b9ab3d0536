"""One file for each slide, of any type, and a table: what remains when no project's layout is recognised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bigbag.bags import Bag
from bigbag.data.lattice import settled_stride
from bigbag.data.sources.arrays import COORDS, FEATURES, FILE_TYPES, coords_of, read_file
from bigbag.data.sources.clam import check_rows
from bigbag.data.sources.folder import Files, FolderSource, by_name, files_in, need_files
from bigbag.data.sources.torchmil import to_inst_labels
from bigbag.data.sources.trident import level0_stride

_LABELS = ("y_inst", "inst_labels", "patch_labels", "instance_labels")


@dataclass
class Plain(FolderSource):
    """Slides in ``.npy``, ``.npz``, ``.pt``, ``.safetensors``, ``.h5`` or ``.csv`` files; arguments beside those of
    :class:`bigbag.data.sources.folder.FolderSource`:

    Features, coordinates and instance labels are found by their usual names (``features``, ``feats``, ``coords``,
    ``y_inst``, ...). The stride of the coordinates is that of the file's attributes, or measured.

    Args:
        coords: folder of coordinates, one file for each slide, where they are not in the files themselves.
        features_key: name of the features in the files, where it is another.
        coords_key: name of the coordinates in the files, where it is another.
    """

    coords: str | None = None
    features_key: str | None = None
    coords_key: str | None = None

    name: ClassVar[str] = "plain"

    @classmethod
    def detect(cls, root: Path) -> str | None:
        types = _types_in(root) if root.is_dir() else Counter()
        if not types:
            return None
        kind, count = types.most_common(1)[0]
        return f"{count} *{kind} files of no project's layout: one file, one slide"

    def files(self) -> Files:
        root = Path(self.root)
        types = _types_in(root)
        if not types:
            raise ValueError(f"{root}: holds no files of the types {', '.join(FILE_TYPES)}; check root of the source")
        tables = {Path(path).resolve() for path in (self.labels, self.slides) if path is not None}
        kinds = [kind for kind in types if kind != ".csv"] or [".csv"]
        paths = [path for path in files_in(root, kinds, deep=True) if path.resolve() not in tables]
        beside = {} if self.coords is None else by_name(files_in(Path(self.coords), FILE_TYPES))
        if self.coords is not None:
            paths = [path for path in paths if Path(self.coords).resolve() not in path.resolve().parents]
        found = {k: (path, beside[k]) if k in beside else (path,) for k, path in by_name(paths).items()}
        return need_files(found, root, "one file for each slide")

    def read(self, files: Sequence[Path]) -> Bag:
        contents = read_file(files[0])
        x = contents.features(FEATURES if self.features_key is None else (self.features_key,))
        names = COORDS if self.coords_key is None else (self.coords_key,)
        coords, about = contents.coords(names), contents.attributes
        if len(files) > 1:
            beside = read_file(files[1])
            coords, about = beside.coords(names), beside.attributes
            if coords is None and len(beside.arrays) == 1:
                coords = coords_of(next(iter(beside.arrays.values())))
            if coords is not None:
                check_rows(x, coords, files[0], files[1])
        said: dict[str, Any] = {}
        for part in about.values():
            said |= part
        stride = None if coords is None else settled_stride(coords, level0_stride(said))
        label_name = contents.find(_LABELS)
        y_inst = (
            None if label_name is None else to_inst_labels(contents.arrays[label_name], f"{files[0]}: {label_name}")
        )
        return Bag(x=x, coords=coords, y_inst=y_inst, stride=stride)

    def details(self) -> dict[str, Any]:
        return {"features_key": self.features_key, "coords_key": self.coords_key}


def _types_in(root: Path) -> Counter[str]:
    return Counter(path.suffix.lower() for path in files_in(root, FILE_TYPES, deep=True))
