"""Generated bags: torchmil's numbers under the same seed, and the distributions that their papers describe."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import bigbag.datasets as ours
from bigbag.data import collate_fn, open_store, pack


def same(a, b):
    return len(a) == len(b) and all(
        set(x.keys()) == set(y.keys()) and all(torch.equal(x[key], y[key]) for key in x.keys())  # noqa: SIM118
        for x, y in zip(a, b)
    )


@pytest.mark.parametrize("bag_size", [3, 10, (4, 9)])
def test_toy_bags_of_torchmil(bag_size):
    theirs = pytest.importorskip("torchmil.datasets")
    rng = np.random.default_rng(0)
    data, labels = rng.normal(size=(60, 4)), rng.integers(0, 5, 60)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    for seed in (0, 7):
        args = (data, labels, 25, [1, 3], bag_size, 0.4, seed)
        mine = ours.ToyDataset(*args)
        assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
        assert same(mine, theirs.ToyDataset(*args))
        np.random.seed()  # noqa: NPY002
        state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert sum(int(bag["Y"]) for bag in mine) == 10
    assert all(bag["Y"] == bag["y_inst"].max() for bag in mine)


def test_toy_takes_tensors_and_lists_as_torchmil_does():
    theirs = pytest.importorskip("torchmil.datasets")
    data, labels = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    expected = theirs.ToyDataset(data, labels, 6, [1], (3, 6), seed=2)
    assert same(ours.ToyDataset(data, labels, 6, [1], (3, 6), seed=2), expected)
    assert same(ours.ToyDataset(data.tolist(), labels.tolist(), 6, [1], (3, 6), seed=2), expected)


def test_toy_needs_both_kinds():
    with pytest.raises(ValueError, match="both instances with and without"):
        ours.ToyDataset(np.zeros((3, 2)), np.zeros(3), 2, [1], 2)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name, extra", [("MCStandard", {}), ("SCStandard", {"B": 4}), ("FalseFrequency", {})])
def test_algorithmic_bags_of_torchmil(name, extra, train):
    theirs = getattr(pytest.importorskip("torchmil.datasets"), f"{name}MILDataset")
    cls = getattr(ours, f"{name}MILDataset")
    for D in (3, 20):
        kwargs = {"D": D, "num_bags": 15, "pos_class_prob": 0.6, "train": train, "seed": 5, **extra}
        torch.manual_seed(5)
        assert same(cls(**kwargs), theirs(**kwargs))
    torch.manual_seed(99)
    assert same(cls(**kwargs), cls(**kwargs)) and not same(cls(**kwargs), cls(**{**kwargs, "seed": 6}))


def test_algorithmic_bags_of_the_paper():
    """Means of concepts to five standard errors; which bags hold which."""
    num, D = 400, 8
    for train in (True, False):
        bags = list(ours.MCStandardMILDataset(D, num, train=train))
        for bag in bags:
            means = bag["X"][bag["y_inst"] == 1].mean(1)
            low, high = ((means - 2).abs() < 0.3).sum(), ((means - 3).abs() < 0.3).sum()
            poisoned = (bag["y_inst"] == -1).sum()
            assert low + high == (bag["y_inst"] == 1).sum()
            if bag["Y"] == 1:
                assert low == high and 1 <= low <= 3 and poisoned == (not train)
            else:
                assert low + high == 1 and poisoned == train
        background = torch.cat([bag["X"][bag["y_inst"] == 0] for bag in bags])
        assert abs(background.mean()) < 5 / math.sqrt(background.numel())
        assert abs(background.var() - 1) < 5 * math.sqrt(2 / background.numel())
    frequent = [int((bag["y_inst"] == 1).sum()) for bag in ours.FalseFrequencyMILDataset(D, num, train=False)]
    assert set(frequent[: num // 2]) == {2} and set(frequent[num // 2 :]) == set(range(35, 45))
    single = list(ours.SCStandardMILDataset(D, num, B=6, train=True))
    assert all((bag["y_inst"] == 0).sum() == 6 for bag in single)
    assert {int((bag["y_inst"] == 1).sum()) for bag in single} == {0, 1, 2, 3}


def test_shifted_mean_bags_of_torchmil():
    theirs = pytest.importorskip("torchmil.datasets").ShiftedMeanMILDataset
    kwargs = {"N": 12, "R": 3, "S_low": 6, "S_high": 9, "K": 2, "M": 5, "Delta": 0.7, "seed": 3}
    mine, other = ours.ShiftedMeanMILDataset(**kwargs), theirs(**kwargs)
    assert same(mine, other)
    torch.testing.assert_close(mine.y_inst_list, other.y_inst_list)
    torch.testing.assert_close(
        torch.stack([mine.p_y1_given_h(i) for i in range(12)]),
        torch.stack([other.p_y1_given_h(i) for i in range(12)]), rtol=1e-4, atol=1e-6,
    )  # fmt: skip


def test_posterior_is_calibrated_and_survives_large_bags():
    """Among bags to which it gives a probability in some range, that share is positive; torchmil's is NaN here."""
    kwargs = {"R": 4, "S_low": 20, "S_high": 30, "K": 3, "M": 3, "Delta": 1.2, "mu": 5.0, "sigma": 2.0, "p_y1": 0.3}
    dataset = ours.ShiftedMeanMILDataset(N=2000, **kwargs)
    posterior = torch.stack([dataset.p_y1_given_h(i) for i in range(len(dataset))])
    for low, high in [(0, 0.2), (0.2, 0.5), (0.5, 1.01)]:
        chosen = (posterior >= low) & (posterior < high)
        assert chosen.sum() > 100
        error = (posterior[chosen] * (1 - posterior[chosen])).sum().sqrt() / chosen.sum()
        assert abs(dataset.y[chosen].float().mean() - posterior[chosen].mean()) < 4 * error
    large = ours.ShiftedMeanMILDataset(N=1, R=3, S_low=5000, S_high=5000, K=3, M=3, p_y1=1.0, Delta=3.0)
    assert torch.isfinite(large.p_y1_given_h(0))


def test_generated_bags_load_and_pack(tmp_path):
    dataset = ours.MCStandardMILDataset(6, 8, train=True)
    (batch,) = DataLoader(dataset, batch_size=8, collate_fn=collate_fn, num_workers=1)
    assert batch["Y"].tolist() == [1] * 4 + [0] * 4
    assert batch["mask"].sum(1).tolist() == [len(bag["X"]) for bag in dataset]
    pack(dataset, tmp_path, dtype="float32", progress=False)
    store = open_store(tmp_path)
    assert [(info.name, info.split, info.label) for info in store.infos][:1] == [
        ("MCStandardMILDataset-00000", "train", 1)
    ]
    np.testing.assert_array_equal(store.read(5).x, dataset[5]["X"])
    np.testing.assert_array_equal(store.read(5).y_inst, dataset[5]["y_inst"])
