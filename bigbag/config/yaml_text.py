"""YAML as settings need it: plain values, and ``1e-4`` is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which knows no number without a dot before its exponent: YAML 1.2 does."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+\Z"), list("-+0123456789"))


def read_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text, and the node that says where its parts stand.

    Raises:
        ValueError: no YAML, or a value that no type can hold.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
