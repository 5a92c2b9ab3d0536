"""What is found once per graph, however many operators, layers and steps ask for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from bigbag.adjacency import Adjacency

_Function = TypeVar("_Function", bound=Callable[..., Any])


def once_per_graph(weighted: bool) -> Callable[[_Function], _Function]:
    """Decorates a function of a graph and of what can be a key: its result is kept as long as the graph's tensors live.

    Found anew where a tensor is another one or has changed in place, and always while tracing and of tensors of
    inference mode, which have no version by which to know. A result must not hold the graph's columns, which it would
    keep alive.

    Args:
        weighted: whether the result depends on the weights.
    """

    def decorate(find: _Function) -> _Function:
        # By the tensor of columns.
        kept = WeakTensorKeyDictionary()

        @wraps(find)
        def found(adj: Adjacency, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return find(adj, *args, **kwargs)
            others = (adj.crow, adj.weight) if weighted else (adj.crow,)
            tensors = [t for t in (adj.col, *others) if t is not None]
            if any(t.is_inference() for t in tensors):
                return find(adj, *args, **kwargs)
            versions = [t._version for t in tensors]
            known: Any = kept.get(adj.col)
            if known is None or known[1] != versions or any(a is not b for a, b in zip(known[0], others)):
                known = kept[adj.col] = (others, versions, {})
            key = (args, *kwargs.items())
            if key not in known[2]:
                known[2][key] = find(adj, *args, **kwargs)
            return known[2][key]

        return cast(_Function, found)

    return decorate
