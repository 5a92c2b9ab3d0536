"""Remote sets: WebDataset fetches, the cache keeps, and a remote set gives the same bags as a local one."""

from __future__ import annotations

import functools
import http.server
import json
import multiprocessing
import os
import shlex
import socketserver
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from bigbag.data import BagStore, open_store, pack
from bigbag.data import cache as cache_module
from bigbag.data.sources import MemorySource
from bigbag.testing import forkserver


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_WAIT_S", 0.01)


@pytest.fixture
def packed(tmp_path: Path, make_bags: Callable) -> Path:
    pack(MemorySource(make_bags(), ["train", "val", "test"] * 3), tmp_path / "set", shard_bytes=25_000, progress=False)
    return tmp_path / "set"


@dataclass
class Server:
    url: str
    gets: list[str] = field(default_factory=list)
    broken: dict[str, int] = field(default_factory=dict)  # path -> how many more times only half of it is sent
    silent: dict[str, str] = field(default_factory=dict)  # path -> "stall" or "trickle"
    stop: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def server(packed: Path) -> Iterator[Server]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            state.gets.append(self.path)
            if self.path in state.silent:
                self.send_response(200)
                self.end_headers()
                while not state.stop.wait(0.02):
                    if state.silent[self.path] == "trickle":
                        self.wfile.write(b"0")
                return
            if state.broken.get(self.path, 0) > 0:
                state.broken[self.path] -= 1
                content = (packed / self.path.lstrip("/")).read_bytes()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                return
            super().do_GET()

        def log_message(self, *args: object) -> None:
            pass

    class ThreadingServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True

    with ThreadingServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(packed))) as httpd:
        state = Server(f"http://127.0.0.1:{httpd.server_address[1]}")
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        state.stop.set()
        httpd.shutdown()
        thread.join()


def assert_same_bags(store: BagStore, other: BagStore) -> None:
    assert store.infos == other.infos
    for index in range(len(store.infos)):
        a, b = store.read(index), other.read(index)
        assert (a.key, a.y) == (b.key, b.y)
        for name in ("x", "coords", "y_inst"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        np.testing.assert_array_equal(a.adj.col, b.adj.col)


def test_http(server: Server, packed: Path, tmp_path: Path) -> None:
    store = open_store(server.url, cache_dir=tmp_path / "cache", check_digests=True)
    assert server.gets == ["/manifest.json"]
    assert_same_bags(store, open_store(packed))
    shards = [f"/{shard.file}" for shard in store.manifest.shards]
    assert sorted(server.gets[1:]) == sorted(shards)
    assert_same_bags(open_store(f"{server.url}/manifest.json", cache_dir=tmp_path / "cache"), open_store(packed))
    assert len(server.gets) == len(shards) + 2  # the copies were used again
    for shard in store.manifest.shards:
        (copy,) = (tmp_path / "cache").glob(f"*/{shard.file}")
        assert copy.read_bytes() == (packed / shard.file).read_bytes()


def test_file_urls(packed: Path, tmp_path: Path) -> None:
    assert_same_bags(open_store(packed.as_uri(), cache_dir=tmp_path / "cache"), open_store(packed))


def test_pipe_needs_permission(packed: Path, tmp_path: Path) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["shard_url"] = f"pipe:cat {shlex.quote(str(packed))}/{{shard}}"
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"runs a shell command on this machine; allow it with allow_pipe=True"):
        open_store(tmp_path / "remote", cache_dir=tmp_path / "cache")
    store = open_store(tmp_path / "remote", cache_dir=tmp_path / "cache", allow_pipe=True)
    assert_same_bags(store, open_store(packed))


@pytest.mark.parametrize("url", ["http://x/a'b", "http://x/${HOME}", "http://x/{0..9}", "http://x/ y", "http://x/`id`"])
def test_addresses_that_could_run_something_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        open_store(url)
    with pytest.raises(ValueError, match="expected a folder"):
        open_store("pipe:cat set")
    with pytest.raises(ValueError, match="expected a folder"):
        open_store("ftp://x/set")


def test_a_broken_transfer_is_repeated(server: Server, packed: Path, tmp_path: Path) -> None:
    store = open_store(server.url, cache_dir=tmp_path / "cache")
    server.broken = {"/val-000000.tar": 2}
    assert_same_bags(store, open_store(packed))
    assert server.gets.count("/val-000000.tar") == 3


def test_a_transfer_that_stays_broken_is_an_error(server: Server, tmp_path: Path) -> None:
    store = open_store(server.url, cache_dir=tmp_path / "cache")
    server.broken = {"/train-000000.tar": 99}
    with pytest.raises(
        ValueError, match=rf"{server.url}/train-000000.tar: shard train-000000.tar could not be fetched"
    ):
        store.read(0)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".tar", ".part", ".reserved")]


@pytest.mark.parametrize("how", ["stall", "trickle"])
def test_a_server_that_says_nothing_is_an_error_not_a_hang(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(cache_module, "_STALL_S", 0.3)
    store = open_store(server.url, cache_dir=tmp_path / "cache")
    server.silent = {"/train-000000.tar": how}
    start = time.monotonic()
    reason = "timed out" if how == "stall" else r"bytes arrived in"
    with pytest.raises(
        ValueError, match=rf"{server.url}/train-000000.tar: .* in 3 attempts \(TimeoutError: .*{reason}"
    ):
        store.read(0)
    assert time.monotonic() - start < 20 and server.gets.count("/train-000000.tar") == 3
    server.silent = {}
    assert store.read(0).num_instances == store.sizes[0]


def test_missing_shard_and_missing_manifest(server: Server, packed: Path, tmp_path: Path) -> None:
    store = open_store(server.url, cache_dir=tmp_path / "cache")
    (packed / "train-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000000.tar could not be fetched in 3 attempts"):
        store.read(0)
    with pytest.raises(ValueError, match="no manifest could be read there"):
        open_store(f"{server.url}/nowhere")


@pytest.mark.parametrize("cut", ["member", "byte"])
def test_a_remote_shard_that_is_not_the_one_packed(packed: Path, tmp_path: Path, cut: str) -> None:
    store = open_store(packed.as_uri(), cache_dir=tmp_path / "cache")
    shard = packed / "test-000000.tar"
    with tarfile.open(shard) as tar:
        first, *others = (item for item in tar.getmembers() if item.name.endswith(".x.npy"))
        key = first.name.partition(".")[0]
        next_bag = min(item.offset for item in tar.getmembers() if not item.name.startswith(f"{key}."))
    content = bytearray(shard.read_bytes())
    if cut == "member":
        assert others
        content = content[:next_bag]
    else:
        content[first.offset_data + 130] ^= 1
    shard.write_bytes(content)
    index = next(i for i, info in enumerate(store.infos) if info.shard == shard.name)
    with pytest.raises(ValueError, match="bags arrived" if cut == "member" else "SHA-256"):
        store.read(index)


def cached_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.tar"))


def test_the_cache_is_bounded_and_drops_the_least_recently_used(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {shard.file: shard.bytes for shard in open_store(packed).manifest.shards}
    bound = max(sizes.values()) + min(sizes.values())
    assert len(sizes) >= 3 and bound < sum(sizes.values())
    store = open_store(packed.as_uri(), cache_dir=tmp_path / "cache", cache_bytes=bound)
    local = open_store(packed)
    fetched: list[str] = []
    original = cache_module.copy_shard

    def counting(shard: object, *args: object) -> None:
        fetched.append(shard.file)  # type: ignore[attr-defined]
        original(shard, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_module, "copy_shard", counting)
    for index in [*range(len(store)), *range(len(store))]:
        store._open.clear()
        np.testing.assert_array_equal(store.read(index).x, local.read(index).x)
        assert cached_bytes(tmp_path / "cache") <= bound
        assert store.infos[index].shard in {path.name for path in (tmp_path / "cache").rglob("*.tar")}
    assert len(fetched) > len(sizes)
    before = len(fetched)
    store._open.clear()
    store.read(len(store) - 1)
    assert len(fetched) == before


def test_a_shard_larger_than_the_cache(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the cache holds 100: raise data.cache_bytes"):
        open_store(packed.as_uri(), cache_dir=tmp_path / "cache", cache_bytes=100).read(0)


def read_all(url: str, cache: str, bound: int, reverse: bool, queue: multiprocessing.Queue) -> None:
    store = open_store(url, cache_dir=cache, cache_bytes=bound)
    total = 0.0
    order = range(len(store))
    for index in reversed(order) if reverse else order:
        store._open.clear()
        total += float(store.read(index).x.astype(np.float64).sum())
    queue.put(total)


def test_several_processes_share_one_small_cache(packed: Path, tmp_path: Path) -> None:
    local = open_store(packed)
    expected = sum(float(local.read(i).x.astype(np.float64).sum()) for i in range(len(local)))
    bound = 2 * max(shard.bytes for shard in local.manifest.shards)
    context = forkserver()  # a process has one, which the ranks of later tests are forked off too
    queue = context.Queue()
    processes = [
        context.Process(target=read_all, args=(packed.as_uri(), str(tmp_path / "cache"), bound, reverse, queue))
        for reverse in (False, True, False)
    ]
    for process in processes:
        process.start()
    found = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert found == pytest.approx([expected] * 3)
    assert cached_bytes(tmp_path / "cache") <= bound


@pytest.mark.parametrize("when", ["before it is looked at", "after"])
def test_a_copy_that_arrives_while_room_is_made_is_counted(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Another process gives up its claim to bytes, its copy being there, while this one adds up what is in use."""
    cache = open_store(packed.as_uri(), cache_dir=tmp_path / "cache")._cache
    cache.set_folder.mkdir(parents=True)
    claim, copy = (cache.set_folder / f"train-000000.{kind}" for kind in ("reserved", "tar"))
    claim.write_bytes(bytes(1000))
    look = Path.stat

    def look_and_arrive(path: Path, **options: bool) -> os.stat_result:
        status = look(path, **options) if when == "after" else None
        if path == claim and not os.path.exists(copy):
            os.rename(claim, copy)
        return status or look(path, **options)

    monkeypatch.setattr(Path, "stat", look_and_arrive)
    assert cache._make_room(0) == (1000 if when == "before it is looked at" else 2000)


def test_leftovers_of_a_killed_process_are_cleared(packed: Path, tmp_path: Path) -> None:
    local = open_store(packed)
    bound = 2 * max(shard.bytes for shard in local.manifest.shards)
    store = open_store(packed.as_uri(), cache_dir=tmp_path / "cache", cache_bytes=bound)
    folder = store._cache.set_folder
    folder.mkdir(parents=True)
    for name in ("val-000000", "test-000000"):
        (folder / f"{name}.reserved").write_bytes(b"")
        with open(folder / f"{name}.reserved", "r+b") as file:
            file.truncate(bound)
        (folder / f"{name}.part").write_bytes(b"half a shard")
    np.testing.assert_array_equal(store.read(0).x, local.read(0).x)
    assert not list(folder.glob("*.reserved")) and not list(folder.glob("*.part"))
