"""The stream: what the plan says, whatever reads it, in bounded memory."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bigbag import Bag, PackedBags
from bigbag.data import (
    BagStore,
    EpochPlan,
    MemoryStore,
    ShardStore,
    capped_sizes,
    count_capped,
    open_store,
    pack,
    plan_epoch,
    stream,
)
from bigbag.data.buffers import Layout, LocalBuffers, SharedBuffers
from bigbag.data.cap import cap_instances, take_rows
from bigbag.data.sources import MemorySource


@pytest.fixture
def store(tmp_path: Path, make_bags: Callable) -> ShardStore:
    pack(MemorySource(make_bags(12), ["train"] * 12), tmp_path / "set", shard_bytes=30_000, progress=False)
    return open_store(tmp_path / "set")


def make_plan(store: BagStore, world_size: int = 2, max_instances: int | None = None) -> EpochPlan:
    sizes = capped_sizes(store.sizes, max_instances)
    return plan_epoch(
        sizes, range(len(sizes)), seed=1, epoch=0, world_size=world_size, budget_instances=80, batch_bags=5
    )


def assert_same_pack(a: PackedBags, b: PackedBags) -> None:
    assert (a.keys, a.sizes) == (b.keys, b.sizes)
    for name in ("x", "offsets", "y", "y_inst", "coords"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)
    for name in ("crow", "col", "weight"):
        torch.testing.assert_close(getattr(a.adj, name), getattr(b.adj, name), rtol=0, atol=0)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_packs_are_those_of_the_plan_and_may_be_kept(store: ShardStore, num_workers: int) -> None:
    plan = make_plan(store)
    assert sum(len(step.micro_steps) for step in plan.steps) > 4
    for rank in (0, 1):
        kept = list(stream(store, plan, rank=rank, num_workers=num_workers))
        assert [item[:3] for item in kept] == list(plan.of_rank(rank))
        for _, _, pack_plan, found in kept:  # all packs are still whole, though buffers are used again
            assert_same_pack(found, PackedBags.from_bags([store.read(bag) for bag in pack_plan.bags]))
            assert found.num_instances == pack_plan.num_instances


@pytest.mark.parametrize("num_workers", [0, 1])
def test_starting_at_a_step_gives_the_rest(store: ShardStore, num_workers: int) -> None:
    plan = make_plan(store, world_size=1)
    whole = [item for item in stream(store, plan, rank=0) if item[0] >= 1]
    rest = list(stream(store, plan, rank=0, start_step=1, num_workers=num_workers))
    assert [item[:3] for item in rest] == [item[:3] for item in whole]
    for a, b in zip(rest, whole):
        assert_same_pack(a[3], b[3])
    assert list(stream(store, plan, rank=0, start_step=plan.num_steps, num_workers=num_workers)) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_pack_is_one_buffer_of_its_own_size(store: ShardStore, num_workers: int) -> None:
    for *_, found in stream(store, make_plan(store), rank=0, num_workers=num_workers):
        tensors = [found.x, found.offsets, found.y, found.y_inst, found.coords, found.adj.crow, found.adj.col]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
        assert 0 <= found.x.untyped_storage().nbytes() - Layout.of(found).num_bytes < 64  # its last tensor is padded
        moved = found.to("cpu")
        assert_same_pack(moved, found)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_cap_takes_a_reproducible_subsample(store: ShardStore, num_workers: int) -> None:
    plan = make_plan(store, world_size=1, max_instances=20)
    kwargs = {"rank": 0, "max_instances": 20, "seed": 4, "num_workers": num_workers}
    packs = list(stream(store, plan, epoch=2, **kwargs))
    seen = 0
    for _, _, pack_plan, found in packs:
        for place, bag in enumerate(pack_plan.bags):
            rows = cap_instances(store.sizes[bag], 20, seed=4, epoch=2, bag=bag)
            start, end = found.offsets[place : place + 2].tolist()
            x = store.read(bag).x
            np.testing.assert_array_equal(found.x[start:end], x if rows is None else x[rows])
            seen += end - start
    assert seen == sum(min(20, size) for size in store.sizes)
    other = list(stream(store, plan, epoch=3, **kwargs))
    assert any(not torch.equal(a[3].x, b[3].x) for a, b in zip(packs, other))


def test_a_plan_for_other_sizes_is_an_error(store: ShardStore) -> None:
    with pytest.raises(ValueError, match="make the plan with capped_sizes"):
        list(stream(store, make_plan(store), rank=0, max_instances=20))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_a_worker_is_the_clear_error_itself(store: ShardStore, num_workers: int) -> None:
    store.check_digests = True
    shard = Path(store.location) / store.manifest.shards[0].file
    content = bytearray(shard.read_bytes())
    at = content.find(b"\x93NUMPY", content.find(b"x.npy"))
    content[at + 130] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="does not have the SHA-256") as error:
        list(stream(store, make_plan(store), rank=0, num_workers=num_workers))
    assert "Traceback" not in str(error.value) and shard.name in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"rank": 2}, "rank is 2"), ({"num_workers": -1}, "num_workers"), ({"prefetch": 0}, "prefetch")],
)
def test_wrong_arguments(store: ShardStore, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(store, make_plan(store), **{"rank": 0, **kwargs})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_pinning_needs_an_accelerator(store: ShardStore) -> None:
    with pytest.raises(ValueError, match="pin_memory"):
        stream(store, make_plan(store), rank=0, pin_memory=True)


def test_bags_in_memory_stream_like_packed_ones(store: ShardStore) -> None:
    memory = MemoryStore([store.read(index) for index in range(len(store))])
    plan = make_plan(store)
    for num_workers in (0, 1):
        for a, b in zip(stream(memory, plan, rank=1, num_workers=num_workers), stream(store, plan, rank=1)):
            assert_same_pack(a[3], b[3])


def test_a_pack_larger_than_its_slot_gets_its_own_buffer(tmp_path: Path) -> None:
    """The size of a slot is estimated from the first pack; here the first bag has no graph and no coordinates."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(n, 2)).astype(np.float32) for n in (4000, 4000, 4000)]

    growing = Growing([Bag(x, y=0, key=str(i)) for i, x in enumerate(rows)])
    plan = plan_epoch(
        growing.sizes, range(3), seed=0, epoch=0, world_size=1, budget_instances=1, batch_bags=1, shuffle=False
    )
    found = list(stream(growing, plan, rank=0, num_workers=1))
    assert [item[3].coords if item[3].coords is None else item[3].coords.shape[1] for item in found] == [None, 200, 400]
    for x, item in zip(rows, found):
        np.testing.assert_array_equal(item[3].x, x)


class Growing(MemoryStore):
    """Coordinates that grow from bag to bag."""

    def read(self, index: int) -> Bag:
        bag = super().read(index)
        return Bag(bag.x, bag.y, bag.key, coords=np.zeros((len(bag.x), 200 * index)) if index else None)


def test_leaving_early_ends_the_workers(store: ShardStore) -> None:
    import multiprocessing

    for item in stream(store, make_plan(store, world_size=1), rank=0, num_workers=2):
        assert item[3].num_bags
        assert len(multiprocessing.active_children()) == 2
        break
    gc.collect()
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_workers_survive_the_signals_of_a_cluster(store: ShardStore) -> None:
    import multiprocessing

    packs = stream(store, make_plan(store, world_size=1), rank=0, num_workers=1, prefetch=1)
    count = 0
    for _ in packs:
        count += 1
        for worker in multiprocessing.active_children():
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                os.kill(worker.pid, number)
    assert count == make_plan(store, world_size=1).num_packs
    # nor are they blocked here
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}


def test_a_killed_worker_is_an_error_not_a_hang(make_bags: Callable) -> None:
    import multiprocessing

    store = MemoryStore(make_bags(40, graph=False))
    plan = plan_epoch(store.sizes, range(40), seed=0, epoch=0, world_size=1, budget_instances=1, batch_bags=1)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"worker .* exited unexpectedly"):
        for _ in stream(store, plan, rank=0, num_workers=1, prefetch=1):
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
    assert time.monotonic() - start < 60


def resident_bytes() -> int:
    """Private and shared memory of this process; maps of files, which the kernel drops at will, not counted."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resident_memory_and_open_files_stay_flat(tmp_path: Path, num_workers: int) -> None:
    bags = [Bag(np.full((4000, 128), i, np.float32), y=0, key=str(i)) for i in range(12)]  # 1 MB each as float16
    pack(MemorySource(bags), tmp_path, progress=False)
    del bags
    store = open_store(tmp_path)
    seen = []
    for epoch in range(6):
        plan = plan_epoch(
            store.sizes, range(12), seed=0, epoch=epoch, world_size=1, budget_instances=4000, batch_bags=2
        )
        total = sum(float(item[3].x[0, 0]) for item in stream(store, plan, rank=0, num_workers=num_workers))
        assert total == sum(range(12))
        gc.collect()
        seen.append((resident_bytes(), len(os.listdir("/proc/self/fd"))))
    assert seen[-1][0] - seen[1][0] < 3e6, seen  # an epoch is 12 MB
    assert seen[-1][1] <= seen[1][1] + 1, seen


def test_local_buffers_are_used_again_only_when_free() -> None:
    buffers = LocalBuffers()
    first, second = buffers.lease(1000), buffers.lease(1000)
    address = first.data_ptr()
    view = first[10:20].view(torch.int16)
    del first
    assert buffers.lease(500).data_ptr() not in (address, second.data_ptr())  # a view still holds it
    view.fill_(7)
    del view
    assert address in {tensor.data_ptr() for tensor in [buffers.lease(1000), buffers.lease(1000)]}


def test_shared_buffers_run_out_and_come_back() -> None:
    buffers = SharedBuffers(2, 4096)
    slots = [buffers.acquire(), buffers.acquire()]
    assert sorted(slots) == [0, 1] and buffers.acquire() is None
    buffers.slots[slots[0]][:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    lease = buffers.lease(slots[0], 4)
    assert lease.tolist() == [1, 2, 3, 4] and lease.untyped_storage().nbytes() == 4
    assert buffers.acquire() is None
    del lease
    assert buffers.acquire() == slots[0]


def test_cap_instances() -> None:
    assert cap_instances(10, None, seed=0, epoch=0, bag=0) is None
    assert cap_instances(10, 10, seed=0, epoch=0, bag=0) is None
    rows = cap_instances(1000, 100, seed=0, epoch=0, bag=0)
    assert len(np.unique(rows)) == 100 and (np.diff(rows) > 0).all() and rows.min() >= 0 and rows.max() < 1000
    for other in ({"seed": 1}, {"epoch": 1}, {"bag": 1}):
        assert not np.array_equal(rows, cap_instances(1000, 100, **{"seed": 0, "epoch": 0, "bag": 0, **other}))
    drawn = np.concatenate([cap_instances(50, 5, seed=0, epoch=e, bag=0) for e in range(2000)])
    counts = np.bincount(drawn, minlength=50)  # each row 200 times, standard deviation 13.4
    assert abs(counts - 200).max() < 70
    with pytest.raises(ValueError, match="max_instances is 0"):
        cap_instances(10, 0, seed=0, epoch=0, bag=0)
    assert capped_sizes([5, 50], 10) == (5, 10) and capped_sizes([5, 50], None) == (5, 50)
    assert count_capped([5, 50, 20], 10) == (2, 50) and count_capped([5, 50], None) == (0, 0)


def test_take_rows_keeps_the_graph_among_them(make_bags: Callable) -> None:
    bag = make_bags(6)[5]
    rows = np.array([0, 1, 2, 5, 6, 20])
    part = take_rows(bag, rows)
    dense = bag.adj.to_coo().to_dense().numpy()
    np.testing.assert_allclose(part.adj.to_coo().to_dense().numpy(), dense[np.ix_(rows, rows)])
    np.testing.assert_array_equal(part.coords, bag.coords[rows])
    np.testing.assert_array_equal(part.y_inst, bag.y_inst[rows])
    assert (part.y, part.key) == (bag.y, bag.key)
