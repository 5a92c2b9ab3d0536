"""The stream: what the plan says, whatever reads it, in bounded memory."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bigbag import Bag, PackedBags
from bigbag.bench.loader import COPY, WEBDATASET, contenders, make_set, measure
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
from bigbag.data.augment import Augmentation
from bigbag.data.buffers import Buffers
from bigbag.data.cap import cap_instances, take_rows
from bigbag.data.patients import PatientStore
from bigbag.data.sources import MemorySource
from bigbag.memory import resident_bytes


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
        num_bytes = sum(-(-t.nbytes // 64) * 64 for t in [*tensors, found.adj.weight])
        assert found.x.untyped_storage().nbytes() == num_bytes
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


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("bigbag-read")]


def test_a_bag_over_the_budget_stays_in_its_shard(store: ShardStore) -> None:
    sizes, budget = store.sizes, 30 * 6 * 2
    plan = plan_epoch(sizes, range(12), seed=1, epoch=0, world_size=1, budget_instances=30, batch_bags=5)
    usual = list(stream(store, plan, rank=0))
    lean = list(stream(store, plan, rank=0, budget_bytes=budget))
    large = 0
    for (*_, a), (*_, b) in zip(usual, lean):
        assert_same_pack(a, b)
        apart = b.x.untyped_storage().data_ptr() != b.offsets.untyped_storage().data_ptr()
        assert apart == (a.x.nbytes > budget) and (not apart or b.num_bags == 1)
        large += apart
    assert large == sum(size > 30 for size in sizes) > 3
    halves = [next(iter(stream(store, plan, rank=0, budget_bytes=0, part=(r, 2))))[-1] for r in range(2)]
    torch.testing.assert_close(torch.cat([half.x for half in halves]).sum(0), usual[0][-1].x.sum(0))


def test_the_budget_counts_the_wider_of_both_precisions(store: ShardStore) -> None:
    """A bag of 16-bit features that would be over the budget in the 32 bits of a pack stays where it is, in 16."""
    size = max(store.sizes)
    plan = plan_epoch(store.sizes, range(12), seed=1, epoch=0, world_size=1, budget_instances=1, batch_bags=5)
    for *_, found in stream(store, plan, rank=0, dtype=torch.float32, budget_bytes=size * 6 * 4 - 1):
        assert found.x.dtype == (torch.float16 if found.num_instances == size else torch.float32)


def test_joined_slides_over_the_budget_are_refused(store: ShardStore) -> None:
    bags = [replace(store.read(i), y=0) for i in range(3)]
    joined = PatientStore(MemoryStore(bags, patients=["p", "p", None]))
    plan = plan_epoch(joined.sizes, range(2), seed=1, epoch=0, world_size=1, budget_instances=1, batch_bags=5)
    with pytest.raises(ValueError, match="bag 'p': .* over data.budget_bytes = 10, and data.bag: patient joins"):
        list(stream(joined, plan, rank=0, budget_bytes=10))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"augment": Augmentation(feature_noise=0.1)}, "data.augment changes them in a copy"),
        ({"max_instances": 20}, "data.max_instances copies a part"),
        ({}, "several bags in a pack are copied"),
    ],
)
def test_what_would_be_copied_over_the_budget_is_refused(store: ShardStore, options: dict, message: str) -> None:
    single = 1 if options else 80
    sizes = capped_sizes(store.sizes, options.get("max_instances"))
    plan = plan_epoch(sizes, range(12), seed=1, epoch=0, world_size=1, budget_instances=single, batch_bags=5)
    with pytest.raises(ValueError, match=f"bag 'slide-.*over data.budget_bytes = 100, and .*{message}"):
        list(stream(store, plan, rank=0, budget_bytes=100, **options))


def test_leaving_early_ends_the_threads(store: ShardStore) -> None:
    for item in stream(store, make_plan(store, world_size=1), rank=0, num_workers=2):
        assert item[3].num_bags
        assert 1 <= len(reading_threads()) <= 2
        break
    gc.collect()
    assert not reading_threads()


def test_packs_are_read_ahead_and_no_further(store: ShardStore) -> None:
    reads: list[int] = []

    class Counting(MemoryStore):
        def read(self, index: int) -> Bag:
            reads.append(index)
            return super().read(index)

    counting = Counting([store.read(index) for index in range(len(store))])
    plan = plan_epoch(counting.sizes, range(12), seed=0, epoch=0, world_size=1, budget_instances=1, batch_bags=1)
    packs = stream(counting, plan, rank=0, num_workers=2, prefetch=2)
    next(packs)
    deadline = time.monotonic() + 20
    while len(reads) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(reads) == 5  # the pack in hand and two for each thread
    assert len(list(packs)) == 11 and len(reads) == 12


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_in_another_precision(store: ShardStore, num_workers: int, dtype: torch.dtype) -> None:
    plan = make_plan(store)
    for *_, pack_plan, found in stream(store, plan, rank=0, num_workers=num_workers, dtype=dtype):
        whole = np.concatenate([store.read(bag).x for bag in pack_plan.bags])
        assert found.x.dtype == dtype
        torch.testing.assert_close(found.x, torch.from_numpy(whole).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("num_workers", [0, 2])
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


def test_streaming_keeps_up_with_copying(tmp_path: Path) -> None:
    """Generous bounds for a busy machine, where the best of some rounds says most; `bench loader` has the figures.

    A busy second core leaves two readers and their reader one core to share, thus half of what an idle machine gives.
    """
    store, files = make_set(tmp_path, 8, 10_000, 512)
    times, _ = measure(contenders(store, files, [0, 1, 2]), 6)
    best = {name: min(of) for name, of in times.items()}
    for num_workers in (0, 1, 2):
        epoch = best[f"stream, {num_workers} workers"]
        assert best[COPY] / epoch > (0.25 if num_workers == 2 else 0.5), best
        assert best[WEBDATASET] / epoch > 2, best


def test_buffers_are_used_again_only_when_free() -> None:
    buffers = Buffers()
    first, second = buffers.lease(1000), buffers.lease(1000)
    address = first.data_ptr()
    view = first[10:20].view(torch.int16)
    del first
    assert buffers.lease(900).data_ptr() not in (address, second.data_ptr())  # a view still holds it
    view.fill_(7)
    del view
    assert buffers.lease(1000).data_ptr() == address


def test_buffers_keep_as_many_as_they_are_told() -> None:
    buffers = Buffers(2)
    leases = [buffers.lease(1000) for _ in range(5)]
    del leases
    assert buffers.num_free == 2
    buffers.keep(1)
    assert buffers.num_free == 1


def test_one_large_pack_leaves_one_large_buffer() -> None:
    """Small packs take none of its memory, so that the next large one finds it again."""
    buffers = Buffers(3)
    large = buffers.lease(1000)
    address = large.data_ptr()
    del large
    for size in (40, 60, 50, 1000, 70, 30, 990, 20, 50, 600):
        held = buffers.lease(size)
        assert (held.data_ptr() == address) == (size >= 500)
        del held


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
