"""LongNetMIL: order along Hilbert's curve, positions, memory."""

from __future__ import annotations

import pytest
import torch

from bigbag import PackedBags, Segments
from bigbag.memory import peak_bytes
from bigbag.models import LongNetMIL
from bigbag.nn.dilated import hilbert_order, relative_coords, sinusoidal_position, unsorted


def pack(coords: torch.Tensor, sizes: tuple[int, ...], width: int = 8) -> PackedBags:
    segments = Segments.from_sizes(sizes)
    x = torch.randn(len(coords), width, generator=torch.Generator().manual_seed(0))
    return PackedBags(x, segments.offsets, sizes, y=torch.ones(len(sizes)), coords=coords)


def lattice(side: int) -> torch.Tensor:
    index = torch.arange(side * side)
    return torch.stack([index % side, index // side], 1)


def test_neighbours_along_the_curve_are_neighbours_on_the_lattice() -> None:
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    coords = torch.cat([lattice(16)[order] * 512 + 77, lattice(8)])
    bags = pack(coords, (256, 64))
    found = hilbert_order(*relative_coords(bags, "test"), bags.segments)
    assert sorted(found[:256].tolist()) == list(range(256)) and sorted(found[256:].tolist()) == list(range(256, 320))
    for part, step in ((found[:256], 512), (found[256:], 1)):
        walked = coords[part].diff(dim=0).abs().sum(1)
        assert (walked == step).all()
    values = torch.arange(320.0)
    assert torch.equal(unsorted(values[found], found), values)


def test_position_does_not_end_where_a_table_would() -> None:
    """Places beyond 1,000 patches differ, and the dot product of two positions depends on their difference alone."""
    places = torch.tensor([[3.0, 5.0], [1003.0, 5.0], [1_000_003.0, 5.0], [7.0, 6.0], [1_000_007.0, 6.0]])
    encoded = sinusoidal_position(places, 64)
    assert encoded.shape == (5, 64) and (encoded[0] - encoded[1]).abs().max() > 0.1
    torch.testing.assert_close(encoded[0] @ encoded[3], encoded[2] @ encoded[4], rtol=1e-5, atol=1e-5)


def test_where_the_slide_begins_and_in_what_unit_does_not_matter() -> None:
    torch.manual_seed(0)
    model = LongNetMIL((8,), att_dim=8, n_heads=2, segment_lengths=(16, 64), dilations=(1, 2)).eval()
    scaled = LongNetMIL((8,), att_dim=8, n_heads=2, segment_lengths=(16, 64), dilations=(1, 2), patch_size=224.0).eval()
    scaled.load_state_dict(model.state_dict())
    logits = model(pack(lattice(12), (144,)))
    torch.testing.assert_close(scaled(pack(lattice(12) * 224 + 5_000_000, (144,))), logits)
    turned = model(pack(lattice(12).flip(1), (144,)))
    assert (turned - logits).abs() > 1e-4  # the place does matter


def peak_of(rows: int) -> int:
    torch.manual_seed(0)
    model = LongNetMIL((8,), att_dim=16, n_heads=2, segment_lengths=(64, 256), dilations=(1, 2))
    side = round(rows**0.5)
    bags = pack(lattice(side), (side * side,))

    def step() -> None:
        sum(model.compute_loss(bags.y, bags)[1].values()).backward()

    return peak_bytes(step)


def test_memory_is_linear_in_the_bag() -> None:
    small, large = peak_of(64**2), peak_of(128**2)
    assert large < 4.4 * small


def test_errors_name_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        LongNetMIL((8,), att_dim=6, n_heads=2)
    with pytest.raises(ValueError, match="'attention' or 'mean'"):
        LongNetMIL((8,), pool="max")
    with pytest.raises(ValueError, match="divides the 8 heads"):
        LongNetMIL((8,), segment_lengths=(64,), dilations=(3,))
    with pytest.raises(ValueError, match="two axes"):
        LongNetMIL((8,), att_dim=8)(pack(torch.zeros(4, 3), (4,)))
    with pytest.raises(ValueError, match="needs coords"):
        LongNetMIL((8,), att_dim=8)(torch.randn(1, 4, 8))
