"""What every section of a config is: strict, frozen, its fields documented where they stand."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Named(BaseModel):
    """A component chosen by ``name``; its other keys are that component's constructor arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str
    """Name of the class."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor arguments."""
        return dict(self.model_extra or {})
