"""Models of bags, one per file, with torchmil's names, arguments and parameter names."""

from bigbag import torchmil_files
from bigbag.models.abmil import ABMIL
from bigbag.models.base import CoordsMILModel, GraphMILModel, MILModel, MILModelWrapper
from bigbag.models.build import MODELS, build_model, load_model, save_model
from bigbag.models.camil import CAMIL
from bigbag.models.clam import CLAM_MB, CLAM_SB
from bigbag.models.deepgraphsurv import DeepGraphSurv
from bigbag.models.dsmil import DSMIL
from bigbag.models.dtfdmil import DTFDMIL
from bigbag.models.gtp import GTP
from bigbag.models.iibmil import IIBMIL
from bigbag.models.longnet import LongNetMIL
from bigbag.models.patch_gcn import PatchGCN
from bigbag.models.pooling import MaxMIL, MeanMIL
from bigbag.models.prob_smooth_abmil import ProbSmoothABMIL, SmoothABMIL
from bigbag.models.setmil import SETMIL
from bigbag.models.sm_abmil import SmABMIL
from bigbag.models.sm_transformer_abmil import SmTransformerABMIL
from bigbag.models.transformer_abmil import TransformerABMIL
from bigbag.models.transformer_prob_smooth_abmil import TransformerProbSmoothABMIL
from bigbag.models.transmil import TransMIL
from bigbag.models.vaeabmil import VAEABMIL

__all__ = [
    "ABMIL",
    "CAMIL",
    "CLAM_MB",
    "CLAM_SB",
    "DSMIL",
    "DTFDMIL",
    "GTP",
    "IIBMIL",
    "MODELS",
    "SETMIL",
    "VAEABMIL",
    "CoordsMILModel",
    "DeepGraphSurv",
    "GraphMILModel",
    "LongNetMIL",
    "MILModel",
    "MILModelWrapper",
    "MaxMIL",
    "MeanMIL",
    "PatchGCN",
    "ProbSmoothABMIL",
    "SmABMIL",
    "SmTransformerABMIL",
    "SmoothABMIL",
    "TransMIL",
    "TransformerABMIL",
    "TransformerProbSmoothABMIL",
    "build_model",
    "load_model",
    "save_model",
]

torchmil_files.attach(__name__)
