"""The options of ``bigbag pack``: files and tables in place of a config's ``data.source`` and ``data.shards``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from bigbag.config import ConfigError, DataConfig, load_data_config, read_yaml
from bigbag.data import Source
from bigbag.datasets import recognise


def add_pack_options(pack: argparse.ArgumentParser) -> None:
    """Add the options to the parser of the command."""
    pack.add_argument("--from", dest="root", metavar="DIR", help="folder of features; its layout is recognised")
    pack.add_argument("--labels", metavar="TABLE", help="label of each slide or patient (CSV, TSV, Excel)")
    pack.add_argument("--slides", metavar="TABLE", help="patient of each slide, where the labels are by patient")
    pack.add_argument("--splits", metavar="TABLE|RULE", help="a table, or a rule like folds=5,fold=0,val_fraction=0.1")
    pack.add_argument("--out", metavar="SHARDS", help="folder of the packed set")
    pack.add_argument("--format", metavar="NAME", help="layout of --from, instead of the recognised one")
    pack.add_argument(
        "--column", action="append", default=[], metavar="ROLE=NAME",
        help="column of slide, patient, label, split, time or event, where its name does not tell",
    )  # fmt: skip
    pack.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE",
        help="other argument of the layout: features=uni_v1, bags=patient, stride=512, ...",
    )  # fmt: skip
    pack.add_argument("--graph", action="store_true", help="build the graph of 8 neighbours of each bag")
    pack.add_argument("--missing", choices=["error", "leave_out"], help="slides without file or label")
    pack.add_argument("--empty", choices=["error", "leave_out"], help="slides without patches")
    pack.add_argument(
        "--invalid", choices=["error", "leave_out"], help="slides with an error; validation.json names all"
    )
    pack.add_argument("--leakage", choices=["error", "keep"], help="a patient in two splits; keep: with a warning")
    pack.add_argument("--unlabelled", choices=["error", "keep"], default="error", help="keep: for prediction only")


def data_config(options: argparse.Namespace) -> DataConfig:
    """The section ``data`` of the config, if there is one, with what the options of ``pack`` say in its place."""
    changes: dict[str, Any] = {"shards": options.out, "missing_bags": options.missing, "empty_bags": options.empty}
    changes |= {"invalid_bags": options.invalid, "leakage": options.leakage}
    if options.graph:
        changes["graph"] = {}
    if options.root is not None:
        given = source_arguments(options.labels, options.slides, options.column, options.option)
        changes["source"] = recognise(options.root, options.format, given)
    elif options.labels or options.slides or options.format or options.column or options.option:
        raise ConfigError(
            "--labels, --slides, --format, --column and --option go with --from; a config has data.source"
        )
    return load_data_config(options.config, options.overrides, {k: v for k, v in changes.items() if v is not None})


def source_arguments(
    labels: str | None, slides: str | None, columns: Sequence[str], others: Sequence[str]
) -> dict[str, Any]:
    """Arguments of a source by the texts of the options: tables, ``ROLE=NAME`` and ``KEY=VALUE``."""
    named: dict[str, Any] = _pairs("--column", columns)
    if "," in named.get("label", ""):
        named["label"] = named["label"].split(",")
    given = {"labels": labels, "slides": slides, "columns": named}
    for key, value in _pairs("--option", others).items():
        try:
            given[key], _ = read_yaml(value)
        except ValueError as error:
            raise ConfigError(f"--option {key}={value}: not valid YAML: {error}") from None
    return {key: value for key, value in given.items() if value}


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = dict(text.partition("=")[::2] for text in texts)
    for key, value in pairs.items():
        if not key or not value:
            raise ConfigError(f"{option} {key}: expected {'ROLE=NAME' if option == '--column' else 'KEY=VALUE'}")
    return pairs


def say_what_was_found(source: Source) -> None:
    """Columns and classes of the labels, so that a wrong guess is seen."""
    columns, classes = getattr(source, "columns_found", {}), getattr(source, "classes_found", ())
    if columns:
        print("columns: " + ", ".join(f"{role} {name!r}" for role, name in columns.items()))
    if classes:
        print("classes: " + ", ".join(f"{i} {name}" for i, name in enumerate(classes)))
    print(f"bags:    {len(source.entries())}, left out {len(getattr(source, 'left_out', ()))}", flush=True)
