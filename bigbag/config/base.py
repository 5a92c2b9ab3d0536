"""What every section of a config is: strict, frozen, its fields documented where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
                raise ValueError(f"{name} is {value} (in YAML also yes, no, on, off), expected another kind of value")
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
