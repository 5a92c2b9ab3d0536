"""Splits made by rule: folds, nested folds, sites, and what they refuse."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbag.config import ConfigError, SplitsConfig
from bigbag.data import SourceEntry, folds, make_splits, parse_splits_option
from bigbag.data.divide import classes_of, site_folds


def entries(count: int, classes: int = 2, per_patient: int = 1, seed: int = 0) -> list[SourceEntry]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return [SourceEntry(f"s{i:03d}", label=int(labels[i]), patient=f"p{i // per_patient}") for i in range(count)]


def names_of(bags: list[SourceEntry], splits: list[str | None], split: str) -> set[str]:
    return {bag.name for bag, of in zip(bags, splits) if of == split}


@given(
    sizes=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=6, max_size=40),
    num_folds=st.integers(2, 5),
    seed=st.integers(0, 100),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_folds_part_the_bags_keep_patients_and_do_not_depend_on_the_order(
    sizes: list[tuple[int, int]], num_folds: int, seed: int, order: object
) -> None:
    bags = [SourceEntry(f"s{i}-{j}", label=c, patient=f"p{i}") for i, (c, n) in enumerate(sizes) for j in range(n)]
    shuffled = list(bags)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    tested: list[str] = []
    for one in folds(folds=num_folds, val_fraction=0.25, seed=seed):
        try:
            splits = make_splits(bags, one)
        except ValueError as error:  # scikit-learn's rule, its greedy parting left a part empty, or one patient is left
            reasons = ("no class has so many bags", "one part stays empty", "come from 1 patient")
            assert any(reason in str(error) for reason in reasons)
            return
        parts = {split: names_of(bags, splits, split) for split in ("train", "val", "test")}
        assert sum(map(len, parts.values())) == len(bags) and all(parts.values())
        for a, b in itertools.combinations(parts.values(), 2):
            assert not {name.split("-")[0] for name in a} & {name.split("-")[0] for name in b}
        again = make_splits(shuffled, one)
        assert parts == {split: names_of(shuffled, again, split) for split in parts}
        tested += parts["test"]
    assert sorted(tested) == sorted(bag.name for bag in bags)


def test_folds_are_stratified_and_seeds_differ() -> None:
    bags = [SourceEntry(f"s{i}", label=int(i % 5 == 0)) for i in range(100)]  # 20 positives, 80 negatives
    tests = []
    for one in folds(folds=5):
        test = names_of(bags, make_splits(bags, one), "test")
        assert len(test) == 20 and sum(bag.label for bag in bags if bag.name in test) == 4
        tests.append(test)
    assert names_of(bags, make_splits(bags, folds=5, seed=1), "test") not in tests


def test_nested_folds() -> None:
    bags = entries(60, per_patient=2)
    all_folds = folds(folds=3, val_folds=4)
    assert [(one.fold, one.val_fold) for one in all_folds] == list(itertools.product(range(3), range(4)))
    for fold in range(3):
        inner = [make_splits(bags, one) for one in all_folds if one.fold == fold]
        tests = [names_of(bags, splits, "test") for splits in inner]
        validated = [name for splits in inner for name in names_of(bags, splits, "val")]
        assert all(test == tests[0] for test in tests)
        assert sorted(validated) == sorted({bag.name for bag in bags} - tests[0])


def test_official_test_bags_stay_where_only_validation_is_asked_for() -> None:
    bags = [replace(bag, split="test" if i < 10 else "train") for i, bag in enumerate(entries(40))]
    for one in folds(val_folds=3):
        splits = make_splits(bags, one)
        assert names_of(bags, splits, "test") == {bag.name for bag in bags[:10]} and splits.count("val") == 10
    assert make_splits(bags) == [bag.split for bag in bags]
    pooled = make_splits(bags, test_fraction=0.5, val_fraction=0.2)
    assert [pooled.count(name) for name in ("train", "val", "test")] == [16, 4, 20]


def hospitals(seed: int, num_sites: int = 12) -> list[SourceEntry]:
    """Sites of very different sizes and class balance."""
    rng = np.random.default_rng(seed)
    bags = []
    for site in range(num_sites):
        rate = rng.random()
        for i in range(int(rng.integers(3, 40))):
            name = f"TCGA-{chr(65 + site)}{chr(65 + site)}-{i:04d}-01Z-00-DX1.ABC"
            bags.append(SourceEntry(name, label=int(rng.random() < rate), patient=name[:12]))
    return bags


def balance(bags: list[SourceEntry], parts: list[set[str]]) -> float:
    """What preserved-site cross-validation minimises."""
    cost = 0.0
    for label in (0, 1):
        of_class = {bag.name for bag in bags if bag.label == label}
        cost += sum((len(part & of_class) / len(of_class) - 1 / len(parts)) ** 2 for part in parts)
    return cost


def test_sites_are_kept_whole_and_classes_balanced() -> None:
    bags = hospitals(0)
    parts = [names_of(bags, make_splits(bags, one), "test") for one in folds(folds=3, sites="tcga")]
    sites = [{name[5:7] for name in part} for part in parts]
    assert set.union(*sites) == {bag.name[5:7] for bag in bags} and sum(map(len, sites)) == 12
    assert all(abs(len(part) / len(bags) - 1 / 3) < 0.02 for part in parts)
    turned = make_splits(bags[::-1], folds=3, sites="tcga")
    assert names_of(bags[::-1], turned, "test") == parts[0]
    held_out = make_splits(bags, test_fraction=0.25, val_fraction=0.2, sites="tcga")
    of = {split: {bag.name[5:7] for bag, s in zip(bags, held_out) if s == split} for split in ("train", "val", "test")}
    assert not of["train"] & of["val"] and not (of["train"] | of["val"]) & of["test"]
    assert abs(held_out.count("test") / len(bags) - 0.25) < 0.04


@pytest.mark.parametrize("seed", range(3))
def test_the_search_for_sites_comes_near_the_optimum(seed: int) -> None:
    """Against all 3**8 assignments of 8 sites to 3 folds."""
    bags = hospitals(seed, num_sites=8)
    groups = [bag.name[5:7] for bag in bags]
    classes = [str(bag.label) for bag in bags]
    found = site_folds(range(len(bags)), groups, classes, [1 / 3] * 3, 0, "folds")
    names = sorted(set(groups))
    counts = np.array([[sum(g == n and c == k for g, c in zip(groups, classes)) for k in "01"] for n in names])
    shares = counts / counts.sum(0)
    assignments = np.array(list(itertools.product(range(3), repeat=8)))
    costs = sum((((assignments == k)[:, :, None] * shares).sum(1) - 1 / 3) ** 2 for k in range(3)).sum(1)  # type: ignore
    cost = balance(bags, [{bags[i].name for i in part} for part in found])
    assert cost <= np.sort(costs)[60]  # among the best 10 of 6561, each of which occurs in 6 orders of the folds


def test_sites_from_a_table(tmp_path) -> None:  # type: ignore[no-untyped-def]
    bags = entries(12, per_patient=2)
    path = tmp_path / "sites.csv"
    path.write_text("case_id,site\n" + "".join(f"p{i},{'abc'[i % 3]}\n" for i in range(6)))
    splits = make_splits(bags, folds=3, sites=str(path))
    assert {bag.patient for bag, split in zip(bags, splits) if split == "test"} in (
        {"p0", "p3"},
        {"p1", "p4"},
        {"p2", "p5"},
    )
    with pytest.raises(ValueError, match=r"bag 's012' has no site: .*expected a line in .*sites.csv"):
        make_splits([*bags, SourceEntry("s012")], folds=3, sites=str(path))
    with pytest.raises(ValueError, match=r"bag 's000' has no site: .*names like TCGA-XX"):
        make_splits(bags, folds=3, sites="tcga")
    path.write_text("slide_id,site\n" + "".join(f"s{i:03d},h{i}\n" for i in range(12)))
    with pytest.raises(ValueError, match="patient 'p0' is at the sites 'h0' and 'h1'"):
        make_splits(bags, folds=3, sites=str(path))
    with pytest.raises(ValueError, match=r"nowhere.csv: no such file; sites is 'tcga' or a CSV"):
        make_splits(bags, folds=3, sites="nowhere.csv")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"folds": 7}, "folds asks for 7 parts, but the 12 bags to part come from 6 patients.*at most 6"),
        ({"folds": 3, "val_folds": 5}, "val_folds asks for 5 parts, but the 8 bags to part come from 4 patients"),
    ],
)
def test_more_folds_than_patients(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_splits(entries(12, classes=1, per_patient=2), **fields)


def test_a_class_that_is_missing_in_a_split_is_named(caplog: pytest.LogCaptureFixture) -> None:
    bags = [SourceEntry(f"s{i}", label=int(i < 2)) for i in range(20)]
    with caplog.at_level(logging.WARNING):
        splits = [make_splits(bags, one) for one in folds(folds=5)]
    without = sum(not any(b.label for b, s in zip(bags, of) if s == "test") for of in splits)
    assert without == 3 and caplog.text.count("no bag of the split test has one of these labels (in all: 2 of 1)") == 3


def test_classes_of_labels() -> None:
    assert classes_of([0, 1, None]) == ["0", "1", "None"]
    assert classes_of([i / 7 for i in range(50)]) is None
    assert classes_of([[i / 7, i % 2] for i in range(50)]) == [str(i % 2) for i in range(50)]  # (time, event)
    assert classes_of([[0, 1], [1, 1]]) == ["0, 1", "1, 1"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"val_fraction": 1.5}, "between 0 and 1"),
        ({"folds": 1}, "folds is 1, expected at least 2"),
        ({"folds": 3, "fold": 3}, "fold is 3, expected 0 to 2"),
        ({"folds": 3, "fold": -1}, "fold is -1, expected 0 to"),
        ({"fold": 1}, "fold is 1, but folds is not set"),
        ({"val_fold": 1, "table": "x.csv"}, "val_fold is 1, but val_folds is not set"),
        ({"folds": 3, "table": "x.csv"}, "table and folds both say which bags test"),
        ({"folds": 3, "test_fraction": 0.1}, "folds and test_fraction both say"),
        ({"val_folds": 3, "val_fraction": 0.1}, "both say which bags validate"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitsConfig(**fields)


def test_the_option_of_the_command_line() -> None:
    assert parse_splits_option("a/splits_0.csv") == SplitsConfig(table="a/splits_0.csv")
    assert parse_splits_option("folds=5,fold=2,stratify=false,sites=tcga") == SplitsConfig(
        folds=5, fold=2, stratify=False, sites="tcga"
    )
    with pytest.raises(ConfigError, match=r"--splits: unknown setting 'foldss'; did you mean 'folds'\?"):
        parse_splits_option("folds=5,foldss=2")
    with pytest.raises(ConfigError, match="--splits folds=5,fold=9: fold is 9, expected 0 to 4$"):
        parse_splits_option("folds=5,fold=9")
    with pytest.raises(ConfigError, match="--splits folds=x: folds: Input should be a valid integer[^\n]*$"):
        parse_splits_option("folds=x")
    with pytest.raises(ValueError, match="neither folds, val_folds nor a table with folds"):
        folds(val_fraction=0.1)
