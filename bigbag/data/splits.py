"""Who trains, who validates, who tests: by the manifest, checked for leakage."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from bigbag.data.manifest import BagInfo
from bigbag.data.plan import derive_seed
from bigbag.data.stores import BagStore

_MAX_STRATA = 20


def split_bags(store: BagStore, *, val_fraction: float | None = None, seed: int = 0) -> dict[str, tuple[int, ...]]:
    """Indices of the bags of each split.

    Where the set has no split "val" and ``val_fraction`` is given, that share of "train" becomes "val", stratified by
    label; all bags of a patient go together.

    Args:
        store: the bags.
        val_fraction: share of the training bags (patients, where they are known) that validate, in (0, 1).
        seed: seed of the choice; it depends on names and labels, not on the order of the bags.

    Returns:
        Split -> indices, ascending. Bags without a split are under "unassigned".

    Raises:
        ValueError: no training bags, a patient in two splits, or too few bags to set some aside.
    """
    splits: dict[str, list[int]] = defaultdict(list)
    for index, info in enumerate(store.infos):
        splits["unassigned" if info.split is None else info.split].append(index)
    if not splits.get("train"):
        counts = ", ".join(f"{len(bags)} {name}" for name, bags in splits.items())
        raise ValueError(
            f"no bag is in the split 'train' ({counts}): give the source a split for every bag, or cross-validate"
        )
    if val_fraction is not None and not splits.get("val"):
        train, val = hold_out(store.infos, splits["train"], val_fraction, seed)
        splits["train"], splits["val"] = list(train), list(val)
    check_leakage(store.infos, splits)
    return {name: tuple(bags) for name, bags in splits.items()}


def hold_out(
    infos: Sequence[BagInfo], bags: Sequence[int], fraction: float, seed: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split ``bags`` into ``(rest, held out)``, stratified by label, patients kept together, reproducible.

    Raises:
        ValueError: a fraction outside (0, 1), or fewer than two patients (bags, where there are no patients).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction is {fraction}, expected a number between 0 and 1")
    groups: dict[str, list[int]] = defaultdict(list)
    for bag in bags:
        patient = infos[bag].patient
        # The marks keep a patient called like some bag apart from it.
        groups[f"bag {infos[bag].name}" if patient is None else f"patient {patient}"].append(bag)
    if len(groups) < 2:
        raise ValueError(
            f"val_fraction is {fraction}, but the training bags come from {len(groups)} patient: expected at least 2, "
            "since bags of one patient must not be divided"
        )
    generator = np.random.default_rng(derive_seed(seed, 0x5A11))
    names = sorted(groups)
    generator.shuffle(names)
    strata = {name: _stratum(infos, groups[name]) for name in names}
    if len(set(strata.values())) <= _MAX_STRATA:  # otherwise labels are measurements, not classes
        names.sort(key=strata.__getitem__)
    # Evenly spaced over classes one after the other: each class gives its share to within one group.
    num_out = min(max(1, round(fraction * len(names))), len(names) - 1)
    start = generator.random() * len(names)
    chosen = {names[int(start + i * len(names) / num_out) % len(names)] for i in range(num_out)}
    held_out = {bag for name in chosen for bag in groups[name]}
    return tuple(bag for bag in bags if bag not in held_out), tuple(bag for bag in bags if bag in held_out)


def _stratum(infos: Sequence[BagInfo], bags: Sequence[int]) -> str:
    """The largest label among the bags of one patient, as text."""
    return max(str(infos[bag].label) for bag in bags)


def check_leakage(infos: Sequence[BagInfo], splits: dict[str, list[int]]) -> None:
    """Refuse a patient with bags in two splits.

    Raises:
        ValueError: such patients, the first three by name.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for split, bags in splits.items():
        for bag in bags:
            patient = infos[bag].patient
            if patient is not None and split != "unassigned":
                found[patient].add(split)
    leaking = {patient: sorted(of) for patient, of in found.items() if len(of) > 1}
    if leaking:
        listed = "; ".join(f"{patient!r} in {' and '.join(of)}" for patient, of in sorted(leaking.items())[:3])
        raise ValueError(
            f"{len(leaking)} patients have bags in two splits ({listed}): results on one would leak from the other; "
            "put all bags of a patient into one split"
        )


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
