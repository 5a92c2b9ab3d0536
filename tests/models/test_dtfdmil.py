"""DTFDMIL against the paper's algorithm, pseudo-bag by pseudo-bag, and against torchmil where torchmil is right."""

import numpy as np
import pytest
import torch

from bigbag import PackedBags
from bigbag.bags import Segments
from bigbag.models import DTFDMIL
from bigbag.models.dtfdmil import _Groups
from bigbag.nn.survival import CoxLoss

WIDTH = 6
SIZES = (23, 8, 3, 1, 0)


def make_pack(sizes=SIZES, seed=0) -> PackedBags:
    x = torch.randn(sum(sizes), WIDTH, generator=torch.Generator().manual_seed(seed))
    return PackedBags(x, Segments.from_sizes(sizes).offsets, tuple(sizes))


def attend(pool, x):
    f = pool.fc2(torch.tanh(pool.fc1(x)))[:, 0]
    return f.softmax(0)


def by_hand(model, x, parts):
    """Logits (C,), pseudo logits (M, C), activations (N, C) of one bag from its pseudo-bags' rows."""
    distilled, pseudo, activations = [], [], torch.zeros(len(x), model.classifier.module.out_features)
    for rows in parts:
        a = attend(model.attention_pool, x[rows])
        z = a @ x[rows]
        pseudo.append(model.classifier(z))
        cam = len(rows) * a[:, None] * (x[rows] @ model.classifier.module.weight.t())
        torch.testing.assert_close(cam.mean(0) + model.classifier.module.bias, pseudo[-1])
        activations[rows] = cam
        picks = {"afs": [], "max": [cam.argmax(0)], "maxmin": [cam.argmax(0), cam.argmin(0)]}[model.distill_mode]
        distilled.append(torch.cat([x[rows][i] for i in picks]) if picks else z[None])
    features = torch.cat(distilled)
    return model.u_classifier(attend(model.u_attention_pool, features) @ features), torch.stack(pseudo), activations


@pytest.mark.parametrize("out_dim", [1, 3])
@pytest.mark.parametrize("mode", ["maxmin", "max", "afs"])
@pytest.mark.parametrize("training", [True, False])
def test_the_papers_algorithm(mode, out_dim, training):
    torch.manual_seed(0)
    criterion = torch.nn.CrossEntropyLoss() if out_dim > 1 else None
    model = DTFDMIL((WIDTH,), 4, 4, mode, criterion=criterion, out_dim=out_dim).train(training)
    pack = make_pack()
    torch.manual_seed(3)
    groups = _Groups(pack, 4, training)
    parts = [order.tolist() for order in groups.order.split(groups.segments.sizes)]
    torch.manual_seed(3)
    logits, pseudo, scores = model(pack, return_pseudo_pred=True, return_inst_cam=True)
    Y = torch.tensor([1, 0, 1, 0, 1])
    torch.manual_seed(3)
    losses = list(model.compute_loss(Y, pack)[1].values())
    tier_1, tier_2 = [], [model.bag_loss(logits[4:], Y[4:])]
    for bag, (start, size) in enumerate(zip(pack.segments.starts, SIZES)):
        mine = [[row - start for row in part] for part in parts if part and start <= part[0] < start + size]
        assert [len(part) for part in mine] == [len(part) for part in np.array_split(range(size), min(4, size) or 1)][
            : min(4, size)
        ]
        if not size:
            continue
        assert sorted(row for part in mine for row in part) == list(range(size))
        expected = by_hand(model, pack.x[start : start + size], mine)
        torch.testing.assert_close(logits[bag], expected[0].squeeze(-1) if out_dim == 1 else expected[0])
        torch.testing.assert_close(pseudo[bag, : len(mine)], expected[1].squeeze(-1) if out_dim == 1 else expected[1])
        torch.testing.assert_close(scores[start : start + size], expected[2].amax(1))
        of_bag = expected[1].squeeze(-1) if out_dim == 1 else expected[1]
        tier_1.append(model.bag_loss(of_bag, Y[bag].expand(len(mine))))
        tier_2.append(model.bag_loss(logits[bag : bag + 1], Y[bag : bag + 1]))
    torch.testing.assert_close(losses, [sum(tier_1) / len(SIZES), sum(tier_2) / len(SIZES)])


def test_risk_sets_hold_all_pseudo_bags_of_a_pack():
    model, pack = DTFDMIL((WIDTH,), 4, 4, criterion=CoxLoss()).eval(), make_pack()
    Y = torch.tensor([[3.0, 1], [2, 0], [1, 1], [5, 1], [4, 1]])
    _, pseudo = model(pack, return_pseudo_pred=True)
    groups = [4, 4, 3, 1, 0]
    risks = torch.cat([row[:count] for row, count in zip(pseudo, groups)])
    expected = model.criterion(risks, Y.repeat_interleave(torch.tensor(groups), 0))
    torch.testing.assert_close(model.compute_loss(Y, pack)[1]["CoxLoss_t1"], expected)


def test_names_of_the_losses():
    model = DTFDMIL((WIDTH,))
    assert list(model.compute_loss(torch.ones(5), make_pack())[1]) == ["BCEWithLogitsLoss_t1", "BCEWithLogitsLoss_t2"]


def test_pseudo_bags_change_in_training_only():
    model, pack = DTFDMIL((WIDTH,), 4), make_pack((40, 9))
    assert (model(pack) != model(pack)).all()
    model.eval()
    assert (model(pack) == model(pack)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_order_of_content_is_by_chance_and_has_no_ties(dtype):
    """Near duplicates and sparse rows included; groups of an ordered bag look like random ones."""
    x = torch.linspace(0, 1, 3000)[:, None].repeat(1, 8) * torch.tensor([1, 0, 0, 0, 0, 0, 0, 1])
    pack = PackedBags(x.to(dtype), Segments.from_sizes((3000,)).offsets, (3000,))
    order, _, groups = (lambda g: (g.order, g.place, g.segments))(_Groups(pack, 8, False))
    means = torch.stack([part.float().mean() for part in order.split(groups.sizes)])
    # Standard error of a mean of 375 of 3000 ranks: 3000 / sqrt(12 * 375) = 45.
    assert (means - 1500).abs().max() < 5 * 45
    shuffle = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    again = _Groups(pack.with_x(pack.x[shuffle]), 8, False).order
    for found, expected in zip(pack.x[shuffle][again].split(groups.sizes), pack.x[order].split(groups.sizes)):
        torch.testing.assert_close(found.sort(0).values, expected.sort(0).values, rtol=0, atol=0)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 20)])
def test_afs_equals_torchmil_with_its_pseudo_bags(mask, monkeypatch):
    theirs_class = pytest.importorskip("torchmil.models").DTFDMIL
    torch.manual_seed(0)
    theirs, ours = theirs_class((WIDTH,), 4, 4, "afs"), DTFDMIL((WIDTH,), 4, 4, "afs")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    X, Y = torch.randn(2, 20, WIDTH), torch.tensor([1, 0])
    torch.manual_seed(3)
    order = _Groups(PackedBags.from_padded(X), 4, True).order[:20].numpy()
    monkeypatch.setattr(np.random, "shuffle", lambda index: np.copyto(index, order))
    for ask in ("return_pseudo_pred", "return_inst_cam"):
        torch.manual_seed(3)
        expected, found = theirs(X, mask, **{ask: True}), ours(X, mask, **{ask: True})
        torch.testing.assert_close(found[0], expected[0])
        assert found[1].shape == expected[1].shape
        if ask == "return_pseudo_pred":
            torch.testing.assert_close(found[1], expected[1])
    torch.manual_seed(3)
    _, expected = theirs.compute_loss(Y, X, mask)
    _, losses = ours.compute_loss(Y, X, mask)
    torch.testing.assert_close(losses["BCEWithLogitsLoss_t1"], expected["BCEWithLogitsLoss_t2"])
    torch.testing.assert_close(losses["BCEWithLogitsLoss_t2"], expected["BCEWithLogitsLoss_t1"])


def test_errors():
    with pytest.raises(ValueError, match="'median'"):
        DTFDMIL((4,), distill_mode="median")
    with pytest.raises(ValueError, match="n_groups"):
        DTFDMIL((4,), n_groups=0)
