"""Features that a trained module makes of the instances, a chunk at a time, whenever they are needed.

A model that pools needs of each instance's features only a few numbers (scores) and their share in weighted sums. So
the features of a bag need never exist at once, nor their gradient: memory is set by the chunk, however large the bag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigbag import ops
from bigbag.bags import Segments
from bigbag.nn.pool_rows import chunks_by_bag, pool_rows
from bigbag.nn.rows import by_rows, chunk_rows
from bigbag.ops.rows import combine_rows
from bigbag.ops.segments import largest_of_ranks


@dataclass(frozen=True)
class Encoded:
    """``module(x)``, row by row, not computed.

    Where the module draws random numbers (dropout in training), those of a chunk follow from a seed and the chunk's
    place. So all passes over the rows see the same features.

    Attributes:
        x: ``(T, ...)`` instances as they are stored, in memory or mapped from a file.
        module: row-wise, to ``(T, P)``.
        chunk: rows to compute together; None: so many as 2048 (GPU: 16,384) rows of 1024 numbers hold.
    """

    x: Tensor
    module: torch.nn.Module
    chunk: int | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """``(T, P)``."""
        with torch.no_grad(), torch.random.fork_rng(self._devices):
            return len(self), self._encode(self.x.new_zeros(1, *self.x.shape[1:])).shape[-1]

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def step(self) -> int:
        """Rows that are computed together."""
        return chunk_rows(self.x, self.chunk)

    @cached_property
    def _places(self) -> tuple[Tensor, ...]:
        """Where the module draws numbers: the seed of each row, of which that of a chunk's first one counts."""
        if not any(_may_draw(part) for part in self.module.modules()):
            return ()
        return (torch.arange(len(self)) + int(torch.randint(2**40, ())),)

    @property
    def _devices(self) -> list[torch.device]:
        return [self.device] if self.x.is_cuda else []

    def _encode(self, rows: Tensor, *places: Tensor) -> Tensor:
        return _encode(self.module, rows, *places)

    def _after(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Without self, and so all rows, in what is returned, which lives until the backward pass is over.
        module, num_places = self.module, len(self._places)
        return lambda rows, *more: function(_encode(module, rows, *more[:num_places]), *more[num_places:])

    def map(
        self,
        function: Callable[..., Any],
        *inputs: Tensor,
        modules: Iterable[torch.nn.Module] = (),
        shared: Iterable[Tensor] = (),
    ) -> Any:
        """``function(features, *inputs)`` as :func:`bigbag.nn.rows.by_rows`, with the features of one chunk at once."""
        given = (self.x, *self._places, *inputs)
        modules = (*modules, self.module)
        return by_rows(self._after(function), *given, modules=modules, shared=shared, chunk=self.step)

    def pool(
        self,
        function: Callable[..., tuple[Tensor, Tensor]],
        *inputs: Tensor,
        segments: Segments,
        softmax: bool = True,
        modules: Iterable[torch.nn.Module] = (),
        shared: Iterable[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """:func:`bigbag.nn.pool_rows.pool_rows` of the values and scores that ``function(features, ...)`` gives."""
        given = (self.x, *self._places, *inputs)
        return pool_rows(
            self._after(function),
            *given,
            segments=segments,
            softmax=softmax,
            modules=(*modules, self.module),
            shared=shared,
            chunk=self.step,
        )

    def weighted_sum(self, weights: Tensor, segments: Segments) -> Tensor:
        """``(T, S)`` weights to the weighted sums of the features of each bag, ``(B, S, P)``."""
        return self.pool(lambda features, w: (features, w), weights, segments=segments, softmax=False)[0]

    def materialize(self) -> Tensor:
        """The features of all rows, ``(T, P)``."""
        return self.map(lambda features: features)

    def take(self, rows: Tensor) -> Tensor:
        """The features of a few different rows, ``(k, P)``."""
        if not self._places:
            return Encoded(self.x[rows], self.module, self.chunk).materialize()
        # Random numbers are those of a chunk, so all of it is computed.
        found, order = [], rows.argsort()
        of_chunks, counts = (rows[order] // self.step).unique_consecutive(return_counts=True)
        for number, part in zip(of_chunks.tolist(), rows[order].split(counts.tolist())):
            chunk = slice(number * self.step, (number + 1) * self.step)
            given = (self.x[chunk], *(place[chunk] for place in self._places))
            found.append(checkpoint(self._some_of, part - chunk.start, *given, use_reentrant=False))
        return torch.cat(found)[order.argsort()]

    def at(self, index: Tensor, pick: Callable[[Tensor, Tensor], Tensor] = lambda x, places: x[places]) -> Tensor:
        """``pick(features, index)``, zeros where the index is -1; only features that it names are computed."""
        index = index if len(self) else torch.full_like(index, -1)
        rows, places = index[index >= 0].unique(return_inverse=True)
        every = torch.zeros_like(index)
        every[index >= 0] = places
        # One row at least, so that the modules keep their place in the graph where no row is asked for.
        features = self.take(rows) if len(rows) else self._encode(self.x.new_zeros(1, *self.x.shape[1:])) * 0
        found = pick(features, every)
        return torch.where((index < 0).view(*index.shape, *[1] * (found.dim() - index.dim())), 0, found)

    def _some_of(self, rows: Tensor, *given: Tensor) -> Tensor:
        return self._encode(*given)[rows]


def _encode(module: torch.nn.Module, rows: Tensor, *places: Tensor) -> Tensor:
    dtype = next((p.dtype for p in module.parameters()), rows.dtype)
    if not (places and len(rows)):
        return module(rows.to(dtype))
    with torch.random.fork_rng([rows.device] if rows.is_cuda else []):
        seed_generators(int(places[0][0]))
        return module(rows.to(dtype))


def seed_generators(seed: int) -> None:
    """``torch.manual_seed`` of the generators in use. For devices that are not it keeps a note of each call, with its
    traceback: that takes milliseconds, and memory that is never freed."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def rows_of(
    x: Tensor | Encoded,
    function: Callable[..., Any],
    *inputs: Tensor,
    modules: Iterable[torch.nn.Module] = (),
    shared: Iterable[Tensor] = (),
) -> Any:
    """``function(x, *inputs)``, row-wise, of features that may not be computed yet."""
    return function(x, *inputs) if isinstance(x, Tensor) else x.map(function, *inputs, modules=modules, shared=shared)


def weighted_sum(weights: Tensor, x: Tensor | Encoded, segments: Segments) -> Tensor:
    """:func:`bigbag.ops.segment_pool` of features that may not be computed yet."""
    return ops.segment_pool(weights, x, segments) if isinstance(x, Tensor) else x.weighted_sum(weights, segments)


def take_rows(x: Tensor | Encoded, index: Tensor, segments: Segments | None = None) -> Tensor:
    """:func:`bigbag.ops.take_rows` of features that may not be computed yet."""
    if isinstance(x, Tensor):
        return ops.take_rows(x, index, segments)
    return combine_rows(x.at(index), segments)


def segment_max(x: Tensor | Encoded, segments: Segments) -> Tensor:
    """:func:`bigbag.ops.segment_max` of features that may not be computed yet.

    They are computed once to find the maxima, and those of the at most B P rows that hold one again, with gradient.
    """
    if isinstance(x, Tensor):
        return ops.segment_max(x, segments)
    index = _maximal_rows(x, segments)
    own = x.at(index, lambda features, places: features.gather(0, places))
    return own if segments.parts is None else largest_of_ranks(own, segments, segments.parts)


@torch.no_grad()
def _maximal_rows(x: Encoded, segments: Segments) -> Tensor:
    """(B, P) the first row of each bag that attains the maximum of each feature, -1 for an empty bag."""
    index = torch.full((segments.num_bags, x.shape[1]), -1, device=x.device)
    top: Tensor | None = None
    for rows, pieces in chunks_by_bag(segments, x.step):
        values = x._encode(x.x[rows], *(place[rows] for place in x._places))
        top = values.new_full(index.shape, -torch.inf) if top is None else top
        for bag, part in pieces:
            best, row = values[part].max(0)
            better = (best > top[bag]) | (index[bag] < 0)
            top[bag] = torch.where(better, best, top[bag])
            index[bag] = torch.where(better, row + rows.start + part.start, index[bag])
    return index


def _may_draw(part: torch.nn.Module) -> bool:
    """Whether a module may draw random numbers: dropout, and modules of users, in training."""
    if isinstance(part, torch.nn.modules.dropout._DropoutNd):
        return part.training and part.p > 0
    return part.training and not type(part).__module__.startswith(("torch.nn.", "bigbag."))


def refuse_batch_statistics(module: torch.nn.Module) -> None:
    """Refuse a module whose result for one row depends on the rows that it is computed with.

    Raises:
        ValueError: batch normalisation in training mode.
    """
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.training:
            raise ValueError(
                f"{type(part).__name__} {name!r} normalises by the statistics of a chunk of instances, or of one "
                "rank's, not of the bag: use GroupNorm or LayerNorm, put it in eval mode, or compute whole bags "
                "(activation_checkpointing off, parallel.bag 1)"
            )
