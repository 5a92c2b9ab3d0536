"""Pre-emption: a signal asks a run to save and leave; the same command goes on from there.

Schedulers send SIGTERM when a job has to make room and, where asked (``#SBATCH --signal=USR1@120``), SIGUSR1 before its
time is up. Both only set a flag, which all ranks look at together after every step, so that all save the same step. The
process then ends with status :data:`EXIT_PREEMPTED`, by which a batch script knows that the job is to be queued again.
"""

from __future__ import annotations

import signal
from types import FrameType

from bigbag.engine.world import World

EXIT_PREEMPTED = 85
"""Exit status of a run that saved and left: that of an interrupted call to be restarted (ERESTART), as sites use it."""

LEAVE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_watching = False
_received: signal.Signals | None = None


class Preempted(Exception):
    """The run was asked to leave; whoever raises it has seen to a checkpoint."""


def watch() -> None:
    """From now on SIGTERM and SIGUSR1 ask the run to leave; call it on every rank, in the main thread."""
    global _watching
    for number in LEAVE_SIGNALS:
        signal.signal(number, _note)
    _watching = True


def asked_to_leave(world: World) -> bool:
    """Whether any rank has been asked to leave: the same answer on every rank, which all have to ask for."""
    return _watching and world.any(_received is not None)


def _note(number: int, frame: FrameType | None) -> None:
    # The first stays: SLURM sends SIGCONT along with its signals, and SIGTERM once more before SIGKILL.
    global _received
    _received = _received or signal.Signals(number)
