"""Where these tests run, with which implementation, and what the host must not do there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from bigbag.bags import PackedBags
from tests.host_reads import watched

DEVICE = os.environ.get("BIGBAG_TEST_DEVICE", "cuda")
IMPL = "triton" if DEVICE == "cuda" else "cpu"


@contextmanager
def no_waiting(given: Iterable[Any]) -> Iterator[None]:
    """Within the block, that the host waits for the device is an error; on CPU, that it waits for ``given`` and what
    comes of it, but within custom operators, into which the watcher does not see."""
    if DEVICE != "cuda":
        with watched([value for value in tree_leaves(list(given)) if isinstance(value, torch.Tensor)]) as device:
            yield
        assert not device.reads, device.reads
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pack_of(instances: int, width: int, dtype: torch.dtype) -> PackedBags:
    """One bag of label 1 on a lattice, joined to its neighbours, on the device."""
    from bigbag.bench.models import lattice
    from bigbag.graphs import build_adjacency

    coords = lattice(instances)
    adj = build_adjacency(coords, radius=1.5, normalize="symmetric")
    x = torch.randn(instances, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    pack = PackedBags(x, torch.tensor([0, instances]), (instances,), y=torch.ones(1), coords=coords, adj=adj)
    return pack.to(DEVICE)
