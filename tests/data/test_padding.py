"""Padded batches and dense grids against torchmil's."""

from __future__ import annotations

import pytest
import torch

from bigbag import PackedBags
from bigbag.data import collate_fn, pad_tensors, seq_to_spatial, spatial_to_seq


@pytest.fixture
def theirs():
    return pytest.importorskip("torchmil.data")


def make_bags(sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    bags = []
    for size in sizes:
        adj = (torch.rand(size, size) < 0.3).float() * torch.rand(size, size)
        coords = torch.stack([torch.arange(size), torch.arange(size) % 3], 1)
        bag = {"X": torch.randn(size, 5), "Y": torch.tensor(1), "y_inst": torch.ones(size), "coords": coords}
        bags.append({**bag, "adj": adj.to_sparse_coo()})
    return bags


@pytest.mark.parametrize("sizes", [[4, 7, 1], [6]])
@pytest.mark.parametrize("sparse", [True, False])
def test_collate(theirs, sizes, sparse):
    found, expected = (module_collate(make_bags(sizes), sparse) for module_collate in (collate_fn, theirs.collate_fn))
    assert type(found) is type(expected) and set(found.keys()) == set(expected.keys())
    for key in found.keys():  # noqa: SIM118
        a, b = found[key], expected[key]
        assert a.is_sparse == b.is_sparse == (sparse and key == "adj") and a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a.to_dense(), b.to_dense())


def test_the_mask_is_that_of_the_instances():
    bags = [{"Y": torch.tensor([1.0]), "X": torch.randn(size, 3)} for size in (2, 4)]
    assert collate_fn(bags)["mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_a_batch_packs(theirs):
    bags = make_bags([4, 7, 2])
    batch = collate_fn(bags)
    pack = PackedBags.from_padded(batch["X"], batch["mask"], batch["adj"], batch["coords"])
    assert pack.sizes == (4, 7, 2)
    torch.testing.assert_close(pack.x, torch.cat([bag["X"] for bag in bags]))
    dense = torch.block_diag(*(bag["adj"].to_dense() for bag in bags))
    torch.testing.assert_close(pack.adj.to_coo().to_dense(), dense)


@pytest.mark.parametrize("sizes", [[3], [2, 5, 4]])
def test_pad_tensors(theirs, sizes):
    tensors = [torch.randn(size, 2) for size in sizes]
    for a, b in zip(pad_tensors(tensors, -1), theirs.pad_tensors(tensors, -1)):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_grids(theirs):
    torch.manual_seed(1)
    coords = torch.stack([torch.stack([torch.randperm(12) // 4, torch.randperm(12)], 1) for _ in range(2)])
    X = torch.randn(2, 12, 3)
    grid = seq_to_spatial(X, coords)
    assert torch.equal(grid, theirs.seq_to_spatial(X, coords))
    assert torch.equal(spatial_to_seq(grid, coords), theirs.spatial_to_seq(grid, coords))
    assert torch.equal(spatial_to_seq(grid, coords), X)


def test_padding_does_not_overwrite_a_place():
    X = torch.tensor([[[1.0], [2.0], [9.0]]])
    coords, mask = torch.tensor([[[0, 0], [1, 1], [0, 0]]]), torch.tensor([[1, 1, 0]])
    assert seq_to_spatial(X, coords, mask)[0, :, :, 0].tolist() == [[1.0, 0.0], [0.0, 2.0]]
