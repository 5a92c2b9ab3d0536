"""TRIDENT's files, and Patho-Bench's tasks over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bigbag.data.sources.detect import detect_format
from bigbag.data.sources.trident import Trident, level0_stride
from bigbag.graphs import build_adjacency

TCGA = ["TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF", "TCGA-3C-AALI-01Z-00-DX2.CF4496E0", "TCGA-4H-AAAK-01Z-00-DX1.ABF1B042"]


def job(root: Path, write: SimpleNamespace, **options: object) -> list[np.ndarray]:
    cells = [write.places(25 + 5 * i, seed=i) for i in range(3)]
    for i, slide in enumerate(TCGA):
        write.trident(root, slide, cells[i], write.features(len(cells[i]), i), **options)
    return cells


def labels(root: Path, write: SimpleNamespace) -> str:
    rows = [("case_id", "slide_id", "diagnosis")]
    rows += [(name[:12], f"{name}.svs", kind) for name, kind in zip(TCGA, ["LUSC", "LUSC", "LUAD"])]
    return write.table(root / "labels.csv", rows)


@pytest.mark.parametrize(
    ("options", "stride"),
    [
        ({"mag": 40, "target": 20}, 512.0),
        ({"mag": 20, "target": 20}, 256.0),
        ({"mag": 40, "target": 10, "size": 224, "overlap": 56}, 672.0),
    ],
)
def test_level_0_stride_labels_and_graph(
    tmp_path: Path,
    write: SimpleNamespace,
    packed: Callable,
    capsys: pytest.CaptureFixture,
    options: dict,
    stride: float,
) -> None:
    cells = job(tmp_path / "job", write, **options)
    found = packed(tmp_path / "job", "--labels", labels(tmp_path, write), "--graph")
    shown = capsys.readouterr().out
    assert "label ['diagnosis']" in shown and "0 LUAD, 1 LUSC" in shown
    assert list(found) == TCGA
    for i, (name, one) in enumerate(found.items()):
        assert one.info.stride == stride and one.info.num_instances == len(cells[i])
        assert one.info.label == [1, 1, 0][i] and one.info.patient == name[:12]
        np.testing.assert_array_equal(one.bag.x, write.features(len(cells[i]), i).astype(np.float16))
        np.testing.assert_array_equal(one.bag.coords, cells[i])
        np.testing.assert_array_equal(one.bag.positions, cells[i] * stride + [7 * 256, 3 * 256])
        expected = build_adjacency(cells[i], radius=1.5, normalize="symmetric")
        torch.testing.assert_close(one.bag.adj.to_coo().to_dense(), expected.to_coo().to_dense())
        assert one.bag.attributes["target_magnification"] == options["target"]
        assert one.bag.attributes["encoder"] == "uni_v1" and "level0_height" not in one.bag.attributes


def test_a_whole_lattice_scanned_at_40x_has_8_neighbours(
    tmp_path: Path, write: SimpleNamespace, packed: Callable
) -> None:
    cells = np.stack(np.divmod(np.arange(36), 6), 1)
    write.trident(tmp_path / "job", "s", cells)
    one = packed(tmp_path / "job", "--graph", "--unlabelled", "keep")["s"]
    degree = one.bag.adj.crow.diff().reshape(6, 6)
    assert (degree[1:-1, 1:-1] == 8).all() and degree[0, 0] == 3 and (degree[0, 1:-1] == 5).all()


def test_stated_strides() -> None:
    assert level0_stride({"patch_size": 512, "patch_size_level0": 1024, "overlap": 0}) == 1024
    assert level0_stride({"patch_size": 512, "patch_size_level0": 1024, "overlap": 128}) == 768
    assert level0_stride({"patch_size": 512, "level0_magnification": 40, "target_magnification": 20}) == 1024
    assert level0_stride({"patch_size": 512, "overlap": None}) is None and level0_stride({}) is None


def test_a_stride_that_was_rounded_otherwise(tmp_path: Path, write: SimpleNamespace) -> None:
    """``patch_size_level0`` is cut, the coordinates are rounded: a pixel over 600 columns is more than a patch."""
    x = np.arange(600)
    coords = np.stack([np.tile(x, 2), np.repeat([0, 1], 600)], 1) * 683
    about = {"patch_size": 256, "patch_size_level0": 682, "overlap": 0}
    write.save_h5(tmp_path / "s.h5", {"features": write.features(1200), "coords": coords}, {"coords": about})
    source = Trident(str(tmp_path))
    assert source.load(source.entries()[0]).stride == 683


def test_empty_slides(tmp_path: Path, write: SimpleNamespace, packed: Callable, capsys: pytest.CaptureFixture) -> None:
    job(tmp_path / "job", write)
    write.trident(tmp_path / "job", "empty.1", np.empty((0, 2), int), np.empty((0, 8), np.float32))
    write.trident(tmp_path / "job", "empty.2", np.empty((0, 2), int), np.empty(0, np.float32))
    from bigbag.cli import main

    command = ["pack", "--from", str(tmp_path / "job"), "--out", str(tmp_path / "a"), "--unlabelled", "keep"]
    assert main(command) == 2
    assert "'empty.1'" in (error := capsys.readouterr().err) and "has no instances" in error
    found = packed(tmp_path / "job", "--unlabelled", "keep", "--empty", "leave_out")
    assert list(found) == TCGA


def test_several_encoders_and_folders(tmp_path: Path, write: SimpleNamespace, packed: Callable) -> None:
    job(tmp_path / "job", write)
    job(tmp_path / "job", write, encoder="conch_v15", dtype=np.float16)
    job(tmp_path / "job", write, target=10)
    with pytest.raises(ValueError, match=r"several folders.*10x_256px_0px_overlap/features_uni_v1.*features="):
        Trident(str(tmp_path / "job")).entries()
    both = ["--option", "features=conch_v15", "--option", "patches=20x_256px_0px_overlap"]
    for i, where in enumerate((["job", *both], ["job/20x_256px_0px_overlap/features_conch_v15"])):
        found = packed(tmp_path / where[0], "--unlabelled", "keep", *where[1:], out=str(i))
        assert {one.info.stride for one in found.values()} == {512.0}
    with pytest.raises(ValueError, match="no folder of features for 'resnet50'"):
        Trident(str(tmp_path / "job"), features="resnet50").entries()


def test_features_without_coordinates_take_those_of_the_patches(tmp_path: Path, write: SimpleNamespace) -> None:
    (cells, *_) = job(tmp_path, write)
    folder = tmp_path / "20x_256px_0px_overlap" / "features_uni_v1"
    path = folder / f"{TCGA[0]}.h5"
    path.unlink()
    torch.save(write.features(len(cells)), path.with_suffix(".pt"))  # saveas='pt': a numpy array
    source = Trident(str(tmp_path))
    bag = source.load(next(entry for entry in source.entries() if entry.name == TCGA[0]))
    assert bag.stride == 512 and len(bag.coords) == len(bag.x) == len(cells)
    np.testing.assert_array_equal(bag.x, write.features(len(cells)))


def test_detection_says_why(tmp_path: Path, write: SimpleNamespace) -> None:
    job(tmp_path, write)
    name, reason = detect_format(tmp_path)
    assert (
        name == "trident" and "20x_256px_0px_overlap/features_uni_v1/*.h5" in reason and "patch_size_level0" in reason
    )


def test_patho_bench(tmp_path: Path, write: SimpleNamespace, packed: Callable) -> None:
    cells = job(tmp_path / "job", write)
    rows = [("case_id", "slide_id", "OS_days", "BAP1_mutation", "fold_0", "fold_1")]
    rows += [(TCGA[0][:12], TCGA[0], 10, 1, "train", "test"), (TCGA[0][:12], TCGA[1], 10, 1, "train", "test")]
    rows += [(TCGA[2][:12], TCGA[2], 20, 0, "test", "train")]
    task = write.table(tmp_path / "task" / "k=all.tsv", rows, "\t")
    (tmp_path / "task" / "config.yaml").write_text("task_col: BAP1_mutation\nlabel_dict: {0: wt, 1: mut}\n")
    assert detect_format(tmp_path / "job", task)[0] == "patho_bench"
    found = packed(tmp_path / "job", "--labels", task, "--splits", task)
    assert {name: (one.info.label, one.info.split, one.info.patient) for name, one in found.items()} == {
        TCGA[0]: (1, "train", TCGA[0][:12]), TCGA[1]: (1, "train", TCGA[0][:12]), TCGA[2]: (0, "test", TCGA[2][:12]),
    }  # fmt: skip
    second = packed(tmp_path / "job", "--labels", task, "--splits", f"table={task},fold=1", out="second")
    assert [second[name].info.split for name in TCGA] == ["test", "test", "train"]
    whole = packed(tmp_path / "job", "--labels", task, "--splits", task, "--option", "bags=patient", out="patients")
    one = whole[TCGA[0][:12]]
    assert len(whole) == 2 and one.info.num_instances == len(cells[0]) + len(cells[1])
    assert one.bag.attributes["slides"] == TCGA[:2] and one.info.stride == 512
    gap = one.bag.coords[len(cells[0]) :, 0].min() - one.bag.coords[: len(cells[0]), 0].max()
    assert gap >= 2  # no edge from slide to slide


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"coords": np.zeros((3, 2), int)}, r"coords has shape \(3, 2\), expected 5 rows"),
        ({"features": np.zeros(1536, np.float32)}, r"features have shape \(1536,\).*encoding of a whole slide"),
        ({"features": None}, r"holds coords, expected a data set called features"),
    ],
)
def test_errors_name_the_file(
    tmp_path: Path, write: SimpleNamespace, capsys: pytest.CaptureFixture, damage: dict, message: str
) -> None:
    from bigbag.cli import main

    arrays = {"features": write.features(5), "coords": np.zeros((5, 2), int)} | damage
    about = {"coords": {"patch_size_level0": 512}}
    write.save_h5(tmp_path / "features_uni" / "s.1.h5", {k: v for k, v in arrays.items() if v is not None}, about)
    command = ["pack", "--format", "trident", "--from", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*command, "--unlabelled", "keep"]) == 2
    import re

    error = capsys.readouterr().err
    assert re.search(message, error) and "s.1" in error
