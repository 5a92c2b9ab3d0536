"""Packing: the round trip, the same bytes every time, interruptions, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from bigbag import Bag
from bigbag.data import Manifest, SourceEntry, open_store, pack
from bigbag.data import shards as shards_module
from bigbag.data.manifest import make_keys
from bigbag.data.sources import MemorySource

TCGA = ["TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF", "TCGA-3C-AALI-01Z-00-DX1.CF4496E0", "a/b c", "ä.ß", "_x", "plain"]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def quiet_pack(source: object, out: Path, **options: object) -> Manifest:
    return pack(source, out, progress=False, **options)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_round_trip(tmp_path: Path, make_bags: Callable, dtype: str) -> None:
    bags = [replace(bag, key=name) for bag, name in zip(make_bags(6), TCGA)]
    splits = ["train", "test", "train", None, "val", "train"]
    source = MemorySource(bags, splits, patients=["p", "q", "p", None, "r", "s"], patch_shape=(2, 3))
    manifest = quiet_pack(source, tmp_path / "set", dtype=dtype, shard_bytes=1)
    store = open_store(tmp_path / "set", check_digests=True)
    assert store.manifest == manifest
    assert store.patch_shape == (2, 3) and store.feature_shape == (6,) and store.feature_dtype == dtype
    assert manifest.splits == {"train": 3, "val": 1, "test": 1}
    assert sorted(info.name for info in store.infos) == sorted(TCGA)
    by_name = {bag.key: (bag, split) for bag, split in zip(bags, splits)}
    for index, info in enumerate(store.infos):
        bag, (wanted, split) = store.read(index), by_name[info.name]
        assert (bag.key, info.split, info.label, bag.y) == (wanted.key, split, wanted.y, wanted.y)
        assert info.num_instances == len(bag.x) == len(wanted.x)
        np.testing.assert_array_equal(bag.x, wanted.x.astype(dtype))
        np.testing.assert_array_equal(bag.coords, wanted.coords)
        np.testing.assert_array_equal(bag.y_inst, wanted.y_inst)
        assert bag.y_inst.dtype == np.int8
        for name in ("crow", "col", "weight"):
            np.testing.assert_array_equal(getattr(bag.adj, name).numpy(), getattr(wanted.adj, name).numpy())
        assert not bag.x.flags.writeable and not bag.x.flags.owndata


def test_webdataset_alone_reads_a_shard(tmp_path: Path, make_bags: Callable) -> None:
    bags = [replace(bag, key=name) for bag, name in zip(make_bags(6), TCGA)]
    quiet_pack(MemorySource(bags, ["train"] * 6), tmp_path)
    dataset = webdataset.WebDataset(str(tmp_path / "train-000000.tar"), shardshuffle=False).decode()
    found = list(dataset)
    assert [sample["json"]["name"] for sample in found] == TCGA
    for sample, bag in zip(found, bags):
        np.testing.assert_array_equal(sample["x.npy"], bag.x.astype(np.float16))
        np.testing.assert_array_equal(sample["adj.col.npy"], bag.adj.col)
        assert sample["json"]["label"] == bag.y


def test_keys_are_safe_and_unique() -> None:
    keys = make_keys([*TCGA, "x" * 300, "x" * 301, ".", "-"])
    assert len(set(keys)) == len(keys) and keys[5] == "plain"
    for key in keys:
        assert key.replace("-", "").replace("_", "").isalnum() and key.isascii() and key[0].isalnum()
        assert len(f"{key}.adj.weight.npy") <= 100


def test_two_packings_give_the_same_bytes_whatever_the_workers(tmp_path: Path, make_bags: Callable) -> None:
    source = MemorySource(make_bags(), ["train", "val", "test"] * 3)
    for name, workers in (("a", 1), ("b", 1), ("c", 4)):
        quiet_pack(source, tmp_path / name, shard_bytes=3000, workers=workers)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c")
    manifest = open_store(tmp_path / "a").manifest
    assert len(manifest.shards) > 3
    assert [shard.sha256 for shard in manifest.shards] == [digests(tmp_path / "a")[s.file] for s in manifest.shards]


def test_a_finished_set_is_left_alone_or_replaced_when_asked(tmp_path: Path, make_bags: Callable) -> None:
    source = MemorySource(make_bags(3))
    quiet_pack(source, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert quiet_pack(source, tmp_path) == open_store(tmp_path).manifest
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="overwrite=True"):
        quiet_pack(source, tmp_path, dtype="float32")
    with pytest.raises(ValueError, match="overwrite=True"):
        quiet_pack(MemorySource(make_bags(4)), tmp_path)
    assert quiet_pack(source, tmp_path, dtype="float32", overwrite=True).feature_dtype == "float32"
    assert open_store(tmp_path).read(0).x.dtype == np.float32


def test_disk_full_keeps_finished_shards_and_a_second_run_completes(
    tmp_path: Path, make_bags: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = MemorySource(make_bags(), ["train"] * 9)
    quiet_pack(source, tmp_path / "whole", shard_bytes=3000)
    written = 0

    def write(self: shards_module._HashingFile, data: bytes) -> int:
        nonlocal written
        written += len(data)
        if written > 45_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, data)

    original = shards_module._HashingFile.write
    monkeypatch.setattr(shards_module._HashingFile, "write", write)
    out = tmp_path / "out"
    with pytest.raises(OSError, match=r"disk full.*bags\) are finished and kept.*run the same command again") as error:
        quiet_pack(source, out, shard_bytes=3000)
    assert error.value.errno == errno.ENOSPC
    finished = sorted(path.name for path in out.glob("*.tar"))
    assert finished and not (out / "manifest.json").exists() and not list(out.glob(".*.tmp"))
    with pytest.raises(ValueError, match="interrupted"):
        open_store(out)
    monkeypatch.setattr(shards_module._HashingFile, "write", original)
    times = {name: (out / name).stat().st_mtime_ns for name in finished}
    quiet_pack(source, out, shard_bytes=3000)
    assert times == {name: (out / name).stat().st_mtime_ns for name in finished}
    assert digests(out) == digests(tmp_path / "whole")


SLOW_PACKER = """
import sys, time
import numpy as np
from bigbag import Bag
from bigbag.data import pack
from bigbag.data.sources import MemorySource

class Slow(MemorySource):
    def load(self, entry):
        time.sleep(float(sys.argv[2]))
        return super().load(entry)

rng = np.random.default_rng(0)
bags = [Bag(rng.normal(size=(50, 4)), y=i % 2, key=f"b{i}") for i in range(30)]
pack(Slow(bags, ["train"] * 30), sys.argv[1], shard_bytes=2000, progress=False)
"""


def test_killed_in_the_middle_then_completed_is_byte_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", SLOW_PACKER, str(out), "0.1"]) as process:
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.tar"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert 3 <= len(list(out.glob("*.tar"))) < 30
    with pytest.raises(ValueError, match="interrupted"):
        open_store(out)
    first = (out / "train-000000.tar").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["pack", str(out), "0"])
    exec(SLOW_PACKER, {})
    assert (out / "train-000000.tar").stat().st_mtime_ns == first
    monkeypatch.setattr(sys, "argv", ["pack", str(tmp_path / "whole"), "0"])
    exec(SLOW_PACKER, {})
    assert digests(out) == digests(tmp_path / "whole")


def test_other_options_start_again_and_say_so(
    tmp_path: Path, make_bags: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    bags = make_bags()
    source = MemorySource(bags)
    broken = MemorySource([*bags[:6], replace(bags[6], x=np.full_like(bags[6].x, np.nan)), *bags[7:]])
    with pytest.raises(ValueError, match="NaN"):
        quiet_pack(broken, tmp_path, shard_bytes=1)
    assert len(list(tmp_path.glob("*.tar"))) == 5  # the sixth was open
    quiet_pack(source, tmp_path, shard_bytes=3000)
    assert "changed since the interruption; starting again" in caplog.text
    quiet_pack(source, tmp_path.with_name("fresh"), shard_bytes=3000)
    assert digests(tmp_path) == digests(tmp_path.with_name("fresh"))


def bag(key: str = "s.1", n: int = 4, **fields: object) -> Bag:
    x = np.full((n, 3), zlib.crc32(key.encode()) % 1000, np.float32)  # bags of other names have other features
    values = {"x": x, "y": 1, "key": key, **fields}
    return Bag(**values)


def with_value(value: float, dtype: type = np.float32) -> np.ndarray:
    x = np.ones((4, 3), dtype)
    x[2, 1] = value
    return x


@pytest.mark.parametrize(
    ("bags", "message"),
    [
        ([bag(x=with_value(np.nan))], r"'s.1': x\[2, 1\] is nan, expected finite.*1 values in 1 of 4 instances"),
        ([bag(x=with_value(-np.inf, np.float16))], r"x\[2, 1\] is -inf"),
        ([bag(x=with_value(7e4))], r"x\[2, 1\] = 70000.0 overflows float16 .*65504.*store float32"),
        ([bag(), bag("t", x=np.ones((4, 5), np.float32))], r"'t': x has instances of shape \(5,\).*as in bag 's.1'"),
        ([bag(), bag("t", x=np.ones((4, 3), np.float64))], r"'t': x .* float64, expected \(3,\) float32"),
        ([bag(n=0)], r"'s.1': has no instances.*empty=\"leave_out\""),
        ([bag(y=None)], r"'s.1': label is missing"),
        ([bag(y=float("nan"))], r"label nan, expected finite"),
        ([bag(), bag()], r"two bags are called 's.1'"),
        ([bag("")], r"empty name"),
        ([bag(x=np.ones(4, np.float32))], r"x has shape \(4,\), expected \(N, P\)"),
        ([bag(x=np.array([["a"]]))], r"x is of type <U1, expected numbers"),
        ([bag(y_inst=np.ones((4, 2), int))], r"y_inst has shape \(4, 2\), expected \(4,\)"),
        ([bag(y_inst=np.ones(4))], r"y_inst is of type float64, expected integers"),
        ([bag(coords=np.full((4, 2), np.nan))], r"coords has shape .* expected finite"),
        ([], "the source has no bags"),
    ],
)
def test_what_is_refused(tmp_path: Path, bags: list[Bag], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quiet_pack(MemorySource(bags), tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_wrong_graphs_are_refused(tmp_path: Path, make_bags: Callable) -> None:
    good = make_bags(2)[1]
    beyond = replace(good.adj, col=good.adj.col.clone().fill_(99))
    falling = replace(good.adj, crow=good.adj.crow.flip(0))
    for adj, message in ((beyond, "adj.col holds 99 to 99"), (falling, "adj.crow must rise")):
        with pytest.raises(ValueError, match=message):
            quiet_pack(MemorySource([replace(good, adj=adj)]), tmp_path)


def test_errors_name_the_file(tmp_path: Path) -> None:
    class FromFile(MemorySource):
        def entries(self) -> list[SourceEntry]:
            return [replace(entry, path="/slides/s1.npy") for entry in super().entries()]

        def load(self, entry: SourceEntry) -> Bag:
            return Bag(np.ones((4, 3), np.float32), coords=np.ones((5, 2)))

    with pytest.raises(ValueError, match=r"'s.1' \(/slides/s1.npy\).*coords has shape \(5, 2\), expected 4 rows"):
        quiet_pack(FromFile([bag()]), tmp_path)


def test_numbers_that_a_half_would_lose_and_what_json_cannot_hold(tmp_path: Path) -> None:
    small = Bag(np.full((3, 2), 1e-6, np.float32), y=0, key="faint")
    with pytest.raises(ValueError, match=r"bag 'faint': x is 9\.99.*e-07 at most, below the normal .*store float32"):
        pack(MemorySource([small], ["train"]), tmp_path / "a", progress=False)
    assert pack(MemorySource([small], ["train"]), tmp_path / "b", progress=False, dtype="float32").bags
    zeros = replace(small, x=np.zeros((3, 2), np.float32))
    assert pack(MemorySource([zeros], ["train"]), tmp_path / "c", progress=False).bags
    odd = replace(zeros, attributes={"mpp": float("nan")})
    with pytest.raises(ValueError, match=r"bag 'faint': attribute 'mpp' is nan, which JSON can't hold"):
        pack(MemorySource([odd], ["train"]), tmp_path / "d", progress=False)


def test_the_largest_half_is_no_overflow_and_integers_are_fine(tmp_path: Path) -> None:
    quiet_pack(MemorySource([bag(x=with_value(65504.0))]), tmp_path / "a")
    assert open_store(tmp_path / "a").read(0).x.max() == 65504
    quiet_pack(MemorySource([bag(x=np.full((2, 3), 255, np.uint8))]), tmp_path / "b", dtype="uint8")
    assert open_store(tmp_path / "b").read(0).x.dtype == np.uint8


def test_left_out_bags_are_counted_and_listed(tmp_path: Path) -> None:
    bags = [bag("a", 0), bag("b"), bag("c", 0), bag("d"), bag("e", 0)]
    manifest = quiet_pack(MemorySource(bags, ["train", "train", "train", "val", "val"]), tmp_path, empty="leave_out")
    assert [item["name"] for item in manifest.left_out] == ["a", "c", "e"]
    assert manifest.splits == {"train": 1, "val": 1}
    assert [info.name for info in open_store(tmp_path).infos] == ["b", "d"]
    assert open_store(tmp_path).left_out == manifest.left_out
    assert json.loads((tmp_path / "manifest.json").read_text())["left_out"][0]["reason"] == "no instances"
    with pytest.raises(ValueError, match="no bag is left"):
        quiet_pack(MemorySource(bags[:1]), tmp_path / "none", empty="leave_out")


def test_contradicting_instance_labels_are_listed(tmp_path: Path) -> None:
    zeros, ones = np.zeros(4, int), np.ones(4, int)
    unknown = np.array([0, 0, 0, -1])
    bags = [
        bag("a", y=1, y_inst=zeros),
        bag("b", y=0, y_inst=ones),
        bag("c", y=1, y_inst=unknown),
        bag("d", y_inst=ones),
    ]
    warnings = quiet_pack(MemorySource(bags), tmp_path).warnings
    assert len(warnings) == 2
    assert "'a'" in warnings[0] and "all 4 instances are labelled 0" in warnings[0]
    assert "'b'" in warnings[1] and "4 instances are labelled 1" in warnings[1]


def test_unlabelled_and_vector_labels(tmp_path: Path) -> None:
    bags = [bag("a", y=None), bag("b", y=np.array([0.5, 1.0])), bag("c", y=np.int64(3)), bag("d", y=True)]
    quiet_pack(MemorySource(bags), tmp_path, unlabelled="keep")
    assert [info.label for info in open_store(tmp_path).infos] == [None, [0.5, 1.0], 3, 1]


def test_only_one_packing_at_a_time(tmp_path: Path, make_bags: Callable) -> None:
    class Nested(MemorySource):
        def load(self, entry: SourceEntry) -> Bag:
            quiet_pack(MemorySource(make_bags(2)), tmp_path)
            return super().load(entry)

    with pytest.raises(ValueError, match="another packing"):
        quiet_pack(Nested(make_bags(2)), tmp_path)


def test_foreign_tars_are_not_removed(tmp_path: Path, make_bags: Callable) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="neither a manifest nor the progress"):
        quiet_pack(MemorySource(make_bags(2)), tmp_path)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"precious"


@pytest.mark.parametrize("option", [{"dtype": "int8"}, {"shard_bytes": 0}, {"workers": 0}, {"empty": "skip"}])
def test_wrong_options(tmp_path: Path, make_bags: Callable, option: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        quiet_pack(MemorySource(make_bags(2)), tmp_path, **option)
