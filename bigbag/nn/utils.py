"""What torchmil users import from ``torchmil.nn.utils``."""

from bigbag.nn.linear import LazyLinear, get_feat_dim
from bigbag.nn.losses import SmoothTop1SVM
from bigbag.nn.pools import MaskedSoftmax, masked_softmax
from bigbag.nn.positions import SinusoidalPositionalEncodingND

__all__ = [
    "LazyLinear",
    "MaskedSoftmax",
    "SinusoidalPositionalEncodingND",
    "SmoothTop1SVM",
    "get_feat_dim",
    "masked_softmax",
]
