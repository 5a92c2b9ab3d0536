"""From settings to a model, and from a model to a file that loads anywhere.

A model's constructor signature is its config schema. A saved model is a folder: ``model.safetensors`` (the state dict)
beside ``model.json`` (class, arguments, instance shape, task): loading needs no code but bigbag's, and unpickles
nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

import bigbag.nn
from bigbag.config import ConfigError, ModelConfig, TaskConfig, check_arguments, typed_arguments
from bigbag.files import read_json, write_atomically, write_json
from bigbag.models.abmil import ABMIL
from bigbag.models.base import MILModel
from bigbag.models.camil import CAMIL
from bigbag.models.clam import CLAM_MB, CLAM_SB
from bigbag.models.criteria import build_criterion
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

_REMEDY = "copy it from where it is whole, or train the run again with --restart"

MODELS: dict[str, type[MILModel]] = {
    cls.__name__: cls
    for cls in (
        ABMIL,
        MeanMIL,
        MaxMIL,
        CLAM_SB,
        CLAM_MB,
        DSMIL,
        DTFDMIL,
        IIBMIL,
        SmABMIL,
        SmTransformerABMIL,
        SmoothABMIL,
        ProbSmoothABMIL,
        TransformerProbSmoothABMIL,
        TransformerABMIL,
        TransMIL,
        PatchGCN,
        DeepGraphSurv,
        CAMIL,
        GTP,
        SETMIL,
        VAEABMIL,
        LongNetMIL,
    )
}
_SET_BY_TASK = ("criterion", "out_dim")


def build_model(model: ModelConfig, in_shape: tuple[int, ...], task: TaskConfig) -> MILModel:
    """Construct the model that the config names.

    Args:
        model: class name and constructor arguments; ``feat_ext`` is itself ``{name: <class of bigbag.nn>, ...}``.
        in_shape: shape of one instance of the data.
        task: sets the number of outputs and the criterion.

    Raises:
        ConfigError: unknown model or argument, an argument that the task sets, or an ``in_shape`` that differs from
            the data's.
    """
    if model.name not in MODELS:
        raise ConfigError(f"model: unknown name {model.name!r}; known models: {', '.join(MODELS)}")
    cls = MODELS[model.name]
    arguments = model.arguments
    check_arguments(f"model {model.name}", arguments, arguments_of(model.name))
    extractor = arguments.pop("feat_ext", None)
    arguments = typed_arguments(f"model {model.name}", cls, arguments)
    for key, value in arguments.items():
        if isinstance(value, int) and value < 1 and key.endswith(("_dim", "_heads", "_landmarks", "_clusters")):
            raise ConfigError(f"model {model.name}: {key} is {value}, expected at least 1")
    given = arguments.pop("in_shape", None)
    if given is not None and tuple(given) != tuple(in_shape):
        raise ConfigError(
            f"model.in_shape is {tuple(given)}, but the bags have instances of shape {tuple(in_shape)}; "
            "leave in_shape out to take the shape of the data"
        )
    if extractor is not None:
        arguments["feat_ext"] = _build_feature_extractor(extractor, in_shape)
    try:
        return cls(in_shape=in_shape, criterion=build_criterion(task), out_dim=task.num_outputs, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model {model.name} can't be built from {model.arguments}: {error}") from error


def arguments_of(name: str) -> list[str]:
    """Constructor arguments of the model ``name`` that a config may set."""
    return [argument for argument in inspect.signature(MODELS[name]).parameters if argument not in _SET_BY_TASK]


def _build_feature_extractor(settings: Any, in_shape: tuple[int, ...]) -> torch.nn.Module:
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        raise ConfigError(f"model.feat_ext: expected {{name: <class of bigbag.nn>, ...}}, got {settings!r}")
    arguments = {key: value for key, value in settings.items() if key != "name"}
    cls = getattr(bigbag.nn, settings["name"], None)
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise ConfigError(f"model.feat_ext: {settings['name']!r} is not a class of bigbag.nn")
    known = list(inspect.signature(cls).parameters)
    check_arguments(f"model.feat_ext {settings['name']}", arguments, known)
    for width in ("input_size", "in_features", "in_dim"):
        if width in known and len(in_shape) == 1:
            arguments.setdefault(width, in_shape[0])
    if "input_shape" in known:
        arguments.setdefault("input_shape", tuple(in_shape))
    arguments = typed_arguments(f"model.feat_ext {settings['name']}", cls, arguments)
    try:
        return cls(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model.feat_ext {settings['name']} can't be built from {arguments}: {error}") from error


def save_model(
    folder: str | Path,
    state_dict: Mapping[str, torch.Tensor],
    model: ModelConfig,
    in_shape: tuple[int, ...],
    task: TaskConfig,
    bags: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model.safetensors`` and ``model.json`` into ``folder``, each atomically.

    Args:
        folder: made if absent.
        state_dict: the weights.
        model: class and arguments.
        in_shape: shape of one instance.
        task: meaning of the logits.
        bags: how the bags were made that it was trained on, for predictions (``BagSettings.to_json``).
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    settings = {"model": model.model_dump(mode="json"), "task": task.model_dump(mode="json")}
    about = {**settings, "in_shape": list(in_shape), **({} if bags is None else {"bags": dict(bags)})}
    write_atomically(folder / "model.safetensors", save(weights))
    write_json(folder / "model.json", about)


def saved_model(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a saved model, and the content of its ``model.json``.

    Args:
        path: a folder that :func:`save_model` wrote, a file in it, or the folder of a run (its best model is taken).

    Raises:
        FileNotFoundError: none of these.
        ValueError: the file is damaged.
    """
    place = Path(path)
    folders = (place.parent,) if place.is_file() else (place, place / "checkpoints" / "best")
    folder = next((f for f in folders if (f / "model.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"{path}: no model.json here or in checkpoints/best; give the folder of a run or of a saved model"
        )
    about = read_json(folder / "model.json", _REMEDY)
    try:
        ModelConfig.model_validate(about.get("model")), TaskConfig.model_validate(about.get("task"))
        TypeAdapter(tuple[int, ...]).validate_python(about.get("in_shape"))
    except ValidationError as error:
        problem = error.errors()[0]
        text = f"{error.title}{''.join(f'.{part}' for part in problem['loc'])}: {problem['msg']}"
        raise ValueError(
            f"{folder / 'model.json'}: not what a saved model says of itself ({text}): {_REMEDY}"
        ) from None
    return folder, about


def load_model(path: str | Path) -> MILModel:
    """Load a saved model, in eval mode.

    Args:
        path: as of :func:`saved_model`.

    Raises:
        FileNotFoundError: no model there.
        ValueError: a file of it is damaged, or the weights are those of another model.
    """
    folder, about = saved_model(path)
    model = build_model(ModelConfig(**about["model"]), tuple(about["in_shape"]), TaskConfig(**about["task"]))
    path = folder / "model.safetensors"
    try:
        model.load_state_dict(_read_weights(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: not the weights of the model in model.json ({error}): {_REMEDY}") from None
    return model.eval()


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {_REMEDY}") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole file of weights ({error}): {_REMEDY}") from None
