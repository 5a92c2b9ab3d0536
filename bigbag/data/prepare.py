"""What happens to a bag of a source before a model sees it, whether it is packed or predicted straight away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from bigbag.bags import Bag, LengthError
from bigbag.data.graph import with_graph
from bigbag.data.lattice import on_lattice
from bigbag.data.sources.base import Source, SourceEntry
from bigbag.data.survey import coord_remarks, survey_coords
from bigbag.data.validate import BagError, check_bag, where_of


class Prepared(NamedTuple):
    """A bag as a shard stores it.

    Attributes:
        bag: features in the precision asked for, ``coords`` that count patches, and its graph.
        remarks: what is odd about it: name of the check, and text.
        step: the most frequent distance of neighbours in the source's coordinates.
    """

    bag: Bag
    remarks: tuple[tuple[str, str], ...]
    step: float | None


def load(source: Source, entry: SourceEntry) -> Bag:
    """Read one bag of a source.

    Raises:
        BagError: it can't be read; bag and file are named.
    """
    try:
        bag = source.load(entry)
    except (ValueError, OSError) as error:
        text = str(error)
        named = repr(entry.name) in text or (entry.path and entry.path in text)
        where = "" if named else f"{where_of(entry)}: "
        raise BagError("lengths" if isinstance(error, LengthError) else "readable", f"{where}{text}") from error
    return replace(bag, y=entry.label, key=entry.name)


def prepare(bag: Bag, entry: SourceEntry, dtype: str, graph: Mapping[str, Any] | None) -> Prepared:
    """Check a bag and make it what a shard stores.

    Args:
        bag: as :func:`load` gives it.
        entry: its entry.
        dtype: precision of the features.
        graph: the fields of :class:`bigbag.config.GraphConfig`; None builds none.

    Raises:
        BagError: the first thing that is wrong with it.
    """
    where = where_of(entry)
    if bag.num_instances == 0:
        raise BagError(
            "empty",
            f"{where}: has no instances, expected at least 1; repair it, or leave empty bags out with "
            'empty="leave_out" (data.empty_bags: leave_out), which lists them',
        )
    stored = check_bag(bag, entry, dtype)
    bag = _checked("type", where, lambda: on_lattice(bag, None if graph is None else graph["stride"]))
    remarks: list[tuple[str, str]] = []
    step = None
    if bag.coords is not None:
        survey = survey_coords(bag.coords if bag.positions is None else bag.positions)
        step = survey.step
        remarks += [(check, f"{where}: {message}") for check, message in coord_remarks(bag, survey)]
    if graph is not None:
        bag, warning = _checked("graph", "", lambda: with_graph(bag, graph, where))
        remarks += [("graph", warning)] if warning else []
    return Prepared(replace(bag, x=stored.x), tuple(remarks), step)


def _checked(check: str, where: str, step: Callable[[], Any]) -> Any:
    """The result of ``step``, whose ``ValueError`` is what ``check`` found."""
    try:
        return step()
    except ValueError as error:
        raise BagError(check, f"{where}: {error}" if where else str(error)) from error
