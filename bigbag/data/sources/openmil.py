"""Projects that list files with labels and splits: OpenMIL (JSON) and MIL_BASELINE (CSV of paths).

    {"train": [{"path": ..., "label": ...}, ...], "val": ..., "test": ...}
    train_slide_path,train_label,val_slide_path,val_label,test_slide_path,test_label

A file is ``.h5`` with 'features', or ``.pt`` / ``.pth``: a tensor, or a dict of 'feats' or 'features' and 'coords'.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from bigbag.bags import Bag
from bigbag.data.lattice import settled_stride
from bigbag.data.sources.arrays import FILE_TYPES, read_file
from bigbag.data.sources.folder import Files, FolderSource, by_name, files_in, first_sound, need_files
from bigbag.data.sources.labels import Annotation, Annotations, number_labels
from bigbag.data.table import is_missing, read_table

_SPLITS = ("train", "val", "test")
_TYPES = tuple(kind for kind in FILE_TYPES if kind != ".csv")


@dataclass
class ListedFiles(FolderSource):
    """Slides of a list that names file, label and split of each; arguments beside those of ``FolderSource``:

    ``labels`` is the list; None: the only one in ``root``. ``root`` is the folder that relative paths start from, or
    the list itself.
    """

    suffix: ClassVar[str] = ""

    @classmethod
    def detect(cls, root: Path) -> str | None:
        for path in [root] if root.is_file() else files_in(root, (cls.suffix,)):
            if path.suffix == cls.suffix and cls.is_list(path):
                return f"{path.name} {cls.reason}"
        return None

    reason: ClassVar[str] = ""

    @classmethod
    def is_list(cls, path: Path) -> bool:
        raise NotImplementedError

    def lines(self, path: Path) -> Iterator[tuple[int, str, str, str]]:
        """Line, split, path and label of every slide."""
        raise NotImplementedError

    def files(self) -> Files:
        named = {self.name_of(path): path for _, _, path, _ in self._lines}
        found = {name: self._place(path) for name, path in named.items()}
        return need_files(
            {k: (path,) for k, path in found.items() if path.is_file()}, self.root, "the files of its list"
        )

    def annotations(self) -> Annotations:
        numbers, classes = number_labels(
            str(self._list), [(line, label) for line, _, _, label in self._lines], self.classes
        )
        slides: dict[str, Annotation] = {}
        for (line, split, path, _), label in zip(self._lines, numbers):
            name = self.name_of(path)
            before = slides.setdefault(name, Annotation(label, None, split, line))
            if (before.label, before.split) != (label, split):
                raise ValueError(
                    f"{self._list}: lines {before.line} and {line} both list {name!r}, once as {before.split} with "
                    f"label {before.label}, once as {split} with {label}"
                )
        return Annotations(str(self._list), slides, {}, classes, {})

    def read(self, files: Sequence[Path]) -> Bag:
        contents = read_file(files[0])
        coords, about = contents.coords(), contents.attributes.get("", {})
        size = about.get("patch_size_lv0", about.get("patch_size_level0"))
        if size is None and (name := contents.find(("patch_size_lv0",))):
            size = contents.arrays[name].reshape(-1)[0].item()
        stated = float(size) if isinstance(size, int | float) else None
        return Bag(
            x=contents.features(), coords=coords, stride=None if coords is None else settled_stride(coords, stated)
        )

    @cached_property
    def _list(self) -> Path:
        if self.labels is not None:
            return Path(self.labels)
        root = Path(self.root)
        lists = [path for path in ([root] if root.is_file() else files_in(root, (self.suffix,))) if self.is_list(path)]
        if len(lists) != 1:
            found = ", ".join(path.name for path in lists) or "none"
            raise ValueError(
                f"{root}: expected one list of files and labels ({self.suffix}), found {found}: give labels="
            )
        return lists[0]

    @cached_property
    def _lines(self) -> list[tuple[int, str, str, str]]:
        found = list(self.lines(self._list))
        if not found:
            raise ValueError(f"{self._list}: lists no files")
        return found

    def _place(self, text: str) -> Path:
        """The file: as it is named, else below the root, else of that name in the root."""
        path, root = Path(text), Path(self.root)
        root = root.parent if root.is_file() else root
        if path.is_absolute():
            return path if path.is_file() else root / path.name
        return root / path if (root / path).is_file() else root / path.name


@dataclass
class OpenMil(ListedFiles):
    """Slides of OpenMIL; arguments as of :class:`ListedFiles`."""

    name: ClassVar[str] = "openmil"
    suffix: ClassVar[str] = ".json"
    reason: ClassVar[str] = "lists paths and labels under train, val, test"

    @classmethod
    def is_list(cls, path: Path) -> bool:
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return False
        items = content.get("train") if isinstance(content, dict) else None
        return isinstance(items, list) and bool(items) and isinstance(items[0], dict) and "path" in items[0]

    def lines(self, path: Path) -> Iterator[tuple[int, str, str, str]]:
        try:
            content: Any = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable JSON list ({error})") from None
        number = 0
        for split, items in content.items() if isinstance(content, dict) else ():
            for item in items:
                number += 1
                if not isinstance(item, dict) or "path" not in item:
                    raise ValueError(f"{path}: item {number} of {split!r} is {item!r}, expected a path and a label")
                yield number, split, str(item["path"]), "" if item.get("label") is None else str(item["label"])


@dataclass
class MilBaseline(ListedFiles):
    """Slides of MIL_BASELINE; arguments as of :class:`ListedFiles`."""

    name: ClassVar[str] = "mil_baseline"
    suffix: ClassVar[str] = ".csv"
    reason: ClassVar[str] = "has the columns train_slide_path and train_label"

    @classmethod
    def is_list(cls, path: Path) -> bool:
        try:
            with open(path, encoding="utf-8-sig") as file:
                columns = file.readline(1 << 16).lower().replace('"', "").strip().split(",")
        except (OSError, UnicodeDecodeError):
            return False
        return {"train_slide_path", "train_label"} <= set(columns)

    def lines(self, path: Path) -> Iterator[tuple[int, str, str, str]]:
        table = read_table(path)
        for split in _SPLITS:
            if f"{split}_slide_path" not in table.columns:
                continue
            table.need(f"{split}_label", f"the labels of {split}")
            for line, row in table:
                if not is_missing(row[f"{split}_slide_path"]):
                    yield line, split, row[f"{split}_slide_path"], row[f"{split}_label"]


@dataclass
class PtFiles(FolderSource):
    """A folder of ``.pt`` / ``.pth`` dicts of 'feats' and 'coords' with a table of labels (OpenMIL's files alone)."""

    name: ClassVar[str] = "pt_dicts"

    @classmethod
    def detect(cls, root: Path) -> str | None:
        def look(path: Path) -> str | None:
            contents = read_file(path)
            if contents.find(("feats", "features")) and contents.find(("coords",)):
                return f"*{path.suffix} hold dicts of {', '.join(contents.arrays)}"
            return None

        return first_sound(files_in(root, (".pt", ".pth")) if root.is_dir() else [], look)

    def files(self) -> Files:
        found = by_name(files_in(Path(self.root), _TYPES))
        return need_files({slide: (path,) for slide, path in found.items()}, self.root, "<slide>.pt")

    read = ListedFiles.read
