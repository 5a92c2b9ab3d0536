"""What tests and benchmarks of bigbag share: samples of operators, error budgets, poisoned memory, peak memory, ranks.

    for sample in samples("attention_pool"):
        check(sample, impl="cpu", dtype=torch.float32)     # raises AssertionError

The oracle is the operator's reference in float64. An implementation may err twice as much as the reference does in the
precision under test, plus rounding: so the budget follows from the definition, not from what a kernel happens to do.
In float64 the oracle errs as well, by once as much.

The reference's error is random: what counts is the largest budget of K = ``DRAWS`` draws of the same kind of numbers.
For long results that changes little: the largest of n errors is about sqrt(2 log n) of their standard deviations. But
let a result be one number, the sum of terms t of random signs, and s^2 = sum t^2. Its error e is about normal, of
deviation c eps s, c from how often a term is rounded; its value v of deviation s. An implementation whose error is
distributed like e exceeds a budget of one draw, 2 (|e| + eps |v|), with a probability of 7% where c = 1: whenever e and
v happen to be small. It exceeds the largest of K = 2, 4, 8 with 1.3%, 0.13%, 0.005%.
"""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bigbag import ops
from bigbag.bags import Segments

SIZES = {
    "one bag": (37,),
    "several": (5, 1, 300, 64, 17),
    "empty bags": (0, 9, 0, 130, 0),
    "one instance": (1,),
    "small bags": (4,) * 40 + (3, 1, 2),
    "off the block": (1025, 513),
    "long bag": (2600, 3),
    "no bag has instances": (0, 0),
}
"""Ways to cut a pack that have gone wrong somewhere."""

DRAWS = 8
"""Draws that an error budget is the largest of."""


@dataclass(frozen=True)
class Sample:
    """One call of one operator: named tensors, how its rows are cut, and keyword arguments.

    Attributes:
        op: name of the function in ``bigbag.ops``.
        name: what is special about it.
        sizes: instances of each bag.
        make: generator -> named float64 tensors on the CPU, in the order of the operator's arguments.
        options: keyword arguments of the call.
        contiguous: False lays the tensors of instances out with their rows apart and their columns strided.
        cut: what the first dimension of a tensor ("x", "output 0") counts: "rows" (instances), "bags", or what else
            :meth:`bounds` knows. A tensor that is not named belongs to all bags together:
            a parameter, or a sum over bags.
        of: the pack and the bag that this sample is the only one of.
        amplification: by how much the operator's own recomputation magnifies rounding; 1 for none. Attention takes its
            weights in backward from exp(S - L), L the logsumexp: rounding S and L to eps |L| errs by as much there.
        seed: of the numbers, and of the gradients that come in.
    """

    op: str
    name: str
    sizes: tuple[int, ...]
    make: Callable[[torch.Generator], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    contiguous: bool = True
    cut: Mapping[str, str] = field(default_factory=lambda: {"x": "rows", "output 0": "bags"}, kw_only=True)
    of: tuple[Any, int] | None = field(default=None, kw_only=True)
    amplification: float = field(default=1.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __str__(self) -> str:
        return f"{self.op}, {self.name}"

    def tensors(self, dtype: torch.dtype, device: str = "cpu", stored: torch.dtype | None = None) -> dict[str, Tensor]:
        """Leaves that require grad, rounded to ``dtype``; the first one to ``stored`` if given."""
        made = self.make(torch.Generator().manual_seed(2 * self.seed))
        out = {}
        for position, (name, value) in enumerate(made.items()):
            value = value.to(stored if stored is not None and position == 0 else dtype).to(device)
            if self.cut.get(name) == "rows" and not self.contiguous:
                wide = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1] + 3)
                wide[..., 3::2] = value
                value = wide[..., 3::2]
            out[name] = value.detach().requires_grad_()
        return out

    def structure(self, device: str) -> dict[str, Any]:
        """The arguments that are not differentiated: how the pack is cut, graphs, masks, positions."""
        return {"segments": Segments.from_sizes(self.sizes, device)}

    def apply(self, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], impl: str | None) -> Any:
        first, *names = tensors
        rest = {name: tensors[name] for name in names}
        return getattr(ops, self.op)(tensors[first], structure["segments"], **rest, **self.options, impl=impl)

    def call(self, tensors: Mapping[str, Tensor], impl: str | None) -> tuple[Tensor, ...]:
        """The outputs of the operator."""
        device = next(iter(tensors.values())).device.type
        out = self.apply(tensors, self.structure(device), impl)
        return out if isinstance(out, tuple) else (out,)

    def rounding(self, dtype: torch.dtype) -> float:
        """By how much of the largest number a result may err for its rounding."""
        return self.amplification * torch.finfo(dtype).eps

    def alone(self, bag: int) -> Sample:
        """The same call of one bag; its tensors are the pack's, cut by :meth:`part`."""
        return replace(self, sizes=self.sizes[bag : bag + 1], of=(self, bag))

    def bounds(self, kind: str, bag: int) -> tuple[int, int]:
        """Where the bag's part of what ``kind`` counts begins and ends."""
        if kind == "bags":
            return bag, bag + 1
        assert kind == "rows", f"{self}: nothing counts {kind}"
        start = sum(self.sizes[:bag])
        return start, start + self.sizes[bag]

    def part(self, name: str, value: Tensor, bag: int) -> Tensor:
        """The bag's part of an input, an output or their gradient; ``value`` itself where all bags share it."""
        kind = self.cut.get(name)
        return value if kind is None else value[slice(*self.bounds(kind, bag))]


def samples(op: str) -> list[Sample]:
    """The calls on which operator ``op`` is proved, from ``bigbag.samples``.

    Raises:
        ValueError: an operator without samples.
    """
    import bigbag.samples

    names = [module.name for module in pkgutil.iter_modules(bigbag.samples.__path__)]
    modules = [importlib.import_module(f"bigbag.samples.{name}") for name in names]
    found = [sample for module in modules for sample in module.SAMPLES if sample.op == op]
    if not found:
        raise ValueError(f"operator {op!r} has no samples: add them to a file in bigbag/samples")
    return found


def fixed_random(outputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Random float64 weights of the same shapes, rounded to 16 bits: the same gradient enters in every precision."""
    generator = torch.Generator().manual_seed(2 * seed + 1)
    drawn = [torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(torch.float16) for out in outputs]
    return [weight.double().to(out.device) for weight, out in zip(drawn, outputs)]


def run(
    sample: Sample, tensors: dict[str, Tensor], impl: str | None, weights: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs, and the gradients of their sum weighted by ``weights`` (default: :func:`fixed_random`), as float64."""
    outputs = sample.call(tensors, impl)
    weights = fixed_random(outputs, sample.seed) if weights is None else weights
    loss = sum(((out.double() * weight).sum() for out, weight in zip(outputs, weights)), torch.zeros(()))
    grads = torch.autograd.grad(loss, list(tensors.values()))
    found = {f"output {i}": out for i, out in enumerate(outputs)}
    found |= {f"gradient of {name}": grad for name, grad in zip(tensors, grads)}
    return {name: value.detach().double().cpu() for name, value in found.items()}


def _exact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double().cpu().requires_grad_() for name, value in tensors.items()}


def _within(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What overflows in ``dtype`` counts as its largest number: infinite errors would allow anything."""
    limit = torch.finfo(dtype).max
    return value.clamp(-limit, limit)


def _errors(found: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """The largest error of each result that has numbers."""
    return {
        name: float((_within(found[name], dtype) - _within(value, dtype)).abs().max())
        for name, value in truth.items()
        if value.numel()
    }


def _budgets(sample: Sample, dtype: torch.dtype, device: str, stored: torch.dtype | None) -> dict[str, float]:
    """2 x (error of the reference + rounding) of each result, from one draw.

    For float64, 3 x, the error being twice float32's scaled down, since a vector has half as many lanes of float64:
    sums are of half as many partial sums, each twice as long.
    """
    lower = torch.float32 if dtype == torch.float64 else dtype
    low = sample.tensors(lower, device, stored)
    truth = run(sample, _exact(low), "reference")
    factor, scale = (2, 1.0) if lower == dtype else (3, 2 * torch.finfo(dtype).eps / torch.finfo(lower).eps)
    errors, rounding = _errors(run(sample, low, "reference"), truth, lower), sample.rounding(dtype)
    return {
        name: factor * (scale * error + rounding * float(_within(truth[name], dtype).abs().max()))
        for name, error in errors.items()
    }


def check(
    sample: Sample, impl: str, dtype: torch.dtype, device: str = "cpu", stored: torch.dtype | None = None
) -> dict[str, float]:
    """Compare ``impl`` in ``dtype`` with the float64 reference on the same (rounded) numbers.

    Args:
        stored: dtype of the first tensor, where it is stored narrower than the rest.

    Returns:
        For each output and gradient, its error divided by its budget, from as many draws as it took.

    Raises:
        AssertionError: an error beyond 2 x (error of the reference in ``dtype`` + rounding, amplified), the largest of
            ``DRAWS`` draws, or a NaN; float64: beyond 3 x.
    """
    low = sample.tensors(dtype, device, stored)
    truth, found = run(sample, _exact(low), "reference"), run(sample, low, impl)
    for name, value in truth.items():
        assert found[name].shape == value.shape, f"{sample}: {name} has shape {tuple(found[name].shape)}"
    errors, budgets = _errors(found, truth, dtype), _budgets(sample, dtype, device, stored)
    for seed in range(sample.seed + 1, sample.seed + DRAWS):
        if all(error <= budgets[name] for name, error in errors.items()):
            break  # a further draw could only allow more
        drawn = _budgets(replace(sample, seed=seed), dtype, device, stored)
        budgets = {name: max(budget, drawn[name]) for name, budget in budgets.items()}
    for name, error in errors.items():
        # Written so that a NaN fails.
        what = f"{sample}, {impl}, {dtype}: {name} errs by {error:.3g}, budget {budgets[name]:.3g}"
        assert error <= budgets[name], what
    return {name: error / budgets[name] if budgets[name] else 0.0 for name, error in errors.items()}


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within the block, ``torch.empty`` and its kin give NaN (or the largest integer), so that reading memory that
    nothing wrote shows up in the result."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(float("nan"))
            return out if out.dtype in (torch.bool, torch.uint8) else out.fill_(torch.iinfo(out.dtype).max)

        return made

    with (
        mock.patch("torch.empty", poison(torch.empty)),
        mock.patch("torch.empty_like", poison(torch.empty_like)),
        mock.patch("torch.Tensor.new_empty", poison(Tensor.new_empty)),
    ):
        yield


def _rank_main(
    rank: int, environment: dict[str, str], folder: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    gc.freeze()  # what the server imported: a collection of garbage would walk it, and copy the pages it shares
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    world_size = int(environment["WORLD_SIZE"])
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
        )
        outcome = (True, fn(*args))
        torch.distributed.destroy_process_group()
    except BaseException:
        outcome = (False, traceback.format_exc())
    path = os.path.join(folder, f"rank{rank}")
    torch.save(outcome, path + ".part")
    os.replace(path + ".part", path)


def free_port() -> int:
    """A port for the rendezvous of a launcher; two launchers on their default one would meet each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def forkserver() -> Any:
    """A multiprocessing context whose processes are forked off a server that has imported what a run needs, which takes
    a fresh process several seconds. The server does nothing else, and asks no driver for devices."""
    context = torch.multiprocessing.get_context("forkserver")
    # DeepSpeed's ZeRO has torch import the second, which takes longer than a small run; the third brings numba.
    imported = ["bigbag.engine.run", "torch._inductor.compile_fx", "bigbag.kernels.cpu.attention_pool"]
    context.set_forkserver_preload(imported)
    return context


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Run ``fn(*args)`` on ``world_size`` gloo ranks, each a process of its own (:func:`forkserver`) with one thread.

    RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are set, and the process group is initialised.

    Args:
        fn: a function that can be pickled: one defined in a module.
        world_size: number of ranks.
        timeout_s: seconds after which every rank is killed.

    Returns:
        What each rank returned, in order of rank.

    Raises:
        RuntimeError: a rank raised (with its traceback), died, or the time ran out.
    """
    context = forkserver()
    one_thread = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    environment = {**os.environ, **one_thread, "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    with tempfile.TemporaryDirectory(prefix="bigbag-ranks-") as folder:
        given = [(rank, environment, folder, fn, args) for rank in range(world_size)]
        processes = [context.Process(target=_rank_main, args=arguments) for arguments in given]
        with mock.patch.dict(os.environ, one_thread):  # of the server, when this is the first call
            for process in processes:
                process.start()
        try:
            return _collect(processes, folder, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(processes: Sequence[Any], folder: str, timeout_s: float) -> list[Any]:
    """The results; as soon as one rank has failed, its error, since the others may wait for it forever."""
    import time
    from multiprocessing.connection import wait

    deadline = time.monotonic() + timeout_s
    running = dict(enumerate(processes))
    results: dict[int, Any] = {}
    while running:
        left = deadline - time.monotonic()
        if left <= 0:
            raise RuntimeError(f"ranks {sorted(running)} did not finish within {timeout_s} s and were killed")
        wait([process.sentinel for process in running.values()], timeout=left)
        for rank, process in list(running.items()):
            if process.is_alive():
                continue
            del running[rank]
            path = os.path.join(folder, f"rank{rank}")
            if not os.path.exists(path):
                raise RuntimeError(f"rank {rank} died with exit code {process.exitcode} and left no result")
            succeeded, value = torch.load(path, weights_only=False)
            if not succeeded:
                raise RuntimeError(f"rank {rank} of {len(processes)} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(processes))]
