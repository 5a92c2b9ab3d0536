"""Operators over packs of bags: one meaning, several implementations.

    z, scores = ops.attention_pool(x, bags.segments, w1, b1, w2)
    print(ops.explain())                                    # what would run here, and why
    with ops.use_impl({"attention_pool": "reference"}): ...

To add an operator: one file here, at most one each in ``kernels/cpu`` and ``kernels/gpu``, its module in the list
below, and its samples in ``bigbag.samples``.
"""

from __future__ import annotations

import importlib

import torch

from bigbag.ops.attention_bias import AttentionBias, DistanceBias, RelativePositionBias
from bigbag.ops.attention_pool import attention_pool
from bigbag.ops.attention_scores import attention_scores
from bigbag.ops.chebyshev import chebyshev, lambda_max
from bigbag.ops.chebyshev_conv import chebyshev_conv
from bigbag.ops.class_attention import class_token_attention, mean_attention
from bigbag.ops.depthwise_conv import depthwise_conv
from bigbag.ops.dilated_attention import Branch, dilated_attention, dilated_branches
from bigbag.ops.dot_pool import dot_attention_pool
from bigbag.ops.expected_attention import expected_attention
from bigbag.ops.masked_attention import masked_attention
from bigbag.ops.neighbor_attention import neighbor_attention, neighbor_scores
from bigbag.ops.nystrom import nystrom_attention, nystrom_class_token_attention
from bigbag.ops.nystrom_token import landmark_means, nystrom_token_attention
from bigbag.ops.quadratic import dirichlet_energy, quadratic_form
from bigbag.ops.registry import Operator, use_impl
from bigbag.ops.registry import table as _table
from bigbag.ops.rows import segment_dots, take_rows
from bigbag.ops.sampled_attention import attention_draws, sampled_attention
from bigbag.ops.segments import segment_max, segment_mean, segment_softmax, segment_sum
from bigbag.ops.smooth import smooth
from bigbag.ops.smooth_directed import smooth_exact_directed
from bigbag.ops.smooth_exact import IndefiniteSystem, smooth_exact
from bigbag.ops.spmm import degrees, spmm
from bigbag.ops.topk import segment_logsumexp, segment_pool, segment_topk
from bigbag.ops.transpose import marked_symmetric, transpose

__all__ = [
    "AttentionBias",
    "Branch",
    "DistanceBias",
    "IndefiniteSystem",
    "RelativePositionBias",
    "attention_draws",
    "attention_pool",
    "attention_scores",
    "chebyshev",
    "chebyshev_conv",
    "chosen",
    "class_token_attention",
    "degrees",
    "depthwise_conv",
    "dilated_attention",
    "dilated_branches",
    "dirichlet_energy",
    "dot_attention_pool",
    "expected_attention",
    "explain",
    "lambda_max",
    "landmark_means",
    "marked_symmetric",
    "masked_attention",
    "mean_attention",
    "neighbor_attention",
    "neighbor_scores",
    "nystrom_attention",
    "nystrom_class_token_attention",
    "nystrom_token_attention",
    "quadratic_form",
    "sampled_attention",
    "segment_dots",
    "segment_logsumexp",
    "segment_max",
    "segment_mean",
    "segment_pool",
    "segment_softmax",
    "segment_sum",
    "segment_topk",
    "smooth",
    "smooth_exact",
    "smooth_exact_directed",
    "spmm",
    "take_rows",
    "transpose",
    "use_impl",
]

_MODULES = (
    "attention_pool",
    "attention_scores",
    "segments",
    "topk",
    "rows",
    "dot_pool",
    "spmm",
    "smooth",
    "smooth_exact",
    "chebyshev",
    "neighbor_attention",
    "quadratic",
    "masked_attention",
    "class_attention",
    "dilated_attention",
    "depthwise_conv",
    "nystrom",
    "sampled_attention",
    "expected_attention",
)
# By the modules' names: several share theirs with a function, which is what this package exports.
_OPERATORS: tuple[Operator, ...] = tuple(
    row for module in _MODULES for row in importlib.import_module(f"bigbag.ops.{module}").OPERATORS
)


def chosen(device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Operator -> the implementation that ``impl=None`` runs on ``device`` with ``dtype``."""
    rows = _table(_OPERATORS, torch.device(device).type, dtype)
    return {row["operator"]: row["impl"] for row in rows if row["chosen"]}


def explain(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> str:
    """A table of operators and implementations: which one would run on ``device`` with ``dtype``, and why.

    Args:
        device: default: "cuda" where there is one, else "cpu".
        dtype: of the operator's first argument (``attention_pool``: of the computation).
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    rows = _table(_OPERATORS, kind, dtype)
    head = {name: name for name in rows[0]}
    width = {name: max(len(row[name]) for row in [head, *rows]) for name in head}
    return "\n".join("  ".join(row[name].ljust(width[name]) for name in head).rstrip() for row in [head, *rows])
