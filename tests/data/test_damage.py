"""Damaged sets: whatever bytes a manifest or a shard holds, reading gives bags or an error that names the file."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigbag import Bag
from bigbag.data import open_store, pack
from bigbag.data.sources import MemorySource

_PACKED: dict[str, Path] = {}


@pytest.fixture
def packed(tmp_path_factory: pytest.TempPathFactory, make_bags: Callable) -> Path:
    """A set that all examples copy; one split, one shard."""
    if "set" not in _PACKED:
        _PACKED["set"] = tmp_path_factory.mktemp("whole") / "set"
        pack(MemorySource(make_bags(4), ["train"] * 4), _PACKED["set"], progress=False)
    return _PACKED["set"]


def read_all(folder: Path, check_digests: bool = False) -> list[Bag]:
    store = open_store(folder, check_digests=check_digests)
    return [store.read(index) for index in range(len(store))]


def check(folder: Path, check_digests: bool = False) -> bool:
    """Whether the set is refused; if it is not, what it holds are bags."""
    try:
        bags = read_all(folder, check_digests)
    except ValueError as error:
        assert str(folder) in str(error)
        return True
    for bag in bags:
        assert bag.x.dtype == np.float16 and bag.x.shape[1:] == (6,)
    return False


def flipped(content: bytes, places: list[int], bits: list[int]) -> bytes:
    changed = bytearray(content)
    for place, bit in zip(places, bits):
        changed[place % len(changed)] ^= 1 << bit
    return bytes(changed)


flips = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 7)), min_size=1, max_size=4)
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("part", ["manifest", "headers", "arrays", "json"])
@fuzz
@given(flips=flips)
def test_flipped_bits(tmp_path_factory: pytest.TempPathFactory, packed: Path, part: str, flips: list) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    shutil.copytree(packed, folder, dirs_exist_ok=True)
    path = folder / ("manifest.json" if part == "manifest" else "train-000000.tar")
    content = path.read_bytes()
    with tarfile.open(packed / "train-000000.tar") as tar:
        members = tar.getmembers()
    starts = {
        "headers": [(m.offset, 512) for m in members],
        "arrays": [(m.offset_data, 128) for m in members if m.name.endswith("npy")],
        "json": [(m.offset_data, m.size) for m in members if m.name.endswith("json")],
        "manifest": [(0, len(content))],
    }[part]
    places = [
        start + place // len(starts) % size for place, _ in flips for start, size in [starts[place % len(starts)]]
    ]
    changed = flipped(content, places, [bit for _, bit in flips])
    path.write_bytes(changed)
    check(folder)
    if part in ("arrays", "json") and changed != content:
        assert check(folder, check_digests=True)


@fuzz
@given(share=st.floats(0, 1), part=st.sampled_from(["manifest.json", "train-000000.tar"]))
def test_truncated(tmp_path_factory: pytest.TempPathFactory, packed: Path, share: float, part: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "truncated"
    shutil.copytree(packed, folder, dirs_exist_ok=True)
    content = (packed / part).read_bytes()
    kept = int(share * (len(content) - 2))  # a last newline is no loss
    (folder / part).write_bytes(content[:kept])
    assert check(folder)


def any_json() -> st.SearchStrategy:
    leaves = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5))
    return st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3))


@fuzz
@given(data=st.data())
def test_other_values_in_the_manifest(
    tmp_path_factory: pytest.TempPathFactory, packed: Path, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "values"
    shutil.copytree(packed, folder, dirs_exist_ok=True)
    manifest = json.loads((packed / "manifest.json").read_text())
    where = manifest
    key = data.draw(st.sampled_from(sorted(manifest)))
    while isinstance(where[key], (dict, list)) and where[key] and data.draw(st.booleans()):
        where = where[key]
        key = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
    where[key] = data.draw(any_json())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    check(folder)
