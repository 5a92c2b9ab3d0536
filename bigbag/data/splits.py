"""Who trains, who validates, who tests: as packed, by a table or by a rule, and checked for leakage.

``data.splits`` of a config (:class:`bigbag.config.SplitsConfig`), ``bigbag pack --splits`` and the functions here say
the same: ``split_bags(store, folds=5, fold=0, val_fraction=0.1)``.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from bigbag.config import ConfigError, SplitsConfig, check_arguments, read_yaml
from bigbag.data.divide import Splittable, classes_of, folds_of, groups_of, hold_out, site_folds
from bigbag.data.split_tables import count_folds, read_splits
from bigbag.data.stores import BagStore
from bigbag.data.validate import leaking_patients

logger = logging.getLogger(__name__)

_NAMED = ("train", "val", "test")


def split_bags(store: BagStore, settings: SplitsConfig | None = None, **fields: Any) -> dict[str, tuple[int, ...]]:
    """Indices of the bags of each split.

    Args:
        store: the bags.
        settings: how they are split; None: by ``fields``.
        fields: fields of :class:`bigbag.config.SplitsConfig`; none of them: as the bags were packed.

    Returns:
        Split -> indices, ascending. Bags without a split are under "unassigned".

    Raises:
        ValueError: no training bags, a patient in two splits, or a request that the bags cannot meet.
    """
    splits: dict[str, list[int]] = defaultdict(list)
    for index, split in enumerate(make_splits(store.infos, settings, **fields)):
        splits["unassigned" if split is None else split].append(index)
    if not splits.get("train"):
        counts = ", ".join(f"{len(bags)} {name}" for name, bags in splits.items())
        raise ValueError(
            f"no bag is in the split 'train' ({counts}): give the source a split for every bag, or set data.splits, "
            "for example to {folds: 5, fold: 0, val_fraction: 0.1}"
        )
    for name in sorted(set(splits) - {*_NAMED, "unassigned"}):
        shown = f"{len(splits[name])} bags are in the split {name!r}"
        logger.warning("data.splits: %s, which no run uses: expected %s", shown, ", ".join(_NAMED))
    if store.keeps_leakage:
        if leaking := _leakage(store.infos, splits):
            logger.warning("%s", leaking)
    else:
        check_leakage(store.infos, splits)
    return {name: tuple(bags) for name, bags in splits.items()}


def make_splits(bags: Sequence[Splittable], settings: SplitsConfig | None = None, **fields: Any) -> list[str | None]:
    """The split of each bag: ``"train"``, ``"val"``, ``"test"``, another name, or None.

    Args:
        bags: what is known of the bags: the ``infos`` of a store or the ``entries()`` of a source.
        settings: how they are split; None: by ``fields``.
        fields: fields of :class:`bigbag.config.SplitsConfig`.

    Raises:
        ValueError: a table that cannot be read, or a request that the bags cannot meet, with numbers.
    """
    settings = SplitsConfig(**fields) if settings is None else settings
    splits: list[str | None] = [bag.split for bag in bags]
    if settings.table is not None:
        splits = read_splits(settings.table, bags, settings.fold)
    if not settings.is_rule:
        return splits
    groups = groups_of(bags, settings.sites)
    classes = classes_of([bag.label for bag in bags]) if settings.stratify else None
    rule = _Rule(groups, classes, settings)
    if settings.folds is not None or settings.test_fraction is not None:
        everyone = range(len(bags))
        splits = ["train"] * len(bags)
        for bag in rule.part(everyone, settings.folds, settings.fold, settings.test_fraction, "folds", "test_fraction"):
            splits[bag] = "test"
    train = [bag for bag, split in enumerate(splits) if split == "train"]
    asked = settings.val_folds is not None or settings.val_fraction is not None
    if asked and train and (settings.val_folds is not None or "val" not in splits):
        out = rule.part(
            train, settings.val_folds, settings.val_fold, settings.val_fraction, "val_folds", "val_fraction"
        )
        for bag in out:
            splits[bag] = "val"
    _warn_of_missing_classes(splits, classes)
    return splits


class _Rule:
    """What all choices of one rule share."""

    def __init__(self, groups: Sequence[str], classes: Sequence[str] | None, settings: SplitsConfig) -> None:
        self.groups, self.classes, self.settings = groups, classes, settings

    def part(
        self, bags: Sequence[int], folds: int | None, fold: int, fraction: float | None, of_folds: str, of_fraction: str
    ) -> list[int]:
        """The bags of one fold, or a fraction of them."""
        by_site, seed = self.settings.sites is not None, self.settings.seed
        if folds is not None:
            if by_site:
                return site_folds(bags, self.groups, self.classes, [1 / folds] * folds, seed, of_folds)[fold]
            return folds_of(bags, self.groups, self.classes, folds, seed, of_folds)[fold]
        assert fraction is not None
        if by_site:
            return site_folds(bags, self.groups, self.classes, [1 - fraction, fraction], seed, of_fraction)[1]
        return hold_out(bags, self.groups, self.classes, fraction, seed, of_fraction)[1]


def folds(settings: SplitsConfig | None = None, **fields: Any) -> list[SplitsConfig]:
    """The settings of every fold of a cross-validation: outer folds first, inner ones within them.

    Args:
        settings: settings with ``folds``, ``val_folds``, or a table that has folds; None: by ``fields``.
        fields: fields of :class:`bigbag.config.SplitsConfig`.

    Returns:
        One for each fold, to be given to :func:`split_bags`.

    Raises:
        ValueError: settings without folds.
    """
    settings = SplitsConfig(**fields) if settings is None else settings
    outer = settings.folds
    if settings.table is not None and (settings.val_folds is None or "{fold}" in settings.table):
        outer = count_folds(settings.table)
    if outer is None and settings.val_folds is None:
        raise ValueError("folds: neither folds, val_folds nor a table with folds is set in data.splits")
    chosen = [{"fold": fold} for fold in range(outer or 1)] if outer is not None else [{}]
    if settings.val_folds is not None:
        chosen = [{**one, "val_fold": inner} for one in chosen for inner in range(settings.val_folds)]
    return [settings.model_copy(update=one) for one in chosen]


def parse_splits_option(text: str) -> SplitsConfig:
    """What follows ``--splits``: a table, or settings like ``folds=5,fold=0,val_fraction=0.1``.

    Raises:
        ConfigError: an unknown setting or a bad value.
    """
    first, equals, _ = text.partition("=")
    if not equals or first not in SplitsConfig.model_fields:
        return SplitsConfig(table=text)
    pairs = dict(pair.partition("=")[::2] for pair in text.split(","))
    check_arguments("--splits", pairs, list(SplitsConfig.model_fields))
    try:
        return SplitsConfig(**{key: read_yaml(value)[0] for key, value in pairs.items()})
    except ValidationError as error:
        problem = error.errors()[0]
        field = "".join(f"{name}: " for name in problem["loc"])
        raise ConfigError(f"--splits {text}: {field}{problem['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise ConfigError(f"--splits {text}: {error}") from None


def splits_digest(store: BagStore, splits: Mapping[str, Sequence[int]]) -> str:
    """SHA-256 of who is in which split, whatever the order."""
    content = sorted((store.infos[bag].name, name) for name, bags in splits.items() for bag in bags)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _warn_of_missing_classes(splits: Sequence[str | None], classes: Sequence[str] | None) -> None:
    if classes is None:
        return
    everyone = Counter(label for label, split in zip(classes, splits) if split is not None)
    for name in _NAMED:
        found = Counter(label for label, split in zip(classes, splits) if split == name)
        missing = [label for label in sorted(everyone) if not found[label]]
        if found and missing:
            counts = ", ".join(f"{everyone[label]} of {label}" for label in missing)
            logger.warning("data.splits: no bag of the split %s has one of these labels (in all: %s)", name, counts)


def check_leakage(infos: Sequence[Splittable], splits: Mapping[str, Sequence[int]]) -> None:
    """Refuse a patient with bags in two splits.

    Raises:
        ValueError: such patients, the first three by name.
    """
    found = _leakage(infos, splits)
    if found:
        raise ValueError(
            f"{found}; put all bags of a patient into one split, or pack the set with --leakage keep (data.leakage)"
        )


def _leakage(infos: Sequence[Splittable], splits: Mapping[str, Sequence[int]]) -> str:
    """Which patients have bags in two splits, as a sentence; "" if none has."""
    of_bag: list[str | None] = [None] * len(infos)
    for split, bags in splits.items():
        for bag in bags:
            of_bag[bag] = None if split == "unassigned" else split
    leaking = leaking_patients(infos, of_bag)
    if not leaking:
        return ""
    listed = "; ".join(f"{patient!r} in {' and '.join(of)}" for patient, of in sorted(leaking.items())[:3])
    return f"{len(leaking)} patients have bags in two splits ({listed}): results on one leak from the other"


def check_binary_labels(store: BagStore, bags: Sequence[int], split: str = "train") -> None:
    """Check that a binary task can be learned from ``bags``.

    Raises:
        ValueError: a missing label, one that is not 0 or 1, or bags of one class only.
    """
    infos = [store.infos[bag] for bag in bags]
    for info in infos:
        if info.label is None:
            raise ValueError(f"bag {info.name!r} ({split}): label is missing; a binary task needs 0 or 1 for every bag")
        if isinstance(info.label, (list, tuple)) or info.label not in (0, 1):
            raise ValueError(
                f"bag {info.name!r} ({split}): label {info.label!r}, expected 0 or 1; for other labels set task.type"
            )
    counts = Counter(int(info.label) for info in infos)  # type: ignore[arg-type]
    if not counts[1]:
        raise ValueError(f"no positive bag in {split} ({counts[0]} negative): nothing can be learned from one class")
    if not counts[0]:
        raise ValueError(f"only positive bags in {split} ({counts[1]}): nothing can be learned from one class")
