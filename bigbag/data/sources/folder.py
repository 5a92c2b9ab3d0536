"""Slides as files in a folder, joined by name with a table of labels: what almost every layout of the field is."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from bigbag.bags import Bag
from bigbag.data.lattice import facts_of_slides, join_slides
from bigbag.data.names import bare_name
from bigbag.data.sources.base import SourceEntry
from bigbag.data.sources.labels import Annotation, Annotations, Reading, read_labels, tcga_patient
from bigbag.data.table import is_missing, read_table

_LOOKS = 20

Files = Mapping[str, tuple[Path, ...]]
"""Name of each slide, and its files: that of the features first, those beside it after it."""


@dataclass
class FolderSource(ABC):
    """Slides in files (a :class:`bigbag.data.sources.Source`); a subclass says which files and what is in them.

    Slides and lines of the table are matched by name without folders and known extensions. Slides without a line or
    without a label, and lines without a file, are listed in ``left_out``.

    Args:
        root: the folder.
        labels: table of labels (CSV, TSV, Excel), by slide or by patient; ``{split}`` in its name stands for train, val
            and test, where each has a table of its own. None: what the layout itself brings.
        columns: column of each role (slide, patient, label, split, time, event) where its name does not tell;
            ``label`` may be a list of columns.
        classes: texts of the classes in the order of their numbers; empty: sorted.
        slides: table of the patient of each slide, where ``labels`` is by patient.
        bags: "slide": one bag for each slide; "patient": one bag of all slides of a patient.
        stride: distance of adjacent patches in the unit of the coordinates, instead of what the files say.

    Raises:
        ValueError: files or columns that are missing, with the remedy.
    """

    root: str
    labels: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()
    slides: str | None = None
    bags: Literal["slide", "patient"] = "slide"
    stride: float | None = None

    name: ClassVar[str] = ""
    patch_shape: ClassVar[tuple[int, int] | None] = None

    def __post_init__(self) -> None:
        if not Path(self.root).exists():
            raise ValueError(f"{self.root}: no such folder; check root of the source")
        if self.bags not in ("slide", "patient"):
            raise ValueError(f"bags is {self.bags!r}, expected 'slide' or 'patient'")
        if self.stride is not None and not 0 < self.stride < float("inf"):
            raise ValueError(f"stride is {self.stride}, expected a positive number in the unit of the coordinates")

    @classmethod
    @abstractmethod
    def detect(cls, root: Path) -> str | None:
        """Why ``root`` is of this layout, or None where it is not."""

    @abstractmethod
    def files(self) -> Files:
        """All slides and their files.

        Raises:
            ValueError: none are there.
        """

    @abstractmethod
    def read(self, files: Sequence[Path]) -> Bag:
        """Features, coordinates, stride and attributes of one slide."""

    def name_of(self, text: str) -> str:
        """Name of the slide that a cell of a table or a file's path means."""
        return bare_name(text)

    def annotations(self) -> Annotations | None:
        """What is known of labels, patients and splits; None: nothing."""
        return None if self.labels is None else read_labels(self.labels, self.reading())

    def reading(self) -> Reading:
        return Reading(self.columns, self.classes, self.name_of)

    def entries(self) -> Sequence[SourceEntry]:
        return self._joined[0]

    @property
    def left_out(self) -> list[dict[str, str]]:
        """Slides that cannot be packed, and lines of the table without a file, with the reason."""
        return self._joined[1]

    def load(self, entry: SourceEntry) -> Bag:
        slides = self.slides_of(entry.name)
        read = [self._read(slide) for slide in slides]
        bag = read[0] if len(read) == 1 else join_slides(read, slides)
        if self.bags == "patient" and len(read) == 1:
            bag = replace(bag, attributes={**bag.attributes, **facts_of_slides(read, slides)})
        return replace(bag, y=entry.label, key=entry.name)

    @property
    def slide_entries(self) -> Sequence[SourceEntry]:
        """One entry for each slide, whatever a bag is."""
        return self._slide_entries[0]

    def slides_of(self, bag: str) -> list[str]:
        """Names of the slides of a bag."""
        return self._members[bag]

    def description(self) -> dict[str, Any]:
        """The arguments without places of folders, and a digest of names, labels, splits and file sizes."""
        digest = hashlib.sha256()
        for entry in self.entries():
            sizes = [Path(path).stat().st_size for path in (entry.path, *entry.parts)]
            digest.update(json.dumps([entry.name, entry.split, entry.label, entry.patient, sizes]).encode())
        found: dict[str, Any] = {"name": self.name, "bags": self.bags, "stride": self.stride}
        found |= {"columns": self.columns_found, "classes": list(self.classes_found)}
        return {**found, **self.details(), "files_sha256": digest.hexdigest()}

    @property
    def columns_found(self) -> dict[str, Any]:
        """The column of the table taken for each role."""
        return {} if self._annotations is None else self._annotations.columns

    @property
    def classes_found(self) -> tuple[str, ...]:
        """Texts of the classes in the order of their numbers; empty where labels are numbers."""
        return () if self._annotations is None else self._annotations.classes

    def details(self) -> dict[str, Any]:
        """What else determines the bags."""
        return {}

    @cached_property
    def _files(self) -> Files:
        return self.files()

    @cached_property
    def _annotations(self) -> Annotations | None:
        return self.annotations()

    @cached_property
    def _patients(self) -> dict[str, str]:
        """Patient of each slide by the table ``slides``."""
        if self.slides is None:
            return {}
        table = read_table(self.slides)
        given = {role: self.columns[role] for role in ("slide", "patient") if self.columns.get(role) in table.columns}
        slide, patient = table.column("slide", given), table.column("patient", given)
        if slide is None or patient is None:
            raise ValueError(
                f"{self.slides}: columns {', '.join(table.columns)}; expected one of slides and one of patients"
            )
        found: dict[str, str] = {}
        for line, row in table:
            name, person = self.name_of(row[slide]), row[patient]
            if not is_missing(person) and found.setdefault(name, person) != person:
                raise ValueError(f"{self.slides}, line {line}: slide {name!r} is of {person!r} and of {found[name]!r}")
        return found

    @cached_property
    def _joined(self) -> tuple[tuple[SourceEntry, ...], list[dict[str, str]]]:
        found, left_out = self._slide_entries
        if self.bags == "slide":
            return found, left_out
        groups: dict[str, list[SourceEntry]] = {}
        for entry in found:
            if entry.patient is None:
                raise ValueError(
                    f"slide {entry.name!r}: its patient is not known; name the table of slides and patients (slides=), "
                    "or pack one bag for each slide (bags=slide)"
                )
            groups.setdefault(entry.patient, []).append(entry)
        return tuple(_one_patient(patient, slides) for patient, slides in groups.items()), left_out

    @cached_property
    def _members(self) -> dict[str, list[str]]:
        """Slides of each bag."""
        members: dict[str, list[str]] = {}
        for entry in self.slide_entries:
            bag = entry.name if self.bags == "slide" else str(entry.patient)
            members.setdefault(bag, []).append(entry.name)
        return members

    @cached_property
    def _slide_entries(self) -> tuple[tuple[SourceEntry, ...], list[dict[str, str]]]:
        table, left_out, entries, seen = self._annotations, [], [], set()
        for slide, files in self._files.items():
            patient = self._patients.get(slide)
            said = None if table is None else table.find(slide, patient or tcga_patient(slide))
            if table is not None and said is None:
                left_out.append({"name": slide, "reason": f"has a file ({files[0]}), but no line in {table.path}"})
                continue
            if said is not None:
                seen.add(id(said))
            if said is not None and said.label is None:
                reason = f"{table.path if table else ''}, line {said.line}: the label is empty"
                left_out.append({"name": slide, "reason": reason})
                continue
            entries.append(self._entry(slide, patient, said, files))
        if table is not None:
            if not entries:
                raise ValueError(_nothing_matches(table, self._files, self.slides))
            lines: Iterable[tuple[str, Annotation]] = (table.patients or table.slides).items()
            left_out += [
                {"name": name, "reason": f"{table.path}, line {said.line}: there is no file for it below {self.root}"}
                for name, said in lines
                if id(said) not in seen
            ]
        return tuple(entries), left_out

    def _entry(self, slide: str, patient: str | None, said: Annotation | None, files: Sequence[Path]) -> SourceEntry:
        patient = patient or (said.patient if said else None) or tcga_patient(slide)
        label, split = (None, None) if said is None else (said.label, said.split)
        return SourceEntry(slide, split, label, patient, str(files[0]), tuple(str(path) for path in files[1:]))

    def _read(self, slide: str) -> Bag:
        bag = self.read(self._files[slide])
        return bag if self.stride is None else replace(bag, stride=self.stride)


def files_in(folder: Path, suffixes: Sequence[str], deep: bool = False) -> list[Path]:
    """Files of these extensions in ``folder``, by name; hidden ones are not counted."""
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(path for path in found if path.suffix.lower() in suffixes and path.name[0] != "." and path.is_file())


def first_sound(paths: Iterable[Path], look: Callable[[Path], str | None]) -> str | None:
    """``look(path)`` for the first file that is not damaged, among the first few.

    A layout is told by one file. A damaged one says nothing of it, and is refused by name where its slide is read.
    """
    for path in islice(paths, _LOOKS):
        try:
            return look(path)
        except ValueError:
            continue
    return None


def by_name(paths: Iterable[Path], name_of: Any = bare_name) -> dict[str, Path]:
    """Paths by the name of their slide.

    Raises:
        ValueError: two files of one slide.
    """
    found: dict[str, Path] = {}
    for path in paths:
        name = name_of(str(path))
        if name in found:
            raise ValueError(f"{found[name]} and {path}: two files of one slide; remove one of them")
        found[name] = path
    return found


def need_files(found: Files, where: str | Path, expected: str) -> Files:
    """``found``, which has to hold something.

    Raises:
        ValueError: it is empty.
    """
    if not found:
        raise ValueError(f"{where}: holds no slides, expected {expected}; check root and format of the source")
    return found


def _one_patient(patient: str, slides: Sequence[SourceEntry]) -> SourceEntry:
    first = slides[0]
    for entry in slides[1:]:
        if (entry.label, entry.split) != (first.label, first.split):
            raise ValueError(
                f"patient {patient!r}: slide {first.name!r} has label {first.label} and split {first.split}, slide "
                f"{entry.name!r} {entry.label} and {entry.split}: a bag has one of each; pack one bag for each slide "
                "(bags=slide)"
            )
    parts = tuple(path for entry in slides for path in (entry.path, *entry.parts))
    return SourceEntry(patient, first.split, first.label, patient, parts[0], parts[1:])


def _nothing_matches(table: Annotations, files: Files, slides: str | None) -> str:
    named = next(iter(table.patients or table.slides), "nothing")
    what = "patient" if table.patients else "slide"
    text = f"{table.path}: describes none of the {len(files)} slides: it has {what} {named!r}, a file is "
    text += f"{next(iter(files), 'nothing')!r}"
    if table.patients and slides is not None:
        return f"{text}; {slides} has to join the two, by names of files and of patients as they are there"
    if table.patients:
        return f"{text}; name the table of slides and patients (slides=, --slides)"
    return f"{text}; name the column of slides: columns={{slide: ...}} (--column slide=...)"
