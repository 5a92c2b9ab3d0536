"""Training in chunks of instances is training on whole bags: losses, every gradient, memory."""

import random
from functools import partial

import pytest
import torch

from bigbag import PackedBags, Segments
from bigbag.models import CLAM_SB, MODELS, MaxMIL
from tests.models.test_models import SMALL, build, make_bag
from tests.ops.test_graphs_memory import peak_bytes

POOLING = ("ABMIL", "MeanMIL", "MaxMIL", "CLAM_SB", "CLAM_MB", "DSMIL", "DTFDMIL", "ProbSmoothABMIL", "SmABMIL")
"""Models that hold no feature of all instances at once."""
ENCODER = {"name": "MLP", "linear_sizes": [9, 7], "activations": ["relu", "relu"]}
VARIANTS = [
    (name, {**SMALL.get(name, {}), **({} if name == "VAEABMIL" else {"feat_ext": ENCODER})}) for name in MODELS
] + [
    ("ABMIL", {"gated": True, "feat_ext": ENCODER}),
    ("DTFDMIL", {"distill_mode": "afs", "feat_ext": ENCODER}),
    ("SmABMIL", {"sm_where": "none", "feat_ext": ENCODER}),
    ("SmABMIL", {"sm_where": "late", "spectral_norm": False, "feat_ext": ENCODER}),
]


def random_pack(seed: int, dtype: torch.dtype) -> PackedBags:
    numbers = random.Random(seed)
    sizes = [numbers.randint(1, 40) for _ in range(4)]
    bags = PackedBags.from_bags([make_bag(size, i % 2, i) for i, size in enumerate(sizes)])
    return bags.with_x(bags.x.to(dtype))


def losses_and_gradients(model, pack, chunk: int | None):
    model.zero_grad()
    model.activation_checkpointing, model.chunk_instances = chunk is not None, chunk
    torch.manual_seed(3)
    _, losses = model.compute_loss(pack.y, pack)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name, arguments", VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-3)])
def test_chunks_give_the_gradient_of_whole_bags(name, arguments, dtype, tolerance):
    model, pack = build(name, arguments).to(dtype), random_pack(len(name), dtype)
    losses, whole = losses_and_gradients(model, pack, None)
    found, chunked = losses_and_gradients(model, pack, 7)
    torch.testing.assert_close(found, losses, rtol=tolerance, atol=0)
    assert whole.keys() == chunked.keys() and any(key.startswith("feat_ext") for key in whole)
    # Attention's gradient is a sum that cancels, and carries the rounding of terms as large as the others' gradients.
    rounding = 4 * torch.finfo(dtype).eps * max(float(gradient.norm()) for gradient in whole.values())
    for key, gradient in whole.items():
        error = (chunked[key] - gradient).norm()
        assert error <= tolerance * gradient.norm() + rounding, f"{key}: {error / gradient.norm():.2g}"


class Patches(torch.nn.Module):
    """Patches (n, 1, 6, 6) to features (n, 5), as a user would write it: its dropout is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(torch.tanh(self.conv(x)).mean((2, 3)), 0.4, self.training)


@pytest.mark.parametrize("model_class", [CLAM_SB, MaxMIL])
def test_dropout_is_the_same_in_every_pass_over_raw_patches(model_class):
    """The loss is a function of the weights: its slope is the gradient, so forward and backward dropped the same."""
    torch.manual_seed(0)
    arguments = {"k_sample": 3, "inst_loss_name": "BCEWithLogitsLoss"} if model_class is CLAM_SB else {}
    model = model_class(in_shape=(1, 6, 6), feat_ext=Patches(), **arguments).double()
    model.activation_checkpointing, model.chunk_instances = True, 4
    x, y = torch.randn(23, 1, 6, 6, dtype=torch.float64), torch.tensor([1, 0])
    segments = Segments.from_sizes((14, 9))
    pack = PackedBags(x, segments.offsets, segments.sizes)

    def loss(shift: float) -> torch.Tensor:
        for p, direction in zip(model.parameters(), directions):
            p.data += shift * direction
        torch.manual_seed(5)
        value = sum(model.compute_loss(y, pack)[1].values())
        for p, direction in zip(model.parameters(), directions):
            p.data -= shift * direction
        return value

    directions = [torch.randn_like(p) for p in model.parameters()]
    step = 1e-6
    torch.manual_seed(5)
    sum(model.compute_loss(y, pack)[1].values()).backward()
    slope = sum((p.grad * direction).sum() for p, direction in zip(model.parameters(), directions))
    measured = (loss(step) - loss(-step)) / (2 * step)
    torch.testing.assert_close(slope, measured, rtol=1e-6, atol=1e-9)
    assert not torch.equal(loss(0.0), model.eval().compute_loss(y, pack)[1]["BCEWithLogitsLoss"])


def test_batch_normalisation_is_refused_in_training_only():
    feat_ext = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    model = build("ABMIL", {})
    model.feat_ext, model.activation_checkpointing = feat_ext, True
    with pytest.raises(ValueError, match="BatchNorm1d '1' normalises by the statistics of a chunk.*use GroupNorm"):
        model.encode(feat_ext, torch.randn(9, 6))
    assert model.eval().encode(feat_ext, torch.randn(9, 6)).shape == (9, 4)


def train_on(model, pack):
    sum(model.compute_loss(pack.y, pack)[1].values()).backward()


@pytest.mark.parametrize("name", POOLING)
def test_memory_is_set_by_the_chunk(name):
    """Four times the instances take no more than thin columns more: far below one feature row of 256 numbers."""
    wide = {"name": "MLP", "linear_sizes": [256], "activations": ["relu"]}
    small = {} if name in ("MeanMIL", "MaxMIL") else {"att_dim": 4}
    model = build(name, {**SMALL.get(name, {}), **small, "feat_ext": wide})
    model.activation_checkpointing, model.chunk_instances = True, 256
    peaks = []
    for size in (2_000, 8_000):
        pack = PackedBags.from_bags([make_bag(size, 1, 0), make_bag(9, 0, 1)])
        peaks.append(peak_bytes(partial(train_on, model, pack)))
    grown = (peaks[1] - peaks[0]) / 6_000
    assert grown < 1024, f"{grown:.0f} bytes per instance"
