"""What the launchers ask about the device that they launch on."""

from __future__ import annotations

from functools import cache

from triton.runtime import driver


@cache
def is_hopper() -> bool:
    """Whether four warps multiply a tile of 64 rows in one instruction, which reads from shared memory (sm_90)."""
    return bool(driver.active.get_current_target().arch == 90)
