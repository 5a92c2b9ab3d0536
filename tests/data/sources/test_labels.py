"""Tables of labels: the columns that are found, what labels become, names, and every way to get them wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bigbag.cli import main
from bigbag.data import make_splits, open_store
from bigbag.data.names import bare_name
from bigbag.data.sources.labels import Reading, read_labels, tcga_patient
from bigbag.data.sources.plain import Plain
from bigbag.data.table import read_table


def labels(write: SimpleNamespace, path: Path, *rows: tuple, delimiter: str = ",", **how: object) -> dict:
    found = read_labels(write.table(path, rows, delimiter), Reading(**how))
    return {name: said.label for name, said in (found.patients or found.slides).items()}


def test_names() -> None:
    uuid = "TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF-D8FB-45CF-B4BD-C6B76294C291"
    for text in (uuid, f"{uuid}.svs", f"a/b/{uuid}.SVS", f"{uuid}.svs.h5", f"C:\\slides\\{uuid}.tiff"):
        assert bare_name(text) == uuid
    assert bare_name("rat.s") == "rat.s" and bare_name(".h5") == ".h5" and bare_name("vs.svs") == "vs"
    assert tcga_patient(uuid) == "TCGA-3C-AALI" and tcga_patient("CPTAC-1") is None


@pytest.mark.parametrize(
    ("header", "row"),
    [
        (("slide_id", "label"), ("s.1.svs", 1)),
        (("Slide", "Target"), ("s.1", 1)),
        (("wsi", "case_id", "mutation"), ("s.1", "p", 1)),
        (("", "label"), ("s.1", 1)),
        (("FILENAME", "fold_0", "fold_1", "isMSI"), ("x/s.1.h5", "train", "test", 1)),
        (("image_id", "data_provider", "isup_grade"), ("s.1", "karolinska", 1)),
        (("label", "bag_name", "OS_time", "OS_status"), (1, "s.1", 3.5, 0)),
    ],
)
def test_columns_are_found(tmp_path: Path, write: SimpleNamespace, header: tuple, row: tuple) -> None:
    for delimiter, name in ((",", "a.csv"), ("\t", "a.tsv"), (";", "b.csv")):
        assert labels(write, tmp_path / name, header, row, delimiter=delimiter) == {"s.1": 1}


def test_what_labels_become(tmp_path: Path, write: SimpleNamespace) -> None:
    path, head = tmp_path / "a.csv", ("slide_id", "label")
    assert labels(write, path, head, ("a", "tumor"), ("b", "normal"), ("c", "nan")) == {"a": 1, "b": 0, "c": None}
    assert labels(write, path, head, ("a", 2), ("b", 0.0), ("c", "1.5")) == {"a": 2, "b": 0, "c": 1.5}
    assert labels(write, path, head, ("a", "True"), ("b", "False")) == {"a": 1, "b": 0}
    gleason = {"classes": [3, "4+4"]}
    assert labels(write, path, head, ("a", 3), ("b", "4+4"), **gleason) == {"a": 0, "b": 1}
    order = {"classes": ["tumor", "normal"]}
    assert labels(write, path, head, ("a", "tumor"), ("b", "normal"), **order) == {"a": 0, "b": 1}
    several = {"columns": {"label": ["er", "pr"]}}
    assert labels(write, path, ("slide", "er", "pr"), ("a", 1, 0), ("b", "", 1), **several) == {"a": [1, 0], "b": None}


@pytest.mark.parametrize(
    ("event", "cells"),
    [
        ("status", ("dead", "alive")),
        ("event", (1, 0)),
        ("OS_status", ("1:DECEASED", "0:LIVING")),
        ("censorship", (0, 1)),
    ],
)
def test_survival(tmp_path: Path, write: SimpleNamespace, event: str, cells: tuple) -> None:
    rows = [("case_id", "survival_months", event), ("a", 3.5, cells[0]), ("b", 12, cells[1]), ("c", "NA", cells[0])]
    assert labels(write, tmp_path / "a.csv", *rows) == {"a": [3.5, 1], "b": [12, 0], "c": None}


def test_folds_of_transmil(tmp_path: Path, write: SimpleNamespace) -> None:
    head = ("", "train", "train_label", "val", "val_label", "test", "test_label")
    table = write.table(tmp_path / "fold0.csv", [head, (0, "a", 1, "b", 0, "c", 1), (1, "d", 0, "", "", "", "")])
    found = read_labels(table, Reading()).slides
    assert {name: (said.label, said.split) for name, said in found.items()} == {
        "a": (1, "train"), "b": (0, "val"), "c": (1, "test"), "d": (0, "train"),
    }  # fmt: skip


def test_excel(tmp_path: Path, write: SimpleNamespace) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (("slide_id", "label"), ("s.1", "x"), ("s.2", None), (3, "y")):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    found = read_labels(str(tmp_path / "a.xlsx"), Reading())
    assert {name: said.label for name, said in found.slides.items()} == {"s.1": 0, "s.2": None, "3": 1}
    (tmp_path / "b.xlsx").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"b.xlsx: not a readable Excel table"):
        read_table(tmp_path / "b.xlsx")


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        ([("what", "label"), ("a", 1)], {}, r"columns what, label: none of them is known to name slides"),
        ([("slide", "age", "sex"), ("a", 1, 2)], {}, r"there are age, sex: say which, columns=\{label: ...\}"),
        (
            [("slide", "label"), ("a", 1)],
            {"columns": {"label": "grade"}},
            r"no column 'grade' for label; it has",
        ),
        ([("slide", "label"), ("a", 1)], {"columns": {"lable": "x"}}, r"no role is called 'lable'"),
        ([("slide", "label"), ("a", 1), ("a.svs", 0)], {}, r"lines 2 and 3 both describe 'a', but differently"),
        ([("slide", "label"), ("", 1)], {}, r"line 2: slide is empty"),
        ([("slide", "label"), ("a", 1, 2)], {}, r"line 2: 3 cells under a header of 2 columns"),
        ([("slide", "label")], {}, r"no lines below its header"),
        ([("slide", "label"), ("a", 2.5), ("b", "2,5")], {}, r"line 3: label '2,5' among numbers such as '2.5'"),
        ([("slide", "label", "label"), ("a", 1, 0)], {}, r"a.csv: two columns are called 'label'"),
        ([("slide", "time", "event"), ("a", 1, "perhaps")], {}, r"line 2: event is 'perhaps', expected 1 or dead"),
        ([("slide", "time", "event"), ("a", "soon", 1)], {}, r"line 2: time is 'soon', expected a time"),
        (
            [("slide", "er", "pr"), ("a", 1, "x")],
            {"columns": {"label": ["er", "pr"]}},
            r"line 2: pr is 'x'",
        ),
    ],
)
def test_errors(tmp_path: Path, write: SimpleNamespace, rows: list, how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels(write, tmp_path / "a.csv", *rows, **how)


def test_tables_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.csv: no such table"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_bytes(b"slide,label\n\xff\xfe\x00,1\n")
    with pytest.raises(ValueError, match=r"a.csv: not a table of text .* save it as CSV in UTF-8"):
        read_table(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text('slide,label\n"a,1\nb,0\n')
    with pytest.raises(ValueError, match=r"a.csv: not a table of text \(unexpected end of data\)"):
        read_table(tmp_path / "a.csv")


def test_a_slide_of_two_patients(tmp_path: Path, write: SimpleNamespace) -> None:
    root = files(tmp_path / "features", "a")
    table = write.table(tmp_path / "l.csv", [("case_id", "label"), ("p", 1), ("q", 0)])
    slides = write.table(tmp_path / "s.csv", [("slide_id", "case_id"), ("a.svs", "p"), ("a", "q")])
    with pytest.raises(ValueError, match=r"s\.csv, line 3: slide 'a' is of 'q' and of 'p'"):
        Plain(root, labels=table, slides=slides).entries()


def files(root: Path, *names: str) -> str:
    root.mkdir(exist_ok=True)
    for name in names:
        np.save(root / f"{name}.npy", np.ones((3, 2), np.float32))
    return str(root)


def test_what_has_no_partner_is_listed(tmp_path: Path, write: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    root = files(tmp_path / "f", "a", "b", "c")
    table = write.table(tmp_path / "t.csv", [("slide", "label"), ("a.svs", "x"), ("b", ""), ("d", "y"), ("e", "y")])
    source = Plain(root, table)
    assert [entry.name for entry in source.entries()] == ["a"]
    assert {item["name"]: item["reason"].replace(str(tmp_path), "") for item in source.left_out} == {
        "b": "/t.csv, line 3: the label is empty",
        "c": "has a file (/f/c.npy), but no line in /t.csv",
        "d": "/t.csv, line 4: there is no file for it below /f",
        "e": "/t.csv, line 5: there is no file for it below /f",
    }
    command = ["pack", "--from", root, "--labels", table, "--out", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "there is no file for it" in error and "the label is empty" in error
    assert main([*command, "--missing", "leave_out"]) == 0
    assert {item["name"] for item in open_store(tmp_path / "out").left_out} == {"b", "c", "d", "e"}
    other = write.table(tmp_path / "o.csv", [("slide", "label"), ("S1", 1)])
    with pytest.raises(ValueError, match=r"describes none of the 3 slides: it has slide 'S1', a file is 'a'"):
        Plain(root, other).entries()
    with pytest.raises(ValueError, match=r"it has patient 'p1', a file is 'a'; name the table of slides and patients"):
        Plain(root, write.table(tmp_path / "p.csv", [("patient", "label"), ("p1", 1)])).entries()


def test_patients(tmp_path: Path, write: SimpleNamespace) -> None:
    root = files(tmp_path / "f", "a", "b", "c", "TCGA-3C-AALI-01Z-00-DX1.F6E9", "TCGA-3C-AALI-01Z-00-DX2.0A1B")
    slides = write.table(tmp_path / "s.csv", [("slide", "patient"), ("a", "p"), ("b", "p"), ("c", "q")])
    rows = [("patient", "label"), ("p", 1), ("q", 0), ("TCGA-3C-AALI", 1)]
    source = Plain(root, write.table(tmp_path / "l.csv", rows), slides=slides, bags="patient")
    assert {entry.name: (entry.label, len(entry.parts)) for entry in source.entries()} == {
        "TCGA-3C-AALI": (1, 1), "p": (1, 1), "q": (0, 0),
    }  # fmt: skip
    assert len(source.load(source.entries()[1]).x) == 6
    splits = make_splits(source.entries(), test_fraction=0.34)
    assert sorted(str(split) for split in splits) == ["test", "train", "train"]
    rows = [("slide", "patient", "label"), ("a", "p", 1), ("b", "p", 0), ("c", "q", 0)]
    with pytest.raises(ValueError, match=r"patient 'p': slide 'a' has label 1 and split None, slide 'b' 0"):
        Plain(root, write.table(tmp_path / "l.csv", rows), bags="patient").entries()
    with pytest.raises(ValueError, match=r"slide 'a': its patient is not known"):
        Plain(root, bags="patient").entries()


def test_a_patient_in_two_splits_of_a_table(
    tmp_path: Path, write: SimpleNamespace, capsys: pytest.CaptureFixture
) -> None:
    root = files(tmp_path / "f", "a", "b")
    table = write.table(tmp_path / "l.csv", [("slide", "patient", "label"), ("a", "p", 1), ("b", "p", 1)])
    splits = write.table(tmp_path / "s.csv", [("slide", "split"), ("a", "training"), ("b", "test")])
    command = ["pack", "--from", root, "--labels", table, "--splits", splits, "--out", str(tmp_path / "o")]
    assert main([*command, "--option", "bags=patient"]) == 2
    assert "'p' has slides in several splits (a in train, b in test)" in capsys.readouterr().err


def test_the_command_s_own_errors(tmp_path: Path, capsys: pytest.CaptureFixture, packed: Callable) -> None:
    root = files(tmp_path / "f", "a")

    def fails(*command: str) -> str:
        assert main(["pack", *command]) == 2
        return capsys.readouterr().err

    assert "data.source says what to pack, and is missing; or give --from" in fails("--out", str(tmp_path / "o"))
    assert "give --out" in fails("--from", root, "--unlabelled", "keep")
    assert "--labels, --slides" in fails("--labels", "x.csv", "--out", "o")
    assert "no such file or folder; check --from" in fails("--from", str(tmp_path / "nowhere"), "--out", "o")
    assert "holds none of the layouts" in fails(
        "--from", str(tmp_path.joinpath("e").mkdir() or tmp_path / "e"), "--out", "o"
    )
    assert "no source is called 'tridnt', did you mean 'trident'" in fails(
        "--from", root, "--format", "tridnt", "--out", "o"
    )
    assert "takes no 'feature'" in fails("--from", root, "--format", "trident", "--option", "feature=x", "--out", "o")
    assert "has no folder features_<encoder>" in fails("--from", root, "--format", "trident", "--out", "o")
    assert "--column label: expected ROLE=NAME" in fails("--from", root, "--column", "label", "--out", "o")
    for option, message in (
        ("stride=abc", "source plain: stride is 'abc', expected float | None"),
        ("stride=-1", "stride is -1, expected a positive number"),
        ("classes=3", "source plain: classes is 3, expected Sequence[str]"),
        ("columns=3", "source plain: columns is 3, expected Mapping[str,"),
        ("root=[a]", "source plain: root is ['a'], expected str"),
        ("labels=5", "5: no such table"),
        ("stride={", "--option stride={: not valid YAML"),
    ):
        assert message in fails("--from", root, "--option", option, "--unlabelled", "keep", "--out", "o")
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file: is a file, expected a folder" in fails("--from", root, "--out", str(tmp_path / "file"))
    assert "setting 'shards'" in fails("--from", root, "--out", "") and "expected data.key" in fails("data=3")
    assert "only settings of data.*" in fails("--from", root, "--out", "o", "optim.lr=1")
    assert "label is missing" in fails("--from", root, "--out", str(tmp_path / "u"))
    found = packed(root, "--unlabelled", "keep", "data.storage_dtype=float32")
    assert found["a"].bag.x.dtype == np.float32 and found["a"].info.label is None
