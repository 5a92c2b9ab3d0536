"""TRIDENT's folders: the stride at level 0, labels from a CSV."""

import os

import numpy as np
import pytest

import bigbag.datasets as ours
from bigbag.data import open_store, pack
from bigbag.data.sources.trident import level0_stride

h5py = pytest.importorskip("h5py")


def write_slide(base, name, *, side=7, step, attributes, labels=True):
    """A square of tissue of ``side**2`` patches, ``step`` level-0 pixels apart, as TRIDENT writes it."""
    rng = np.random.default_rng(side)
    cells = np.argwhere(np.ones((side, side))) + [3, 5]
    for folder in ("features_uni_v1", "patches", "patch_labels"):
        os.makedirs(base / folder, exist_ok=True)
    with h5py.File(base / f"patches/{name}_patches.h5", "w") as file:
        coords = file.create_dataset("coords", data=cells.astype(np.int64) * step, chunks=(1, 2), maxshape=(None, 2))
        coords.attrs.update(attributes)
    with h5py.File(base / f"features_uni_v1/{name}.h5", "w") as file:
        x = rng.normal(size=(side * side, 5)).astype(np.float16)
        file.create_dataset("features", data=x, chunks=(1, 5), maxshape=(None, 5))
    if labels:
        with h5py.File(base / f"patch_labels/{name}.h5", "w") as file:
            file["patch_labels"] = np.arange(side * side) % 2


def attributes_of(level0, target, size=512, overlap=0):
    return {
        "patch_size": size, "patch_size_level0": size * level0 // target, "level0_magnification": level0,
        "target_magnification": target, "overlap": overlap, "name": "s", "savetodir": "out",
    }  # fmt: skip


def open_dataset(base, package=ours, **kwargs):
    labels = base / "labels.csv"
    if not labels.exists():
        labels.write_text("slide,label\na.svs,1\nb,0\n")
    kwargs = {"bag_keys": ["X", "Y", "coords", "adj"], "norm_adj": False, "load_at_init": False, **kwargs}
    columns = {"wsi_name_col": "slide", "wsi_label_col": "label"}
    return package.TridentWSIDataset(f"{base}/", str(labels), "uni_v1", **columns, **kwargs)


@pytest.mark.parametrize("level0, target, overlap, step", [(40, 20, 0, 1024), (20, 20, 0, 512), (40, 20, 128, 768)])
def test_every_inner_patch_has_eight_neighbours(tmp_path, level0, target, overlap, step):
    write_slide(tmp_path, "a", step=step, attributes=attributes_of(level0, target, overlap=overlap))
    bag = open_dataset(tmp_path)[0]
    degrees = bag["adj"].to_dense().sum(1).reshape(7, 7)
    assert (degrees[1:-1, 1:-1] == 8).all() and degrees.sum() == 4 * 3 + 20 * 5 + 25 * 8
    assert bag["coords"].tolist() == (np.argwhere(np.ones((7, 7))) + [3, 5]).tolist()


def test_torchmil_finds_no_neighbours_on_a_slide_at_40x(tmp_path):
    theirs = pytest.importorskip("torchmil.datasets")
    write_slide(tmp_path, "a", step=1024, attributes=attributes_of(40, 20))
    assert open_dataset(tmp_path, theirs)[0]["adj"]._nnz() == 0


@pytest.mark.parametrize("attributes, size", [(attributes_of(20, 20), 512), ({}, 256)])
def test_like_torchmil_where_the_patch_size_is_the_stride(tmp_path, attributes, size, assert_same_bags):
    theirs = pytest.importorskip("torchmil.datasets")
    write_slide(tmp_path, "a", step=size, attributes=attributes)
    write_slide(tmp_path, "b", side=4, step=size, attributes=attributes)
    kwargs = {
        "patch_size": size, "patch_labels_path": f"{tmp_path}/patch_labels",
        "bag_keys": ["X", "Y", "y_inst", "coords", "adj"],
    }  # fmt: skip
    assert_same_bags(open_dataset(tmp_path, **kwargs), open_dataset(tmp_path, theirs, **kwargs))


def test_stride_of_attributes():
    assert level0_stride(attributes_of(40, 20)) == 1024
    assert level0_stride(attributes_of(40, 10, size=256, overlap=64)) == 768
    assert level0_stride({"patch_size_level0": 1024, "overlap": "None"}) == 1024
    assert level0_stride({}) is None and level0_stride({"patch_size_level0": "None"}) is None


def test_labels_of_a_csv(tmp_path):
    for name in ("a", "TCGA-1.2", "c"):
        write_slide(tmp_path, name, side=3, step=512, attributes={})
    (tmp_path / "labels.csv").write_text("slide,label\nTCGA-1.2.svs,1\na,0\nTCGA-1,0\n")
    dataset = open_dataset(tmp_path)
    assert [dataset[i]["Y"].tolist() for i in (0, 1)] == [[1], [0]]  # sorted: TCGA-1.2, a
    with pytest.raises(ValueError, match=r"bag 'c': no line of .*labels\.csv has this name in the column 'slide'"):
        dataset[2]
    (tmp_path / "labels.csv").write_text("slide,label\na,0\na,1\n")
    with pytest.raises(ValueError, match=r"line 3: 'a' has the labels \[0\] and \[1\]"):
        open_dataset(tmp_path)[1]
    (tmp_path / "labels.csv").write_text("slide,label\na,tumour\n")
    with pytest.raises(ValueError, match="line 2: label 'tumour', expected a number"):
        open_dataset(tmp_path)[1]
    with pytest.raises(ValueError, match="has no column 'label' for labels_path; it has slide, y"):
        (tmp_path / "labels.csv").write_text("slide,y\na,0\n")
        open_dataset(tmp_path)[1]


def test_files_are_closed(tmp_path):
    write_slide(tmp_path, "a", step=512, attributes={})
    dataset = open_dataset(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    bags = [dataset._build_bag("a") for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before and len(bags) == 5


def test_packs_with_its_level0_positions(tmp_path):
    for name in ("a", "b"):
        write_slide(tmp_path, name, step=1024, attributes=attributes_of(40, 20))
    dataset = open_dataset(
        tmp_path, patch_labels_path=tmp_path / "patch_labels", bag_keys=["X", "Y", "y_inst", "adj", "coords"]
    )
    manifest = pack(dataset, tmp_path / "shards", progress=False)
    assert [(bag.name, bag.label, bag.num_instances, bag.stride) for bag in manifest.bags] == [
        ("a", 1, 49, 1024.0), ("b", 0, 49, 1024.0)
    ]  # fmt: skip
    bag = open_store(tmp_path / "shards").read(0)
    assert bag.positions[0].tolist() == [3 * 1024, 5 * 1024] and bag.coords[0].tolist() == [3, 5]
    assert bag.adj.num_edges == 4 * 3 + 20 * 5 + 25 * 8 and bag.y_inst.sum() == 24
