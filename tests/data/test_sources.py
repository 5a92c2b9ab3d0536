"""Sources: torchmil's layout against torchmil itself, and MUSK."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bigbag.data import Source, open_store, pack
from bigbag.data.sources import MemorySource, Musk1, Musk2, TableSource, TorchmilFolder
from bigbag.datasets import SOURCES, open_source

NAMES = {"normal_001": "train", "tumor_001": "train", "test.001": "test"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small CAMELYON16 as torchmil publishes it."""
    root = tmp_path / "camelyon"
    patches = root / "patches_512"
    for kind in ("features/features_UNI", "labels", "patch_labels", "coords"):
        (patches / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(NAMES):
        n = 20 + i
        labels = (rng.random(n) < 0.2).astype(np.int64) if "tumor" in name else np.zeros(n, np.int64)
        np.save(patches / "features/features_UNI" / f"{name}.npy", rng.normal(size=(n, 8)).astype(np.float32))
        np.save(patches / "labels" / f"{name}.npy", np.array([labels.max()]))
        np.save(patches / "patch_labels" / f"{name}.npy", labels[:, None])
        np.save(patches / "coords" / f"{name}.npy", 512 * rng.integers(3, 40, (n, 2)))
    write_splits(root, list(NAMES.items()))
    return root


def write_splits(root: Path, rows: list[tuple[str, str]], columns: tuple[str, str] = ("bag_name", "split")) -> None:
    with open(root / "splits.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def test_torchmil_folder_holds_what_torchmil_reads(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchmil.datasets")
    pack(TorchmilFolder(str(folder)), tmp_path / "set", dtype="float32", progress=False)
    store = open_store(tmp_path / "set")
    ours = {info.name: store.read(index) for index, info in enumerate(store.infos)}
    assert {info.name: info.split for info in store.infos} == NAMES
    for split in ("train", "test"):
        theirs = datasets.CAMELYON16MILDataset(str(folder), partition=split)
        for name, item in zip(theirs.get_bag_names(), theirs):
            np.testing.assert_array_equal(ours[name].x, item["X"])
            np.testing.assert_array_equal(ours[name].y, item["Y"])
            np.testing.assert_array_equal(ours[name].y_inst, item["y_inst"])
            np.testing.assert_array_equal(ours[name].coords, item["coords"])


def test_lattice_of_coordinates_off_the_grid(folder: Path) -> None:
    source = TorchmilFolder(str(folder))
    entry = source.entries()[0]
    np.save(folder / "patches_512/coords" / f"{entry.name}.npy", np.tile([[700, 1023], [1024, 5000]], (10, 1)))
    np.testing.assert_array_equal(source.load(entry).coords, np.tile([[0, 0], [1, 8]], (10, 1)))


def test_optional_files_may_be_absent(folder: Path) -> None:
    source = TorchmilFolder(str(folder))
    entry = source.entries()[0]
    for kind in ("coords", "patch_labels"):
        (folder / "patches_512" / kind / f"{entry.name}.npy").unlink()
    bag = source.load(entry)
    assert bag.coords is None and bag.y_inst is None and bag.key == entry.name


def test_bags_without_files_are_reported_and_left_out_only_when_asked(folder: Path, tmp_path: Path) -> None:
    write_splits(folder, [*NAMES.items(), ("gone_1", "train"), ("gone_2", "test")])
    with pytest.raises(ValueError, match=r"2 bags cannot be packed \(gone_1: in splits.csv, but .*left_out_ok=True"):
        pack(TorchmilFolder(str(folder)), tmp_path / "set", progress=False)
    manifest = pack(TorchmilFolder(str(folder)), tmp_path / "set", progress=False, left_out_ok=True)
    assert [item["name"] for item in manifest.left_out] == ["gone_1", "gone_2"]
    assert len(manifest.bags) == 3
    write_splits(folder, list(NAMES.items())[:2])
    assert TorchmilFolder(str(folder)).left_out == [
        {"name": "test.001", "reason": "has features, but no line in splits.csv"}
    ]


def test_torchmil_folder_errors(folder: Path) -> None:
    with pytest.raises(ValueError, match="features_CONCH: no such folder"):
        TorchmilFolder(str(folder), features="CONCH")
    write_splits(folder, [*NAMES.items(), ("tumor_001", "test")])
    with pytest.raises(ValueError, match=r"line 5: bag 'tumor_001' is in train and in test"):
        TorchmilFolder(str(folder)).entries()
    write_splits(folder, list(NAMES.items()), ("name", "split"))
    with pytest.raises(ValueError, match="expected bag_name and split"):
        TorchmilFolder(str(folder)).entries()
    write_splits(folder, list(NAMES.items()))
    (folder / "patches_512/labels/tumor_001.npy").unlink()
    with pytest.raises(ValueError, match="bag 'tumor_001': label is missing, expected it in"):
        TorchmilFolder(str(folder)).entries()


def test_object_arrays_and_truncated_files_are_refused(folder: Path) -> None:
    source = TorchmilFolder(str(folder))
    entry = source.entries()[1]
    np.save(entry.path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"tumor_001.npy: not a readable .npy"):
        source.load(entry)
    np.save(entry.path, np.ones((20, 8), np.float32))
    content = Path(entry.path).read_bytes()
    Path(entry.path).write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"tumor_001.npy: not a readable .npy"):
        source.load(entry)


def test_description_names_the_bags_not_the_place(folder: Path, tmp_path: Path) -> None:
    before = TorchmilFolder(str(folder)).description()
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert TorchmilFolder(str(moved)).description() == before
    write_splits(moved, [(name, "train") for name in NAMES])
    assert TorchmilFolder(str(moved)).description() != before


def test_table_source() -> None:
    x = np.arange(10.0).reshape(5, 2)
    source = TableSource(x, np.array([7, 3, 7, 7, 3]), np.array([1, 0, 1, 1, 0]), "mine")
    assert [(entry.name, entry.label) for entry in source.entries()] == [("mine-7", 1), ("mine-3", 0)]
    np.testing.assert_array_equal(source.load(source.entries()[0]).x, x[[0, 2, 3]])
    with pytest.raises(ValueError, match=r"bag 7 has the labels \[0, 1\]"):
        TableSource(x, np.array([7, 3, 7, 7, 3]), np.array([1, 0, 0, 1, 0]))
    with pytest.raises(ValueError, match="5 rows of features, 4 bag ids"):
        TableSource(x, np.zeros(4), np.zeros(5))


@pytest.mark.parametrize(
    ("cls", "bags", "positive", "instances", "largest"), [(Musk1, 92, 47, 476, 40), (Musk2, 102, 39, 6598, 1044)]
)
def test_musk(
    test_data: Path, tmp_path: Path, cls: type, bags: int, positive: int, instances: int, largest: int
) -> None:
    """Numbers of the data sets as the UCI repository documents them."""
    if not (test_data / "musk").is_dir():
        pytest.skip(f"MUSK is not at {test_data / 'musk'}")
    source = cls(str(test_data / "musk"))
    assert isinstance(source, Source)
    pack(source, tmp_path, progress=False)
    store = open_store(tmp_path)
    assert len(store) == bags and sum(info.label for info in store.infos) == positive
    assert sum(store.sizes) == instances and max(store.sizes) == largest and store.feature_shape == (166,)
    for index in (0, bags - 1):
        np.testing.assert_array_equal(store.read(index).x, source.load(source.entries()[index]).x)


def test_musk_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"musk1_data.csv: no such file \(nor .csv.gz\)"):
        open_source("musk1", root=str(tmp_path))
    (tmp_path / "musk2.csv").write_text("1,1,a\n")
    with pytest.raises(ValueError, match="not a table of numbers"):
        open_source("musk2", root=str(tmp_path))


def test_open_source(folder: Path) -> None:
    source = open_source("camelyon16", root=str(folder), features="UNI")
    assert isinstance(source, TorchmilFolder) and isinstance(source, Source)
    assert isinstance(open_source("digits"), Source)
    with pytest.raises(ValueError, match=r"no source is called 'camelyon', did you mean 'camelyon16'\?"):
        open_source("camelyon")
    with pytest.raises(ValueError, match=r"source camelyon16 takes no 'feature', did you mean 'features'\?"):
        open_source("camelyon16", root=str(folder), feature="UNI")
    with pytest.raises(ValueError, match="source camelyon16 needs 'root'"):
        open_source("camelyon16")
    assert "musk1" in SOURCES


def test_memory_source_notices_other_features() -> None:
    from bigbag import Bag

    a = Bag(np.zeros((2, 3)), y=0, key="a")
    assert MemorySource([a]).description() == MemorySource([replace(a)]).description()
    assert MemorySource([a]).description() != MemorySource([replace(a, x=np.ones((2, 3)))]).description()
    with pytest.raises(ValueError, match="2 splits for 1 bags"):
        MemorySource([a], ["train", "val"])


def test_a_label_of_several_numbers(folder: Path) -> None:
    """(time, event) of a survival task, or several labels of a bag."""
    path = folder / "patches_512/labels/tumor_001.npy"
    np.save(path, np.array([[31.5, 1.0]]))
    labels = {entry.name: entry.label for entry in TorchmilFolder(str(folder)).entries()}
    assert labels == {"normal_001": 0, "tumor_001": [31.5, 1], "test.001": 0}
    np.save(path, np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"'tumor_001'.*expected numbers in a row"):
        TorchmilFolder(str(folder)).entries()
