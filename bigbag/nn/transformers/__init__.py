"""Transformer layers and encoders, in torchmil's places."""

from bigbag.nn.transformers.conventional_transformer import TransformerEncoder, TransformerLayer
from bigbag.nn.transformers.encoder import Encoder
from bigbag.nn.transformers.irpe_transformer import iRPETransformerEncoder, iRPETransformerLayer
from bigbag.nn.transformers.layer import Layer
from bigbag.nn.transformers.nystrom_transformer import NystromTransformerEncoder, NystromTransformerLayer
from bigbag.nn.transformers.sm_transformer import SmTransformerEncoder, SmTransformerLayer
from bigbag.nn.transformers.t2t import T2TLayer

__all__ = [
    "Encoder",
    "Layer",
    "NystromTransformerEncoder",
    "NystromTransformerLayer",
    "SmTransformerEncoder",
    "SmTransformerLayer",
    "T2TLayer",
    "TransformerEncoder",
    "TransformerLayer",
    "iRPETransformerEncoder",
    "iRPETransformerLayer",
]
