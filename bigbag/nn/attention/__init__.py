"""Attention: pools and layers, in torchmil's places."""

from bigbag import torchmil_files
from bigbag.nn.attention.base import SelfAttention
from bigbag.nn.attention.irpe_multihead_self_attention import iRPEMultiheadSelfAttention
from bigbag.nn.attention.multihead_cross_attention import MultiheadCrossAttention
from bigbag.nn.attention.multihead_self_attention import MultiheadSelfAttention
from bigbag.nn.attention.nystrom_attention import NystromAttention
from bigbag.nn.pools import AttentionPool
from bigbag.nn.prob_smooth_attention_pool import ProbSmoothAttentionPool
from bigbag.nn.sm_attention_pool import SmAttentionPool

__all__ = [
    "AttentionPool",
    "MultiheadCrossAttention",
    "MultiheadSelfAttention",
    "NystromAttention",
    "ProbSmoothAttentionPool",
    "SelfAttention",
    "SmAttentionPool",
    "iRPEMultiheadSelfAttention",
]

torchmil_files.attach(__name__)
