"""YAML as settings need it: numbers as people write them, and no value that is neither number, word, list nor mapping.

PyYAML reads YAML 1.1, in which ``1e-4`` is a word, ``012`` ten, ``1:30`` ninety and ``2024-05-01`` a date.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_INT, _FLOAT, _DATE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))
_WHOLE = re.compile(r"[-+]?(?:0x[0-9a-fA-F]+|\d[\d_]*)\Z")
_REAL = re.compile(r"[-+]?(?:(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2 in place of those of 1.1, and without dates."""


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 16 if "x" in node.value else 10)


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in (_INT, _FLOAT, _DATE)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, _WHOLE, list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, _REAL, list("-+0123456789."))
_Loader.add_constructor(_INT, _whole)


def read_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text, and the node that says where its parts stand.

    Raises:
        ValueError: no YAML, or a value that no type can hold.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _refuse_circles(node, ())
        return (None if node is None else loader.construct_document(node)), node
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_circles(node: yaml.Node, above: tuple[yaml.Node, ...]) -> None:
    if node in above:
        raise ValueError(f"line {node.start_mark.line + 1}: a value that holds itself")
    below = node.value if isinstance(node, yaml.CollectionNode) else ()
    for item in below:
        for part in item if isinstance(item, tuple) else (item,):
            _refuse_circles(part, (*above, node))
