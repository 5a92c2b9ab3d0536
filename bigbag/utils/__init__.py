"""What torchmil users import from ``torchmil.utils``: a trainer for their loaders, helpers for graphs and files."""

from bigbag import torchmil_files
from bigbag.engine.annealing import (
    AnnealingScheduler,
    ConstantAnnealingScheduler,
    CyclicalAnnealingScheduler,
    LinearAnnealingScheduler,
)
from bigbag.utils.files import keep_only_existing_files, read_csv
from bigbag.utils.graphs import add_self_loops, build_adj, degree, normalize_adj
from bigbag.utils.trainer import Trainer

__all__ = [
    "AnnealingScheduler",
    "ConstantAnnealingScheduler",
    "CyclicalAnnealingScheduler",
    "LinearAnnealingScheduler",
    "Trainer",
    "add_self_loops",
    "build_adj",
    "degree",
    "keep_only_existing_files",
    "normalize_adj",
    "read_csv",
]

torchmil_files.attach(__name__)
