"""Bags kept in memory: bounded over all processes, shared with subsets."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from bigbag.data import collate_fn
from bigbag.datasets import ProcessedMILDataset
from bigbag.datasets.cache import BagCache, bag_bytes

KEYS = ["X", "coords", "adj"]


@pytest.fixture
def many(tmp_path):
    """24 bags of 40,000 bytes of features and a graph each; the arguments of their data set."""
    for name in ("x", "c"):
        (tmp_path / name).mkdir()
    for index in range(24):
        np.save(tmp_path / "x" / f"{index:02d}.npy", np.full((100, 100), index, np.float32))
        np.save(tmp_path / "c" / f"{index:02d}.npy", np.argwhere(np.ones((10, 10))))
    return {"features_path": tmp_path / "x", "coords_path": tmp_path / "c", "bag_keys": KEYS, "verbose": False}


class Reporting(ProcessedMILDataset):
    """Gives the bytes that its process keeps beside each bag."""

    def __getitem__(self, index):
        bag = super().__getitem__(index)
        return int(bag["X"][0, 0]), torch.utils.data.get_worker_info().id, self._cache.num_bytes


def test_bytes_stay_flat_over_epochs_with_workers(many):
    size = bag_bytes(ProcessedMILDataset(**many)._bag("00"))
    preloaded, room = 4, 10 * size + 100
    dataset = Reporting(**many, load_at_init=True, cache_bytes=preloaded * size)
    assert len(dataset.loaded_bags) == preloaded
    dataset._cache.max_bytes = room
    loader = DataLoader(dataset, batch_size=None, shuffle=True, num_workers=2, persistent_workers=True)
    for _ in range(3):
        rows = list(loader)
        assert sorted(value for value, _, _ in rows) == list(range(24))
        for worker in (0, 1):
            kept = max(num_bytes for _, at, num_bytes in rows if at == worker)
            assert kept == (preloaded + 3) * size  # of the room for 10 bags, 4 are shared and 6 divided by 2
    assert dataset._cache.num_bytes == preloaded * size


def test_keeps_what_fits_and_no_more(many):
    size = bag_bytes(ProcessedMILDataset(**many)._bag("00"))
    dataset = ProcessedMILDataset(**many, cache_bytes=5 * size)
    for _ in range(3):
        for index in (20, 3, 7, 0, 1, 2, 9):
            assert dataset[index]["X"][0, 0] == index
    assert sorted(dataset.loaded_bags) == ["00", "01", "03", "07", "20"]
    assert dataset[3]["X"].data_ptr() == dataset[3]["X"].data_ptr()
    assert dataset[9]["X"].data_ptr() != dataset.loaded_bags["00"]["X"].data_ptr()
    assert not ProcessedMILDataset(**many, load_at_init=True, cache_bytes=0).loaded_bags
    with pytest.raises(ValueError, match="cache_bytes is -1"):
        BagCache(-1)


def test_subset_shares_the_bags(many):
    dataset = ProcessedMILDataset(**many, load_at_init=True)
    part = dataset.subset([5, 2])
    assert part.bag_names == ["05", "02"] and len(part) == 2 and len(dataset) == 24
    assert list(part.loaded_bags) == ["05", "02"]
    assert part[0]["X"].data_ptr() == dataset[5]["X"].data_ptr()
    assert part._cache is dataset._cache


@pytest.mark.parametrize("free", ["clear", "assign"])
def test_bags_in_memory_are_let_go_of_as_in_torchmil(many, free):
    dataset = ProcessedMILDataset(**many, load_at_init=True)
    size, read = bag_bytes(dataset.loaded_bags["07"]), []
    build = dataset._build_bag
    dataset._build_bag = lambda name: read.append(name) or build(name)
    watched = weakref.ref(dataset.loaded_bags["07"]["X"])
    del dataset.loaded_bags["03"]
    assert dataset.loaded_bags.pop("04")["X"][0, 0] == 4 and "04" not in dataset.loaded_bags
    dataset.subset([5, 6]).loaded_bags.clear()
    assert len(dataset.loaded_bags) == 20 and dataset._cache.num_bytes == 20 * size and watched() is not None
    if free == "clear":
        dataset.loaded_bags.clear()
    else:
        dataset.loaded_bags = {}
    gc.collect()
    assert not dataset.loaded_bags and dataset._cache.num_bytes == 0 and watched() is None
    assert dataset[7]["X"][0, 0] == 7 and read == ["07"] and list(dataset.loaded_bags) == ["07"]
    with pytest.raises(KeyError):
        del dataset.loaded_bags["08"]
    dataset._cache.max_bytes = size
    with pytest.raises(ValueError, match=rf"bag '09' of {size} bytes does not fit into cache_bytes"):
        dataset.loaded_bags["09"] = build("09")


def test_spawned_workers(many):
    dataset = ProcessedMILDataset(**many, load_at_init=True, cache_bytes=200_000)
    part = dataset.subset([0, 23])
    loader = DataLoader(part, collate_fn=collate_fn, num_workers=1, multiprocessing_context="spawn")
    assert [batch["X"][0, 0, 0].item() for batch in loader] == [0, 23]
