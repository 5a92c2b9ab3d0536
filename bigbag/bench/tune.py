"""Candidate tiles of the Triton kernels, timed on the device that they are for.

    bigbag bench tune --op attention_pool --size 1000000

What a compiler makes of a tile can be read without a device; which of several good ones is the fastest cannot. The
table names the fastest first; to take one, write it into the launcher (``kernels/gpu``) and run the proof.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bigbag.bench.cases import make_case, usual_width
from bigbag.bench.measure import add_device, machine, seconds
from bigbag.config.option_types import positive

Settings = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """Tiles other than those of the launcher.

    Attributes:
        function: "file.function" in ``kernels/gpu`` whose result they replace.
        settings: what is replaced.
        only: the calls that are meant, by their keyword arguments or, for those without, all.
    """

    function: str
    settings: Settings
    only: Settings = field(default_factory=dict)

    def __str__(self) -> str:
        names = {"num_warps": "warps", "num_stages": "stages"}
        parts = [f"{names.get(k, k.removeprefix('BLOCK_'))} {v}" for k, v in self.settings.items()]
        return ", ".join([*parts, *(f"[{k} {v}]" for k, v in self.only.items())])


def _tiles(names: str, *rows: tuple[int | str, ...]) -> list[Settings]:
    short = {"warps": "num_warps", "stages": "num_stages", "precision": "PRECISION"}
    keys = [short.get(name, f"BLOCK_{name}") for name in names.split()]
    return [dict(zip(keys, row, strict=True)) for row in rows]


def _candidates(function: str, tiles: list[Settings], **only: Any) -> list[Candidate]:
    return [Candidate(function, settings, only) for settings in tiles]


_POOL, _ATTEND = "attention_pool._options", "masked_attention._Call.tiles"
_SPMM = _candidates(
    "spmm._tiles", _tiles("R C warps", (8, 256, 8), (16, 256, 4), (16, 256, 8), (16, 128, 4), (32, 128, 8), (4, 512, 4))
)
CANDIDATES: dict[tuple[str, str], list[Candidate]] = {
    ("attention_pool", "bfloat16"): [
        *_candidates(
            _POOL,
            [
                *_tiles("T D P C warps stages", (128, 128, 32, 128, 8, 6), (128, 128, 64, 256, 8, 3)),
                *_tiles("T D P C warps stages", (128, 64, 64, 256, 8, 3), (64, 128, 64, 256, 8, 3)),
                # Two programs on a multiprocessor: one multiplies while the other adds up its rows.
                {**_tiles("T D P C warps stages", (128, 64, 32, 128, 8, 4))[0], "maxnreg": 128},
                *_tiles("T D P C warps stages", (64, 64, 64, 256, 8, 3)),
            ],
            back=False,
        ),
        *_candidates(
            _POOL,
            _tiles("T D P C warps stages", (64, 64, 64, 256, 8, 3), (128, 64, 64, 256, 8, 3), (64, 128, 32, 256, 8, 5)),
            back=True,
        ),
    ],
    ("attention_pool", "float32"): _candidates(
        _POOL, _tiles("T D P warps stages precision", (64, 64, 32, 8, 2, "tf32x3"), (128, 64, 32, 8, 2, "tf32x3"))
    ),
    ("masked_attention", "bfloat16"): [
        *_candidates(
            _ATTEND,
            _tiles("M N warps stages", (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3)),
            backward=False,
        ),
        *_candidates(
            _ATTEND,
            _tiles("M N warps stages", (64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 1), (128, 64, 8, 2)),
            backward=True,
        ),
    ],
    ("nystrom_attention", "bfloat16"): [
        *_candidates("nystrom._options", _tiles("T M warps stages", (128, 32, 8, 2), (64, 64, 4, 2)), owner="rows"),
        *_candidates(
            "nystrom._options", _tiles("M T warps stages", (64, 32, 4, 1), (128, 32, 8, 2)), owner="landmarks"
        ),
    ],
    **{(op, dtype): _SPMM for op in ("spmm", "smooth", "chebyshev") for dtype in ("bfloat16", "float32")},
    ("segment_sum", "bfloat16"): _candidates("segments._tiles", _tiles("T C warps", (64, 128, 4), (32, 256, 8))),
}
"""Operator and precision -> what may be faster than what the launcher takes."""


@contextmanager
def applied(candidate: Candidate) -> Iterator[None]:
    """Within the block, the launcher takes the candidate's tiles where they are meant."""
    file, *path, name = candidate.function.split(".")
    owner: Any = import_module(f"bigbag.kernels.gpu.{file}")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def changed(*args: Any, **kwargs: Any) -> Settings:
        meant = all(kwargs.get(key) == value for key, value in candidate.only.items())
        return original(*args, **kwargs) | (candidate.settings if meant else {})

    with mock.patch.object(owner, name, changed):
        yield


def _step(op: str, size: int, width: int, dtype: torch.dtype, device: str) -> Callable[[], list[Tensor]]:
    """Forward and backward of the operator by Triton: the output and the gradients."""
    case = make_case(op, size, width, device)
    function = next(iter(case.ours.values()))
    leaves = {n: v.to(dtype if n in (case.stored or case.leaves) else v.dtype).detach() for n, v in case.leaves.items()}
    wanted = [leaf.requires_grad_() for name, leaf in leaves.items() if name not in case.stored]
    autocast = torch.autocast(device, torch.bfloat16, enabled=bool(case.stored) and dtype == torch.bfloat16)
    incoming: list[Tensor] = []

    def step() -> list[Tensor]:
        with autocast:
            out = function(leaves, "triton")
        if not incoming:
            incoming.append(torch.randn_like(out))
        return [out.detach(), *torch.autograd.grad(out, wanted, incoming[0])]

    return step


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any result, over its largest number; NaN where there is one."""
    ratios = [(a.double() - b.double()).abs().max() / b.double().abs().max() for a, b in zip(found, expected)]
    return float(torch.stack(ratios).max())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``bigbag bench tune``; returns an exit status: 1 if a candidate computed something else."""
    parser = argparse.ArgumentParser(prog="bigbag bench tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", required=True, choices=sorted({op for op, _ in CANDIDATES}))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--size", type=positive, default=1_000_000, help="instances of the bag")
    parser.add_argument("--width", type=positive, help="features of an instance; default: as usual for the operator")
    add_device(parser, "cuda")
    parser.add_argument("--rounds", type=positive, default=7)
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    if (options.op, options.dtype) not in CANDIDATES:
        parser.error(f"no candidates of {options.op} in {options.dtype}: add them to bigbag/bench/tune.py")
    step = _step(options.op, options.size, options.width or usual_width(options.op), dtype, options.device)
    entries: dict[str, Candidate | None] = {"as it is": None}
    entries |= {str(candidate): candidate for candidate in CANDIDATES[options.op, options.dtype]}
    expected, notes = step(), dict.fromkeys(entries, "")
    times: dict[str, list[float]] = {name: [] for name in entries}
    for turn in range(options.rounds + 1):
        for name, candidate in entries.items():
            if notes[name].startswith("failed"):
                continue
            with applied(candidate) if candidate else nullcontext():
                try:
                    if not turn:  # compiles, and is compared
                        error = _error(step(), expected)
                        notes[name] = "" if error <= 16 * torch.finfo(dtype).eps else f"differs by {error:.2g}"
                    else:
                        times[name].append(seconds(step, options.device))
                except Exception as problem:  # of any layer of the compiler: the others are to be timed all the same
                    notes[name] = f"failed: {type(problem).__name__}: {str(problem).splitlines()[0][:80]}"
    return _report(options, times, notes)


def _report(options: argparse.Namespace, times: dict[str, list[float]], notes: dict[str, str]) -> int:
    print(f"{options.op}, {options.size} instances, {options.dtype}: forward + backward; {machine(options.device)}")
    middle = {name: statistics.median(found) if found else float("inf") for name, found in times.items()}
    for name in sorted(middle, key=lambda name: middle[name]):
        print(
            f"{middle[name] * 1e3:>10.3f} ms  x{middle[name] / middle['as it is']:.3f}  {name}  {notes[name]}".rstrip()
        )
    return int(any(note.startswith("differs") for note in notes.values()))
