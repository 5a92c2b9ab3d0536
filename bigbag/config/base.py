"""What every section of a config is: strict, frozen, its fields documented where they stand."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def expanded(path: str) -> str:
    """A path with its leading ``~`` and every ``$NAME`` or ``${NAME}`` replaced, as a shell would.

    Raises:
        ValueError: no such user, or no such variable: a folder of that name is not what is meant.
    """
    if path.startswith("pipe:"):  # a command, for a shell that does so itself
        return path

    def value_of(found: re.Match[str]) -> str:
        value = os.environ.get(found[1] or found[2])
        if value is None:
            raise ValueError(f"the environment has no variable {found[0]}: set it, or write the path out")
        return value

    home = os.path.expanduser(path)
    if home.startswith("~"):
        raise ValueError(f"there is no home folder {home.partition('/')[0]}: write the path out")
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", value_of, home)


Place = Annotated[str, AfterValidator(expanded)]
"""A file, folder or URL."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Seed of a generator."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        for name, field in cls.model_fields.items():
            value = values.get(name) if isinstance(values, Mapping) else None
            if isinstance(value, bool) and bool not in (field.annotation, *get_args(field.annotation)):
                raise ValueError(
                    f"{name} is {value} (in YAML also yes, no, on, off, unless in quotes), expected another kind of "
                    "value"
                )
        return values


class Named(BaseModel):
    """A component chosen by ``name``; its other keys are that component's constructor arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str
    """Name of the class."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor arguments."""
        return dict(self.model_extra or {})
