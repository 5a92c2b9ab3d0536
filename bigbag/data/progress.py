"""How far a packing has come: what makes an interrupted one go on instead of starting again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bigbag.data.manifest import MANIFEST_NAME, BagInfo, Manifest, ShardInfo
from bigbag.data.report import Finding
from bigbag.data.sources.base import Source, SourceEntry
from bigbag.files import write_json

logger = logging.getLogger(__name__)

PROGRESS_NAME = "progress.json"


@dataclass
class Progress:
    """What an interrupted packing has finished: whole shards only."""

    fingerprint: str
    num_entries: int = 0
    features: list[Any] = field(default_factory=list)
    bags: list[BagInfo] = field(default_factory=list)
    shards: list[ShardInfo] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    fields: list[str] | None = None


def entries_digest(entries: Sequence[SourceEntry]) -> str:
    content = json.dumps([[e.name, e.split, e.label, e.patient] for e in entries])
    return hashlib.sha256(content.encode()).hexdigest()


def _files(entries: Sequence[SourceEntry]) -> list[str]:
    return [path for entry in entries for path in (entry.path, *entry.parts) if path and os.path.isfile(path)]


def fingerprint(source: Source, options: dict[str, Any], entries: Sequence[SourceEntry]) -> str:
    """Digest of all that determines the shards; a file that was touched since changes it."""
    stats = []
    for path in _files(entries):
        status = os.stat(path)
        stats.append([status.st_size, status.st_mtime_ns])
    content = json.dumps([source.description(), options, entries_digest(entries), stats], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def finished_set(
    folder: Path, source: Source, options: dict[str, Any], entries: Sequence[SourceEntry]
) -> Manifest | None:
    """The manifest of a finished set of the same source and options; None where packing has to run.

    Raises:
        ValueError: a finished set of something else, or of files that have changed since.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    manifest = Manifest.parse(path.read_bytes(), str(path))
    remedy = "choose another folder, or replace it with overwrite=True (bigbag pack --overwrite)"
    same_source = manifest.source == json.loads(json.dumps(source.description()))
    if not same_source or manifest.options != {**options, "entries": entries_digest(entries)}:
        raise ValueError(f"{folder}: already holds a finished set of another source or other options: {remedy}")
    packed_ns = path.stat().st_mtime_ns
    for file in _files(entries):
        if os.stat(file).st_mtime_ns > packed_ns:
            raise ValueError(f"{folder}: already packed, but {file} has changed since: {remedy}")
    logger.info("pack: %s is already packed from this source with these options", folder)
    return manifest


def resume(folder: Path, wanted: str, left_out: list[dict[str, str]], overwrite: bool) -> Progress:
    """State of an earlier packing of the same bags, or a fresh one; other files of an earlier packing are removed."""
    state = None if overwrite else _read_progress(folder, wanted)
    if state is None:
        state = Progress(wanted, left_out=left_out)
        write_json(folder / PROGRESS_NAME, asdict(state))
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
    else:
        logger.info("pack: going on in %s after %d finished shards", folder, len(state.shards))
    kept = {shard.file for shard in state.shards}
    for path in [*folder.glob(f"*-{'[0-9]' * 6}.tar"), *folder.glob(".*.tar.tmp"), *folder.glob(".*.json.*.tmp")]:
        if path.name not in kept:
            path.unlink()
    return state


def _read_progress(folder: Path, wanted: str) -> Progress | None:
    path = folder / PROGRESS_NAME
    if not path.exists():
        stray = sorted(folder.glob("*.tar"))
        if stray:
            raise ValueError(
                f"{folder}: holds {stray[0].name} but neither a manifest nor the progress of a packing: pack to an "
                "empty folder, or replace what is there with overwrite=True"
            )
        return None
    try:
        content = json.loads(path.read_bytes())
        if content["fingerprint"] != wanted:
            logger.warning("pack: %s: source or options have changed since the interruption; starting again", folder)
            return None
        content["bags"] = [BagInfo(**bag) for bag in content["bags"]]
        content["findings"] = [Finding(**finding) for finding in content["findings"]]
        content["shards"] = [ShardInfo(**shard) for shard in content["shards"]]
        state = Progress(**content)
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("pack: %s is damaged (%s); starting again", path, error)
        return None
    for shard in state.shards:
        file = folder / shard.file
        if not file.exists() or file.stat().st_size != shard.bytes:
            logger.warning("pack: finished shard %s is gone or has changed; starting again", file)
            return None
    return state
