"""Augmentation and sampling: what they change, what they leave alone, and that they are the same for everybody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bigbag import Bag, PackedBags
from bigbag.data import (
    Augmentation,
    BagInfo,
    MemoryStore,
    PatientStore,
    bag_weights,
    draw_bags,
    plan_epoch,
    stream,
)
from bigbag.data.join import join_bags


@pytest.fixture
def store(make_bags: Callable) -> MemoryStore:
    return MemoryStore(make_bags(12))


def epoch(store: MemoryStore, augment: Augmentation | None, number: int = 0, **kwargs: int) -> dict:
    """Key and draw -> what the training step sees of a bag; whatever the packing."""
    world_size, seed = kwargs.pop("world_size", 1), kwargs.pop("seed", 7)
    order = kwargs.pop("order", range(len(store)))
    budget = kwargs.pop("budget_instances", 100)
    sizes = store.sizes if augment is None else augment.sizes(store.sizes)
    plan = plan_epoch(
        sizes, order, seed=seed, epoch=number, world_size=world_size, budget_instances=budget, batch_bags=4,
        repeated=len(set(order)) < len(order),
    )  # fmt: skip
    seen = {}
    for rank in range(world_size):
        for step, _, pack_plan, pack in stream(
            store, plan, rank=rank, epoch=number, seed=seed, augment=augment, **kwargs
        ):
            for place, (bag, draw) in enumerate(zip(pack_plan.bags, pack_plan.draws)):
                if not pack_plan.is_filler:
                    rows = slice(*pack.segments.starts[place : place + 2])
                    assert (bag, draw) not in seen
                    seen[bag, draw] = (step, pack.x[rows].clone(), pack.y_inst[rows].clone(), pack.y[place].item())
    return seen


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[k][0] == b[k][0] and a[k][3] == b[k][3] and torch.equal(a[k][1], b[k][1]) and torch.equal(a[k][2], b[k][2])
        for k in a
    )


EVERYTHING = Augmentation(mixup=0.8, instance_dropout=0.3, feature_noise=0.1, partners=tuple(range(12)))


def test_the_same_whatever_workers_ranks_packing_and_another_with_every_epoch_and_seed(store: MemoryStore) -> None:
    order = (0, 3, 3, 5, 11, 3, 7, 2, 2, 9)
    reference = epoch(store, EVERYTHING, order=order)
    assert Counter(bag for bag, _ in reference) == Counter(order)
    for other in ({"num_workers": 2}, {"world_size": 3}, {"budget_instances": 1}):
        assert same(epoch(store, EVERYTHING, order=order, **other), reference), other
    assert not same(epoch(store, EVERYTHING, order=order, seed=8), reference)
    later = epoch(store, EVERYTHING, 1, order=order)
    assert not torch.equal(later[5, 0][1], reference[5, 0][1])
    drawn = [reference[3, draw][1] for draw in range(3)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_ranks_that_share_a_bag_hold_the_parts_of_one_changed_bag(store: MemoryStore) -> None:
    sizes = EVERYTHING.sizes(store.sizes)
    plan = plan_epoch(sizes, range(12), seed=7, epoch=0, world_size=1, budget_instances=100, batch_bags=4)
    kwargs = {"rank": 0, "seed": 7, "augment": EVERYTHING}
    thirds = [stream(store, plan, part=(r, 3), **kwargs) for r in range(3)]
    for whole, *parts in zip(stream(store, plan, **kwargs), *thirds):
        of_bags = [torch.cat(rows) for rows in zip(*(part[3].x.split(list(part[3].sizes)) for part in parts))]
        assert torch.equal(torch.cat(of_bags), whole[3].x)


def test_nothing_is_changed_by_default(store: MemoryStore) -> None:
    assert same(epoch(store, Augmentation()), epoch(store, None))
    assert Augmentation().counted(store.sizes) == {} and Augmentation().sizes(store.sizes) == store.sizes


def test_instance_dropout(store: MemoryStore) -> None:
    augment = Augmentation(instance_dropout=0.4)
    for (bag, _), (_, x, y_inst, y) in epoch(store, augment).items():
        whole = store.read(bag)
        assert len(x) == whole.num_instances - round(0.4 * whole.num_instances) and y == whole.y
        places = [int(np.flatnonzero((whole.x == row).all(1))[0]) for row in x.numpy()]
        assert places == sorted(set(places))
        np.testing.assert_array_equal(y_inst, whole.y_inst[places])
    assert Augmentation(instance_dropout=0.99).sizes((0, 1, 2, 1000)) == (0, 1, 1, 10)
    left_out = sum(round(0.4 * size) for size in store.sizes)
    assert augment.counted(store.sizes) == {"instance_dropout": {"share": 0.4, "instances_left_out": left_out}}
    drawn = [set(map(tuple, epoch(store, augment, e)[11, 0][1].tolist())) for e in range(30)]
    counts = Counter(row for rows in drawn for row in rows)
    assert len(counts) == store.sizes[11] and max(counts.values()) < 30  # every instance stays sometimes, none always


def test_feature_noise() -> None:
    x = np.full((4000, 50), 3.0, np.float16)
    store = MemoryStore(
        [Bag(x, y=0, key="a", y_inst=np.zeros(4000, int)), Bag(x, y=1, key="b", y_inst=np.zeros(4000, int))]
    )
    seen = epoch(store, Augmentation(feature_noise=0.25), budget_instances=10_000, dtype=torch.float32)
    a, b = ((seen[bag, 0][1] - 3.0) / 0.25 for bag in (0, 1))
    for noise in (a, b):  # standard errors: 1 / sqrt(200 000) = 0.0022, and 0.0016
        assert abs(noise.mean().item()) < 0.01 and abs(noise.std().item() - 1) < 0.01
    assert abs((a * b).mean().item()) < 0.01
    assert (x == 3).all()
    with pytest.raises(ValueError, match="feature_noise"):
        epoch(MemoryStore([Bag(np.zeros((3, 2), np.uint8), y=0, key="a")]), Augmentation(feature_noise=1.0))


def test_mixup_takes_instances_and_labels_in_the_same_shares() -> None:
    rng = np.random.default_rng(0)
    bags = []
    for i in range(6):  # the first feature says which bag an instance is of
        x = rng.normal(size=(40 + 10 * i, 3)).astype(np.float32)
        x[:, 0] = i
        bags.append(Bag(x, y=i % 2, key=str(i), y_inst=np.full(len(x), i)))
    store = MemoryStore(bags)
    augment = Augmentation(mixup=1.0, partners=(0, 1, 2, 3, 4, 5))
    shares = []
    for number in range(40):
        for (bag, _), (_, x, y_inst, y) in epoch(store, augment, number).items():
            assert len(x) == store.sizes[bag]
            assert len(np.unique(x.numpy(), axis=0)) == len(x)  # nothing twice
            assert (y_inst == x[:, 0]).all()
            of = Counter(x[:, 0].int().tolist())
            others = [i for i in of if i != bag]
            assert len(others) <= 1
            assert y == pytest.approx(sum(count * (i % 2) for i, count in of.items()) / len(x), abs=1e-6)
            shares.append(of[bag] / len(x))
    assert 0.45 < np.mean(shares) < 0.6 and min(shares) < 0.1 and max(shares) > 0.9  # Beta(1, 1), cut by small partners
    alone = Augmentation(mixup=1.0, partners=(2,))
    assert same(epoch(store, alone), epoch(store, None)) and alone.counted((3,))["mixup"]["mixed_bags"] == 0


def test_mixed_bags_keep_the_edges_of_their_parts(store: MemoryStore) -> None:
    bag = EVERYTHING.change(store.read(9), (0, 0, 9, 0), store.read)
    assert bag.adj.num_nodes == bag.num_instances == EVERYTHING.sizes((store.sizes[9],))[0]
    assert PackedBags.from_bags([bag]).adj.num_edges == bag.adj.num_edges


def infos(labels: list) -> list[BagInfo]:
    return [BagInfo(str(i), f"bag.{i}", "train", label, None, 5) for i, label in enumerate(labels)]


def test_class_balanced_weights_draw_all_classes_alike() -> None:
    labels = [0] * 90 + [1] * 9 + [2]
    weights = bag_weights(infos(labels), "class_balanced")
    drawn = [labels[bag] for e in range(100) for bag in draw_bags(range(100), weights, 90, seed=0, epoch=e)]
    counts = Counter(drawn)  # 3000 each, standard deviation 45
    assert all(abs(counts[label] - 3000) < 200 for label in (0, 1, 2))
    assert draw_bags(range(100), weights, 90, seed=0, epoch=3) == draw_bags(range(100), weights, 90, seed=0, epoch=3)
    assert draw_bags(range(100), weights, 90, seed=0, epoch=3) != draw_bags(range(100), weights, 90, seed=0, epoch=4)


def test_weights_by_label_and_by_table(tmp_path: Path) -> None:
    some = infos([0, 1, 1])
    assert bag_weights(some, {0: 1.0, 1: 3.0}) == [1.0, 3.0, 3.0]
    table = tmp_path / "weights.csv"
    table.write_text("weight,bag\n2,bag.1\n0.5,bag.0\n0,bag.2\n")
    assert bag_weights(some, str(table)) == [0.5, 2.0, 0.0]
    assert 2 not in draw_bags(range(3), [0.5, 2.0, 0.0], 500, seed=0, epoch=0)
    with pytest.raises(ValueError, match="label 1 has no weight"):
        bag_weights(some, {0: 1.0})
    with pytest.raises(ValueError, match=r"bag 'bag\.3' has no weight"):
        bag_weights(infos([0] * 4), str(table))
    with pytest.raises(ValueError, match="expected that of a class"):
        bag_weights(infos([0.5, 1]), "class_balanced")
    with pytest.raises(ValueError, match="is no file"):
        bag_weights(some, "balanced")
    for weights in ([0, 0], [1, -1], [1, float("nan")], [1]):
        with pytest.raises(ValueError, match="finite weights"):
            draw_bags((0, 1), weights, 3, seed=0, epoch=0)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_repeated_bags_are_all_planned_and_told_apart(world_size: int) -> None:
    order = [0, 1, 1, 1, 2, 0, 3, 1]
    plan = plan_epoch(
        [5, 9, 4, 7], order, seed=0, epoch=0, world_size=world_size, budget_instances=12, batch_bags=4, shuffle=False,
        repeated=True,
    )  # fmt: skip
    by_step = []
    for step in plan.steps:
        packs = [pack for micro in step.micro_steps for pack in micro if not pack.is_filler]
        by_step.append(sorted(pair for pack in packs for pair in zip(pack.bags, pack.draws)))
    assert by_step == [[(0, 0), (1, 0), (1, 1), (1, 2)], [(0, 1), (1, 3), (2, 0), (3, 0)]]


def test_all_slides_of_a_patient_are_one_bag(make_bags: Callable) -> None:
    bags = [
        Bag(b.x, y=i % 2, key=f"s{i}", coords=b.coords, y_inst=b.y_inst, adj=b.adj) for i, b in enumerate(make_bags(6))
    ]
    slides = MemoryStore(bags, ["train"] * 4 + ["test"] * 2, ["p", "q", "p", None, "r", None])
    store = PatientStore(slides)
    assert [(i.name, i.split, i.label, i.num_instances) for i in store.infos] == [
        ("p", "train", 0, sum(slides.sizes[i] for i in (0, 2))),
        ("q", "train", 1, slides.sizes[1]),
        ("s3", "train", 1, slides.sizes[3]),
        ("r", "test", 0, slides.sizes[4]),
        ("s5", "test", 1, slides.sizes[5]),
    ]
    bag = store.read(0)
    np.testing.assert_array_equal(bag.x, np.concatenate([bags[0].x, bags[2].x]))
    np.testing.assert_array_equal(bag.y_inst, np.concatenate([bags[0].y_inst, bags[2].y_inst]))
    assert (bag.key, bag.y, bag.adj.num_edges) == ("p", 0, bags[0].adj.num_edges + bags[2].adj.num_edges)
    first, second = bag.coords[: slides.sizes[0]], bag.coords[slides.sizes[0] :]
    assert second[:, 0].min() == first[:, 0].max() + 2
    np.testing.assert_array_equal(first[:, 1], bags[0].coords[:, 1])
    assert np.shares_memory(store.read(1).x, bags[1].x)
    assert store.digest() != slides.digest()
    seen = epoch(store, None)
    assert sum(len(x) for _, x, _, _ in seen.values()) == sum(slides.sizes)


def test_slides_of_a_patient_must_agree(make_bags: Callable) -> None:
    bags = [Bag(b.x, y=i % 2, key=f"s{i}") for i, b in enumerate(make_bags(4))]
    with pytest.raises(ValueError, match=r"patient 'p': slides with different labels, 0 \(s0\), 1 \(s1\)"):
        PatientStore(MemoryStore(bags, None, ["p", "p", "q", "r"]))
    with pytest.raises(ValueError, match="different splits"):
        PatientStore(MemoryStore(bags, ["train", "val", "test", "test"], ["p", "q", "p", "r"]))
    with pytest.raises(ValueError, match="'s1' is a patient and also a bag"):
        PatientStore(MemoryStore(bags, None, ["s1", None, "q", "r"]))


def test_joining_floating_coordinates_and_empty_bags() -> None:
    a, b, c = (Bag(np.zeros((n, 1)), coords=np.full((n, 2), 0.5)) for n in (2, 0, 1))
    np.testing.assert_array_equal(join_bags([a, b, c], key="", y=0).coords, [[0, 0.5], [0, 0.5], [2, 0.5]])
