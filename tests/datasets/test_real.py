"""MUSK, MNIST-bags and the HGSC slide, from the real files."""

import gzip

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from bigbag.data import collate_fn, pack
from bigbag.data.sources import Musk1, Musk2
from bigbag.datasets import HGSC, MNISTBags, SourceDataset
from bigbag.datasets.mnist import read_idx


@pytest.fixture(scope="module")
def folder(test_data):
    def find(name):
        if not (test_data / name).is_dir():
            pytest.skip(f"{test_data / name} is absent; set BIGBAG_TEST_DATA")
        return test_data / name

    return find


@pytest.fixture(scope="module")
def mnist(folder):
    return MNISTBags(folder("mnist"), num_train=500, num_test=1000)


def test_mnist_bags(mnist):
    """500 training bags: mean size 9.5, since sizes are cut to integers, as the authors' are."""
    entries = mnist.entries()
    assert [sum(e.split == split for e in entries) for split in ("train", "test")] == [500, 1000]
    bags = [mnist.load(entry) for entry in entries]
    sizes = np.array([bag.num_instances for bag in bags])
    assert abs(sizes.mean() - 9.5) < 5 * 2 / np.sqrt(1500) and abs(sizes.std() - 2) < 5 * 2 / np.sqrt(3000)
    share = np.mean([bag.y for bag in bags])
    assert abs(share - (1 - (1 - 0.1) ** 9.5)) < 0.06  # a tenth of MNIST's digits are nines
    assert all(bag.y == bag.y_inst.max() and bag.x.shape[1] == 784 and bag.x.min() >= 0 for bag in bags)
    assert max(bag.x.max() for bag in bags) == 1


def test_mnist_bags_are_the_authors(folder, mnist):
    """Their program's steps for the first bags of seed 1: a size, then indices, from one RandomState."""
    root = folder("mnist")
    rng = np.random.RandomState(1)
    images = read_idx(root / "train-images-idx3-ubyte.gz")
    digits = read_idx(root / "train-labels-idx1-ubyte.gz")
    assert images.shape == (60000, 28, 28) and np.bincount(digits)[9] == 5949
    standard = MNISTBags(root, num_train=5, num_test=0, normalize=True)
    for index in range(5):
        rows = rng.randint(0, 60000, int(rng.normal(10, 2, 1)[0]))
        bag = mnist.load(mnist.entries()[index])
        np.testing.assert_array_equal(bag.y_inst, digits[rows] == 9)
        np.testing.assert_allclose(bag.x, images[rows].reshape(-1, 784) / 255, atol=1e-7)
        expected = (images[rows].reshape(-1, 784) / 255 - 0.1307) / 0.3081
        np.testing.assert_allclose(standard.load(standard.entries()[index]).x, expected, atol=1e-5)
    assert standard.patch_shape is None and mnist.patch_shape == (28, 28)


def test_damaged_idx(tmp_path):
    for content in (b"", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x0d\x01\0\0\0\x01a", b"\0\0\x08\xff\xff"):
        (tmp_path / "x.gz").write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=r"x\.gz: (not an IDX|the header promises)"):
            read_idx(tmp_path / "x.gz")
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(1000))[:15])
    with pytest.raises(ValueError, match="can't be read"):
        read_idx(tmp_path / "x.gz")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: no such file \(nor \.gz\)"):
        MNISTBags(tmp_path)


@pytest.mark.parametrize("cls, bags, positive, instances", [(Musk1, 92, 47, 476), (Musk2, 102, 39, 6598)])
def test_musk_for_a_loader(cls, bags, positive, instances, folder):
    source = cls(str(folder("musk")), fold=0)
    parts = [SourceDataset(source, split) for split in ("train", "test")]
    loaders = [DataLoader(part, batch_size=32, collate_fn=collate_fn) for part in parts]
    batches = [batch for loader in loaders for batch in loader]
    assert sum(len(part) for part in parts) == bags
    assert sum(int(batch["Y"].sum()) for batch in batches) == positive
    assert sum(int(batch["mask"].sum()) for batch in batches) == instances
    assert all(batch["X"].shape[2] == 166 for batch in batches)
    with pytest.raises(ValueError, match="no bag is in the split 'val', expected one of test, train"):
        SourceDataset(source, "val")


def test_hgsc_is_one_bag(folder, tmp_path):
    slide = HGSC(folder("hgsc"))
    (entry,) = slide.entries()
    bag = slide.load(entry)
    assert bag.x.shape == (592_349, 7) and bag.coords.shape == (592_349, 2) and bag.y == 1
    assert 0.005 < bag.y_inst.mean() < 0.05
    assert SourceDataset(slide)[0]["X"].dtype == torch.float32
    manifest = pack(slide, tmp_path, dtype="float32", progress=False)
    assert manifest.bags[0].num_instances == 592_349


def test_hgsc_windows(folder):
    source = HGSC(folder("hgsc"), window=1024)
    assert (len(source.entries()), sum(e.label for e in source.entries())) == (2153, 1375)
    # What the slide gives before its centroids are rounded to pixels.
    shifted = HGSC(folder("hgsc"), window=1024, origin=(-3, 0))
    assert (len(shifted.entries()), sum(e.label for e in shifted.entries())) == (2154, 1374)
    blocks, rates = {}, []
    for entry in source.entries():
        bag = source.load(entry)
        column, row = (int(part) for part in entry.name.split("-")[1:])
        assert (bag.coords // 1024 == [column, row]).all() and bag.num_instances >= 20
        assert entry.label == bag.y_inst.max()
        assert blocks.setdefault((column // 8, row // 8), entry.split) == entry.split
        rates += [bag.y_inst.mean()] if entry.label else []
    assert 0.009 < np.median(rates) < 0.012
    shares = [sum(e.split == split for e in source.entries()) / 2153 for split in ("train", "val", "test")]
    assert all(abs(share - wanted) < 0.15 for share, wanted in zip(shares, (0.6, 0.2, 0.2)))
    everything = HGSC(folder("hgsc"), window=1024, min_instances=1)
    assert sum(len(everything.load(e).x) for e in everything.entries()) == 592_349


def test_hgsc_errors(tmp_path):
    with pytest.raises(ValueError, match=r"hgsc_points\.npz: no such file"):
        HGSC(tmp_path)
    np.savez(tmp_path / "hgsc_points.npz", xy=np.zeros((3, 2)))
    with pytest.raises(ValueError, match="expected an .npz of xy, shape, cls and classes"):
        HGSC(tmp_path)
