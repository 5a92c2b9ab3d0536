"""Layers with torchmil's names, arguments and parameter names, computing on packs."""

from bigbag.nn.attention import MultiheadCrossAttention, MultiheadSelfAttention
from bigbag.nn.linear import MLP, LazyLinear, get_feat_dim
from bigbag.nn.losses import SmoothTop1SVM
from bigbag.nn.pools import AttentionPool, MaskedSoftmax, MaxPool, MeanPool, masked_softmax
from bigbag.nn.transformers import Encoder, Layer, TransformerEncoder, TransformerLayer

__all__ = [
    "MLP",
    "AttentionPool",
    "Encoder",
    "Layer",
    "LazyLinear",
    "MaskedSoftmax",
    "MaxPool",
    "MeanPool",
    "MultiheadCrossAttention",
    "MultiheadSelfAttention",
    "SmoothTop1SVM",
    "TransformerEncoder",
    "TransformerLayer",
    "get_feat_dim",
    "masked_softmax",
]
