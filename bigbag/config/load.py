"""From a YAML file to a :class:`Config`, with messages that say where a mistake stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from bigbag.config.arguments import ConfigError, suggest
from bigbag.config.data import DataConfig
from bigbag.config.sections import Config
from bigbag.config.yaml_text import read_yaml


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file into a :class:`Config`.

    Args:
        path: the YAML file.
        overrides: ``key.sub=value`` strings, the value in YAML syntax; applied in order.

    Raises:
        ConfigError: unreadable file, unknown key, bad value or bad override.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't read the config: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start})") from None
    try:
        settings, node = read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(settings).__name__}")
    places: dict[str, str] = {}
    for key, line in _lines(node):
        if key in places:
            raise ConfigError(
                f"{path}:{line}: setting {key!r} is there twice, first at {places[key]}: keep one of them"
            )
        places[key] = f"{path}:{line}"
    for override in overrides:
        key = _apply_override(settings, override)
        parts = key.split(".")
        places |= {".".join(parts[:i]): f"override {override!r}" for i in range(1, len(parts) + 1)}
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_explain(error, settings, places, str(path))) from None


def build_config(settings: Mapping[str, Any]) -> Config:
    """A :class:`Config` from a mapping, with the same checks and messages as :func:`load_config`."""
    try:
        return Config.model_validate(dict(settings))
    except ValidationError as error:
        raise ConfigError(_explain(error, settings, {}, "config")) from None


def load_data_config(path: str | Path | None, overrides: Sequence[str], changes: Mapping[str, Any]) -> DataConfig:
    """The section ``data`` of a config, or without a file of the overrides alone.

    Args:
        path: the YAML file, or None.
        overrides: ``data.key=value`` strings.
        changes: settings of the section that take the place of both.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    if path is not None:
        fields = load_config(path, overrides).data.model_dump(exclude_unset=True)
    else:
        settings: dict[str, Any] = {}
        for override in overrides:
            _apply_override(settings, override)
        if settings.keys() - {"data"}:
            raise ConfigError(f"{overrides[0]!r}: without --config only settings of data.* can be given")
        fields = settings.get("data") or {}
        if not isinstance(fields, dict):
            raise ConfigError(f"override 'data={fields}': expected data.key=value")
    try:
        return DataConfig.model_validate({**fields, **changes})
    except ValidationError as error:
        missing = [problem["loc"][0] for problem in error.errors() if problem["type"] == "missing"]
        if "shards" in missing:
            raise ConfigError("where the packed set goes is missing: give --out, or data.shards in a config") from None
        raise ConfigError(_explain(error, {}, {}, "data")) from None


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted key and line (from 1) of every setting below a YAML mapping node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _lines(value, f"{name}.")


def _apply_override(settings: dict[str, Any], override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: expected key.sub=value")
    *parents, last = key.split(".")
    section = settings
    for parent in parents:
        below = section.setdefault(parent, {})
        if below is None:
            below = section[parent] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
        section = below
    try:
        section[last], _ = read_yaml(value)
    except ValueError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    return key


def _explain(error: ValidationError, settings: Mapping[str, Any], places: Mapping[str, str], default: str) -> str:
    """One line per problem: where it stands, what it is, and the nearest known name for an unknown key."""
    messages = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        known = _field_names(location[:-1])
        key = ".".join(location)
        place = next(
            (places[k] for i in range(len(location), 0, -1) if (k := ".".join(location[:i])) in places), default
        )
        if problem["type"] == "extra_forbidden":
            messages.append(
                f"{place}: unknown setting {key!r}{_below(location[-1], known) or suggest(location[-1], known)}"
            )
        elif problem["type"] == "missing":
            messages.append(f"{place}: setting {key!r} is missing")
        else:
            of = f"setting {key!r}: " if key else ""
            messages.append(f"{place}: {of}{_problem_text(problem)}")
    return "\n".join(messages)


def _problem_text(problem: Mapping[str, Any]) -> str:
    text, got = problem["msg"].removeprefix("Value error, "), problem["input"]
    if problem["type"] == "value_error" and isinstance(got, Mapping):  # ours, about several settings, which it names
        return text
    if problem["type"] == "string_type" and isinstance(got, int | float):
        return f'{text} (got {got!r}, a number; as text it is "{got!r}" in a file, \'"{got!r}"\' on a command line)'
    return f"{text} (got {got!r})"


def _below(key: str, known: Sequence[str]) -> str:
    """What to write in place of a key with dots in a file."""
    section, _, name = key.partition(".")
    return f"; a file has it as {name} below {section}" if section in known and name else ""


def _field_names(location: Sequence[str]) -> list[str]:
    """Names of the settings of the section at ``location``."""
    section: Any = Config
    for part in location:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)
