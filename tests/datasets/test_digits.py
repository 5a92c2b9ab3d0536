from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from scipy import ndimage
from sklearn.datasets import load_digits

from bigbag.bags import Bag
from bigbag.data.sources.base import Source
from bigbag.datasets.digits import Digits, grow_lesions, tissue_mask

SMALL: dict[str, Any] = {"num_train": 8, "num_val": 4, "num_test": 6, "min_instances": 1500, "max_instances": 3000}


def small(**changes: Any) -> Digits:
    return Digits(**{**SMALL, **changes})


def load(source: Digits, name: str) -> Bag:
    (entry,) = [entry for entry in source.entries() if entry.name == name]
    return source.load(entry)


def on_lattice(bag: Bag, values: np.ndarray) -> np.ndarray:
    assert bag.coords is not None
    lattice = np.zeros(bag.coords.max(0)[::-1] + 1, dtype=bool)
    lattice[bag.coords[:, 1], bag.coords[:, 0]] = values
    return lattice


def nearest_image(x: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row of the closest image to each row of ``x``, and the distance."""
    squares = (x**2).sum(1)[:, None] - 2 * x @ images.T + (images**2).sum(1)
    nearest = squares.argmin(1)
    return nearest, np.sqrt(np.maximum(squares[np.arange(len(x)), nearest], 0))


def test_entries_are_named_labelled_and_balanced() -> None:
    source = small(positive_fraction=0.25)
    assert isinstance(source, Source)
    entries = source.entries()
    assert [entry.name for entry in entries[:2]] == ["train-0000", "train-0001"]
    assert len({entry.name for entry in entries}) == 18
    for split, num, positives in (("train", 8, 2), ("val", 4, 1), ("test", 6, 2)):
        labels = [entry.label for entry in entries if entry.split == split]
        assert (len(labels), sum(int(label or 0) for label in labels)) == (num, positives)


def test_slides_are_a_function_of_seed_split_and_index_alone() -> None:
    source, again = small(), small()
    names = [entry.name for entry in source.entries()]
    bags = {name: load(source, name) for name in names}
    for name in reversed(names):
        bag = load(again, name)
        for field in ("x", "coords", "y_inst"):
            assert np.array_equal(getattr(bag, field), getattr(bags[name], field)), (name, field)
    assert not np.array_equal(bags["train-0000"].x[:500], bags["train-0001"].x[:500])
    assert not np.array_equal(bags["train-0000"].x[:500], bags["test-0000"].x[:500])
    assert not np.array_equal(bags["train-0000"].x[:500], load(small(seed=1), "train-0000").x[:500])
    # More slides in a split must not change the images the others are made of.
    assert np.array_equal(source.image_ids("test"), small(num_train=20).image_ids("test"))


def test_a_known_slide() -> None:
    bag = load(small(), "train-0005")
    assert (bag.num_instances, bag.y, int(bag.y_inst.sum())) == (2374, 1, 46)  # type: ignore[union-attr]


def test_dtypes_shapes_and_label() -> None:
    source = small()
    for entry in source.entries():
        bag = source.load(entry)
        assert bag.x.dtype == np.float16 and bag.x.shape == (bag.num_instances, 64)
        assert bag.coords is not None and bag.coords.dtype == np.int32 and bag.coords.shape == (bag.num_instances, 2)
        assert bag.y_inst is not None and bag.y_inst.dtype == np.int8
        assert bag.x.min() >= 0 and bag.x.max() <= 1
        assert SMALL["min_instances"] <= bag.num_instances <= SMALL["max_instances"]
        assert bag.key == entry.name and bag.y == entry.label == int(bag.y_inst.any())
        assert len(np.unique(bag.coords, axis=0)) == bag.num_instances


def test_every_patch_is_a_real_digit_of_its_split_and_y_inst_marks_the_target() -> None:
    images, digits = load_digits(return_X_y=True)
    images = images / 16
    source = small(target=4, staining=0.0, noise=0.0, witness_rate=(0.01, 0.02))
    seen: dict[str, set[int]] = {"train": set(), "val": set(), "test": set()}
    for entry in source.entries():
        bag = source.load(entry)
        nearest, distance = nearest_image(bag.x.astype(np.float64), images)
        assert distance.max() < 1e-3, entry.name
        assert np.array_equal(digits[nearest] == 4, bag.y_inst == 1), entry.name
        seen[entry.split].update(nearest.tolist())  # type: ignore[index]
    for split, ids in seen.items():
        assert ids <= set(source.image_ids(split).tolist())
    assert not (seen["train"] & seen["val"] or seen["train"] & seen["test"] or seen["val"] & seen["test"])


def test_images_are_split_within_each_digit() -> None:
    digits = load_digits(return_X_y=True)[1]
    ids = [small().image_ids(split) for split in ("train", "val", "test")]
    assert sorted(np.concatenate(ids).tolist()) == list(range(1797))
    share = np.stack([np.bincount(digits[part], minlength=10) for part in ids], 1) / np.bincount(digits)[:, None]
    assert np.abs(share - [0.55, 0.15, 0.30]).max() < 0.01


def test_noise_and_staining_have_the_stated_size() -> None:
    plain = load(small(staining=0.0, noise=0.0), "train-0000").x.astype(np.float64)
    noisy = load(small(staining=0.0, noise=0.05), "train-0000").x.astype(np.float64)
    inner = (plain > 0.25) & (plain < 0.75)  # far from where pixels are clipped
    assert abs((noisy - plain)[inner].std() - 0.05) < 0.001
    gains = []
    source = small(num_train=40, staining=0.1, noise=0.0, min_instances=500, max_instances=500)
    clean = small(num_train=40, staining=0.0, noise=0.0, min_instances=500, max_instances=500)
    for entry in source.entries()[:40]:
        stained, base = source.load(entry).x.astype(np.float64), clean.load(entry).x.astype(np.float64)
        inner = (base > 0.25) & (base < 0.7) & (stained < 1)
        ratio = stained[inner] / base[inner]
        assert ratio.std() < 2e-3  # one contrast per slide
        gains.append(ratio.mean())
    assert 0.07 < np.std(gains) < 0.14


def test_witness_rates_and_lesions() -> None:
    source = small(num_train=40, witness_rate=(0.002, 0.004), large_witness_rate=(0.02, 0.04), large_fraction=0.3)
    large, lesions = {"train": 0, "val": 0, "test": 0}, []
    for entry in source.entries():
        bag = source.load(entry)
        if not bag.y:
            continue
        assert bag.y_inst is not None
        witnesses = int(bag.y_inst.sum())
        is_large = witnesses > 0.01 * bag.num_instances
        low, high = (0.02, 0.04) if is_large else (0.002, 0.004)
        assert round(low * bag.num_instances) <= witnesses <= round(high * bag.num_instances)
        large[str(entry.split)] += is_large
        lesions.append(ndimage.label(on_lattice(bag, bag.y_inst == 1))[1])
    assert large == {"train": 6, "val": 1, "test": 1}  # 0.3 of 20, 2 and 3 positive slides
    assert set(lesions) == {1, 2, 3}


def test_the_smallest_lesion_is_one_digit() -> None:
    source = small(witness_rate=(1e-6, 1e-6), large_fraction=0.0)
    assert [int(source.load(e).y_inst.sum()) for e in source.entries()[:8] if e.label] == [1] * 4  # type: ignore[union-attr]


def test_default_rates_are_those_of_micro_and_macrometastases() -> None:
    source = Digits(num_test=20)
    rates = np.sort([source.load(e).y_inst.mean() for e in source.entries()[-20:] if e.label])  # type: ignore[union-attr]
    assert len(rates) == 10
    assert rates[0] > 0.0004 and rates[5] < 0.0009 and rates[6] > 0.0145 and rates[-1] < 0.0205


@pytest.mark.parametrize("seed", range(20))
def test_tissue_has_the_asked_size_and_few_pieces(seed: int) -> None:
    mask = tissue_mask(np.random.default_rng(seed), 4000)
    assert mask.sum() == 4000
    pieces = ndimage.label(mask)[1]
    assert pieces <= 8
    # Compact: a random scatter of as many cells has far more outline.
    outline = np.logical_xor(mask[1:], mask[:-1]).sum() + np.logical_xor(mask[:, 1:], mask[:, :-1]).sum()
    assert outline < 0.3 * mask.sum()


def test_lesions_fill_small_pieces_and_go_on_elsewhere() -> None:
    tissue = np.zeros((5, 12), dtype=bool)
    tissue[1:3, 1:3] = tissue[1:4, 6:9] = True  # pieces of 4 and 9 cells
    for seed in range(20):
        cells = grow_lesions(np.random.default_rng(seed), tissue, 12)
        assert len(set(cells.tolist())) == 12 and cells.min() >= 0 and cells.max() < 13


def test_description_is_json_and_names_every_argument() -> None:
    source = small(seed=3, witness_rate=(0.01, 0.02))
    description = json.loads(json.dumps(source.description()))
    assert description.pop("source") == "digits"
    assert Digits(**description).description() == source.description()
    assert description["seed"] == 3 and description["witness_rate"] == [0.01, 0.02]
    import inspect

    assert set(description) == set(inspect.signature(Digits).parameters)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target", 10),
        ("target", -1),
        ("num_train", 1),
        ("num_val", 0),
        ("num_test", 1),
        ("min_instances", 10),
        ("max_instances", 1000),
        ("witness_rate", (0.0, 0.1)),
        ("witness_rate", (0.2, 0.1)),
        ("witness_rate", (0.1, 1.0)),
        ("witness_rate", (0.1,)),
        ("large_witness_rate", (0.0, 0.1)),
        ("large_fraction", 1.5),
        ("positive_fraction", 0.0),
        ("positive_fraction", 1.0),
        ("staining", -0.1),
        ("noise", -1.0),
        ("seed", -1),
    ],
)
def test_impossible_arguments_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"digits: {name} is .*, expected .+"):
        small(**{name: value})


def test_unknown_slide_is_named() -> None:
    source = small()
    entry = source.entries()[0]
    with pytest.raises(ValueError, match=r"no slide 'train-0008'.*train: 8"):
        source.load(type(entry)(name="train-0008"))
