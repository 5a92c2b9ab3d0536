"""Layers with torchmil's names, arguments and parameter names, computing on packs."""

from bigbag.nn.linear import MLP, LazyLinear, get_feat_dim
from bigbag.nn.pools import AttentionPool, MaskedSoftmax, MaxPool, MeanPool, masked_softmax

__all__ = [
    "MLP",
    "AttentionPool",
    "LazyLinear",
    "MaskedSoftmax",
    "MaxPool",
    "MeanPool",
    "get_feat_dim",
    "masked_softmax",
]
