"""The sections of a config about bags: where they come from, their graphs, their splits, how they are fed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from bigbag.config.base import Named, Place, Section, Seed, expanded


class SourceConfig(Named):
    """Where bags come from when they are packed: a reader or generator of ``bigbag.datasets`` and its arguments."""

    @model_validator(mode="before")
    @classmethod
    def _expand_paths(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {k: expanded(v) if isinstance(v, str) and v.startswith(("~", "$")) else v for k, v in values.items()}


class GraphConfig(Section):
    """The graph that packing builds over the instances of each bag, for models that need one.

    Weights are 1, or ``exp(-||x_i - x_j|| / P)`` with ``features``, and then normalised: see
    :func:`bigbag.graphs.build_adjacency`.
    """

    radius: float | None = 1.5
    """Join instances at most so many lattice steps apart: 1 joins 4 neighbours, 1.5 joins 8. None: use ``knn``."""
    knn: int | None = None
    """Join each instance with so many nearest others, made symmetric by union. None: use ``radius``."""
    features: bool = False
    """Weigh an edge by the similarity of the features of its ends."""
    self_loops: bool = False
    """Join every instance to itself."""
    normalize: Literal["none", "symmetric", "row"] = "symmetric"
    """symmetric: D^-1/2 A D^-1/2; row: D^-1 A; D holds the row sums."""
    stride: float | Literal["infer"] | None = None
    """Lattice step in the unit of the source's coordinates: for level-0 pixels the patch size at level 0 less the
    overlap; "infer" measures it in each bag. None: what the source says, 1 where it says nothing."""

    @model_validator(mode="after")
    def _consistent(self) -> GraphConfig:
        if (self.radius is None) == (self.knn is None):
            raise ValueError("expected exactly one of radius and knn (set radius: null to use knn)")
        for name, value in (("radius", self.radius), ("knn", self.knn), ("stride", self.stride)):
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"{name} is {value}, expected a positive number")
        return self


class SplitsConfig(Section):
    """Which bags train, validate and test: as they were packed, by a table, or by a rule.

    A rule keeps the bags of a patient together, balances the labels, and depends on names, patients and labels, not on
    the order of the bags. A table, or ``folds`` and ``test_fraction``, take the place of the splits of the packed set;
    ``val_folds`` and ``val_fraction`` then part the training bags. ``folds`` with ``val_folds`` is nested
    cross-validation. See :mod:`bigbag.data.splits`.
    """

    table: Place | None = None
    """CSV or TSV with the split of each bag; ``{fold}`` in its name stands for ``fold``. None: no table."""
    folds: int | None = None
    """Part all bags into so many folds, of which ``fold`` tests and the others train. None: no folds."""
    fold: int = 0
    """Number of the test fold, or of the fold of ``table``, from 0."""
    test_fraction: float | None = None
    """Share of the bags (of the patients, where they are known) that tests. None: as the set, or ``folds``, say."""
    val_folds: int | None = None
    """Part the training bags into so many folds, of which ``val_fold`` validates."""
    val_fold: int = 0
    """Number of the validation fold, from 0."""
    val_fraction: float | None = None
    """Share of the training bags (of the patients, where they are known) that validates where there is no validation
    split."""
    sites: Place | None = None
    """Keep the bags of a site (hospital) in one split, too. "tcga": the tissue source site in TCGA's barcodes; else a
    CSV with a column of bags or patients and a column ``site``. None: sites are not looked at."""
    stratify: bool = True
    """Balance the labels between splits; labels that are measurements are not classes, and are left alone."""
    seed: Seed = 0
    """Seed of the rule; not that of the run, so that runs with other seeds are comparable bag by bag."""

    @field_validator("test_fraction", "val_fraction")
    @classmethod
    def _fraction(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError(f"expected a number between 0 and 1, got {value}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SplitsConfig:
        for one, other in (("table", "folds"), ("table", "test_fraction"), ("folds", "test_fraction")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} both say which bags test: expected one of them")
        if self.sites is not None and not self.is_rule:
            raise ValueError(
                "sites says what a rule keeps together, but there is none: set folds, test_fraction, val_folds or "
                "val_fraction, or leave sites out"
            )
        if self.val_folds is not None and self.val_fraction is not None:
            raise ValueError("val_folds and val_fraction both say which bags validate: expected one of them")
        for name in ("fold", "val_fold"):
            count, number = getattr(self, f"{name}s"), getattr(self, name)
            if number and count is None and (name == "val_fold" or self.table is None):
                raise ValueError(f"{name} is {number}, but {name}s is not set: set it, or leave {name} out")
            if count is not None and count < 2:
                raise ValueError(f"{name}s is {count}, expected at least 2")
            if number < 0 or (count is not None and number >= count):
                raise ValueError(f"{name} is {number}, expected 0 to {'...' if count is None else count - 1}")
        return self

    @property
    def is_rule(self) -> bool:
        """Whether anything is chosen beyond what the packed set or the table say."""
        asked = (self.folds, self.test_fraction, self.val_folds, self.val_fraction)
        return any(value is not None for value in asked)


class SamplingConfig(Section):
    """Training bags drawn with replacement; ``metrics.jsonl`` says how many different ones each epoch saw."""

    weights: Literal["class_balanced"] | dict[int, float] | Place = "class_balanced"
    """class_balanced: every label as often as any other; ``{0: 1, 1: 3}``: weight of a bag by its label; otherwise a
    CSV with the columns ``bag`` and ``weight``."""
    num_bags: int | None = None
    """Draws in an epoch; None: as many as there are training bags."""

    @field_validator("num_bags")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"expected at least 1, got {value}")
        return value


class AugmentConfig(Section):
    """Random changes to training bags, the same for the same seed, epoch and bag: :class:`bigbag.data.Augmentation`."""

    mixup: float = 0.0
    """Replace a share of the instances of each bag by those of another training bag, and mix the labels; the share is
    drawn from Beta(mixup, mixup). 0: off."""
    instance_dropout: float = 0.0
    """Share of the instances of each bag that are left out. 0: whole bags."""
    feature_noise: float = 0.0
    """Standard deviation of Gaussian noise on the features, in their unit. 0: none."""

    @model_validator(mode="after")
    def _consistent(self) -> AugmentConfig:
        for name in ("mixup", "instance_dropout", "feature_noise"):
            limit = 1 if name == "instance_dropout" else 1e30  # fp32 ends at 3e38
            if not 0 <= getattr(self, name) < limit:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more, and below {limit}")
        return self


class DataConfig(Section):
    """Which bags, how they are packed, and how they are fed."""

    shards: Place = Field(min_length=1)
    """Folder or URL of a packed set (the place of its ``manifest.json``)."""
    source: SourceConfig | None = None
    """What ``bigbag pack`` reads to make ``shards``; not used in training."""
    storage_dtype: Literal["float16", "float32"] = "float16"
    """Precision of features in the shards."""
    graph: GraphConfig | None = None
    """Graph that ``bigbag pack`` builds over each bag and stores; None: none."""
    shard_bytes: int = 256 * 2**20
    """Bytes after which packing starts a new shard."""
    empty_bags: Literal["error", "leave_out"] = "error"
    """What packing does with a bag of no instances: stop, or leave it out and list it."""
    missing_bags: Literal["error", "leave_out"] = "error"
    """What packing does with bags that the source names but does not hold: stop, or leave them out and list them."""
    invalid_bags: Literal["error", "leave_out"] = "error"
    """What packing does with a bag that has an error: look at all others and stop, or leave it out and list it."""
    leakage: Literal["error", "keep"] = "error"
    """What packing does where a patient or a slide is in two splits: stop, or keep the splits as they are, with a
    warning there and in every training on the set."""
    budget_instances: int = 131_072
    """Most instances in one pack; a larger bag is a pack of its own."""
    budget_bytes: int | None = None
    """Most bytes of features in one pack, for bags that fit into no memory: packs hold fewer bags, and a bag that is
    larger by itself stays in its mapped shard, from which a step streams it twice. Models that pool then keep a few
    numbers for each instance; others need memory for their layers, or more ranks (``parallel.bag``). None: any size."""
    max_instances: int | None = None
    """Cap: use a random subsample of at most so many instances of each bag, everywhere. None: whole bags."""
    bag: Literal["slide", "patient"] = "slide"
    """patient: all slides of a patient are one bag, with one label."""
    sampling: SamplingConfig | None = None
    """Draw training bags by weight, with replacement; None: every training bag once in an epoch."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes to training bags; none by default."""
    splits: SplitsConfig = SplitsConfig()
    """Which bags train, validate and test."""
    num_workers: NonNegativeInt = 1
    """Reading threads of each rank; 0 reads when a pack is asked for."""
    prefetch_packs: int = 2
    """Packs that are prepared ahead for each reading thread."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Precision of the features in the packs, converted while they are read; None: as they are stored."""
    check_digests: bool = False
    """Compare each bag with its SHA-256 when a process first reads it."""
    allow_pipe: bool = False
    """Allow ``pipe:`` shard addresses, which run a shell command."""
    cache_dir: Place | None = None
    """Folder for copies of remote shards; None: a folder of the user's cache."""
    cache_bytes: PositiveInt = 50 * 2**30
    """Most bytes that copies of remote shards may take on disk."""

    @field_validator("budget_instances", "shard_bytes", "prefetch_packs")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"expected at least 1, got {value}")
        return value

    @field_validator("max_instances", "budget_bytes")
    @classmethod
    def _positive_or_none(cls, value: int | None) -> int | None:
        return value if value is None else cls._positive(value)
