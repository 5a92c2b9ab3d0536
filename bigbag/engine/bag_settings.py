"""How the bags of a run were made, kept beside its model so that new slides are made into bags in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bigbag.config import Config
from bigbag.data import BagStore


@dataclass(frozen=True)
class BagSettings:
    """What happened to the bags of a run between their source and its model.

    Attributes:
        storage_dtype: precision that the features were stored in.
        dtype: precision of the features in the packs; None: as stored.
        graph: the fields of :class:`bigbag.config.GraphConfig`; None: no graph was built.
        bag: "patient" where the slides of a patient were joined as they were read (``data.bag``).
        source_bags: "patient" where the source joined them as they were packed.
        precision: of matrix products.
        chunk_instances: see :class:`bigbag.config.sections.TrainConfig`.
        classes: texts of the classes, in the order of their numbers; empty where labels are numbers.
    """

    storage_dtype: str = "float32"
    dtype: str | None = None
    graph: Mapping[str, Any] | None = None
    bag: Literal["slide", "patient"] = "slide"
    source_bags: Literal["slide", "patient"] = "slide"
    precision: str = "fp32"
    chunk_instances: int | None = None
    classes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "classes": list(self.classes)}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> BagSettings:
        return BagSettings(**{**fields, "classes": tuple(fields.get("classes", ()))})


def bag_settings(config: Config, store: BagStore) -> BagSettings:
    """The settings of a run on ``store``."""
    graph = config.data.graph
    return BagSettings(
        storage_dtype=store.feature_dtype,
        dtype=config.data.dtype,
        graph=store.graph if graph is None else graph.model_dump(mode="json"),
        bag=config.data.bag,
        source_bags="patient" if store.description.get("bags") == "patient" else "slide",
        precision=config.train.precision,
        chunk_instances=config.train.chunk_instances,
        classes=tuple(map(str, store.description.get("classes", ()))),
    )
