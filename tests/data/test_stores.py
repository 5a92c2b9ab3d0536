"""Reading local sets: what is damaged is refused with one clear message."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bigbag import Bag
from bigbag.data import MemoryStore, ShardStore, open_store, pack
from bigbag.data import stores as stores_module
from bigbag.data.sources import MemorySource


@pytest.fixture
def packed(tmp_path: Path, make_bags: Callable) -> Path:
    pack(MemorySource(make_bags(), ["train", "val", "test"] * 3), tmp_path / "set", shard_bytes=30_000, progress=False)
    return tmp_path / "set"


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="interrupted: run bigbag pack"):
        open_store(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        open_store(tmp_path / "nowhere")


def test_the_manifest_itself_can_be_named(packed: Path) -> None:
    assert open_store(packed / "manifest.json").infos == open_store(packed).infos


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "format version 99, this bigbag reads version 1"),
        ({"format": "other"}, "format is 'other', expected 'bigbag-shards'"),
        ({"bags": [{"key": "x"}]}, "damaged manifest"),
        ({"shards": []}, "damaged manifest.*not listed"),
        ({"shards": [{"file": "../x.tar", "bytes": 1, "sha256": "", "num_bags": 0}]}, "plain file name"),
        ({"feature_dtype": "object"}, "feature_dtype is 'object'"),
    ],
)
def test_other_manifests_are_refused(packed: Path, changes: dict, message: str) -> None:
    edit_manifest(packed, **changes)
    with pytest.raises(ValueError, match=message):
        open_store(packed)


def test_not_json(packed: Path) -> None:
    (packed / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not a manifest"):
        open_store(packed)


def test_missing_and_truncated_shards(packed: Path) -> None:
    shard = packed / "val-000000.tar"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=r"val-000000.tar: the shard is missing"):
        open_store(packed)
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"val-000000.tar: {len(content) // 2} bytes, expected {len(content)}.*trunc"):
        open_store(packed)


def test_truncated_at_the_end_of_a_member(packed: Path) -> None:
    """Such a shard is a valid tar of fewer bags: WebDataset reads it without a word."""
    shard = packed / "test-000000.tar"
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    end = next(m.offset for m in members if m.name.split(".")[0] != members[0].name.split(".")[0])
    with open(shard, "r+b") as file:
        file.truncate(end)
    with pytest.raises(ValueError, match=rf"{end} bytes, expected .* truncated"):
        open_store(packed)


def test_a_shard_truncated_after_opening(packed: Path) -> None:
    store = open_store(packed)
    os.truncate(packed / store.infos[0].shard, 1024)
    with pytest.raises(ValueError, match="1024 bytes, expected"):
        store.read(0)


def flip(folder: Path, store: ShardStore, index: int, member: str) -> None:
    info = store.infos[index]
    with tarfile.open(folder / info.shard) as tar:
        item = tar.getmember(f"{info.key}.{member}")
    with open(folder / info.shard, "r+b") as file:
        file.seek(item.offset_data + item.size - 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("member", ["x.npy", "coords.npy", "y_inst.npy", "adj.col.npy", "json"])
def test_a_flipped_bit_is_found_with_digests(packed: Path, member: str) -> None:
    store = open_store(packed, check_digests=True)
    for index in range(len(store)):
        store.read(index)
    flip(packed, store, 4, member)
    again = open_store(packed, check_digests=True)
    name, shard = store.infos[4].name, store.infos[4].shard
    with pytest.raises(ValueError, match=rf"{shard}, bag '{name}': member {member} does not have the SHA-256"):
        again.read(4)
    assert again.read(3).key == store.infos[3].name


def test_a_manifest_of_another_set_is_found(packed: Path, tmp_path: Path, make_bags: Callable) -> None:
    edit_manifest(packed, feature_shape=[7])
    with pytest.raises(ValueError, match=r"features \(6,\) float16, but the manifest says \(7,\) float16"):
        open_store(packed).read(0)
    store = open_store(packed)
    store.manifest = replace(store.manifest, feature_shape=(6,))
    store.infos = tuple(replace(info, num_instances=1 + info.num_instances) for info in store.infos)
    with pytest.raises(ValueError, match="instances, but the manifest says"):
        store.read(0)


def test_stores_are_picklable_and_keep_few_files_open(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores_module, "_MAX_OPEN_LOCAL", 1)
    store = pickle.loads(pickle.dumps(open_store(packed)))
    bags = [store.read(index) for index in range(len(store))]
    assert len(store._open) == 1
    again = pickle.loads(pickle.dumps(store))
    assert not again._open
    for index, bag in enumerate(bags):  # still readable after their shard was let go
        np.testing.assert_array_equal(bag.x, again.read(index).x)


def test_memory_store(make_bags: Callable) -> None:
    bags = [*make_bags(3), Bag(np.ones((2, 6), np.float32))]
    store = MemoryStore(bags, ["train", "train", "test", None], patients=["p", None, None, None])
    assert [info.name for info in store.infos] == ["slide-0", "slide-1", "slide-2", "3"]
    assert store.sizes == tuple(len(bag.x) for bag in bags) and store.feature_dtype == "float32"
    assert store.read(1).x is bags[1].x and store.read(3).key == "3"
    assert pickle.loads(pickle.dumps(store)).infos == store.infos


def test_digests_change_with_the_bags(packed: Path, tmp_path: Path, make_bags: Callable) -> None:
    pack(MemorySource(make_bags(), ["train"] * 9), tmp_path / "other", progress=False)
    assert open_store(packed).digest() == open_store(packed).digest() != open_store(tmp_path / "other").digest()
    bags = make_bags(3)
    same = {MemoryStore(bags).digest(), MemoryStore(make_bags(3)).digest()}
    changed = replace(bags[0], x=bags[0].x + 1), replace(bags[0], y=1 - bags[0].y), replace(bags[0], adj=None)
    others = {MemoryStore([bag, *bags[1:]]).digest() for bag in changed}
    assert len(same) == 1 and len(others) == 3 and not same & others
    assert MemoryStore(bags, ["train"] * 3).digest() not in same


@pytest.mark.parametrize(
    ("bags", "kwargs", "message"),
    [
        ([], {}, "at least one bag"),
        ([Bag(np.ones((2, 3)), key="a")] * 2, {}, "two bags have the key 'a'"),
        ([Bag(np.ones((2, 3)), key="a"), Bag(np.ones((2, 4)), key="b")], {}, r"'b' has features \(4,\)"),
        ([Bag(np.ones((2, 3)))], {"splits": []}, "0 splits for 1 bags"),
    ],
)
def test_memory_store_errors(bags: list[Bag], kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryStore(bags, **kwargs)
