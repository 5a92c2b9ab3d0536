"""Rules that part bags: groups stay whole, labels are balanced, a seed decides, the order of the bags does not."""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from bigbag.bags import Label
from bigbag.data.names import bare_name
from bigbag.data.plan import derive_seed
from bigbag.data.table import read_table

_MAX_CLASSES = 20
_RESTARTS = 20
_TCGA = re.compile(r"TCGA-([A-Z0-9]{2})-", re.IGNORECASE)


class Splittable(Protocol):
    """What is known of a bag when it is given a split: a ``BagInfo`` or a ``SourceEntry``."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str | None: ...
    @property
    def label(self) -> Label | None: ...
    @property
    def patient(self) -> str | None: ...


def groups_of(bags: Sequence[Splittable], sites: str | None) -> list[str]:
    """For each bag the name of the group that must stay whole: its site, else its patient, else itself.

    Args:
        bags: the bags.
        sites: None, "tcga", or a table; see :class:`bigbag.config.SplitsConfig`.

    Raises:
        ValueError: a bag without a site, or a patient with two.
    """
    # The marks keep a patient called like some bag apart from it.
    if sites is None:
        return [f"bag {bag.name}" if bag.patient is None else f"patient {bag.patient}" for bag in bags]
    table = None if sites == "tcga" else _read_sites(Path(sites))
    groups = []
    site_of: dict[str, str] = {}
    for bag in bags:
        names = [bag.name] if bag.patient is None else [bag.name, bag.patient]
        site = _site(names, table)
        if site is None:
            wanted = "names like TCGA-XX-..." if table is None else f"a line in {sites}"
            raise ValueError(f"bag {bag.name!r} has no site: with sites {sites!r}, expected {wanted} for every bag")
        if bag.patient is not None and site_of.setdefault(bag.patient, site) != site:
            raise ValueError(f"patient {bag.patient!r} is at the sites {site_of[bag.patient]!r} and {site!r}")
        groups.append(f"site {site}")
    return groups


def _site(names: Sequence[str], table: dict[str, str] | None) -> str | None:
    if table is None:
        found = [match[1].upper() for name in names if (match := _TCGA.match(bare_name(name)))]
    else:
        found = [table[key] for name in names for key in (name, bare_name(name)) if key in table]
    return found[0] if found else None


def _read_sites(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; sites is 'tcga' or a CSV with a column 'site'")
    table, sites = read_table(path), dict[str, str]()
    site = next((name for name in table.columns if name.lower() == "site"), None)
    if site is None:
        raise ValueError(
            f"{path}: columns {', '.join(table.columns)}, expected 'site' and a column of bags or patients"
        )
    for row in table.rows:
        for name, value in row.items():
            if name != site and value and row[site]:
                sites.setdefault(value, row[site])
    return sites


def classes_of(labels: Sequence[Label | None]) -> list[str] | None:
    """The class of each label, as text; None where labels are measurements, not classes.

    Of a label of several numbers those count that take at most 20 values: the event of (time, event), every one of
    several labels.
    """
    rows = [label if isinstance(label, (list, tuple)) else [label] for label in labels]
    width = max(map(len, rows), default=0)
    columns = [[row[i] if i < len(row) else None for row in rows] for i in range(width)]
    discrete = [column for column in columns if len(set(column)) <= _MAX_CLASSES]
    classes = [", ".join(map(str, values)) for values in zip(*discrete)]
    return classes if classes and len(set(classes)) <= _MAX_CLASSES else None


def hold_out(
    bags: Sequence[int], groups: Sequence[str], classes: Sequence[str] | None, fraction: float, seed: int, what: str
) -> tuple[list[int], list[int]]:
    """Split ``bags`` into (rest, held out): a share ``fraction`` of the groups, of each class to within one group.

    Args:
        bags: indices of bags.
        groups: the group of every bag of the set.
        classes: the class of every bag of the set; None: not balanced. A group counts as its largest class.
        fraction: share of the groups held out, in (0, 1).
        seed: seed of the choice.
        what: name of the setting, for messages.

    Raises:
        ValueError: fewer than two groups.
    """
    members = _members(bags, groups)
    if len(members) < 2:
        raise ValueError(
            f"{what} is {fraction}, but the bags to choose from come from {len(members)} {_kind(members)}: expected "
            f"at least 2, since bags of one {_kind(members)} must not be divided"
        )
    generator = np.random.default_rng(derive_seed(seed, 0x5A11))
    names = sorted(members)
    generator.shuffle(names)
    if classes is not None:
        names.sort(key=lambda name: max(classes[bag] for bag in members[name]))
    # Evenly spaced over classes one after the other: each class gives its share to within one group.
    num_out = min(max(1, round(fraction * len(names))), len(names) - 1)
    start = generator.random() * len(names)
    chosen = {names[int(start + i * len(names) / num_out) % len(names)] for i in range(num_out)}
    held_out = {bag for name in chosen for bag in members[name]}
    return [bag for bag in bags if bag not in held_out], sorted(held_out)


def folds_of(
    bags: Sequence[int], groups: Sequence[str], classes: Sequence[str] | None, num_folds: int, seed: int, what: str
) -> list[list[int]]:
    """Part ``bags`` into folds by scikit-learn's ``StratifiedGroupKFold``.

    Args:
        bags: indices of bags.
        groups: the group of every bag of the set; a group lies in one fold.
        classes: the class of every bag of the set; None: only the sizes of the folds are balanced.
        num_folds: number of folds.
        seed: seed of the choice.
        what: name of the setting, for messages.

    Raises:
        ValueError: fewer groups than folds.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    check_enough(bags, groups, num_folds, what)
    ordered = sorted(bags, key=lambda bag: groups[bag])
    of_group = [groups[bag] for bag in ordered]
    random_state = derive_seed(seed, 0xF01D) % 2**32
    if classes is None:
        splitter = GroupKFold(num_folds, shuffle=True, random_state=random_state)
        parts = splitter.split(ordered, groups=of_group)
    else:
        counts = Counter(classes[bag] for bag in bags)
        of_class = [classes[bag] for bag in ordered]
        if max(counts.values()) < num_folds:
            raise ValueError(
                f"{what} is {num_folds}, but no class has so many bags ({_listed(counts)}): ask for fewer, or do not "
                "balance classes (stratify: false)"
            )
        splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=random_state)
        parts = splitter.split(ordered, of_class, of_group)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # make_splits names what a split lacks
        return _checked([sorted(ordered[i] for i in test) for _, test in parts], what)


def site_folds(
    bags: Sequence[int],
    groups: Sequence[str],
    classes: Sequence[str] | None,
    shares: Sequence[float],
    seed: int,
    what: str,
) -> list[list[int]]:
    r"""Part ``bags`` into parts of given shares, sites whole: preserved-site cross-validation.

    With :math:`n_{kc}` bags of class c in part k, of :math:`N_c` in all, it looks for the assignment of sites to parts
    that makes

    .. math:: \sum_k \sum_c (n_{kc} / N_c - s_k)^2

    small: every part shall hold its share :math:`s_k` of every class. Howard et al. ("The impact of site-specific
    digital histology signatures on deep learning model accuracy and bias", Nature Communications 12, 2021) state the
    same quadratic program, with :math:`s_k = 1/K` and without the weights :math:`1 / N_c^2`, and give it to a solver.
    Here 20 times sites in random order go one by one to where they cost least; then single sites move, and pairs trade
    places, for as long as that helps; the best result counts. It is a local optimum, not proven to be the least.

    Args:
        bags: indices of bags.
        groups: the site of every bag of the set.
        classes: the class of every bag of the set; None: only sizes are balanced.
        shares: share of each part.
        seed: seed of the search.
        what: name of the setting, for messages.

    Raises:
        ValueError: fewer sites than parts.
    """
    check_enough(bags, groups, len(shares), what)
    members = _members(bags, groups)
    names = sorted(members)
    known = sorted({"" if classes is None else classes[bag] for bag in bags})
    counts = np.zeros((len(names), len(known)))
    for i, name in enumerate(names):
        for bag in members[name]:
            counts[i, known.index("" if classes is None else classes[bag])] += 1
    counts /= counts.sum(0)
    generator = np.random.default_rng(derive_seed(seed, 0x517E))
    found = [_search(counts, np.asarray(shares, float), generator) for _ in range(_RESTARTS)]
    _, part = min(found, key=lambda result: result[0])
    return _checked(
        [sorted(b for i in np.flatnonzero(part == k) for b in members[names[i]]) for k in range(len(shares))], what
    )


def _search(counts: np.ndarray, shares: np.ndarray, generator: np.random.Generator) -> tuple[float, np.ndarray]:
    """A local optimum of :func:`site_folds`: its cost, and the part of each of the ``(G, C)`` groups."""
    num_groups, num_parts = len(counts), len(shares)
    excess = np.repeat(-shares[:, None], counts.shape[1], 1)  # n_kc / N_c - s_k so far
    part = np.full(num_groups, -1)
    order = generator.permutation(num_groups)
    for place, group in enumerate(order):
        costs = ((excess + counts[group]) ** 2 - excess**2).sum(1)
        empty = np.bincount(part[part >= 0], minlength=num_parts) == 0
        if num_groups - place <= empty.sum():  # the last groups go to parts that would stay empty
            costs[~empty] = np.inf
        part[group] = costs.argmin()
        excess[part[group]] += counts[group]
    improved = True
    while improved:
        improved = False
        for group in generator.permutation(num_groups):
            improved |= _move(group, part, excess, counts) or _trade(group, part, excess, counts)
    return float((excess**2).sum()), part


_GAIN = 1e-12


def _move(group: int, part: np.ndarray, excess: np.ndarray, counts: np.ndarray) -> bool:
    """Put one group where it costs least; never the last one of its part."""
    own, size = part[group], counts[group]
    if (part == own).sum() == 1:
        return False
    without = excess[own] - size
    costs = ((excess + size) ** 2 - excess**2).sum(1) + (without**2 - excess[own] ** 2).sum()
    costs[own] = 0
    best = int(costs.argmin())
    if costs[best] > -_GAIN:
        return False
    excess[own] -= size
    excess[best] += size
    part[group] = best
    return True


def _trade(group: int, part: np.ndarray, excess: np.ndarray, counts: np.ndarray) -> bool:
    """Let one group and one of another part change places, where that costs less."""
    own = part[group]
    change = counts - counts[group]  # what ``own`` gains, and the part of the other loses
    costs = ((excess[own] + change) ** 2 - excess[own] ** 2).sum(1)
    costs += ((excess[part] - change) ** 2 - excess[part] ** 2).sum(1)
    costs[part == own] = 0
    other = int(costs.argmin())
    if costs[other] > -_GAIN:
        return False
    excess[own] += change[other]
    excess[part[other]] -= change[other]
    part[group], part[other] = part[other], own
    return True


def check_enough(bags: Sequence[int], groups: Sequence[str], num_parts: int, what: str) -> None:
    """Refuse more parts than groups.

    Raises:
        ValueError: with both numbers.
    """
    found = {groups[bag] for bag in bags}
    if len(found) < num_parts:
        raise ValueError(
            f"{what} asks for {num_parts} parts, but the {len(bags)} bags to part come from {len(found)} "
            f"{_kind(found)}s, which must not be divided: ask for at most {len(found)}"
        )


def _checked(parts: list[list[int]], what: str) -> list[list[int]]:
    if not all(parts):
        sizes = ", ".join(str(len(part)) for part in parts)
        raise ValueError(f"{what}: the bags cannot be parted, one part stays empty (bags: {sizes}); ask for fewer")
    return parts


def _members(bags: Sequence[int], groups: Sequence[str]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = defaultdict(list)
    for bag in bags:
        members[groups[bag]].append(bag)
    return members


def _kind(groups: dict[str, list[int]] | set[str]) -> str:
    kinds = {group.partition(" ")[0] for group in groups}
    return "site" if kinds == {"site"} else "bag" if kinds == {"bag"} else "patient"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
