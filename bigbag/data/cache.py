"""Copies of remote shards on a local disk, bounded in bytes and shared by all processes of a node."""

from __future__ import annotations

import fcntl
import logging
import os
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from bigbag.data.manifest import ShardInfo
from bigbag.data.shards import ShardWriter

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_WAIT_S = 1.0
_STALL_S = 60.0
_SLOWEST_BYTES_PER_S = 1000
_RESERVE_WAIT_S = 0.2
_RESERVE_TIMEOUT_S = 600.0
_UNSAFE = set("'\"\\`${}<>|") | {chr(code) for code in range(33)}


class ShardCache:
    """A folder of shard copies that holds at most ``max_bytes``; the least recently used are removed first.

    A shard that is removed while a process still maps it keeps its disk space until that process lets go of it.

    Args:
        folder: the cache, shared by all sets and processes.
        set_id: digest that names the set of shards.
        max_bytes: most bytes of all copies together.
    """

    def __init__(self, folder: Path, set_id: str, max_bytes: int) -> None:
        self.folder = folder
        self.set_folder = folder / set_id[:24]
        self.max_bytes = max_bytes

    def open(self, shard: ShardInfo, url: str) -> BinaryIO:
        """An open copy of ``shard``, fetched from ``url`` if there is none.

        Raises:
            ValueError: the shard is larger than the cache, or could not be fetched whole.
        """
        if shard.bytes > self.max_bytes:
            raise ValueError(
                f"{url}: shard {shard.file} has {shard.bytes} bytes, the cache holds {self.max_bytes}: raise "
                "data.cache_bytes, or pack smaller shards"
            )
        self.set_folder.mkdir(parents=True, exist_ok=True)
        path = self.set_folder / shard.file
        with _locked(path.with_suffix(".lock")):
            if path.exists() and path.stat().st_size != shard.bytes:
                path.unlink()
            if not path.exists():
                self._fetch(shard, url, path)
            os.utime(path)
            return open(path, "rb")

    def _fetch(self, shard: ShardInfo, url: str, path: Path) -> None:
        reserved, part = path.with_suffix(".reserved"), path.with_suffix(".part")
        self._reserve(shard.bytes, reserved)
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    return copy_shard(shard, url, path, part)
                except Exception as error:  # WebDataset's errors are of many types
                    problem = f"{type(error).__name__}: {str(error)[:500]}"
                    logger.warning("shard %s from %s, attempt %d: %s", shard.file, url, attempt, problem)
                    if attempt < _ATTEMPTS:
                        time.sleep(_WAIT_S * 2 ** (attempt - 1))
        finally:
            reserved.unlink(missing_ok=True)
        raise ValueError(
            f"{url}: shard {shard.file} could not be fetched in {_ATTEMPTS} attempts ({problem}): check the address "
            "and the network, or upload the shard again"
        )

    def _reserve(self, num_bytes: int, reserved: Path) -> None:
        """Claim ``num_bytes`` by an empty file of that size, once removing the oldest copies has made room."""
        deadline = time.monotonic() + _RESERVE_TIMEOUT_S
        while True:
            with _locked(self.folder / "cache.lock"):
                in_use = self._make_room(num_bytes)
                if in_use + num_bytes <= self.max_bytes:
                    with open(reserved, "wb") as file:
                        file.truncate(num_bytes)
                    return
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{self.folder}: other processes are filling {in_use} bytes, {num_bytes} more do not fit into "
                    f"{self.max_bytes}: raise data.cache_bytes"
                )
            time.sleep(_RESERVE_WAIT_S)

    def _make_room(self, num_bytes: int) -> int:
        """Remove the oldest copies that no process is fetching or opening; returns the bytes that stay in use."""
        files = _claims(self.folder)
        in_use = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if in_use + num_bytes <= self.max_bytes:
                break
            with _try_locked(file.with_suffix(".lock")) as free:
                if free:
                    file.unlink(missing_ok=True)
                    file.with_suffix(".part").unlink(missing_ok=True)  # left by a process that was killed
                    in_use -= size
        return in_use


def copy_shard(shard: ShardInfo, url: str, path: Path, part: Path) -> None:
    """Read a shard with WebDataset, bag by bag, and write the same bytes to ``path`` by way of ``part``.

    Raises:
        ValueError: what arrived is not what the manifest says.
    """
    from webdataset.handlers import reraise_exception
    from webdataset.tariterators import group_by_keys, tar_file_expander

    writer = ShardWriter(path, part)
    try:
        with _opened(url) as stream:
            files = tar_file_expander([{"url": url, "stream": stream}], handler=reraise_exception)
            for sample in group_by_keys(files, handler=reraise_exception):
                members = {name: value for name, value in sample.items() if not name.startswith("_")}
                writer.add(sample["__key__"], members)
                if writer.num_bytes > shard.bytes:
                    raise ValueError(f"more than the {shard.bytes} bytes that the manifest promises")
        writer.close()
        num_bytes, sha256 = writer.num_bytes, writer.sha256
        if (num_bytes, writer.num_bags) != (shard.bytes, shard.num_bags):
            raise ValueError(f"{writer.num_bags} of {shard.num_bags} bags arrived: {num_bytes} of {shard.bytes} bytes")
        if sha256 != shard.sha256:
            raise ValueError("the bytes that arrived do not have the SHA-256 of the manifest")
    except BaseException:
        writer.discard()
        raise
    writer.publish()


def _opened(url: str) -> Any:
    if not url.startswith(("http://", "https://")):
        from webdataset.gopen import gopen

        return gopen(url)
    # Not WebDataset's way, which is curl without a limit for a server that accepts and then says nothing.
    return _Watched(urllib.request.urlopen(url, timeout=_STALL_S))


class _Watched:
    """A response that fails where its server stalls or trickles."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self._start, self._num_bytes = time.monotonic(), 0

    def read(self, size: int) -> bytes:
        pieces, missing = [], size
        while missing:
            piece = self._response.read1(missing)
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
            self._num_bytes += len(piece)
            elapsed = time.monotonic() - self._start
            if elapsed > _STALL_S and self._num_bytes < _SLOWEST_BYTES_PER_S * elapsed:
                raise TimeoutError(f"{self._num_bytes} bytes arrived in {elapsed:.0f} s")
        return b"".join(pieces)

    def close(self) -> None:
        self._response.close()

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_url(url: str, allow_pipe: bool) -> None:
    """Refuse addresses that would run commands or be rewritten on their way.

    Raises:
        ValueError: a ``pipe:`` address without ``allow_pipe``, or a character that has no place in a URL.
    """
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise ValueError(
                f"{url!r}: a pipe: address runs a shell command on this machine; allow it with allow_pipe=True "
                "(data.allow_pipe: true) if you trust the manifest"
            )
        return
    bad = sorted(set(url) & _UNSAFE)
    if bad:
        raise ValueError(
            f"{url!r}: the character {bad[0]!r} is not allowed in the address of a shard; escape it as %.."
        )


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/bigbag/shards``, by default in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bigbag" / "shards"


def _claims(folder: Path) -> list[tuple[int, int, Path]]:
    """Age in ns since 1970, bytes and path of every copy, and of every claim to bytes for one on its way.

    A claim is given up once its copy is there, at any time: claims are looked at first, so that one or both are seen.
    """
    found = []
    for pattern in ("*/*.reserved", "*/*.tar"):
        for path in folder.glob(pattern):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _try_locked(path: Path) -> Iterator[bool]:
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
