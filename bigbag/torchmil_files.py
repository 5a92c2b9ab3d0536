"""torchmil's files, for scripts that import from them, ``from bigbag.models.mil_model import MILModel``, or reach them
as attributes of their package, ``bigbag.nn.utils.get_feat_dim``.

bigbag keeps its code in files of other names. Where torchmil has a file that bigbag lacks, its name stands for the
package around it, which exports what the file defines.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

FILES = {
    "bigbag.data": ("collate", "representations"),
    "bigbag.datasets": (
        "binary_classification_dataset",
        "camelyon16mil_dataset",
        "ctscan_dataset",
        "false_frequency_dataset",
        "mc_standard_dataset",
        "pandamil_dataset",
        "processed_mil_dataset",
        "rsnamil_dataset",
        "sc_standard_dataset",
        "shifted_mean_mil_dataset",
        "tadmil_dataset",
        "toy_dataset",
        "trident_wsi_dataset",
        "video_classification_dataset",
    ),
    "bigbag.models": ("mil_model",),
    "bigbag.nn": ("max_pool", "mean_pool", "mlp"),
    "bigbag.nn.attention": ("attention_pool", "prob_smooth_attention_pool", "sm_attention_pool"),
    "bigbag.nn.gnns": ("chebconv", "deepgcn", "gcn_conv", "gnn_identity"),
    "bigbag.utils": ("annealing_scheduler", "common", "graph_utils"),
}
"""Package -> torchmil's files in it whose names bigbag does not have."""


class _Files(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if name in FILES.get(package, ()) else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Fill ``module`` with what its package exports."""
        package = import_module(module.__name__.rpartition(".")[0])
        vars(module).update({name: value for name, value in vars(package).items() if not name.startswith("_")})


def attach(package: str) -> None:
    """Let submodules of ``package`` be its attributes before anything imports them, as they are in torchmil.

    Set from here, where type checkers don't see it: they would take any name for an attribute.
    """

    def __getattr__(name: str) -> ModuleType:
        submodule = f"{package}.{name}"
        if name.startswith("_") or find_spec(submodule) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(submodule)

    vars(sys.modules[package])["__getattr__"] = __getattr__


def register() -> None:
    """Let ``import`` find :data:`FILES`, after all files that exist."""
    if not any(isinstance(finder, _Files) for finder in sys.meta_path):
        sys.meta_path.append(_Files())
