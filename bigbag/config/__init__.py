"""Every setting of a run: typed, documented, strict.

One YAML file is one run. :func:`load_config` reads it, applies ``key.sub=value`` overrides and returns a frozen
:class:`Config`; an unknown key or a bad value is an error that names the file, the line and, for a typing slip, the
nearest name. DeepSpeed's own configuration is derived from this one and never written by hand.
"""

from bigbag.config.arguments import ConfigError, check_arguments, typed_arguments
from bigbag.config.data import DataConfig, GraphConfig, SourceConfig, SplitsConfig
from bigbag.config.load import build_config, load_config, load_data_config
from bigbag.config.sections import (
    CompareConfig,
    Config,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    ReportConfig,
    TaskConfig,
    TrainConfig,
)
from bigbag.config.yaml_text import read_yaml

__all__ = [
    "CompareConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "GraphConfig",
    "ModelConfig",
    "OptimConfig",
    "ReportConfig",
    "SourceConfig",
    "SplitsConfig",
    "TaskConfig",
    "TrainConfig",
    "build_config",
    "check_arguments",
    "load_config",
    "load_data_config",
    "read_yaml",
    "typed_arguments",
]
