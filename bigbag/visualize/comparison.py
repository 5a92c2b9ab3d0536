"""The figures of ``bigbag compare`` and ``bigbag cap-curve``, as PNG and SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bigbag.evaluation.cap_curve import Point
from bigbag.evaluation.compare import NAMES, Line, Spread
from bigbag.files import write_atomically
from bigbag.visualize.charts import CLASS_COLOURS, INK, MUTED, NEGATIVE, POSITIVE, STYLE, legend_above, svg_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_comparison(lines: Sequence[Line], names: Sequence[str], folder: Path) -> Path:
    """Draw ``figure.png`` and ``figure.svg``: models in rows, metrics with 95 % intervals, time and memory in columns.

    Args:
        lines: the models, the best first; those without a finished run are left out.
        names: the metrics to draw.
        folder: where the files go.

    Returns:
        the path of the PNG.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = [line for line in lines if line.num_runs]
    names = [name for name in names if any(name in line.metrics for line in shown)]
    with matplotlib.rc_context(STYLE):
        widths = [2.0] * len(names) + [1.3, 1.3]
        figure = Figure(figsize=(2.2 + sum(widths), 1.1 + 0.27 * max(len(shown), 3)), layout="constrained")
        columns: Any = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
        places = np.arange(len(shown))
        for axes, name, colour in zip(columns, names, CLASS_COLOURS * 2):
            _dots(axes, places, [line.metrics.get(name, Spread(math.nan)) for line in shown], colour)
            axes.set_title(NAMES[name], fontsize=9.5)
        _bars(columns[-2], places, [line.seconds for line in shown], "Seconds a run")
        _bars(columns[-1], places, [line.peak_rss_bytes / 2**20 for line in shown], "Peak RSS, MiB")
        columns[0].set_yticks(places, [line.model for line in shown])
        columns[0].set_ylim(len(shown) - 0.4, -0.6)
        runs = sorted({line.num_runs for line in shown})
        over = "test bags" if runs == [1] else f"{'-'.join(map(str, dict.fromkeys([*runs[:1], *runs[-1:]])))} runs"
        figure.supxlabel(f"mean and 95 % interval over {over}", fontsize=8.5, color=MUTED)
        return _save(figure, folder)


def draw_cap_curve(points: Sequence[Point], name: str, folder: Path) -> Path:
    """Draw ``figure.png`` and ``figure.svg``: a metric, with its 95 % interval over the runs, over the cap.

    Args:
        points: caps in rising order, whole bags last.
        name: the metric.
        folder: where the files go.

    Returns:
        the path of the PNG.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        _cap_curve(figure.add_subplot(), points, name)
        return _save(figure, folder)


def _cap_curve(axes: Axes, points: Sequence[Point], name: str) -> None:
    capped = [point for point in points if point.cap is not None and name in point.metrics]
    whole = next((point.metrics[name] for point in points if point.cap is None and name in point.metrics), None)
    if whole is not None:
        axes.axhline(whole.mean, color=POSITIVE, label=f"whole bags: {whole.mean:.3f}")
        if not math.isnan(whole.low):
            axes.axhspan(whole.low, whole.high, color=POSITIVE, alpha=0.12, linewidth=0)
    if capped:
        caps, spreads = [float(point.cap or 0) for point in capped], [point.metrics[name] for point in capped]
        low, high = (np.array([getattr(s, end) for s in spreads]) for end in ("low", "high"))
        axes.fill_between(caps, low, high, color=NEGATIVE, alpha=0.15, linewidth=0)
        axes.plot(caps, [s.mean for s in spreads], "o-", color=NEGATIVE, label="a random part of each bag")
        axes.set_xscale("log", base=2)
        axes.set_xticks(caps, [f"{cap:,.0f}" for cap in caps])
        axes.minorticks_off()
    axes.set(xlabel="most instances of a bag, in training and testing", ylabel=f"test {NAMES[name]}")
    legend_above(axes)


def metric_svg(shown: Sequence[Line], name: str) -> tuple[str, tuple[int, int]]:
    """A metric of the models, one row each, as SVG text, and its size in pixels."""
    spreads = [line.metrics.get(name, Spread(math.nan)) for line in shown]
    return _rows_svg(shown, lambda axes, places: _dots(axes, places, spreads, NEGATIVE))


def cost_svg(shown: Sequence[Line], key: str) -> tuple[str, tuple[int, int]]:
    """What the runs of the models took, "seconds" or "peak_rss_bytes" in MiB, one row each; as :func:`metric_svg`."""
    values = [getattr(line, key) / (2**20 if key == "peak_rss_bytes" else 1) for line in shown]
    return _rows_svg(shown, lambda axes, places: _bars(axes, places, values, ""))


def cap_curve_svg(points: Sequence[Point], name: str) -> str:
    """The curve of :func:`draw_cap_curve` as SVG text."""
    return svg_text(lambda axes: _cap_curve(axes, points, name))


def _rows_svg(shown: Sequence[Line], draw: Callable[[Axes, np.ndarray], None]) -> tuple[str, tuple[int, int]]:
    """A chart with a row for each model."""
    places = np.arange(len(shown))
    height = 0.45 + 0.2 * max(len(shown), 4)

    def rows(axes: Axes) -> None:
        draw(axes, places)
        axes.set_yticks(places, [line.model for line in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)

    return svg_text(rows, (4.0, height)), (400, round(100 * height))


def _dots(axes: Axes, places: np.ndarray, spreads: Sequence[Spread], colour: str) -> None:
    values, low, high = (np.array([getattr(own, part) for own in spreads]) for part in ("mean", "low", "high"))
    known = ~np.isnan(low)
    axes.hlines(places[known], low[known], high[known], color=colour, linewidth=1.4, alpha=0.55)
    axes.scatter(values, places, s=22, color=colour, zorder=3, clip_on=False)
    lowest = np.nanmin(np.r_[values, low]) if len(values) and not np.isnan(values).all() else 0.0
    if lowest >= 0 and np.nanmax(values) <= 1:
        axes.set_xlim(math.floor(10 * lowest) / 10, 1.01)
    axes.grid(axis="y", visible=True)
    axes.tick_params(axis="y", length=0)


def _bars(axes: Axes, places: np.ndarray, values: Sequence[float], title: str) -> None:
    axes.barh(places, values, color="#c6cfda", height=0.6)
    for place, value in zip(places, values):
        if not math.isnan(value):
            axes.text(value, float(place), f" {value:,.0f}", va="center", fontsize=7.5, color=INK)
    largest = max((value for value in values if not math.isnan(value)), default=1.0)
    axes.set_xlim(0, 1.35 * largest)
    axes.set_title(title, fontsize=9.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=3)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _save(figure: Figure, folder: Path) -> Path:
    for kind, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None, "Creator": None}})):
        content = io.BytesIO()
        figure.savefig(content, format=kind, **options)
        write_atomically(folder / f"figure.{kind}", content.getvalue())
    return folder / "figure.png"
