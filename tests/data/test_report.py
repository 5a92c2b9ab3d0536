"""The validation report: what is found, that all of it is shown together, and what stops."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bigbag import Bag
from bigbag.data import SourceEntry, open_store, pack, split_bags
from bigbag.data.report import CHECKS
from bigbag.data.sources import MemorySource
from bigbag.data.survey import survey_coords


def slide(name: str, n: int = 30, seed: int | None = None, **fields: object) -> Bag:
    rng = np.random.default_rng(sum(name.encode()) if seed is None else seed)
    grid = np.stack(np.meshgrid(np.arange(6), np.arange(5)), -1).reshape(-1, 2)[:n] * 256
    values = {"x": rng.normal(size=(n, 4)).astype(np.float32), "y": 1, "key": name, "coords": grid, "stride": 256.0}
    return Bag(**{**values, **fields})


class Broken(MemorySource):
    """A source whose loading fails for some bags, as that of damaged files does."""

    def __init__(self, bags: Sequence[Bag], failing: dict[str, Callable[[], Bag]], **kwargs: object) -> None:
        super().__init__(bags, **kwargs)  # type: ignore[arg-type]
        self.failing = failing

    def load(self, entry: SourceEntry) -> Bag:
        return self.failing[entry.name]() if entry.name in self.failing else super().load(entry)


def report_of(folder: Path) -> dict:
    return json.loads((folder / "validation.json").read_text())


def checks_of(items: list[dict]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for item in items:
        assert item["check"] in CHECKS
        found.setdefault(item["check"], []).append(item["bag"])
    return found


def damaged() -> Broken:
    nan = slide("nan").x.copy()
    nan[3, 1] = np.nan
    bags = [
        slide("good"), slide("nan", x=nan), slide("empty", n=0), slide("wide", x=np.ones((30, 5), np.float32)),
        slide("double", x=slide("double").x.astype(np.float64)), slide("good 2"), slide("lengths"), slide("file"),
        slide("unlabelled", y=None), slide("copy", seed=sum(b"good")),
    ]  # fmt: skip

    def gone() -> Bag:
        raise OSError("file.h5: truncated")

    failing: dict[str, Callable[[], Bag]] = {"lengths": lambda: slide("x", coords=np.zeros((29, 2))), "file": gone}
    return Broken(bags, failing, splits=["train"] * 9 + ["test"], patients=[*"abcdefghi", "j"])


@pytest.mark.parametrize("workers", [1, 3])
def test_all_errors_of_all_slides_come_together(tmp_path: Path, workers: int) -> None:
    with pytest.raises(ValueError, match="8 errors:") as error:
        pack(damaged(), tmp_path, progress=False, workers=workers)
    for part in ("'nan': x[3, 1] is nan", "'empty': has no instances", "'wide': x has instances of shape (5,)",
                 "'double': x has instances of shape (4,) float64", "'lengths': bag 'x': coords has shape (29, 2)",
                 "'file': file.h5: truncated", "'unlabelled': label is missing",
                 "'copy': has the same features as bag 'good', which is in train, this one in test"):  # fmt: skip
        assert part in str(error.value)
    assert not list(tmp_path.glob("*.tar")) and not (tmp_path / "manifest.json").exists()
    report = report_of(tmp_path)
    assert not report["valid"] and report["num_bags"] == 3  # those without an error of their own, and "unlabelled"
    assert checks_of(report["errors"]) == {
        "labels": ["unlabelled"], "finite": ["nan"], "empty": ["empty"], "features": ["wide", "double"],
        "lengths": ["lengths"], "readable": ["file"], "leakage": ["copy"],
    }  # fmt: skip
    assert {name: check["errors"] for name, check in report["checks"].items() if check["errors"]} == {
        "labels": 1, "finite": 1, "empty": 1, "features": 2, "lengths": 1, "readable": 1, "leakage": 1,
    }  # fmt: skip


def test_bags_with_errors_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    manifest = pack(damaged(), tmp_path, progress=False, invalid="leave_out")
    assert [bag.name for bag in manifest.bags] == ["good", "good 2"]
    assert sorted(item["name"] for item in manifest.left_out) == sorted(
        ["unlabelled", "nan", "empty", "wide", "double", "lengths", "file", "copy"]
    )
    assert all(item["reason"] for item in manifest.left_out)
    report = report_of(tmp_path)
    assert report["valid"] and report["num_left_out"] == 8 and report["left_out"] == list(manifest.left_out)
    assert len(open_store(tmp_path)) == 2


def test_an_error_late_keeps_finished_shards_and_the_repaired_set_goes_on(tmp_path: Path) -> None:
    bags = [slide(f"s{i}") for i in range(6)]

    def gone() -> Bag:
        raise OSError("truncated")

    broken = Broken(bags, {"s4": gone})
    with pytest.raises(ValueError, match="'s4': truncated"):
        pack(broken, tmp_path / "a", shard_bytes=1, progress=False)
    assert len(list((tmp_path / "a").glob("*.tar"))) == 3  # the fourth was open
    assert report_of(tmp_path / "a")["num_bags"] == 5
    broken.failing = {}
    pack(broken, tmp_path / "a", shard_bytes=1, progress=False)
    pack(broken, tmp_path / "b", shard_bytes=1, progress=False)
    for name in ("manifest.json", "validation.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_leakage_by_patient_names_every_patient_and_is_found_with_other_errors(tmp_path: Path) -> None:
    bags = [slide(f"s{i}") for i in range(6)]
    source = MemorySource(
        bags, ["train", "test", "train", "val", "test", "test"], patients=["p", "p", "q", "q", "r", "r"]
    )
    with pytest.raises(ValueError, match=r"2 errors:\n  patient 'p' has bags in test and train: .*\n  patient 'q'"):
        pack(source, tmp_path, progress=False, invalid="leave_out")


def test_splits_with_leakage_are_kept_where_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bags = [slide("a"), slide("b"), slide("c"), slide("copy", seed=sum(b"a"))]
    source = MemorySource(bags, ["train", "test", "train", "test"], patients=["p", "p", "q", "r"])
    with pytest.raises(
        ValueError, match=r"leakage keep(.|\n)*same features as bag 'a', which is in train.*leakage keep"
    ):
        pack(source, tmp_path, progress=False)
    manifest = pack(source, tmp_path, progress=False, leakage="keep")
    assert {bag.name: bag.split for bag in manifest.bags} == {"a": "train", "c": "train", "b": "test", "copy": "test"}
    report = report_of(tmp_path)
    assert report["valid"] and checks_of(report["warnings"])["leakage"] == ["", "copy"]
    store = open_store(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert split_bags(store) == {"train": (0, 1), "test": (2, 3)}
    assert "1 patients have bags in two splits ('p' in test and train)" in caplog.text
    store.keeps_leakage = False
    with pytest.raises(ValueError, match="or pack the set with --leakage keep"):
        split_bags(store)


def test_warnings_are_listed_and_do_not_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    twice = slide("twice").coords.copy()
    twice[7] = twice[8]
    off = slide("off").coords.copy()
    off[20] += 100
    grid = slide("x").coords
    bags = [
        slide("plain", attributes={"target_magnification": 20}), slide("twice", coords=twice), slide("off", coords=off),
        slide("wrong", stride=128.0),
        slide("large", stride=512.0, coords=grid * 2, attributes={"target_magnification": 40}),
        slide("a.svs"), slide("a"), slide("TCGA-1.x"), slide("same", seed=sum(b"plain")),
    ]  # fmt: skip
    splits = ["train"] * 6 + ["test"] + ["train"] * 2
    with caplog.at_level(logging.INFO):
        manifest = pack(MemorySource(bags, splits, patients=["p", "p", *"abcdefg"]), tmp_path, progress=False)
    report = report_of(tmp_path)
    assert report["valid"] and not report["errors"] and len(manifest.bags) == 9
    found = checks_of(report["warnings"])
    assert found == {
        "duplicate_coords": ["twice"], "off_lattice": ["off"], "stride": ["wrong"], "geometry": ["", ""],
        "names": [""], "leakage": ["a", "same"],
    }  # fmt: skip
    messages = "\n".join(item["message"] for item in report["warnings"])
    for part in (
        "1 of 30 instances are at the place of another one", "1 of 30 instances are off the lattice of stride 256",
        "the source says stride 128, but adjacent patches are 256 apart",
        "target_magnification is 20 in 1 bags (plain); 40 in 1 bags (large)",
        "stride is 256 in 7 bags (plain, twice, off, ...); 128 in 1 bags (wrong); 512 in 1 bags (large)",
        "'a.svs' and 'a' differ by folder or extension only: one slide in two splits?",
        "'same': has the same features as bag 'plain'",
    ):  # fmt: skip
        assert part in messages, part
    assert tuple(item["message"] for item in report["warnings"]) == manifest.warnings
    assert checks_of(report["notes"]) == {"patients": [""], "names": [""]}
    assert report["labels"] == {"train": {"1": 8}, "test": {"1": 1}} and report["strides"] == {
        "128.0": 1, "256.0": 7, "512.0": 1,
    }  # fmt: skip
    assert "1 of 8 patients have several bags, at most 2 ('p')" in caplog.text
    assert "labels of train: 1: 8" in caplog.text and "20 to        49 instances       9 ####" in caplog.text


def test_a_slide_scanned_at_another_magnification_is_not_odd(tmp_path: Path) -> None:
    grid = slide("x").coords
    about = {"target_magnification": 20}
    bags = [
        slide("20x", attributes={**about, "level0_magnification": 20}),
        slide("40x", coords=grid * 2, stride=512.0, attributes={**about, "level0_magnification": "40"}),
    ]
    assert not pack(MemorySource(bags), tmp_path, progress=False).warnings
    odd = replace(bags[1], attributes={**about, "level0_magnification": 20})
    (warning,) = pack(MemorySource([bags[0], odd]), tmp_path / "odd", progress=False).warnings
    assert warning.startswith("stride / level-0 magnification is 12.8 in 1 bags (20x); 25.6 in 1 bags (40x)")


def test_bags_without_coordinates_among_others_are_named(tmp_path: Path) -> None:
    bare = [replace(slide(name), coords=None, stride=None) for name in "cd"]
    pack(MemorySource([slide("a"), slide("b"), *bare], ["train"] * 4), tmp_path / "mixed", progress=False)
    (warning,) = (item["message"] for item in report_of(tmp_path / "mixed")["warnings"])
    assert warning.startswith("2 of 4 bags have no coords (c, d), so that models on graphs")
    pack(MemorySource(bare, ["train"] * 2), tmp_path / "none", progress=False)
    assert not report_of(tmp_path / "none")["warnings"]


def test_sizes_and_measured_labels(tmp_path: Path) -> None:
    bags = [slide(f"s{i}", n=1 + i, y=i / 7) for i in range(25)]
    pack(MemorySource(bags), tmp_path, progress=False)
    report = report_of(tmp_path)
    histogram = {(one["from"], one["below"]): one["bags"] for one in report["bag_sizes"]["histogram"]}
    assert histogram == {(1, 2): 1, (2, 5): 3, (5, 10): 5, (10, 20): 10, (20, 50): 6}
    assert report["labels"] == {"without split": {"bags": 25, "min": 0.0, "median": 12 / 7, "max": 24 / 7}}
    assert report["bag_sizes"]["median"] == 13 and report["num_instances"] == 325


def test_a_finished_set_keeps_its_report(tmp_path: Path) -> None:
    pack(MemorySource([slide("a")]), tmp_path, progress=False)
    before = (tmp_path / "validation.json").read_bytes()
    with pytest.raises(ValueError, match="label is missing"):
        pack(MemorySource([slide("a", y=None)]), tmp_path, progress=False, overwrite=True)
    assert (tmp_path / "validation.json").read_bytes() == before and len(open_store(tmp_path)) == 1


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32", "float64"])
def test_surveys_of_coordinates(dtype: str) -> None:
    rng = np.random.default_rng(0)
    places = rng.permutation(40 * 50)[:1500]
    points = (np.stack(np.divmod(places, 50), -1) * 224 + 17).astype(dtype)
    assert survey_coords(points).num_duplicates == 0 and survey_coords(points).step == 224
    again = np.concatenate([points, points[:5], points[:2]])
    assert survey_coords(again).num_duplicates == 7
    cut = np.floor(np.stack(np.divmod(places, 50), -1) * 287.5).astype(dtype)
    assert abs(survey_coords(cut).step - 287.5) < 0.5  # type: ignore[operator]
    assert survey_coords(rng.integers(0, 10**6, (1000, 2)).astype(dtype)).step is None
    assert survey_coords(np.zeros((3, 3), dtype)).num_duplicates == 2
    assert survey_coords(np.zeros((0, 2), dtype)).num_duplicates == 0


@pytest.mark.parametrize(
    ("scale", "step"), [(1, 1.0), (287.5, 287.5)], ids=["counted in patches", "in pixels, cut to integers"]
)
def test_holes_in_a_slide_are_no_other_step(scale: float, step: float) -> None:
    lattice = np.stack(np.divmod(np.arange(900), 30), 1)
    with_holes = lattice[np.random.default_rng(0).random(900) < 0.7]
    found = survey_coords((with_holes * scale).astype(np.int64)).step
    assert found == pytest.approx(step, rel=2e-3 if scale > 1 else 0)
