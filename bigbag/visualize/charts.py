"""The charts of a report as SVG text: matplotlib's object interface, no global figure state."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bigbag.evaluation.curves import Band
    from bigbag.evaluation.survival import Survival

NEGATIVE, POSITIVE, INK, MUTED = "#3b6ea8", "#b5332e", "#1d2733", "#8a95a3"
CLASS_COLOURS = ("#3b6ea8", "#b5332e", "#2f8f5b", "#8a5ab0", "#c98a1b", "#3aa3a8", "#7a5b45", "#d0609a")
_SIZE_INCHES = (4.0, 3.0)
STYLE: Any = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e6eaef",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "svg.hashsalt": "bigbag",  # the same numbers give the same file
}


def svg_text(draw: Callable[[Axes], None], size_inches: tuple[float, float] = _SIZE_INCHES) -> str:
    """One chart, drawn by ``draw`` on fresh axes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size_inches, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def series_chart(
    series: Sequence[tuple[str, np.ndarray, np.ndarray]],
    xlabel: str,
    ylabel: str,
    *,
    faint: tuple[np.ndarray, np.ndarray] | None = None,
    marked: tuple[float, str] | None = None,
    log_y: bool = False,
) -> str:
    """Lines over a common axis.

    Args:
        series: name, x and y of each line.
        xlabel: what x is.
        ylabel: what y is.
        faint: x and y of many points that the lines sum up, drawn pale behind them.
        marked: an x to point out, and what it is.
        log_y: a logarithmic scale.
    """

    def draw(axes: Axes) -> None:
        if faint is not None:
            axes.plot(*faint, color="#c6cfda", linewidth=0.7, label="each step")
        for (name, x, y), colour in zip(series, CLASS_COLOURS):
            axes.plot(x, y, color=colour, label=name, marker="o" if len(x) <= 40 else None, markersize=3)
        if marked is not None:
            axes.axvline(marked[0], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=marked[1])
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if log_y:
            axes.set_yscale("log")
        elif max((np.abs(y).max(initial=0) for _, _, y in series), default=0) >= 10_000:
            axes.yaxis.set_major_formatter(lambda value, _: short_count(value))
        if len(series) + (faint is not None) + (marked is not None) > 1:
            legend_above(axes)

    return svg_text(draw)


def roc_chart(curves: Sequence[tuple[str, np.ndarray, np.ndarray]], bands: Sequence[Band] = ()) -> str:
    """ROC curves ``(name, 0/1 labels (B,), scores (B,))``, the bags of each with both labels, and a band for each."""
    from sklearn.metrics import roc_curve

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label="chance")
        _draw_bands(axes, bands, _colours(len(curves)))
        for (name, labels, scores), colour in zip(curves, _colours(len(curves))):
            false_rate, true_rate, _ = roc_curve(labels, scores, drop_intermediate=False)
            axes.plot(false_rate, true_rate, color=colour, label=name)
        axes.set(xlabel="1 - specificity (false positive rate)", ylabel="sensitivity (recall)")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.03))
        axes.legend(loc="lower right")

    return svg_text(draw)


def precision_recall_chart(curves: Sequence[tuple[str, np.ndarray, np.ndarray]], bands: Sequence[Band] = ()) -> str:
    """Precision over recall, arguments as :func:`roc_chart`; the dashed line is what chance gives."""
    from sklearn.metrics import precision_recall_curve

    def draw(axes: Axes) -> None:
        _draw_bands(axes, bands, _colours(len(curves)))
        for (name, labels, scores), colour in zip(curves, _colours(len(curves))):
            precision, recall, _ = precision_recall_curve(labels, scores)
            axes.step(recall, precision, where="post", color=colour, label=name)
            chance = "chance" if len(curves) == 1 else None
            axes.axhline(labels.mean(), color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label=chance)
        axes.set(xlabel="recall (sensitivity)", ylabel="precision", xlim=(-0.02, 1.02), ylim=(-0.02, 1.03))
        legend_above(axes)

    return svg_text(draw)


def _draw_bands(axes: Axes, bands: Sequence[Band], colours: Sequence[str]) -> None:
    for band, colour in zip(bands, colours):
        label = "95 % interval" if len(bands) == 1 else None
        axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.15, linewidth=0, label=label)


def survival_chart(curves: Sequence[tuple[str, Survival]]) -> str:
    """Kaplan-Meier estimates as steps that go on to the last time of each, with their bands."""

    def draw(axes: Axes) -> None:
        for (name, curve), colour in zip(curves, CLASS_COLOURS):
            time = np.r_[curve.time, max(curve.last, curve.time[-1])]
            share = np.r_[curve.share, curve.share[-1]]
            low, high = (_held(np.r_[values, values[-1]]) for values in (curve.low, curve.high))
            axes.step(time, share, where="post", color=colour, label=name)
            axes.fill_between(time, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="time", ylabel="share without event", ylim=(-0.02, 1.03))
        axes.set_xlim(left=0)
        axes.legend(loc="upper right")

    return svg_text(draw)


def _held(ends: np.ndarray) -> np.ndarray:
    """The end of a band; it is NaN from where the share is 0, and is drawn as it was up to there, as the share is."""
    known = ends[~np.isnan(ends)]
    return np.r_[known, np.full(len(ends) - len(known), known[-1])]


def calibration_chart(probability: np.ndarray, observed: np.ndarray, count: np.ndarray, what: str) -> str:
    """Observed share over mean predicted probability of each bin, with its 95 % interval of Wilson.

    Args:
        probability: ``(bins,)`` mean of the bin, NaN where it is empty.
        observed: ``(bins,)`` share of outcomes 1.
        count: ``(bins,)`` bags.
        what: the outcome, such as "positive bags".
    """
    full = count > 0
    probability, observed, count = probability[full], observed[full], count[full]
    low, high = wilson_interval(observed, count)

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label="as predicted")
        (colour,) = _colours(1)
        axes.vlines(probability, low, high, color=colour, linewidth=1, label="95 % interval")
        axes.scatter(
            probability, observed, s=8 + 80 * np.sqrt(count / count.max()), color=colour, alpha=0.7, linewidth=0
        )
        axes.set(xlabel="mean predicted probability", ylabel=f"share of {what}")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.03))
        legend_above(axes)

    return svg_text(draw)


def wilson_interval(share: np.ndarray, count: np.ndarray, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest true share that an observed one goes with (Wilson, J. Am. Stat. Assoc. 1927).

    (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    """
    scale = 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / scale
    return middle - half, middle + half


def histogram_chart(
    groups: Sequence[tuple[str, np.ndarray]], xlabel: str, *, log_x: bool = False, marked: float | None = None
) -> str:
    """Stacked histogram of several groups of bags, with common bins."""
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate([group for _, group in groups])

    def draw(axes: Axes) -> None:
        if log_x:
            low, high = max(values.min(), 1), max(values.max(), 1)
            bins = np.geomspace(low * 0.98, high * 1.02, 21)
            axes.set_xscale("log")
        else:
            bins = (
                np.linspace(0, 1, 21) if values.min() >= 0 and values.max() <= 1 else np.histogram_bin_edges(values, 20)
            )
        names = [name for name, _ in groups]
        colours = _colours(len(groups), two_classes=True)
        axes.hist([g for _, g in groups], bins=list(bins), stacked=True, label=names, color=colours, edgecolor="white")
        if marked is not None:
            axes.axvline(marked, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=f"threshold {marked:g}")
        axes.set(xlabel=xlabel, ylabel="bags")
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        _plain_log_ticks(axes, log_x, values)
        if len(groups) > 1 or marked is not None:
            legend_above(axes)

    return svg_text(draw)


def size_chart(groups: Sequence[tuple[str, np.ndarray, np.ndarray]], ylabel: str, *, threshold: float | None) -> str:
    """A value of each bag over its number of instances: ``(name, sizes, values)`` of each group."""
    sizes = np.concatenate([x for _, x, _ in groups])

    def draw(axes: Axes) -> None:
        for (name, x, y), colour, marker in zip(groups, _colours(len(groups), two_classes=True), "o^sDvPX*" * 20):
            axes.scatter(x, y, s=20, color=colour, marker=marker, alpha=0.75, linewidth=0, label=name)
        if threshold is not None:
            axes.axhline(threshold, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=f"threshold {threshold:g}")
            axes.set_ylim(-0.04, 1.04)
        axes.set_xscale("log")
        axes.set(xlabel="instances in the bag", ylabel=ylabel)
        _plain_log_ticks(axes, True, sizes)
        legend_above(axes)

    return svg_text(draw)


def agreement_chart(labels: np.ndarray, predictions: np.ndarray) -> str:
    """Predicted values over labels, with the line on which they agree."""

    def draw(axes: Axes) -> None:
        low, high = min(labels.min(), predictions.min()), max(labels.max(), predictions.max())
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label="exact")
        axes.scatter(labels, predictions, s=20, color=NEGATIVE, alpha=0.75, linewidth=0)
        axes.set(xlabel="label", ylabel="predicted")
        legend_above(axes)

    return svg_text(draw)


def residual_chart(predictions: np.ndarray, errors: np.ndarray) -> str:
    """Errors over predicted values, with the line of none."""

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label="exact")
        axes.scatter(predictions, errors, s=20, color=NEGATIVE, alpha=0.75, linewidth=0)
        axes.set(xlabel="predicted", ylabel="predicted - label")
        legend_above(axes)

    return svg_text(draw)


def ranked_chart(values: np.ndarray, marked: np.ndarray | None, ylabel: str) -> str:
    """Values of the N instances of a bag without positions in falling order; ``marked`` is ``(N,)`` bool or None."""
    order = np.argsort(-values, kind="stable")
    rank = np.arange(1, len(values) + 1)

    def draw(axes: Axes) -> None:
        shown = np.unique(np.geomspace(1, len(values), 400).astype(int)) - 1
        axes.plot(rank[shown], values[order][shown], color=NEGATIVE, label="all instances")
        if marked is not None and marked.any():
            places = np.flatnonzero(marked[order])[:2000]
            axes.scatter(rank[places], values[order][places], s=16, color=POSITIVE, zorder=3, label="labelled positive")
        axes.set_xscale("log")
        axes.set(xlabel="rank of the instance", ylabel=ylabel)
        _plain_log_ticks(axes, True, rank)
        legend_above(axes)

    return svg_text(draw)


def legend_above(axes: Axes) -> None:
    """A legend over the plot, where it covers no data."""
    count = len(axes.get_legend_handles_labels()[1])
    axes.legend(
        ncols=count if count <= 3 else 2,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        borderpad=0.2,
        handlelength=1.4,
        handletextpad=0.5,
        columnspacing=1.1,
    )


def _colours(count: int, two_classes: bool = False) -> list[str]:
    if count == 1 and not two_classes:
        return [POSITIVE]
    return [CLASS_COLOURS[i % len(CLASS_COLOURS)] for i in range(count)]


def _plain_log_ticks(axes: Axes, log_x: bool, values: np.ndarray) -> None:
    """Ticks such as 2,000 and 10k instead of powers of ten, few enough not to touch."""
    if not log_x:
        return
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = max(float(values.min()), 1.0), max(float(values.max()), 1.0)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [s * 10.0**e for e in range(12) for s in steps if low * 0.6 <= s * 10.0**e <= high * 1.7]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_count(v)))
    axes.set_xlim(low * 0.9, high * 1.1)


def short_count(value: float) -> str:
    """1234 as 1,234; 20000 as 20k; 1500000 as 1.5M."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:,.0f}"
