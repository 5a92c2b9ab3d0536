"""DSMIL against torchmil, and against its formula where torchmil lets padding in."""

import pytest
import torch

from bigbag import PackedBags
from bigbag.models import DSMIL

WIDTH = 6
X = torch.randn(3, 9, WIDTH, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8], dtype=torch.uint8)


@pytest.mark.parametrize("nonlinear", [(False, False), (True, False), (True, True)])
def test_equals_torchmil(nonlinear):
    theirs_class = pytest.importorskip("torchmil.models").DSMIL
    arguments = {"in_shape": (WIDTH,), "att_dim": 4, "nonlinear_q": nonlinear[0], "nonlinear_v": nonlinear[1]}
    theirs, ours = theirs_class(**arguments), DSMIL(**arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for expected, found in zip(theirs(X, None, True, True), ours(X, None, True, True)):
        torch.testing.assert_close(found, expected)
    Y = torch.tensor([1, 0, 1])
    (expected_pred, expected), (pred, losses) = theirs.compute_loss(Y, X), ours.compute_loss(Y, X)
    torch.testing.assert_close((pred, losses), (expected_pred, expected))
    for expected, found in zip(theirs.predict(X, None, True), ours.predict(X, None, True)):
        torch.testing.assert_close(found, expected)
    assert ours.predict(X).shape == (3,)
    grads = []
    for model in (theirs, ours):
        sum(model.compute_loss(Y, X)[1].values()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected, msg=name)


def test_padding_takes_no_part():
    model = DSMIL((WIDTH,), att_dim=4)
    loud = torch.where(MASK[..., None] == 0, 100 * model.inst_classifier.weight[0].detach(), X)
    Y = torch.tensor([1, 0, 1])
    pred, losses = model.compute_loss(Y, loud, MASK)
    alone = [model.compute_loss(Y[i : i + 1], X[i : i + 1, :n]) for i, n in enumerate((9, 4, 1))]
    torch.testing.assert_close(pred, torch.cat([p for p, _ in alone]))
    torch.testing.assert_close(losses, {k: sum(part[k] for _, part in alone) / 3 for k in losses})


def test_outputs_have_critical_instances_of_their_own():
    model = DSMIL((WIDTH,), att_dim=4, out_dim=3)
    x = X[0]
    y = model.inst_classifier(x)
    z = []
    for c in range(3):
        q = model.q_nn(x)
        z.append(torch.softmax(q @ q[y[:, c].argmax()] / 2, 0) @ x)
    logits, a, scores = model(PackedBags.from_padded(X[:1]), return_att=True, return_inst_pred=True)
    torch.testing.assert_close(logits[0], model.bag_classifier(torch.cat(z)))
    torch.testing.assert_close(scores, y)
    torch.testing.assert_close(a.sum(0), torch.ones(3))
    prediction, best = model.predict(X[:1], return_inst_pred=True)
    torch.testing.assert_close(prediction[0], (logits[0] + y.amax(0)) / 2)
    torch.testing.assert_close(best[0], y.amax(1))


def test_needs_in_shape():
    with pytest.raises(ValueError, match="in_shape"):
        DSMIL()
