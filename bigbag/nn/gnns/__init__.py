"""Graph layers, in torchmil's place."""

from bigbag import torchmil_files
from bigbag.nn.chebyshev import ChebConv
from bigbag.nn.graph import DeepGCNLayer, GCNConv, GNNIdentity
from bigbag.nn.mincut import dense_mincut_pool

__all__ = ["ChebConv", "DeepGCNLayer", "GCNConv", "GNNIdentity", "dense_mincut_pool"]

torchmil_files.attach(__name__)
