"""The data types: packing, padding, one buffer."""

import warnings

import numpy as np
import pytest
import torch

from bigbag import Adjacency, Bag, PackedBags, Segments


def make_bag(size: int, seed: int = 0, **fields) -> Bag:
    rng = np.random.default_rng(seed)
    values = {
        "x": rng.normal(size=(size, 5)).astype(np.float16),
        "y": seed % 2,
        "key": f"bag{seed}",
        "coords": rng.integers(0, 9, (size, 2)).astype(np.int32),
        "y_inst": rng.integers(-1, 2, size).astype(np.int8),
        "adj": Adjacency.from_edges(torch.arange(size), torch.arange(size).flip(0), torch.rand(size), size),
    }
    return Bag(**(values | fields))


@pytest.mark.parametrize("sizes", [(3,), (1, 4, 2), (0, 3), (2, 0, 0, 5)])
def test_from_bags_keeps_every_field(sizes):
    bags = [make_bag(n, seed) for seed, n in enumerate(sizes)]
    pack = PackedBags.from_bags(bags)
    assert pack.sizes == sizes and pack.offsets.tolist() == list(np.cumsum((0, *sizes)))
    assert pack.keys == tuple(bag.key for bag in bags) and pack.y.tolist() == [bag.y for bag in bags]
    np.testing.assert_array_equal(pack.x.numpy(), np.concatenate([bag.x for bag in bags]))
    np.testing.assert_array_equal(pack.coords.numpy(), np.concatenate([bag.coords for bag in bags]))
    assert pack.y_inst.dtype == torch.int64
    np.testing.assert_array_equal(pack.y_inst.numpy(), np.concatenate([bag.y_inst for bag in bags]))
    dense = torch.block_diag(*(bag.adj.to_coo().to_dense() for bag in bags))
    torch.testing.assert_close(pack.adj.to_coo().to_dense(), dense)


def test_optional_fields_need_every_bag():
    pack = PackedBags.from_bags([make_bag(2), make_bag(3, 1, coords=None, y=None, adj=None)])
    assert pack.coords is None and pack.y is None and pack.adj is None and pack.y_inst is not None


def test_one_buffer_moves_in_one_copy():
    pack = PackedBags.from_bags([make_bag(3), make_bag(2, 1)])
    copies = []

    def move(tensor):
        copies.append(tensor.numel())
        return tensor.clone()

    moved = pack._map_buffer(move)
    assert len(copies) == 1
    for name in ("x", "offsets", "y", "y_inst", "coords"):
        assert torch.equal(getattr(moved, name), getattr(pack, name))
    assert torch.equal(moved.adj.weight, pack.adj.weight) and moved.sizes == pack.sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_precision_is_converted_while_packing(dtype):
    rng = np.random.default_rng(0)
    # more values than a piece, two bags, read-only as maps of shards are
    bags = [Bag(rng.normal(size=(n, 31)).astype(np.float16), y=0, key=str(n)) for n in (2500, 0, 777)]
    for bag in bags:
        bag.x.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack = PackedBags.from_bags(bags, dtype=dtype)
    assert pack.x.dtype == dtype
    whole = torch.from_numpy(np.concatenate([bag.x for bag in bags]))
    torch.testing.assert_close(pack.x, whole.to(dtype), rtol=0, atol=0)
    assert pack.x.untyped_storage().data_ptr() == pack.y.untyped_storage().data_ptr()


def test_label_dtypes():
    assert PackedBags.from_bags([make_bag(1, y=0.5)]).y.dtype == torch.float32
    assert PackedBags.from_bags([make_bag(1, y=[0, 1]), make_bag(1, y=[1, 1])]).y.shape == (2, 2)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.float32])
def test_padded_round_trip_with_holes(mask_dtype):
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).to(mask_dtype)
    X = torch.randn(3, 4, 2)
    adj = torch.rand(3, 4, 4)
    bags = PackedBags.from_padded(X, mask, adj=adj, coords=X + 1)
    assert bags.sizes == (3, 1, 0)
    valid = mask != 0
    torch.testing.assert_close(bags.to_padded(bags.x, -7.0), torch.where(valid[..., None], X, -7.0))
    assert torch.equal(bags.mask(), valid)
    expected = torch.block_diag(*(adj[b][valid[b]][:, valid[b]] for b in range(2)))
    torch.testing.assert_close(bags.adj.to_coo().to_dense(), expected)


def test_from_padded_without_mask_is_a_view():
    X = torch.randn(2, 3, 4)
    bags = PackedBags.from_padded(X)
    assert bags.x.data_ptr() == X.data_ptr() and bags.to_padded(bags.x).data_ptr() == X.data_ptr()


def test_to_padded_of_a_pack_from_bags():
    pack = PackedBags.from_bags([make_bag(1), make_bag(3, 1)])
    padded = pack.to_padded(pack.x)
    assert padded.shape == (2, 3, 5) and torch.equal(padded[1], pack.x[1:]) and not padded[0, 1:].any()


def test_gradients_pass_the_door():
    X = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    bags = PackedBags.from_padded(X, mask)
    bags.to_padded(bags.x * 2).sum().backward()
    torch.testing.assert_close(X.grad, 2.0 * mask[..., None].expand(2, 3, 4))


def test_segments():
    segments = Segments.from_sizes((2, 0, 3))
    assert segments.starts == (0, 2, 2, 5) and segments.bag_of_instance.tolist() == [0, 0, 2, 2, 2]


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="'a'.*coords.*expected 3 rows"):
        Bag(np.zeros((3, 2)), key="a", coords=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="bfloat16"):
        Bag(torch.zeros(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="at least one bag"):
        PackedBags.from_bags([])
    with pytest.raises(ValueError, match="'b'.*share feature shape"):
        PackedBags.from_bags([Bag(np.zeros((1, 2)), key="a"), Bag(np.zeros((1, 3)), key="b")])
    with pytest.raises(ValueError, match="mask has shape"):
        PackedBags.from_padded(torch.zeros(2, 3, 1), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3, 3\), expected \(2, 3\)"):
        PackedBags.from_padded(torch.zeros(2, 3, 1), mask=torch.ones(2, 3, 3))  # an adjacency in its place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"col": torch.tensor([1, 0])}, r"col is \(2,\) torch.int64, expected one dimension of torch.int32"),
        ({"crow": torch.tensor([0, 1, 2], dtype=torch.int32)}, r"crow is \(3,\) torch.int32, expected .* torch.int64"),
        ({"crow": torch.tensor([[0, 1, 2]])}, r"crow is \(1, 3\)"),
        ({"weight": torch.ones(3)}, r"weight has shape \(3,\), expected .* \(2,\)"),
    ],
)
def test_graphs_that_kernels_would_misread_are_refused(change, message):
    """torch's own CSR tensors have int64 columns: read as int32, every other one would be 0."""
    fields = {"crow": torch.tensor([0, 1, 2]), "col": torch.tensor([1, 0], dtype=torch.int32), "weight": torch.ones(2)}
    Adjacency(**fields)
    with pytest.raises(ValueError, match=f"Adjacency: {message}"):
        Adjacency(**(fields | change))


def test_offsets_of_fewer_bits_are_refused():
    with pytest.raises(ValueError, match="offsets are torch.int32, expected torch.int64"):
        Segments(torch.tensor([0, 2], dtype=torch.int32), (2,))
