"""Options of the commands that evaluate, predict and compare; light, since every command line is read with them."""

from __future__ import annotations

import argparse
from pathlib import Path

from bigbag.config.option_types import positive
from bigbag.engine.metrics import TASKS


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``bigbag evaluate`` that are about saved predictions."""
    group = parser.add_argument_group("saved predictions, without a model")
    group.add_argument("--predictions", type=Path, help="predictions.csv: key, label, logit or probability, ...")
    group.add_argument("--task", choices=TASKS, help="default: that of the config.yaml beside it, else as it looks")
    group.add_argument("--instances", type=Path, help="instances.npz, for instances and FROC; default: beside it")
    group.add_argument("--against", type=Path, help="predictions.csv of another model on the same bags, to be compared")
    group.add_argument("--split", default="test", help="split of the comparison")
    group.add_argument("--folder", type=Path, help="where metrics.csv and metrics.json go; default: beside it")
    group.add_argument("--resamples", type=int, default=2000, help="bootstrap resamples of patients")
    group.add_argument("--interval", choices=("percentile", "bca"), default="bca", help="kind of the interval")
    group.add_argument("--stratified", action="store_true", help="resample the patients of each label on their own")
    group.add_argument("--patient-rule", choices=("mean", "max"), default="mean", help="from slides to a patient")
    group.add_argument("--min-diameter", type=float, default=0.0, help="FROC: leave smaller lesions out, in patches")


def add_predict_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``bigbag predict``; those of pictures are fields of ``bigbag.visualize.prediction.Pictures``."""
    parser.add_argument("--checkpoint", required=True, metavar="RUN|FILE", help="a run's folder, or a saved model")
    parser.add_argument("--from", dest="root", required=True, metavar="DIR|SHARDS|FILE", help="new slides")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("--format", metavar="NAME", help="layout of --from, instead of the recognised one")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="argument of the layout")
    parser.add_argument("--labels", metavar="TABLE", help="labels, where they are known; only copied to the results")
    parser.add_argument("--patients", metavar="TABLE", help="patient of each slide, for models of patients")
    parser.add_argument("--column", action="append", default=[], metavar="ROLE=NAME", help="column of a table")
    parser.add_argument("--empty", choices=("error", "leave_out"), default="error", help="slides without patches")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    group = parser.add_argument_group("pictures", argument_default=argparse.SUPPRESS)
    group.add_argument("--slides", default=None, metavar="DIR", help="whole-slide images, to draw heatmaps over")
    group.add_argument("--heatmaps", action="store_true", help="draw the instance scores of each slide")
    group.add_argument("--deepzoom", action="store_true", help="and as a pyramid for OpenSeadragon")
    group.add_argument("--geojson", action="store_true", help="instances and regions of high score, for QuPath")
    group.add_argument("--top-k", type=int, metavar="K", help="highest instances, as GeoJSON and patches")
    group.add_argument("--scale", choices=("rank", "linear", "attention"), help="from scores to colours; default rank")
    group.add_argument("--limits", nargs=2, type=float, metavar=("LOW", "HIGH"), help="scores of a linear scale's ends")
    group.add_argument("--threshold", type=float, help="of regions, 0 to 1 on the scale; default 0.9")
    group.add_argument("--min-instances", type=int, help="of a region; default 1")
    group.add_argument("--opacity", type=float, help="of heatmaps over slides; default 0.5")
    group.add_argument("--max-side", type=int, help="of a heatmap, in pixels; default 2000")
    group.add_argument("--colour-map", help="a name that matplotlib knows; default turbo")
    group.add_argument("--mpp", type=float, help="micrometres of a level-0 pixel, where no slide says them")
    group.add_argument("--patch-size", type=float, help="side of a patch in the unit of the coordinates")


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """Seeds, folds, and what to do with the runs in place of doing all of them here."""
    parser.add_argument("--seeds", type=positive, default=1, help="runs of each, with the seeds from seed on")
    parser.add_argument("--folds", type=positive, help="cross-validate: folds by patient, each of which tests once")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--list", action="store_true", help="list the runs with their index and state, start none")
    group.add_argument("--index", type=int, help="do the run of this index only")
    group.add_argument("--collect", action="store_true", help="make table and figure of what has finished, start none")
    group.add_argument("--slurm", choices=("write", "submit"), help="write, or write and submit, a job array")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="e.g. --sbatch=--partition=gpu")
    parser.add_argument("--limit", type=positive, help="most tasks of a job array that run at a time")


def add_grid_options(parser: argparse.ArgumentParser) -> None:
    """Nested cross-validation."""
    parser.add_argument("--inner", type=positive, help="inner folds that choose the epoch and the values of --grid")
    parser.add_argument("--grid", action="append", default=[], metavar="key=value,value", help="values to choose from")
