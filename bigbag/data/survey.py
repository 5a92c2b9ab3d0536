"""What the coordinates of a bag say of themselves: places that occur twice, and the step they stand at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bigbag.bags import Bag

_MIN_GAPS = 20
_COMMON_SHARE = 0.3
_SAME = 0.02


@dataclass(frozen=True)
class CoordSurvey:
    """What one sort of the coordinates shows.

    Attributes:
        num_duplicates: instances whose place another one has already taken.
        step: the gap most frequent between neighbours along the second axis, in the unit of the coordinates; None where
            there are fewer than 20 gaps, or none makes up 30 % of them, as in coordinates on no lattice.
    """

    num_duplicates: int
    step: float | None


def survey_coords(coords: np.ndarray) -> CoordSurvey:
    """Sort ``(N, c)`` coordinates once, O(N log N)."""
    if not len(coords):
        return CoordSurvey(0, None)
    if coords.shape[1] != 2:
        return CoordSurvey(len(coords) - len(np.unique(coords, axis=0)), None)
    # Two float64 sort as one complex number, ten times faster than rows.
    points = np.sort(np.ascontiguousarray(coords, np.float64).view(np.complex128)[:, 0])
    gaps = np.diff(points)
    gaps = gaps.imag[gaps.real == 0]
    return CoordSurvey(int((gaps == 0).sum()), _most_frequent(gaps[gaps > 0]))


def coord_remarks(bag: Bag, survey: CoordSurvey) -> Iterator[tuple[str, str]]:
    """Name of the check and text of whatever is odd about the coordinates of ``bag``."""
    if survey.num_duplicates:
        yield (
            "duplicate_coords",
            f"{survey.num_duplicates} of {bag.num_instances} instances are at the place of another one",
        )
    if bag.stride is None or bag.positions is None:
        return
    if survey.step is not None and abs(survey.step / bag.stride - 1) > _SAME + 1 / bag.stride:
        yield (
            "stride",
            f"the source says stride {bag.stride:g}, but adjacent patches are {survey.step:g} apart: set "
            "data.graph.stride, or repair the attributes of the file",
        )
        return
    off = _num_off_lattice(bag.positions, bag.stride)
    if off:
        yield (
            "off_lattice",
            f"{off} of {bag.num_instances} instances are off the lattice of stride {bag.stride:g}",
        )


def _most_frequent(gaps: np.ndarray) -> float | None:
    if len(gaps) < _MIN_GAPS:
        return None
    values, counts = np.unique(gaps, return_counts=True)
    common = int(counts.argmax())
    # Cut to integers, a stride of 287.5 is 287 here and 288 there: those count together, by their mean. Not so the
    # steps 1 and 2 of coordinates that are counted in patches.
    near = np.abs(values - values[common]) <= (1 if _SAME * values[common] >= 1 else 0)
    if counts[near].sum() < _COMMON_SHARE * len(gaps):
        return None
    return float(np.average(values[near], weights=counts[near]))


def _num_off_lattice(positions: np.ndarray, stride: float) -> int:
    """Instances off the lattice that most of three instances, taken as its origin, stand on."""
    tolerance = min(0.25, _SAME + 1 / stride)
    found = []
    for origin in {0, len(positions) // 2, len(positions) - 1}:
        steps = (positions.astype(np.float64) - positions[origin]) / stride
        found.append(int((np.abs(steps - np.rint(steps)) > tolerance).any(1).sum()))
        if not found[-1]:
            break
    return min(found)
