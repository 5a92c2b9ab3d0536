"""One heap of the C library for all threads of a program."""

import ctypes
import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, threading
import torch
from bigbag.memory import use_one_heap

use_one_heap()
together = threading.Barrier(4)

def allocate():
    together.wait()
    kept = torch.ones(1000)
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
ctypes.CDLL(None).malloc_stats()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_stats"), reason="the C library does not tell of its heaps")
def test_threads_share_a_heap_unless_the_environment_says_how_many() -> None:
    assert _heaps({}) == 1
    assert _heaps({"MALLOC_ARENA_MAX": "8"}) > 1


def _heaps(settings: dict[str, str]) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment | settings, capture_output=True, text=True, check=True
    )
    return done.stderr.count("Arena ")
