"""What ``data.source`` of a config may name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from bigbag.config import typed_arguments
from bigbag.data.sources.base import Source
from bigbag.data.sources.detect import FORMATS, detect_format

logger = logging.getLogger(__name__)

SOURCES = {
    "camelyon16": ("bigbag.data.sources.torchmil", "TorchmilFolder"),
    "digits": ("bigbag.datasets.digits", "Digits"),
    "hgsc": ("bigbag.datasets.hgsc", "HGSC"),
    "mnist_bags": ("bigbag.datasets.mnist", "MNISTBags"),
    "musk1": ("bigbag.data.sources.tables", "Musk1"),
    "musk2": ("bigbag.data.sources.tables", "Musk2"),
    **{name: (f"bigbag.data.sources.{module}", cls) for name, (module, cls) in FORMATS.items()},
    **{
        name: (f"bigbag.datasets.{module}", name)
        for module, names in {
            "algorithmic": ("FalseFrequencyMILDataset", "MCStandardMILDataset", "SCStandardMILDataset"),
            "binary": ("BinaryClassificationDataset",),
            "processed": ("ProcessedMILDataset",),
            "sequences": ("CTScanDataset", "RSNAMILDataset", "TADMILDataset", "VideoClassificationDataset"),
            "shifted_mean": ("ShiftedMeanMILDataset",),
            "slides": ("CAMELYON16MILDataset", "PANDAMILDataset", "WSIDataset"),
            "trident": ("TridentWSIDataset",),
        }.items()
        for name in names
    },
}
"""Name of each source and where its class is; imported when asked for, since some need scikit-learn."""


def open_source(name: str, **params: Any) -> Source:
    """The source ``name`` with the constructor arguments ``params``.

    Data sets with torchmil's names are opened for packing: all their partitions, nothing kept in memory, and no graph
    unless ``bag_keys`` asks for it (``data.graph`` builds one).

    Args:
        name: one of ``SOURCES``.
        params: arguments of its class.

    Raises:
        ValueError: no such source, an argument that it does not take or of another type, or one that it needs and is
            not given.
    """
    known = arguments_of_source(name)
    for key in params:
        if key not in known:
            raise ValueError(f"source {name} takes no {key!r}{_nearest(key, known)}; it takes {', '.join(known)}")
    missing = [key for key, value in known.items() if value.default is value.empty and key not in params]
    if missing:
        raise ValueError(f"source {name} needs {missing[0]!r}; give it in the config under data.source")
    params = typed_arguments(f"source {name}", _class_of(name), params)
    return _class_of(name)(**{**_for_packing(known), **params})


def arguments_of_source(name: str) -> Mapping[str, inspect.Parameter]:
    """Constructor arguments of the source ``name``.

    Raises:
        ValueError: no such source.
    """
    return inspect.signature(_class_of(name)).parameters


def _class_of(name: str) -> Any:
    if name not in SOURCES:
        raise ValueError(f"no source is called {name!r}{_nearest(name, SOURCES)}; there are {', '.join(SOURCES)}")
    module, class_name = SOURCES[name]
    return getattr(importlib.import_module(module), class_name)


def recognise(root: str, name: str | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the source that reads ``root``: ``name``, or the layout that is recognised, which is logged.

    Args:
        root: folder, or table that lists files.
        name: one of ``SOURCES``; None: recognised.
        params: other arguments of its class.

    Raises:
        ValueError: no known layout.
    """
    if name is None:
        name, reason = detect_format(root, params.get("labels"))
        logger.info("format:  %s: %s", name, reason)
    return {"name": name, "root": root, **params}


def _for_packing(known: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Settings for reading each bag of a data set once, of those that it has."""
    settings: dict[str, Any] = {"partition": None, "load_at_init": False, "cache_bytes": 0}
    if "bag_keys" in known:
        settings["bag_keys"] = [key for key in known["bag_keys"].default if key != "adj"]
    return {key: value for key, value in settings.items() if key in known}


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
