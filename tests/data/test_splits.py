from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbag import Bag
from bigbag.data import MemoryStore, check_binary_labels, split_bags


def make_store(
    labels: list, splits: list[str | None] | None = None, patients: list[str | None] | None = None
) -> MemoryStore:
    bags = [Bag(np.zeros((1, 2), np.float32), y=label, key=f"bag{i}") for i, label in enumerate(labels)]
    return MemoryStore(bags, splits or ["train"] * len(bags), patients)


def test_splits_of_the_manifest() -> None:
    store = make_store([0, 1, 0, 1, 0], ["train", "test", "train", "val", None])
    assert split_bags(store, val_fraction=0.5, seed=0) == {
        "train": (0, 2), "test": (1,), "val": (3,), "unassigned": (4,),
    }  # fmt: skip


def test_without_a_fraction_nothing_is_set_aside() -> None:
    assert split_bags(make_store([0, 1, 0]), seed=0) == {"train": (0, 1, 2)}


@given(
    groups=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 3)), min_size=2, max_size=60),
    fraction=st.floats(0.05, 0.6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_the_held_out_part_is_stratified_grouped_and_reproducible(
    groups: list[tuple[int, int]], fraction: float, seed: int
) -> None:
    labels = [label for label, count in groups for _ in range(count)]
    patients = [f"p{i}" for i, (_, count) in enumerate(groups) for _ in range(count)]
    store = make_store(labels, patients=patients)
    splits = split_bags(store, val_fraction=fraction, seed=seed)
    assert sorted(splits["train"] + splits["val"]) == list(range(len(labels)))
    assert splits["train"] and splits["val"]
    val_patients = {patients[i] for i in splits["val"]}
    assert not val_patients & {patients[i] for i in splits["train"]}
    assert splits == split_bags(store, val_fraction=fraction, seed=seed)
    wanted = len(val_patients) / len(groups)
    assert abs(wanted - fraction) <= 0.5 / len(groups) + 1e-9 or len(val_patients) in (1, len(groups) - 1)
    for label in (0, 1):
        of_label = [f"p{i}" for i, (value, _) in enumerate(groups) if value == label]
        assert abs(len(val_patients & set(of_label)) - wanted * len(of_label)) <= 1


def test_another_seed_gives_another_part_and_the_order_of_bags_none() -> None:
    store = make_store([0, 1] * 20)
    parts = {split_bags(store, val_fraction=0.25, seed=seed)["val"] for seed in range(5)}
    assert len(parts) > 1
    turned = MemoryStore(store.bags[::-1], ["train"] * 40)
    names = {store.infos[i].name for i in split_bags(store, val_fraction=0.25, seed=3)["val"]}
    assert names == {turned.infos[i].name for i in split_bags(turned, val_fraction=0.25, seed=3)["val"]}


def test_measurements_are_not_strata() -> None:
    splits = split_bags(make_store([i / 7 for i in range(50)]), val_fraction=0.2, seed=0)
    assert len(splits["val"]) == 10


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"no bag is in the split 'train' \(2 test, 1 unassigned\)"):
        split_bags(make_store([0, 1, 1], ["test", "test", None]), seed=0)
    with pytest.raises(ValueError, match=r"1 patients have bags in two splits \('p' in test and train\)"):
        split_bags(make_store([0, 1, 1], ["train", "test", "train"], ["p", "p", "q"]), seed=0)
    with pytest.raises(ValueError, match="come from 1 patient: expected at least 2"):
        split_bags(make_store([0, 1], patients=["p", "p"]), val_fraction=0.5, seed=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None], r"bag 'bag1' \(train\): label is missing"),
        ([0, 2], r"bag 'bag1' \(train\): label 2, expected 0 or 1"),
        ([0, [0, 1]], "expected 0 or 1"),
        ([0, 0, 0], r"no positive bag in train \(3 negative\)"),
        ([1, 1], r"only positive bags in train \(2\)"),
    ],
)
def test_binary_labels(labels: list, message: str) -> None:
    store = make_store(labels)
    with pytest.raises(ValueError, match=message):
        check_binary_labels(store, range(len(labels)))


def test_good_binary_labels_pass() -> None:
    store = make_store([0, 1.0, 1, 5])
    check_binary_labels(store, [0, 1, 2])
