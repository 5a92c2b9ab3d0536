"""Arguments that a config gives to a component, checked against the component's own signature."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

_LIKE_YAML = ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True, allow_inf_nan=False)


class ConfigError(ValueError):
    """A setting that can't be used; the message says where it stands and what was expected."""


def check_arguments(what: str, arguments: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse arguments that a component doesn't have.

    Raises:
        ConfigError: names the unknown argument, the nearest known one and all of them.
    """
    for key in arguments:
        if key not in known:
            raise ConfigError(f"{what}: unknown setting {key!r}{suggest(key, known)}; it takes: {', '.join(known)}")


def typed_arguments(what: str, component: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the annotations of a class's constructor want them: lists as tuples, ``"4"`` as 4.

    Args:
        what: the component, for messages.
        component: a class.
        arguments: arguments of its constructor, as YAML gives them.

    Raises:
        ConfigError: names the first argument of another type, what is expected and what it is.
    """
    hints = _hints_of(component)
    return {key: _typed(what, key, value, hints[key]) if key in hints else value for key, value in arguments.items()}


def suggest(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _hints_of(component: Any) -> dict[str, Any]:
    try:
        return get_type_hints(component if dataclasses.is_dataclass(component) else component.__init__)
    except NameError:  # of what is imported for type checkers alone
        return {}


def _typed(what: str, key: str, value: Any, hint: Any) -> Any:
    try:
        checked = TypeAdapter(hint, config=_LIKE_YAML).validate_python(value)
    except PydanticSchemaGenerationError:
        return value
    except ValidationError as error:
        wanted = inspect.formatannotation(hint).replace("collections.abc.", "")
        raise ConfigError(f"{what}: {key} is {value!r}, expected {wanted}: {error.errors()[0]['msg']}") from None
    # 512 stays 512 where any number will do: it is part of what identifies a packed set.
    return value if isinstance(value, int) and isinstance(checked, float) else checked
