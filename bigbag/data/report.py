"""The validation report of a packing: every check, what it found, and what the set looks like.

``validation.json`` beside the manifest has all of it; the terminal shows a table. Findings are errors, which stop the
packing once every bag has been looked at, warnings, which do not, and notes, which are often as they should be.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bigbag.data.manifest import BagInfo
from bigbag.files import write_json

REPORT_NAME = "validation.json"

CHECKS = {
    "readable": "files can be read",
    "type": "arrays have the right shape and type",
    "lengths": "features, coords and instance labels have the same length",
    "finite": "no NaN, no infinity, no overflow",
    "features": "features have the same width and type in all bags",
    "empty": "bags have instances",
    "coords": "all bags have coords, or none has",
    "duplicate_coords": "no two instances are at one place",
    "stride": "the stride is the distance of adjacent patches",
    "off_lattice": "coords are on one lattice",
    "geometry": "stride, magnification and extractor are the same in all bags",
    "graph": "the graph joins instances",
    "names": "names are plain, without extension",
    "unique_names": "names are unique",
    "labels": "bags have finite labels",
    "instance_labels": "instance labels agree with the label of the bag",
    "missing": "every label has a bag, every bag a label",
    "patients": "a patient has one bag",
    "leakage": "no patient and no bag is in two splits",
}
Severity = Literal["error", "warning", "note"]

_ALIKE = ("target_magnification", "magnification", "mag", "mpp", "patch_size", "patch_level", "overlap", "encoder",
          "extractor", "tile_size_um", "tile_size_px", "tile_level", "unit", "precision")  # fmt: skip
_MAX_LABELS = 20
_SHOWN = 5
_SHOWN_ERRORS = 20
_BAR = 40


@dataclass(frozen=True)
class Finding:
    """One thing that a check found: the check, how bad it is, the bag ("" for the whole set), and the message."""

    check: str
    severity: Severity
    bag: str
    message: str


def alike(attributes: Mapping[str, Any]) -> dict[str, str]:
    """Those attributes of a bag that should be the same in all bags."""
    return {name: str(attributes[name]) for name in _ALIKE if name in attributes}


def geometry_findings(bags: Sequence[BagInfo], facts: Sequence[Mapping[str, Any]]) -> Iterable[Finding]:
    """Coordinates that some bags lack, and stride and attributes that are not the same in all bags.

    Strides at level 0 are compared per level-0 magnification where that is known: slides scanned at 20x and 40x have
    different ones when they are patched at one magnification.
    """
    without = [bag.name for bag, fact in zip(bags, facts) if not fact["coords"]]
    if 0 < len(without) < len(bags):
        text = f"{len(without)} of {len(bags)} bags have no coords ({_some(without)}), so that models on graphs, and "
        yield Finding("coords", "warning", "", text + "others that need them, refuse the set")
    values: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for bag, fact in zip(bags, facts):
        for name, value in fact["attributes"].items():
            values[name][value].append(bag.name)
        step = bag.stride if bag.stride is not None else fact["step"]
        if step is not None:
            base = fact["level0_magnification"]
            values["stride" if base is None else "stride / level-0 magnification"][
                f"{step if base is None else step / base:.3g}"
            ].append(bag.name)
    for name, found in values.items():
        if len(found) > 1:
            listed = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
            parts = [f"{value} in {len(names)} bags ({_some(names)})" for value, names in listed]
            yield Finding("geometry", "warning", "", f"{name} is {_some(parts, '; ')}")


def patient_findings(bags: Sequence[BagInfo]) -> Iterable[Finding]:
    """Patients with several bags, counted."""
    counts = Counter(bag.patient for bag in bags if bag.patient is not None)
    several = {patient: count for patient, count in counts.items() if count > 1}
    if several:
        most = max(several, key=lambda patient: several[patient])
        message = f"{len(several)} of {len(counts)} patients have several bags, at most {several[most]} ({most!r})"
        yield Finding("patients", "note", "", message)


def write_report(
    folder: Path,
    bags: Sequence[BagInfo],
    facts: Sequence[Mapping[str, Any]],
    findings: Sequence[Finding],
    left_out: Sequence[Mapping[str, str]],
) -> str:
    """Write ``validation.json`` and return the table for the terminal.

    Args:
        folder: folder of the set.
        bags: the bags that are packed, or were before an error stopped the packing.
        facts: for each of them what is not in the manifest.
        findings: all findings.
        left_out: what was left out.
    """
    counts = Counter((finding.check, finding.severity) for finding in findings)
    sizes = [bag.num_instances for bag in bags]
    content: dict[str, Any] = {
        "format": "bigbag-validation",
        "version": 1,
        "valid": not any(finding.severity == "error" for finding in findings),
        "num_bags": len(bags),
        "num_instances": sum(sizes),
        "num_left_out": len(left_out),
        "checks": {
            name: {"checks": text, **{f"{kind}s": counts[name, kind] for kind in ("error", "warning", "note")}}
            for name, text in CHECKS.items()
        },
    }
    for kind in ("error", "warning", "note"):
        content[f"{kind}s"] = [
            {key: value for key, value in asdict(finding).items() if key != "severity"}
            for finding in findings
            if finding.severity == kind
        ]
    content["left_out"] = [dict(item) for item in left_out]
    content["labels"] = _labels(bags)
    content["patients"] = len({bag.patient for bag in bags if bag.patient is not None})
    content["strides"] = _counted(bag.stride for bag in bags if bag.stride is not None)
    content["attributes"] = {
        name: _counted(fact["attributes"][name] for fact in facts if name in fact["attributes"])
        for name in _ALIKE
        if any(name in fact["attributes"] for fact in facts)
    }
    content["bag_sizes"] = _bag_sizes(sizes)
    write_json(folder / REPORT_NAME, content)
    return _text(content)


def error_text(findings: Sequence[Finding], folder: Path) -> str:
    """All errors in one message; of more than 20 the first 20, and where the others are."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if len(errors) == 1:
        return errors[0].message
    lines = [f"{len(errors)} errors:", *(f"  {finding.message}" for finding in errors[:_SHOWN_ERRORS])]
    if len(errors) > _SHOWN_ERRORS:
        lines.append(f"  ... and {len(errors) - _SHOWN_ERRORS} more, all of them in {folder / REPORT_NAME}")
    return "\n".join(lines)


def _labels(bags: Sequence[BagInfo]) -> dict[str, Any]:
    """For each split the number of bags of each label; smallest, median and largest of labels that are measurements."""
    by_split: dict[str, list[Any]] = defaultdict(list)
    for bag in bags:
        by_split[bag.split or "without split"].append(bag.label)
    distinct = {str(bag.label) for bag in bags}
    if len(distinct) <= _MAX_LABELS:
        return {split: _counted(labels) for split, labels in by_split.items()}
    described: dict[str, Any] = {}
    for split, labels in by_split.items():
        numbers = [label for label in labels if isinstance(label, int | float)]
        described[split] = {"bags": len(labels)}
        if numbers:
            described[split] |= {"min": min(numbers), "median": float(np.median(numbers)), "max": max(numbers)}
    return described


def _bag_sizes(sizes: Sequence[int]) -> dict[str, Any]:
    if not sizes:
        return {"histogram": []}
    largest = max(sizes)
    edges = [0]
    while edges[-1] <= largest:  # 1, 2, 5, 10, 20, 50, ...
        exponent, place = divmod(len(edges) - 1, 3)
        edges.append((1, 2, 5)[place] * 10**exponent)
    counts, _ = np.histogram(sizes, edges)
    bins = [{"from": a, "below": b, "bags": int(n)} for a, b, n in zip(edges, edges[1:], counts)]
    while bins and not bins[0]["bags"]:
        bins.pop(0)
    return {
        "min": min(sizes), "median": float(np.median(sizes)), "mean": float(np.mean(sizes)), "max": largest,
        "histogram": bins,
    }  # fmt: skip


def _counted(values: Iterable[Any]) -> dict[str, int]:
    return dict(sorted(Counter(map(str, values)).items()))


def _text(content: dict[str, Any]) -> str:
    """The report as a table of checks, the findings, the labels and the sizes."""
    lines = [f"validation: {content['num_bags']} bags, {content['num_instances']} instances"]
    lines.append(f"  {'check':<64}errors  warnings")
    for check in content["checks"].values():
        shown = [f"{check[kind] or '-':>6}" for kind in ("errors", "warnings")]
        lines.append(f"  {check['checks']:<64}{shown[0]}  {shown[1]:>8}")
    for kind in ("errors", "warnings", "notes"):
        found: dict[str, list[str]] = defaultdict(list)
        for item in content[kind]:
            found[item["check"]].append(item["message"])
        for messages in found.values():
            lines += [f"  {kind[:-1]}: {message}" for message in messages[:_SHOWN]]
            if len(messages) > _SHOWN:
                lines.append(f"  {kind[:-1]}: ... and {len(messages) - _SHOWN} more like this in {REPORT_NAME}")
    lines += [f"  left out: {item['name']}: {item['reason']}" for item in content["left_out"][:_SHOWN]]
    if len(content["left_out"]) > _SHOWN:
        lines.append(f"  left out: {len(content['left_out'])} in all, named in {REPORT_NAME} and in the manifest")
    for split, labels in content["labels"].items():
        lines.append(f"  labels of {split}: " + ", ".join(f"{label}: {count}" for label, count in labels.items()))
    most = max((one["bags"] for one in content["bag_sizes"]["histogram"]), default=0)
    for one in content["bag_sizes"]["histogram"]:
        bar = "#" * round(_BAR * one["bags"] / most)
        lines.append(f"  {one['from']:>9} to {one['below'] - 1:>9} instances {one['bags']:>7} {bar}")
    return "\n".join(lines)


def _some(items: Sequence[str], joint: str = ", ") -> str:
    return joint.join(items[:3]) + (f"{joint}..." if len(items) > 3 else "")
