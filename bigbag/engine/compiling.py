"""``engine.compile``: the feature extractor by torch.compile.

What a model does with the features is made of operators that are compiled or fused already, and depends on how a pack
is cut into bags. The extractor is row-wise: only the number of rows changes. So one graph serves packs of all sizes,
and there are as many graphs as ways to call it: with gradients and without, in training and evaluation, for one row by
itself, which torch.compile does not take for a size that changes, and for many rows where it tells them from few.
"""

from __future__ import annotations

import os
import shutil

import torch

from bigbag.config import Config, ConfigError
from bigbag.models import MILModel
from bigbag.nn import VariationalAutoEncoder


def compile_extractor(model: MILModel, config: Config) -> None:
    """Compile ``model.feat_ext`` in place at its first call, where ``engine.compile`` asks for it.

    Random numbers are those of the extractor as it is, so that dropout is the same.

    Raises:
        ConfigError: no extractor, one of which the model calls only parts, ZeRO 3, or no C++ compiler.
    """
    if not config.engine.compile:
        return
    extractor = getattr(model, "feat_ext", None)
    if extractor is None or isinstance(extractor, torch.nn.Identity):
        raise ConfigError(
            f"engine.compile compiles model.feat_ext, of which {config.model.name} has none here: the operators are "
            "compiled already, so set it to false"
        )
    if isinstance(extractor, VariationalAutoEncoder):
        raise ConfigError(
            f"engine.compile compiles model.feat_ext as it is called, but {config.model.name} calls its parts: set it "
            "to false"
        )
    if config.engine.zero_stage == 3:
        raise ConfigError(
            "engine.compile is not for ZeRO 3, under which weights come and go between packs: set it to false, or "
            "engine.zero_stage to at most 2"
        )
    if compiler() is None:
        raise ConfigError(
            "engine.compile needs a C++ compiler, and there is no g++, clang++ or c++ here: install one, name it in "
            "the environment variable CXX, or set engine.compile to false"
        )
    # Not Module.compile: of a Sequential all frames are torch's own, which that passes over.
    extractor.forward = torch.compile(extractor.forward, dynamic=True, options={"fallback_random": True})


def compiler() -> str | None:
    """The C++ compiler that torch.compile will call, or None."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)
