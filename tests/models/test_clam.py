"""CLAM: the instance loss against one written out bag by bag, and torchmil where torchmil is right."""

import pytest
import torch

from bigbag import PackedBags
from bigbag.bags import Segments
from bigbag.models import CLAM_MB, CLAM_SB
from bigbag.nn import SmoothTop1SVM

WIDTH, K = 6, 4
SIZES = (40, 9, 5, 2, 1, 0)


def hinge(scores: torch.Tensor, target: int) -> torch.Tensor:
    """Berrada et al. 2018 for one sample of two classes."""
    margins = torch.stack([scores[c] - scores[target] + float(c != target) for c in range(2)])
    apart = (scores[0] - scores[1]).abs() >= torch.log(torch.tensor(1000.0))
    return margins.max() if apart else margins.exp().sum().log()


def bce(scores: torch.Tensor, target: int) -> torch.Tensor:
    signs = torch.tensor([1.0 if c == target else -1.0 for c in range(2)])
    return (1 + (-signs * scores).exp()).log().mean()


def by_hand(model, pack, f, classes, loss=hinge) -> torch.Tensor:
    """Mean over the bags of l_in + l_out, instance by instance; f (T, C)."""
    total = torch.zeros(())
    starts = pack.segments.starts
    for bag, (start, end) in enumerate(zip(starts, starts[1:])):
        x, size, parts = pack.x[start:end], end - start, {True: [], False: []}
        for c, layer in enumerate(model.inst_classifiers):
            order = sorted(range(size), key=lambda i: -f[start + i, c].item())
            top = order[: min(K, -(-size // 2))]
            bottom = order[size - min(K, size // 2) :]
            present = bool(classes[bag, c])
            terms = [loss(layer(x[i]), int(present)) for i in top] + [loss(layer(x[i]), 0) for i in bottom if present]
            parts[present].append(sum(terms) / max(1, len(terms)))
        total = total + sum(parts[True]) / max(1, len(parts[True]))
        if model.subtyping:
            total = total + sum(parts[False]) / max(1, len(parts[False]))
    return total / len(SIZES)


def make(cls, **arguments):
    torch.manual_seed(1)
    model = cls((WIDTH,), att_dim=5, k_sample=K, **arguments)
    for layer in model.inst_classifiers:
        torch.nn.init.normal_(layer.module.weight, std=3.0)  # so that some scores are far apart
    x = torch.randn(sum(SIZES), WIDTH)
    segments = Segments.from_sizes(SIZES)
    return model, PackedBags(x, segments.offsets, SIZES)


@pytest.mark.parametrize("name, loss", [("SmoothTop1SVM", hinge), ("BCEWithLogitsLoss", bce)])
def test_binary_instance_loss(name, loss):
    model, pack = make(CLAM_SB, inst_loss_name=name)
    Y = torch.tensor([1, 0, 1, 1, 0, 1])
    _, f = model(pack, return_att=True)
    losses = model.compute_loss(Y.float(), pack)[1]
    classes = torch.stack([Y == 0, Y == 1], 1)
    torch.testing.assert_close(losses["InstLoss"], by_hand(model, pack, f[:, None].expand(-1, 2), classes, loss))
    weighted, *_ = make(CLAM_SB, inst_loss_name=name, bag_weight=0.7)
    for key, value in weighted.compute_loss(Y, pack)[1].items():
        torch.testing.assert_close(value, losses[key] * {"InstLoss": 0.3}.get(key, 0.7))


@pytest.mark.parametrize("cls", [CLAM_SB, CLAM_MB])
def test_classes(cls):
    arguments = {"subtyping": True} if cls is CLAM_MB else {}
    model, pack = make(cls, out_dim=3, criterion=torch.nn.CrossEntropyLoss(), bag_weight=None, **arguments)
    Y = torch.tensor([2, 0, 1, 1, 0, 2])
    logits, f, x = model._attend(pack)
    f = f.reshape(len(x), -1).expand(-1, 3)
    expected = by_hand(model, pack, f, torch.nn.functional.one_hot(Y, 3).bool())
    torch.testing.assert_close(model.compute_loss(Y, pack)[1]["InstLoss"], expected)
    multilabel = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0], [1, 1, 0]])
    model.criterion = torch.nn.BCEWithLogitsLoss()
    loss = model.compute_loss(multilabel.float(), pack)[1]["InstLoss"]
    torch.testing.assert_close(loss, by_hand(model, pack, f, multilabel.bool()))
    model.criterion = torch.nn.MSELoss()
    assert list(model.compute_loss(torch.rand(6, 3), pack)[1]) == ["MSELoss"]
    if cls is CLAM_MB:
        assert (model(pack, return_att=True)[1][:40] == f[:40, logits[0].argmax()]).all()


def test_branches_pool_by_themselves():
    model, pack = make(CLAM_MB, gated=True)
    x, f = pack.x[:40], model(pack, return_att=True)[1][:40]
    pool = model.pool
    hidden = pool.fc1(x).tanh() * pool.fc_gated(x).sigmoid()
    attention = hidden @ pool.fc2.weight.t()
    torch.testing.assert_close(f, attention[:, 1])
    logits = [model.classifiers[c](attention[:, c].softmax(0) @ x) for c in range(2)]
    torch.testing.assert_close(model(pack)[0], (logits[1] - logits[0])[0])
    torch.testing.assert_close(
        by_hand(model, pack, model._attend(pack)[1], torch.tensor([[0, 1]] * 6).bool()) * 0.3,
        model.compute_loss(torch.ones(6), pack)[1]["InstLoss"],
    )


@pytest.mark.parametrize("gated", [False, True])
def test_equals_torchmil(gated):
    theirs_class = pytest.importorskip("torchmil.models").CLAM_SB
    arguments = {"in_shape": (WIDTH,), "att_dim": 5, "gated": gated, "k_sample": K}
    theirs, ours = theirs_class(**arguments), CLAM_SB(**arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    X, mask = torch.randn(2, 13, WIDTH), torch.tensor([[1] * 13, [1] * 8 + [0] * 5])
    for expected, found in zip(theirs(X, mask, True, True), ours(X, mask, True, True)):
        torch.testing.assert_close(found[:1], expected[:1])
    torch.testing.assert_close(ours(X, mask), theirs(X, mask))
    _, expected, targets = theirs.inst_eval(X[0, :, 0], X[0], theirs.inst_classifiers[0])
    loss, predictions, found = ours.inst_eval(X[0, :, 0], X[0], ours.inst_classifiers[0])
    assert (predictions == expected).all() and (found == targets).all() and loss.shape == ()
    _, expected, targets = theirs.inst_eval_out(X[0, :, 0], X[0], theirs.inst_classifiers[0], mask[1])
    _, predictions, found = ours.inst_eval_out(X[0, :, 0], X[0], ours.inst_classifiers[0], mask[1])
    assert (predictions == expected).all() and (found == targets).all()
    _, predictions, _ = ours.inst_eval(X[0, :3, 0], X[0, :3], ours.inst_classifiers[0])
    assert predictions.shape == (6, 1)
    one = ours.compute_inst_loss(X[1:, :8, 0], X[1:, :8], torch.tensor([1]))
    torch.testing.assert_close(one, ours.compute_inst_loss(X[1:, :, 0], X[1:], torch.tensor([1]), mask[1:]))
    parts = ours.inst_eval(X[1, :, 0], X[1], ours.inst_classifiers[1], mask[1])[0]
    parts = parts + ours.inst_eval_out(X[1, :, 0], X[1], ours.inst_classifiers[0], mask[1])[0]
    torch.testing.assert_close(one, parts)


def test_smooth_svm():
    loss, x = SmoothTop1SVM(3, alpha=2.0, tau=0.5), torch.tensor([[0.1, 0.3, -0.2], [9.0, 1.0, 0.0], [1.0, 9.0, 0.0]])
    y = torch.tensor([0, 0, 2])
    smooth = 0.5 * torch.log(torch.exp(torch.tensor([0.0, 4.4, 3.4])).sum())
    torch.testing.assert_close(loss.per_sample(x, y), torch.stack([smooth, torch.tensor(0.0), torch.tensor(11.0)]))
    for form in (y, y[:, None], torch.nn.functional.one_hot(y, 3)):
        torch.testing.assert_close(loss(x, form), (smooth + 11) / 3)


def test_errors():
    with pytest.raises(ValueError, match="'hinge'"):
        CLAM_SB((4,), inst_loss_name="hinge")
    with pytest.raises(ValueError, match="bag_weight"):
        CLAM_SB((4,), bag_weight=1.5)
    with pytest.raises(ValueError, match="k_sample"):
        CLAM_SB((4,), k_sample=0)
