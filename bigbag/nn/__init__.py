"""Layers with torchmil's names, arguments and parameter names, computing on packs."""

from bigbag import torchmil_files
from bigbag.nn.attention import (
    MultiheadCrossAttention,
    MultiheadSelfAttention,
    NystromAttention,
    iRPEMultiheadSelfAttention,
)
from bigbag.nn.chebyshev import ChebConv
from bigbag.nn.graph import DeepGCNLayer, GCNConv, GNNIdentity
from bigbag.nn.linear import MLP, LazyLinear, get_feat_dim
from bigbag.nn.losses import SmoothTop1SVM
from bigbag.nn.mincut import dense_mincut_pool
from bigbag.nn.pools import AttentionPool, MaskedSoftmax, MaxPool, MeanPool, masked_softmax
from bigbag.nn.positions import SinusoidalPositionalEncodingND
from bigbag.nn.prob_smooth_attention_pool import ProbSmoothAttentionPool
from bigbag.nn.sm import ApproxSm, ExactSm, Sm
from bigbag.nn.sm_attention_pool import SmAttentionPool
from bigbag.nn.transformers import (
    Encoder,
    Layer,
    NystromTransformerEncoder,
    NystromTransformerLayer,
    SmTransformerEncoder,
    SmTransformerLayer,
    T2TLayer,
    TransformerEncoder,
    TransformerLayer,
    iRPETransformerEncoder,
    iRPETransformerLayer,
)
from bigbag.nn.transformers.sm_transformer import SmMultiheadSelfAttention
from bigbag.nn.variational_autoencoder import VariationalAutoEncoder, VariationalAutoEncoderMIL

__all__ = [
    "MLP",
    "ApproxSm",
    "AttentionPool",
    "ChebConv",
    "DeepGCNLayer",
    "Encoder",
    "ExactSm",
    "GCNConv",
    "GNNIdentity",
    "Layer",
    "LazyLinear",
    "MaskedSoftmax",
    "MaxPool",
    "MeanPool",
    "MultiheadCrossAttention",
    "MultiheadSelfAttention",
    "NystromAttention",
    "NystromTransformerEncoder",
    "NystromTransformerLayer",
    "ProbSmoothAttentionPool",
    "SinusoidalPositionalEncodingND",
    "Sm",
    "SmAttentionPool",
    "SmMultiheadSelfAttention",
    "SmTransformerEncoder",
    "SmTransformerLayer",
    "SmoothTop1SVM",
    "T2TLayer",
    "TransformerEncoder",
    "TransformerLayer",
    "VariationalAutoEncoder",
    "VariationalAutoEncoderMIL",
    "dense_mincut_pool",
    "get_feat_dim",
    "iRPEMultiheadSelfAttention",
    "iRPETransformerEncoder",
    "iRPETransformerLayer",
    "masked_softmax",
]

torchmil_files.attach(__name__)
