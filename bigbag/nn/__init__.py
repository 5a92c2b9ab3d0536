"""Layers with torchmil's names, arguments and parameter names, computing on packs."""

from bigbag.nn.attention import MultiheadCrossAttention, MultiheadSelfAttention
from bigbag.nn.graph import DeepGCNLayer, GCNConv, GNNIdentity
from bigbag.nn.irpe import iRPEMultiheadSelfAttention, iRPETransformerEncoder, iRPETransformerLayer
from bigbag.nn.linear import MLP, LazyLinear, get_feat_dim
from bigbag.nn.losses import SmoothTop1SVM
from bigbag.nn.nystrom import NystromAttention, NystromTransformerEncoder, NystromTransformerLayer
from bigbag.nn.pools import AttentionPool, MaskedSoftmax, MaxPool, MeanPool, masked_softmax
from bigbag.nn.positions import SinusoidalPositionalEncodingND
from bigbag.nn.prob_smooth_attention_pool import ProbSmoothAttentionPool
from bigbag.nn.sm import ApproxSm, ExactSm, Sm
from bigbag.nn.sm_attention_pool import SmAttentionPool
from bigbag.nn.sm_transformer import SmMultiheadSelfAttention, SmTransformerEncoder, SmTransformerLayer
from bigbag.nn.t2t import T2TLayer
from bigbag.nn.transformers import Encoder, Layer, TransformerEncoder, TransformerLayer
from bigbag.nn.variational_autoencoder import VariationalAutoEncoder, VariationalAutoEncoderMIL

__all__ = [
    "MLP",
    "ApproxSm",
    "AttentionPool",
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
    "get_feat_dim",
    "iRPEMultiheadSelfAttention",
    "iRPETransformerEncoder",
    "iRPETransformerLayer",
    "masked_softmax",
]
