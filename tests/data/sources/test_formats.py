"""CLAM, STAMP, GigaPath, slideflow and the other layouts, each packed from its paths alone."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bigbag.data import open_store, pack
from bigbag.data.sources.clam import Clam, clam_stride
from bigbag.data.sources.detect import detect_format
from bigbag.data.sources.plain import Plain
from bigbag.data.sources.stamp import Stamp
from bigbag.data.sources.tables import MilTable
from bigbag.datasets import open_source

h5py = pytest.importorskip("h5py")
SIZES = {"slide.A": 21, "slide.B": 30, "slide.C": 12}
LABELS = {"slide.A": "tumor", "slide.B": "normal", "slide.C": "tumor"}


def cells(write: SimpleNamespace, name: str) -> np.ndarray:
    return write.places(SIZES[name], seed=len(name) + SIZES[name])


def x_of(write: SimpleNamespace, name: str, width: int = 8) -> np.ndarray:
    return write.features(SIZES[name], SIZES[name], width)


def label_table(root: Path, write: SimpleNamespace, suffix: str = "", slides_per_patient: int = 2) -> str:
    rows = [
        (f"patient{i // slides_per_patient}", f"{name}{suffix}", label)
        for i, (name, label) in enumerate(LABELS.items())
    ]
    return write.table(root / "labels.csv", [("case_id", "slide_id", "label"), *rows])


def check(
    write: SimpleNamespace, found: dict[str, Any], stride: float | None, width: int = 8, labels: bool = True
) -> None:
    """N, features, lattice, stride, and labels by the sorted order of their texts."""
    assert found.keys() == SIZES.keys()
    for name, one in found.items():
        assert one.info.stride == stride and one.info.num_instances == SIZES[name]
        np.testing.assert_array_equal(one.bag.x, x_of(write, name, width).astype(np.float16))
        if stride is not None:
            np.testing.assert_array_equal(one.bag.coords, cells(write, name))
        if labels:
            assert one.info.label == {"normal": 0, "tumor": 1}[LABELS[name]]


@pytest.mark.parametrize(
    ("about", "stride"),
    [
        ({}, 256.0),
        ({"patch_level": 1, "downsample": (4.0, 4.0)}, 1024.0),
        ({"downsample": (1.0, 1.0), "custom_downsample": 2}, 512.0),
    ],
)
def test_clam(tmp_path: Path, write: SimpleNamespace, packed: Callable, about: dict, stride: float) -> None:
    root = tmp_path / "FEATURES"
    for name in SIZES:
        coords = cells(write, name) * int(stride) + [100, 37]
        write.clam(root, name, x_of(write, name), coords)
        write.clam_patches(tmp_path / "RESULTS" / "patches", name, coords, **about)
    splits = write.table(
        tmp_path / "splits_0.csv",
        [("", "train", "val", "test"), (0, "slide.A", "slide.C", "slide.B")],
    )
    more = ["--labels", label_table(tmp_path, write, slides_per_patient=1), "--splits", splits]
    found = packed(root, *more, "--option", f"patches={tmp_path / 'RESULTS' / 'patches'}")
    check(write, found, stride)
    assert {name: one.info.split for name, one in found.items()} == {
        "slide.A": "train", "slide.B": "test", "slide.C": "val",
    }  # fmt: skip
    assert [found[name].info.patient for name in SIZES] == ["patient0", "patient1", "patient2"]
    check(write, packed(root, *more, out="measured"), stride)  # without the patches


def test_clam_tensors_with_coordinates_beside_them(tmp_path: Path, write: SimpleNamespace, packed: Callable) -> None:
    """pt_files and --h5_path, as MHIM, RRT and PackMIL take them; and pt_files alone."""
    for name in SIZES:
        write.clam(tmp_path / "f", name, x_of(write, name), cells(write, name) * 448)
    (tmp_path / "f" / "h5_files").rename(tmp_path / "coords")
    labels = label_table(tmp_path, write, ".svs", slides_per_patient=1)
    check(write, packed(tmp_path / "f", "--labels", labels, "--option", f"h5_path={tmp_path / 'coords'}"), 448.0)
    alone = packed(tmp_path / "f", "--labels", labels, out="alone")
    check(write, alone, None)
    assert all(one.bag.coords is None for one in alone.values())
    bool_splits = [("", "train", "val", "test"), ("slide.A", True, False, False), ("slide.B", False, False, True)]
    bool_splits += [("slide.C", False, True, False)]
    splits = write.table(tmp_path / "splits_0_bool.csv", bool_splits)
    found = packed(tmp_path / "f", "--labels", labels, "--splits", splits, out="bool")
    assert [found[name].info.split for name in SIZES] == ["train", "test", "val"]


def test_clam_overlapping_patches_and_other_runs(tmp_path: Path, write: SimpleNamespace) -> None:
    """``step_size`` is written nowhere: the coordinates show it. Coordinates of another run are refused."""
    x = write.features(49)
    whole = np.stack(np.divmod(np.arange(49), 7), 1)
    write.clam(tmp_path, "s", x, whole * 128)
    write.clam_patches(tmp_path / "patches", "s", whole * 128)
    source = Clam(str(tmp_path))
    assert source.load(source.entries()[0]).stride == 128
    (tmp_path / "h5_files" / "s.h5").unlink()
    write.clam_patches(tmp_path / "patches", "s", whole[:40] * 128)
    source = Clam(str(tmp_path))
    with pytest.raises(ValueError, match=r"s.pt has 49 patches, .*s.h5 40"):
        source.load(source.entries()[0])
    assert clam_stride({"patch_size": 256, "patch_level": 1}) is None


def test_stamp(tmp_path: Path, write: SimpleNamespace, packed: Callable) -> None:
    root = tmp_path / "uni2-01234567"
    for i, name in enumerate(SIZES):
        write.stamp(root / f"site{i % 2}" / f"{name}.h5", x_of(write, name), cells(write, name))
    clini = write.table(tmp_path / "clini.csv", [("PATIENT", "AGE", "isMSIH"), ("p1", 61, "yes"), ("p2", 40, "no")])
    rows = [("p1", "site0/slide.A.h5"), ("p1", "site1/slide.B.h5"), ("p2", "site0/slide.C.h5")]
    slides = write.table(tmp_path / "slide.csv", [("PATIENT", "FILENAME"), *rows])
    more = ["--labels", clini, "--slides", slides, "--column", "label=isMSIH"]
    found = packed(root, *more)
    assert {name: (one.info.label, one.info.num_instances) for name, one in found.items()} == {
        "p1": (1, 51),
        "p2": (0, 12),
    }
    one = found["p1"].bag
    assert one.stride == 256 and one.attributes["unit"] == "um"
    assert one.attributes["slides"] == ["site0/slide.A", "site1/slide.B"] and one.attributes["sizes"] == [21, 30]
    np.testing.assert_array_equal(one.coords[:21], cells(write, "slide.A"))
    np.testing.assert_array_equal(one.coords[21:, 1], cells(write, "slide.B")[:, 1])
    np.testing.assert_array_equal(one.positions[:21], cells(write, "slide.A") * 256.0)
    single = packed(root, *more, "--option", "bags=slide", out="slides")
    assert {name: (one.info.patient, one.info.label) for name, one in single.items()} == {
        "site0/slide.A": ("p1", 1), "site1/slide.B": ("p1", 1), "site0/slide.C": ("p2", 0),
    }  # fmt: skip


def test_stamp_s_older_files(tmp_path: Path, write: SimpleNamespace) -> None:
    """Pixels of a 224-pixel tile without a unit; ``tile_size`` for ``tile_size_um``; encodings of slides."""
    place = np.stack(np.divmod(np.arange(12), 4), 1)
    none = dict.fromkeys(("unit", "tile_size_um", "tile_size_px", "stamp_version", "feat_type"))
    write.stamp(tmp_path / "old.h5", write.features(12), place * 224 / 256, **none)
    write.stamp(tmp_path / "v2.h5", write.features(12), place, **{**none, "unit": "um", "tile_size": 256.0})
    write.stamp(tmp_path / "slide.h5", write.features(1), place[:1], feat_type="slide")
    write.stamp(tmp_path / "px.h5", write.features(12), place, unit="px")
    source = Stamp(str(tmp_path), bags="slide")
    entries = {entry.name: entry for entry in source.entries()}
    for name in ("old", "v2"):
        bag = source.load(entries[name])
        assert bag.stride == 256
        np.testing.assert_allclose(bag.coords, place * 256)
    with pytest.raises(ValueError, match=r"slide.h5: holds the encoding of a slide, expected tiles"):
        source.load(entries["slide"])
    with pytest.raises(ValueError, match=r"px.h5: attribute unit is 'px', expected 'um' .*: convert coords"):
        source.load(entries["px"])


def test_gigapath(tmp_path: Path, write: SimpleNamespace, packed: Callable) -> None:
    for name in SIZES:
        with h5py.File(tmp_path.joinpath("g").mkdir(exist_ok=True) or tmp_path / "g" / f"{name}.h5", "w") as file:
            file["features"] = x_of(write, name, 1536)
            file["coords"] = cells(write, name) * 256
    head = ("slide_id", "pat_id", "EGFR", "KRAS")
    parts = {
        "train": ("slide.A.svs", "p1", 1, 0),
        "val": ("slide.B.svs", "p2", 0, 0),
        "test": ("slide.C.svs", "p3", 1, 1),
    }
    for split, row in parts.items():
        write.table(tmp_path / "splits" / f"{split}_0.csv", [head, row])
    assert detect_format(tmp_path / "g")[0] == "gigapath"
    more = ["--labels", str(tmp_path / "splits" / "{split}_0.csv"), "--column", "label=EGFR,KRAS"]
    found = packed(tmp_path / "g", *more)
    check(write, found, 256.0, 1536, labels=False)
    assert {name: (one.info.label, one.info.split, one.info.patient) for name, one in found.items()} == {
        "slide.A": ([1, 0], "train", "p1"), "slide.B": ([0, 0], "val", "p2"), "slide.C": ([1, 1], "test", "p3"),
    }  # fmt: skip


def test_slideflow(tmp_path: Path, write: SimpleNamespace, packed: Callable) -> None:
    (tmp_path / "bags").mkdir()
    for name in SIZES:
        torch.save(torch.from_numpy(x_of(write, name)), tmp_path / "bags" / f"{name}.pt")
        np.savez(tmp_path / "bags" / f"{name}.index.npz", cells(write, name) * 604 + 302)
    config = {"extractor": {"class": "uni", "kwargs": {}}, "tile_px": 256, "tile_um": 302}
    (tmp_path / "bags" / "bags_config.json").write_text(json.dumps(config))
    found = packed(tmp_path / "bags", "--labels", label_table(tmp_path, write), "--splits", "test_fraction=0.5")
    check(write, found, 604.0)
    kept = {"tile_px": 256, "tile_um": 302, "extractor": "uni", "anchor": "centre"}
    assert found["slide.A"].bag.attributes == kept
    assert found["slide.A"].info.split == found["slide.B"].info.split != found["slide.C"].info.split  # patients


@pytest.mark.parametrize("kind", ["openmil", "mil_baseline"])
def test_lists_of_files(tmp_path: Path, write: SimpleNamespace, packed: Callable, kind: str) -> None:
    root = tmp_path / kind
    root.mkdir()
    paths = {}
    for name in SIZES:
        paths[name] = root / f"{name}.pth" if kind == "openmil" else root / f"{name}.pt"
        coords = torch.from_numpy(cells(write, name) * 512)
        feats = torch.from_numpy(x_of(write, name))
        content = {"feats": feats, "coords": coords, "patch_size_lv0": 512}
        torch.save(content if kind == "openmil" else {"features": feats[None], "coords": coords}, paths[name])
    if kind == "openmil":
        items = {"train": ["slide.A"], "val": ["slide.B"], "test": ["slide.C"]}
        listed = {k: [{"path": str(paths[n]), "label": LABELS[n]} for n in names] for k, names in items.items()}
        (root / "split.json").write_text(json.dumps(listed))
    else:
        columns = [f"{split}_{part}" for split in ("train", "val", "test") for part in ("slide_path", "label")]
        row = [cell for name in SIZES for cell in (paths[name], LABELS[name])]
        write.table(root / "list.csv", [columns, row, ["", "", "", "", "", ""]])
    found = packed(root)
    check(write, found, 512.0)
    assert [found[name].info.split for name in SIZES] == ["train", "val", "test"]
    assert detect_format(root)[0] == kind


def test_dicts_of_tensors(tmp_path: Path, write: SimpleNamespace, packed: Callable) -> None:
    (tmp_path / "f").mkdir()
    for name in SIZES:
        content = {
            "feats": torch.from_numpy(x_of(write, name)).bfloat16(),
            "coords": torch.from_numpy(cells(write, name)),
        }
        torch.save(content, tmp_path / "f" / f"{name}.pth")
    found = packed(tmp_path / "f", "--labels", label_table(tmp_path, write))
    assert found["slide.A"].info.stride == 1 and detect_format(tmp_path / "f")[0] == "pt_dicts"
    expected = torch.from_numpy(x_of(write, "slide.A")).bfloat16().float().numpy().astype(np.float16)
    np.testing.assert_array_equal(found["slide.A"].bag.x, expected)


def test_owkin(tmp_path: Path, write: SimpleNamespace, packed: Callable) -> None:
    for name in SIZES:
        (tmp_path / "o" / name).mkdir(parents=True)
        level = np.full((SIZES[name], 1), 16.0)
        values = np.concatenate([level, cells(write, name), x_of(write, name)], 1)
        np.save(tmp_path / "o" / name / "features.npy", values.astype(np.float32))
    found = packed(tmp_path / "o", "--labels", label_table(tmp_path, write))
    check(write, found, None)
    for name, one in found.items():
        np.testing.assert_array_equal(one.bag.coords, cells(write, name))
        assert one.bag.attributes == {"tile_level": 16}


def test_kaczmarj(tmp_path: Path, write: SimpleNamespace, packed: Callable) -> None:
    (tmp_path / "k" / "embeddings").mkdir(parents=True)
    for name in SIZES:
        torch.save(torch.from_numpy(x_of(write, name)), tmp_path / "k" / "embeddings" / f"{name}.pt")
        write.clam_patches(tmp_path / "k" / "patches", name, cells(write, name) * 520, patch_size=520)
    check(write, packed(tmp_path / "k", "--labels", label_table(tmp_path, write)), 520.0)


def test_nnmil(tmp_path: Path, write: SimpleNamespace, packed: Callable) -> None:
    root = tmp_path / "n"
    for name in SIZES:
        write.save_h5(root / "h5" / f"{name}.h5", {"features": x_of(write, name), "coords": cells(write, name) * 256})
    (root / "dataset.json").write_text("{}")
    rows = [
        ("slide.A", "p1", "Alive", 30.5, "train"),
        ("slide.B", "p2", "dead", 12, "test"),
        ("slide.C", "p3", 1, 7, "val"),
    ]
    write.table(root / "dataset.csv", [("slide_id", "patient_id", "status", "time", "split"), *rows])
    found = packed(root)
    check(write, found, 256.0, labels=False)
    assert {name: (one.info.label, one.info.split) for name, one in found.items()} == {
        "slide.A": ([30.5, 0], "train"), "slide.B": ([12, 1], "test"), "slide.C": ([7, 1], "val"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", [".npy", ".npz", ".pt", ".safetensors", ".h5", ".csv"])
def test_plain_files(tmp_path: Path, write: SimpleNamespace, packed: Callable, kind: str) -> None:
    from safetensors.numpy import save_file

    root = tmp_path / "plain"
    root.mkdir()
    for name in SIZES:
        x, coords, path = x_of(write, name), cells(write, name) * 224, root / f"{name}{kind}"
        if kind == ".npy":
            np.save(path, x)
        elif kind == ".npz":
            np.savez_compressed(path, features=x, coords=coords)
        elif kind == ".pt":
            torch.save(torch.from_numpy(x), path)
        elif kind == ".safetensors":
            save_file({"features": x, "coords": coords}, path)
        elif kind == ".h5":
            with h5py.File(path, "w") as file:
                file.create_dataset("embeddings", data=x, compression="gzip", chunks=(4, 8))
                file["coords"] = coords
        else:
            write.table(path, [["x", "y", *range(8)], *np.concatenate([coords, x], 1).tolist()])
    found = packed(root, "--labels", label_table(tmp_path, write))
    check(write, found, None if kind in (".npy", ".pt") else 224.0)


def test_dsmil_s_numbered_header(tmp_path: Path, write: SimpleNamespace) -> None:
    from bigbag.data.sources.arrays import read_file

    x = write.features(3, width=4)
    assert read_file(write.table(tmp_path / "a.csv", [[0, 1, 2, 3], *x.tolist()])).features().shape == (3, 4)
    assert read_file(write.table(tmp_path / "b.csv", x.tolist())).features().shape == (3, 4)


@pytest.mark.parametrize(
    "values",
    [np.full(6, 2**63 + 5, np.uint64), np.full(6, 1e30), np.full(6, np.nan), np.zeros((3, 2), np.int64), ["a"] * 6],
)
def test_instance_labels_that_are_none(tmp_path: Path, values: np.ndarray | list[str]) -> None:
    np.savez(tmp_path / "a.npz", features=np.ones((6, 4), np.float32), y_inst=values)
    with pytest.raises(ValueError, match=r"a\.npz: y_inst holds .*, expected one integer for each instance"):
        Plain(str(tmp_path)).read([tmp_path / "a.npz"])


def test_torchmil_s_other_layouts(tmp_path: Path, write: SimpleNamespace, packed: Callable) -> None:
    """Features, labels and coords in the root, as .h5 with one key each; instance labels stay .npy; no splits.csv."""
    root = tmp_path / "t"
    for name in SIZES:
        write.save_h5(root / "features" / f"{name}.h5", {"features": x_of(write, name)})
        write.save_h5(root / "labels" / f"{name}.h5", {"labels": np.array([int(LABELS[name] == "tumor")])})
        write.save_h5(root / "coords" / f"{name}.h5", {"coords": cells(write, name) * 512})
        (root / "inst_labels").mkdir(exist_ok=True)
        np.save(root / "inst_labels" / f"{name}.npy", np.zeros((SIZES[name], 1)))
    found = packed(root)
    check(write, found, 512.0)
    assert found["slide.A"].bag.y_inst.tolist() == [0] * 21 and found["slide.A"].info.split is None


UCI = """MUSK-188,188_1+1,42,-198,1.
MUSK-188,188_1+2,43,-190,1.
NON-MUSK-jp13,jp13_1+1,49,-199,0.
"""


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("clean1.data", UCI),
        ("header.csv", "molecule_name,conformation,f1,f2,class\n" + UCI.replace(".\n", "\n")),
        ("numbers.csv", "1,188,42,-198\n1,188,43,-190\n0,13,49,-199\n"),
    ],
)
def test_classic_tables(tmp_path: Path, packed: Callable, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    found = list(packed(tmp_path / file).values())
    assert [one.info.label for one in found] == [1, 0] and [one.info.num_instances for one in found] == [2, 1]
    np.testing.assert_array_equal(found[0].bag.x, [[42, -198], [43, -190]])
    assert detect_format(tmp_path / file)[0] == "mil_table"


def test_classic_tables_with_marks_semicolons_and_damage(tmp_path: Path) -> None:
    text = "bag;label;f1;f2\na;1;1,5;2\n"
    (tmp_path / "a.csv").write_text(text.replace("1,5", "1.5"), encoding="utf-8-sig")
    source = MilTable(str(tmp_path / "a.csv"))
    assert [entry.name for entry in source.entries()] == ["a-a"]
    assert source.load(source.entries()[0]).x.tolist() == [[1.5, 2.0]]
    damaged = bytearray(gzip.compress(500 * text.encode()))
    damaged[20:24] = b"\xff\xff\xff\xff"
    for content, message in (
        (text.encode(), "a feature or label is not a number"),
        (b"bag;label;f1;f2\na;1\n", "line 2 that is not blank has 2 cells, the first 4"),
    ):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.csv: {message}"):
            MilTable(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"b\.csv\.gz: not a readable table of text"):
        MilTable(str(tmp_path / "b.csv.gz"))


def test_bags_from_python(tmp_path: Path) -> None:
    from bigbag import Bag
    from bigbag.data.sources import MemorySource

    bags = (Bag(np.full((i + 1, 2), i, np.float32), i % 2, f"b{i}") for i in range(4))
    pack(MemorySource(bags), tmp_path, progress=False)
    assert open_store(tmp_path).sizes == (1, 2, 3, 4)


def test_a_config_names_the_same_sources(tmp_path: Path, write: SimpleNamespace) -> None:
    for name in SIZES:
        write.trident(tmp_path, name, cells(write, name), x_of(write, name))
    source = open_source(
        "trident", root=str(tmp_path), labels=label_table(tmp_path, write), classes=["tumor", "normal"]
    )
    assert [entry.label for entry in source.entries()] == [0, 1, 0]
    with pytest.raises(ValueError, match="takes no 'feature', did you mean 'features'"):
        open_source("trident", root=str(tmp_path), feature="uni")
    with pytest.raises(ValueError, match="line 3: label 'normal', expected one of tumor, benign"):
        table = label_table(tmp_path, write)
        open_source("trident", root=str(tmp_path), labels=table, classes=["tumor", "benign"]).entries()
