"""Fresh memory in huge pages: what the kernel is asked for."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from bigbag.kernels.cpu import memory


@pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
def test_asks_for_whole_pages_of_the_tensor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(memory, "_madvise", lambda *args: asked.append(args))
    x = torch.empty(5 << 20, dtype=torch.uint8)
    assert memory.huge_pages(x) is x
    ((start, length, advice),) = asked
    assert start % mmap.PAGESIZE == 0 and advice == mmap.MADV_HUGEPAGE
    assert x.data_ptr() <= start < x.data_ptr() + mmap.PAGESIZE
    assert x.data_ptr() + x.nbytes - mmap.PAGESIZE < start + length <= x.data_ptr() + x.nbytes
    memory.huge_pages(torch.empty(1 << 20))
    assert len(asked) == 2
    memory.huge_pages(torch.empty(1 << 10))
    memory.huge_pages(torch.empty(1 << 30, device="meta"))
    assert len(asked) == 2


def test_values_survive() -> None:
    x = memory.huge_pages(torch.empty(3 << 20)).copy_(torch.arange(3 << 20))
    assert torch.equal(x, torch.arange(3 << 20).float())
