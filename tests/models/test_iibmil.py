"""IIBMIL against torchmil, and its prototypes against their definition, on one rank and on several."""

import pytest
import torch

from bigbag import PackedBags
from bigbag.bags import Segments
from bigbag.models import IIBMIL
from bigbag.testing import run_ranks

WIDTH = 6
SIZES = (25, 4, 31, 1)
Y = torch.tensor([1.0, 0.0, 0.0, 1.0])


def make_pack(bags=range(4)) -> PackedBags:
    x = [torch.randn(SIZES[bag], WIDTH, generator=torch.Generator().manual_seed(bag)) for bag in bags]
    sizes = tuple(map(len, x))
    return PackedBags(torch.cat(x), Segments.from_sizes(sizes).offsets, sizes)


def build(**arguments):
    torch.manual_seed(0)
    return IIBMIL((WIDTH,), att_dim=4, n_heads=2, **arguments)


def means_by_hand(model, classes):
    """Mean over the bags of each class of the mean of the tenth with the best scores: (C, att_dim)."""
    found = [[] for _ in range(model.num_classes)]
    for bag in range(len(SIZES)):
        _, y, h = model._levels(make_pack([bag]))
        scores = torch.cat([-y, y], 1) if y.shape[1] == 1 else y - y.logsumexp(1, keepdim=True)
        for c in range(model.num_classes):
            if classes[bag, c]:
                best = scores[:, c].argsort(descending=True)[: max(1, SIZES[bag] // 10)]
                found[c].append(h[best].mean(0))
    return torch.stack([torch.stack(part).mean(0) for part in found]).detach()


def step(model, labels, parts, share=1.0):
    """A step of packs; each gradient weighed as the engine does."""
    for bags in parts:
        losses = model.compute_loss(labels[list(bags)], make_pack(bags))[1]
        (sum(losses.values()) * share * len(bags) / 4).backward()
    model.after_step()


@pytest.mark.parametrize("att_dim", [4, WIDTH])
def test_equals_torchmil(att_dim):
    theirs_class = pytest.importorskip("torchmil.models.iibmil").IIBMIL
    arguments = {"in_shape": (WIDTH,), "att_dim": att_dim, "n_heads": 2, "n_layers_decoder": 2, "use_mlp_decoder": True}
    theirs, ours = theirs_class(**arguments).eval(), IIBMIL(**arguments).eval()
    theirs.prototypes.normal_()
    torch.nn.init.normal_(theirs.cls_token)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    X = torch.randn(1, 21, WIDTH)
    for expected, found in zip(theirs(X, None, True, True), ours(X, None, True, True)):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.predict(X), theirs.predict(X))
    torch.testing.assert_close(ours.compute_loss(Y[:1], X), theirs.compute_loss(Y[:1], X))
    padded = torch.cat([X, torch.full((1, 5, WIDTH), 1e3)], 1)
    mask = torch.cat([torch.ones(1, 21), torch.zeros(1, 5)], 1)
    torch.testing.assert_close(ours.compute_loss(Y[:1], padded, mask), theirs.compute_loss(Y[:1], X))


def test_prototypes_follow_the_bags_of_their_class():
    model = build(proto_m=0.75)
    classes = torch.stack([Y == 0, Y == 1], 1)
    expected = means_by_hand(model, classes)
    step(model, Y, [range(4)])
    torch.testing.assert_close(model.prototypes, expected)
    model.prototypes.copy_(torch.ones(2, 4))
    step(model, Y, [(0, 2), (1, 3)])
    torch.testing.assert_close(model.prototypes, 0.75 + 0.25 * expected)
    before = model.prototypes.clone()
    step(model, Y, [(0, 1)], share=0.0)  # a pack that only fills
    model.eval()
    step(model, Y, [(0, 1)])
    torch.testing.assert_close(model.prototypes, before)
    model.train()
    step(model, Y, [(0,)])
    assert (model.prototypes[0] == before[0]).all() and (model.prototypes[1] != before[1]).all()


def test_prototypes_of_several_classes():
    model = build(out_dim=3, criterion=torch.nn.CrossEntropyLoss())
    labels = torch.tensor([2, 0, 1, 2])
    expected = means_by_hand(model, torch.nn.functional.one_hot(labels, 3).bool())
    step(model, labels, [range(4)])
    torch.testing.assert_close(model.prototypes, expected)
    _, y, h = model._levels(make_pack())
    pseudo = (h @ expected.t()).argmax(1)
    assert len(pseudo.unique()) > 1
    of_bags = torch.nn.functional.cross_entropy(y, pseudo, reduction="none").split(SIZES)
    loss = model.compute_loss(labels, make_pack())[1]["InstLoss"]
    torch.testing.assert_close(loss, torch.stack([part.mean() for part in of_bags]).mean())
    model.criterion = torch.nn.MSELoss()
    assert list(model.compute_loss(torch.rand(4, 3), make_pack())[1]) == ["MSELoss"]


def test_update_by_hand():
    model = build()
    model.update_prototypes(make_pack())
    torch.testing.assert_close(model.prototypes, means_by_hand(model, torch.ones(4, 2)))
    other = build()
    other.update_prototypes(make_pack(), Y=Y)
    torch.testing.assert_close(other.prototypes, means_by_hand(other, torch.stack([Y == 0, Y == 1], 1)))


def _prototypes_of_rank():
    rank = torch.distributed.get_rank()
    model = build()
    step(model, Y, [(0,)] if rank == 0 else [(1, 2), (3,)])
    return model.prototypes


def test_ranks_share_their_bags():
    expected = means_by_hand(build(), torch.stack([Y == 0, Y == 1], 1))
    for found in run_ranks(_prototypes_of_rank, 2):
        torch.testing.assert_close(found, expected)


def test_errors():
    with pytest.raises(ValueError, match="in_shape"):
        IIBMIL()
    with pytest.raises(ValueError, match="proto_m"):
        IIBMIL((4,), proto_m=1.5)
