"""Packing: every bag of a source, checked and written once to shards and a manifest."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bigbag.data.encode import Encoded, encode_all
from bigbag.data.manifest import MANIFEST_NAME, BagInfo, Manifest, ShardInfo, count_splits, make_keys
from bigbag.data.progress import PROGRESS_NAME, Progress, entries_digest, fingerprint, finished_set, resume
from bigbag.data.report import Finding, error_text, geometry_findings, patient_findings, write_report
from bigbag.data.shards import ShardWriter
from bigbag.data.sources.base import Source, SourceEntry
from bigbag.data.validate import entry_errors, plain_label, set_findings, where_of
from bigbag.files import alone_in, write_json

if TYPE_CHECKING:
    from bigbag.config import GraphConfig

logger = logging.getLogger(__name__)

_SPLIT_ORDER = ("train", "val", "test")
_MEMBER_OVERHEAD = 1024  # header and padding of one member in a tar


def pack(
    source: Source,
    out: str | Path,
    *,
    dtype: Literal["float16", "float32", "float64", "uint8"] = "float16",
    shard_bytes: int = 256 * 2**20,
    workers: int = 1,
    progress: bool = True,
    empty: Literal["error", "leave_out"] = "error",
    left_out_ok: bool = False,
    unlabelled: Literal["error", "keep"] = "error",
    graph: GraphConfig | None = None,
    invalid: Literal["error", "leave_out"] = "error",
    leakage: Literal["error", "keep"] = "error",
    overwrite: bool = False,
) -> Manifest:
    """Write the bags of ``source`` to shards in the folder ``out``.

    A packing that was interrupted goes on after the last finished shard when it is run again, and then gives the same
    bytes as one that was not. A shard holds bags of one split.

    Every bag is checked as it passes; ``validation.json`` has what was found (:mod:`bigbag.data.report`). After an
    error nothing more is written, but all other bags are looked at, so that all errors come in one message.

    Args:
        source: where the bags come from.
        out: folder for shards and manifest; made if absent.
        dtype: precision the features are stored in.
        shard_bytes: bytes after which a new shard is started; a larger bag is a shard of its own.
        workers: threads that load, check and encode bags; each holds one bag in memory.
        progress: show a progress bar.
        empty: what to do with a bag of no instances: stop, or leave it out and list it in the manifest.
        left_out_ok: go on where the source itself has to leave bags out (``source.left_out``); they are listed in the
            manifest.
        unlabelled: "keep" packs bags without a label, which can be predicted but not trained on.
        graph: build a graph over the instances of each bag and store it; see :mod:`bigbag.data.graph`.
        invalid: what to do with a bag that has an error: stop, or leave it out and list it in the manifest.
        leakage: what to do where a patient, or a slide, is in two splits: stop, or keep the splits as they are, such as
            the official ones of a data set. It is then a warning, here and whenever the set is trained on.
        overwrite: replace a finished set of another source or other options.

    Returns:
        The manifest of the finished set.

    Raises:
        ValueError: an option that is wrong, or all that is wrong with the bags, with the remedies.
        OSError: the disk is full or fails; finished shards are kept.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder for the shards, or no such path yet")
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"dtype": dtype, "shard_bytes": shard_bytes, "empty": empty, "invalid": invalid}
    options |= {"left_out_ok": left_out_ok, "unlabelled": unlabelled}
    if leakage != "error":
        options["leakage"] = leakage
    if graph is not None:
        options["graph"] = graph.model_dump(mode="json")
    _check_options(options, workers)
    entries, left_out, findings = _survey_entries(source, options)
    failed = any(finding.severity == "error" for finding in findings)
    with alone_in(folder) as alone:
        if not alone:
            raise ValueError(f"{folder}: another packing is writing to this folder; wait for it")
        if not (overwrite or failed):
            done = finished_set(folder, source, options, entries)
            if done is not None:
                if (folder / PROGRESS_NAME).exists():  # the very last step was interrupted
                    (folder / PROGRESS_NAME).unlink()
                return done
        if failed:
            state = Progress("", left_out=left_out)
        else:
            state = resume(folder, fingerprint(source, options, entries), left_out, overwrite)
        seen = _Seen(state, options)
        _write_shards(folder, source, entries, state, seen, options, workers, progress, look_only=failed)
        findings += [*seen.findings, *patient_findings(seen.bags), *geometry_findings(seen.bags, seen.facts)]
        if not (failed and (folder / MANIFEST_NAME).exists()):  # a finished set keeps its own report
            logger.info("%s", write_report(folder, seen.bags, seen.facts, findings, state.left_out))
        if failed or seen.num_errors:
            raise ValueError(error_text(findings, folder))
        if not state.bags:
            raise ValueError("pack: no bag is left to pack: all of them were left out")
        manifest = _manifest(source, options, entries, state, findings)
        manifest.write(folder)
        (folder / PROGRESS_NAME).unlink()
    return manifest


def _check_options(options: dict[str, Any], workers: int) -> None:
    choices = {
        "dtype": ("float16", "float32", "float64", "uint8"),
        "empty": ("error", "leave_out"),
        "invalid": ("error", "leave_out"),
        "unlabelled": ("error", "keep"),
        "leakage": ("error", "keep"),
    }
    for name, allowed in choices.items():
        if options.get(name, "error") not in allowed:
            raise ValueError(f"pack: {name} is {options[name]!r}, expected one of {', '.join(allowed)}")
    for name, value in (("shard_bytes", options["shard_bytes"]), ("workers", workers)):
        if value < 1:
            raise ValueError(f"pack: {name} is {value}, expected at least 1")


def _survey_entries(
    source: Source, options: dict[str, Any]
) -> tuple[list[SourceEntry], list[dict[str, str]], list[Finding]]:
    """Entries with plain labels, split by split, so that a shard holds one split; those left out; what was found."""
    entries = [replace(entry, label=plain_label(entry.label)) for entry in source.entries()]
    if not entries:
        raise ValueError("the source has no bags: check its folder and its arguments")
    left_out = [dict(item) for item in getattr(source, "left_out", ())]
    found: list[Finding] = []
    if left_out and not options["left_out_ok"] and options["invalid"] == "error":
        found.append(Finding("missing", "error", "", _missing_text(left_out)))
    elif left_out:
        found.append(Finding("missing", "warning", "", f"{len(left_out)} bags are missing and left out"))
    wrong = list(entry_errors(entries, options["unlabelled"]))
    if options["invalid"] == "leave_out":
        left_out += [{"name": entry.name, "reason": finding.message} for entry, finding in wrong]
        dropped = {id(entry) for entry, _ in wrong}
        entries = [entry for entry in entries if id(entry) not in dropped]
    else:
        found += [finding for _, finding in wrong]
        labels_gone = {id(entry) for entry, finding in wrong if finding.check == "labels"}
        entries = [replace(entry, label=None) if id(entry) in labels_gone else entry for entry in entries]
    found += set_findings(entries, "warning" if options.get("leakage") == "keep" else "error")
    names = {split: i for i, split in enumerate(dict.fromkeys([*_SPLIT_ORDER, *(e.split for e in entries)]))}
    return sorted(entries, key=lambda entry: names[entry.split]), left_out, found


def _missing_text(left_out: Sequence[dict[str, str]]) -> str:
    listed = "; ".join(f"{item['name']}: {item['reason']}" for item in left_out[:5])
    return (
        f"{len(left_out)} bags cannot be packed ({listed}{'; ...' if len(left_out) > 5 else ''}): repair the "
        "source, or pack without them with left_out_ok=True (data.missing_bags: leave_out), which lists them"
    )


def _write_shards(
    folder: Path,
    source: Source,
    entries: Sequence[SourceEntry],
    state: Progress,
    seen: _Seen,
    options: dict[str, Any],
    workers: int,
    progress: bool,
    look_only: bool,
) -> None:
    """Write the bags that are not written yet, until one has an error; the others are only looked at."""
    from tqdm import tqdm

    keys = [""] * len(entries) if look_only else make_keys([entry.name for entry in entries])
    todo = list(zip(entries, keys))[state.num_entries :]
    bar = tqdm(
        total=len(entries), initial=state.num_entries, desc="pack", unit="bag", disable=None if progress else True
    )
    shard: _OpenShard | None = None
    try:
        with bar:
            for entry, loaded in encode_all(source, todo, options, workers):
                bag = seen.add(seen.compared(loaded, entry))
                bar.update()
                if seen.num_errors or look_only:
                    if shard is not None:
                        shard.discard()
                        shard = None
                    continue
                if shard is not None and bag.members is not None and not shard.fits(bag, options["shard_bytes"]):
                    shard.finish(folder, state)
                    shard = None
                if shard is None:
                    shard = _OpenShard(folder, state, bag.info.split)
                shard.add(bag)
            if shard is not None:
                shard.finish(folder, state)
                shard = None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"disk full while packing to {folder}: {len(state.shards)} shards ({state.num_entries} of "
                f"{len(entries)} bags) are finished and kept; free space and run the same command again",
            ) from None
        raise
    finally:
        if shard is not None:
            shard.discard()


def _may_leave_out(problem: Finding, options: dict[str, Any]) -> bool:
    return options["invalid"] == "leave_out" or (problem.check == "empty" and options["empty"] == "leave_out")


class _Seen:
    """All bags so far, those of an interrupted packing among them, and what was found."""

    def __init__(self, state: Progress, options: dict[str, Any]) -> None:
        self.state, self.options = state, options
        self.bags, self.facts, self.findings = list(state.bags), list(state.facts), list(state.findings)
        self.num_errors = 0
        self._with_features = {fact["x_sha256"]: bag for bag, fact in zip(state.bags, state.facts)}

    def add(self, bag: Encoded) -> Encoded:
        """Take a bag into the report."""
        self.findings += bag.findings
        if bag.problem is None:
            self.bags.append(bag.info)
            self.facts.append(bag.fact)
        elif not _may_leave_out(bag.problem, self.options):
            self.num_errors += 1
            self.findings.append(bag.problem)
            logger.error("pack: %s", bag.problem.message)
        return bag

    def compared(self, bag: Encoded, entry: SourceEntry) -> Encoded:
        """The bag, refused where its features are not like those before it, or the same as some."""
        if bag.members is None:
            return bag
        if not self.state.features:
            self.state.features = [*bag.source_features, entry.name]
        shape, dtype, first = self.state.features
        if [shape, dtype] != bag.source_features:
            return bag.refused(
                "features",
                f"{where_of(entry)}: x has instances of shape {tuple(bag.source_features[0])} "
                f"{bag.source_features[1]}, expected {tuple(shape)} {dtype} as in bag {first!r}: extract all bags with "
                "the same extractor and precision",
            )
        same = self._with_features.setdefault(bag.fact["x_sha256"], bag.info)
        if same is bag.info:
            return bag
        text = f"{where_of(entry)}: has the same features as bag {same.name!r}"
        if None not in (same.split, entry.split) and same.split != entry.split:
            text = f"{text}, which is in {same.split}, this one in {entry.split}"
            if self.options.get("leakage") != "keep":
                return bag.refused("leakage", f"{text}: drop one of them, or keep both (--leakage keep)")
        return replace(bag, findings=(*bag.findings, Finding("leakage", "warning", entry.name, text)))


class _OpenShard:
    """The shard being written, and what is to be recorded once it is finished."""

    def __init__(self, folder: Path, state: Progress, split: str | None) -> None:
        number = sum(1 for shard in state.shards if shard.file.startswith(f"{_shard_prefix(split)}-"))
        self.name = f"{_shard_prefix(split)}-{number:06d}.tar"
        self.split = split
        self.writer = ShardWriter(folder / self.name, folder / f".{self.name}.tmp")
        self.bags: list[BagInfo] = []
        self.left_out: list[dict[str, str]] = []
        self.findings: list[Finding] = []
        self.facts: list[dict[str, Any]] = []
        self.fields = state.fields

    def fits(self, bag: Encoded, shard_bytes: int) -> bool:
        assert bag.members is not None
        size = sum(len(content) + _MEMBER_OVERHEAD for content in bag.members.values())
        return self.split == bag.info.split and (not self.bags or self.writer.num_bytes + size <= shard_bytes)

    def add(self, bag: Encoded) -> None:
        if bag.members is None:
            assert bag.problem is not None
            reason = "no instances" if bag.problem.check == "empty" else bag.problem.message
            self.left_out.append({"name": bag.info.name, "reason": reason})
            return
        self.writer.add(bag.info.key, bag.members)
        self.bags.append(replace(bag.info, shard=self.name))
        self.findings += bag.findings
        self.facts.append(bag.fact)
        self.fields = [name for name in bag.fields if self.fields is None or name in self.fields]

    def finish(self, folder: Path, state: Progress) -> None:
        """Close the shard (an empty one is discarded) and record it."""
        if self.bags:
            self.writer.close()
            self.writer.publish()
            state.shards.append(ShardInfo(self.name, self.writer.num_bytes, self.writer.sha256, len(self.bags)))
        else:
            self.writer.discard()
        state.bags += self.bags
        state.left_out += self.left_out
        state.findings += self.findings
        state.facts += self.facts
        state.fields = self.fields
        state.num_entries += len(self.bags) + len(self.left_out)
        write_json(folder / PROGRESS_NAME, asdict(state))

    def discard(self) -> None:
        self.writer.discard()


def _shard_prefix(split: str | None) -> str:
    return "bags" if split is None else make_keys([split])[0]


def _manifest(
    source: Source,
    options: dict[str, Any],
    entries: Sequence[SourceEntry],
    state: Progress,
    findings: Sequence[Finding],
) -> Manifest:
    return Manifest(
        source=json.loads(json.dumps(source.description())),
        options={**options, "entries": entries_digest(entries)},
        feature_shape=tuple(state.features[0]),
        feature_dtype=options["dtype"],
        patch_shape=source.patch_shape,
        splits=count_splits(state.bags),
        bags=tuple(state.bags),
        shards=tuple(state.shards),
        left_out=tuple(state.left_out),
        warnings=tuple(finding.message for finding in findings if finding.severity == "warning"),
        fields=tuple(state.fields or ()),
    )
