"""Tables of splits in the layouts of the field, written by hand."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from bigbag import Bag
from bigbag.data import MemoryStore, SourceEntry, folds, make_splits, read_splits, split_bags
from bigbag.data.split_tables import splits_table

NAMES = ["TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF", "TCGA-3C-AALI-01Z-00-DX2.CF4496E0", "b", "c"]
BAGS = [SourceEntry(name, label=i % 2, patient="pq"[i // 2]) for i, name in enumerate(NAMES)]
A, B = NAMES[:2]


@pytest.fixture
def table(tmp_path: Path):  # type: ignore[no-untyped-def]
    def write(text: str, name: str = "table.csv") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


LAYOUTS = {
    "torchmil": f"bag_name,split\n{A},train\n{B},train\nb,val\nc,test\n",
    "with extensions": f"slide,split\n/data/{A}.svs,Train\n{B}.svs,training\nb.h5,validation\nc.tif,TEST\n",
    "CLAM names": f",train,val,test\n0,{A},b,c\n1,{B},,\n",
    "CLAM names, numbers as floats": f",train,val,test\n0.0,{A},b,c\n1.0,{B},nan,nan\n",
    "CLAM booleans": f",train,val,test\n{A},True,False,False\n{B},True,,\nb,,True,\nc,False,False,1\n",
    "0 and 1": f"slide_id;train;val;test\n{A};1;0;0\n{B};1;0;0\nb;0;1;0\nc;0;0;1\n",
    "TransMIL": f",train,train_label,val,val_label,test,test_label\n0,{A},0,b,0,c,1\n1,{B},1,,,,\n",
    "nnMIL": f"slide_id,patient_id,label,split\n{A},p,0,train\n{B},p,1,train\nb,q,0,val\nc,q,1,test\n",
    "windows": f"\ufeffbag_name,split\r\n{A},train\r\n{B},train\r\nb,val\r\nc,test\r\n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(table, layout: str) -> None:  # type: ignore[no-untyped-def]
    assert read_splits(table(LAYOUTS[layout]), BAGS) == ["train", "train", "val", "test"]


def test_patho_bench(table) -> None:  # type: ignore[no-untyped-def]
    text = f"case_id\tslide_id\tlabel\tfold_0\tfold_1\np\t{A}\t0\ttrain\ttest\np\t{B}\t1\ttrain\ttest\nq\tb\t0\ttest\ttrain\nq\tc\t1\ttest\ttrain\n"  # noqa: E501
    path = table(text, "k=all.tsv")
    assert read_splits(path, BAGS, 0) == ["train", "train", "test", "test"]
    assert make_splits(BAGS, table=path, fold=1) == ["test", "test", "train", "train"]
    assert [one.fold for one in folds(table=path)] == [0, 1]
    with pytest.raises(ValueError, match="has the folds 0, 1, but not fold 2"):
        read_splits(path, BAGS, 2)


def test_patients_and_numbers_of_folds(table) -> None:  # type: ignore[no-untyped-def]
    path = table("case_id,fold\np,0\nq,1\n")
    assert read_splits(path, BAGS, 1) == ["train", "train", "test", "test"]
    assert [one.fold for one in folds(table=path)] == [0, 1]
    with pytest.raises(ValueError, match="no bag is in fold 5"):
        read_splits(path, BAGS, 5)
    with pytest.raises(ValueError, match=r"line 2: fold is 'x', expected a number"):
        read_splits(table("case_id,fold\np,x\n"), BAGS)


def test_one_file_for_each_fold(table, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    table(f",train,test\n0,{A},b\n1,{B},c\n", "splits_0.csv")
    table(f",train,test\n0,b,{A}\n1,c,{B}\n", "splits_1.csv")
    pattern = str(tmp_path / "splits_{fold}.csv")
    found = [make_splits(BAGS, one) for one in folds(table=pattern)]
    assert found == [["train", "train", "test", "test"], ["test", "test", "train", "train"]]
    with pytest.raises(ValueError, match=r"none_0.csv: no such file, expected the first fold there"):
        folds(table=str(tmp_path / "none_{fold}.csv"))
    with pytest.raises(ValueError, match="has no folds"):
        folds(table=str(tmp_path / "splits_0.csv"))


def test_what_a_run_saves_is_read_back(table) -> None:  # type: ignore[no-untyped-def]
    bags = [*BAGS, SourceEntry("x, y", label=[1.5, 0])]
    splits = ["train", "val", None, "test", "train"]
    assert read_splits(table(splits_table(bags, splits)), bags) == splits


def test_strangers_and_bags_that_are_not_listed_are_counted(table, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    with caplog.at_level(logging.WARNING):
        splits = read_splits(table("name,split\nb,train\nz1,train\nz2,val\n"), BAGS)
    assert splits == [None, None, "train", None]
    assert "2 names in it are no bags of the set: z1, z2" in caplog.text
    assert f"3 bags have no split in it: {A}, {B}, c" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,split\nb,train\nb,test\n", r"table.csv, line 3: bag 'b' is in train and in test"),
        (",train,test\n0,b,b\n", r"line 2: bag 'b' is in train and in test"),
        ("name,label\nb,1\n", r"columns name, label; expected a column of names"),
        ("name,split\nz,train\n", r"names none of the 4 bags: it has 'z', a bag is 'TCGA"),
        ("name,split\n", "has no lines below its header"),
        ("", "has no lines below its header"),
        ("name,split,Split\nb,train,test\n", "two columns are called 'Split'"),
    ],
)
def test_tables_that_are_refused(table, text: str, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        read_splits(table(text), BAGS)


def test_a_table_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such table"):
        read_splits(tmp_path / "gone.csv", BAGS)
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"x.csv: not a table of text"):
        read_splits(tmp_path / "x.csv", BAGS)


def test_a_split_that_no_run_uses_is_said(caplog):  # type: ignore[no-untyped-def]
    bags = [Bag(np.ones((2, 3), np.float32), y=i % 2, key=str(i)) for i in range(4)]
    splits = split_bags(MemoryStore(bags, ["train", "train", "trian", "test"]))
    assert splits["trian"] == (2,) and "1 bags are in the split 'trian', which no run uses" in caplog.text


def test_columns_without_a_name_do_not_shift_the_others(table):  # type: ignore[no-untyped-def]
    path = table(",,train,val,test,\n0,,b,c,,\n")
    assert read_splits(path, BAGS) == [None, None, "train", "val"]
