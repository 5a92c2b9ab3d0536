"""Writing files so that a crash leaves either the old or the whole new content."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

logger = logging.getLogger(__name__)


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends without an error: flushed to disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = f"{error.strerror}, and what was there is as it was; make room, and run the same command again"
        raise OSError(error.errno, text, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace ``path`` by ``content``: written beside it, flushed to disk, then renamed over it."""
    with open_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON; NaN and infinity are refused, since JSON has neither."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Whether no other process on this machine is at what lies in ``folder``; keeps others out meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            logger.warning("%s: this file system has no locks; start one command at a time on this folder", folder)
        yield True
    finally:
        os.close(descriptor)


def read_text(path: Path, remedy: str) -> str:
    """A file of text in UTF-8.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none; the message ends with ``remedy``, what the reader can do.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start}): {remedy}") from None


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; what it raises is what :func:`read_text` does."""
    try:
        value = json.loads(read_text(path, remedy))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg}): {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}: {remedy}")
    return value


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of a ``.npz`` file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile's, zlib's and numpy's own errors
        raise ValueError(f"{path}: not a readable .npz file of numbers ({error}): write it again") from None
