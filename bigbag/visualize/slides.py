"""The report's section on where the model looks: bags drawn from their instances, beside their attention."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bigbag.engine.metrics import THRESHOLD, instance_metrics, risk_of
from bigbag.visualize import charts
from bigbag.visualize.figures import (
    Lattice,
    attention_image,
    colour_range,
    colours,
    lattice,
    log_attention,
    outline_path,
    slide_image,
)
from bigbag.visualize.html import chart, esc, png_uri
from bigbag.visualize.performance import measurement, number
from bigbag.visualize.run_folder import BagAttention, RunFolder, read_attention

_MAX_SLIDES = 8
_BUDGET_BYTES = 4_000_000
_CLOSE_UP_CELLS = 20
_TOP_PATCHES = 12
_COLOUR_MAP = "inferno"


def slides_section(run: RunFolder) -> str:
    """Every bag in ``attention/``, at most eight."""
    files = run.attention_files()
    if not files:
        why = "" if run.task == "binary" else "; runs save that of positive bags of a binary task only"
        return f"<p>This run saved no attention: <code>attention/</code> holds no file{why}.</p>"
    shown = files[:_MAX_SLIDES]
    intro = (
        "<p class='wide'>Each bag is drawn from its own instances, each in its place. Attention is given against the "
        "average of the bag: 10× means ten times the weight of the average instance. An outline marks the instances "
        "that are known to be positive; training saw labels of bags only. The dashed square is the close-up.</p>"
    )
    drawn = [_slide(run, read_attention(path), _BUDGET_BYTES // len(shown)) for path in shown]
    views = [f'<article class="slide" id="slide-{i}">{view}</article>' for i, view in enumerate(drawn)]
    rest = len(files) - len(shown)
    more = (
        f'<p class="muted">{rest} more in <code>attention/</code> left out, to keep this page small.</p>'
        if rest
        else ""
    )
    return intro + "".join(views) + more


def anchors(run: RunFolder) -> dict[str, str]:
    """Key -> ``id`` on the page, of the bags of :func:`slides_section`."""
    return {read_attention(path).key: f"slide-{i}" for i, path in enumerate(run.attention_files()[:_MAX_SLIDES])}


def _slide(run: RunFolder, bag: BagAttention, budget_bytes: int) -> str:
    head = f"<h3>{esc(bag.key)}{_verdict(run, bag)}</h3>"
    if not np.isfinite(bag.scores).all():
        return f"{head}<p>Its attention is not finite, and cannot be drawn.</p>"
    if not len(bag.scores):
        return f"{head}<p>It has no instance.</p>"
    positive = None if bag.y_inst is None else bag.y_inst == 1
    head += f'<p class="facts">{_facts(bag, positive)}</p>'
    values = log_attention(bag.scores)
    if bag.coords is None or bag.coords.ndim != 2 or bag.coords.shape[1] != 2:
        reason = "no positions" if bag.coords is None else f"positions of shape {bag.coords.shape}, not (N, 2)"
        svg = charts.ranked_chart(10.0**values, positive, "attention (× average)")
        alt = f"Attention of the instances of {bag.key} in falling order."
        figure = chart(svg, "Attention by rank", alt, f"The bag has {esc(reason)}, so there is no map.")
        return f'{head}<div class="charts">{figure}</div>'
    views = _views(bag, values, positive, budget_bytes)
    return f"{head}{views}{_strip(bag, values, positive)}"


def _verdict(run: RunFolder, bag: BagAttention) -> str:
    """Label and prediction of the bag, from predictions.csv."""
    if bag.key not in run.predictions.keys:
        return ""
    row = run.predictions.take(np.array([run.predictions.keys.index(bag.key)]))
    values = np.atleast_1d(row.probabilities[0])
    if np.isnan(row.labels).any():
        return f": predicted {', '.join(f'{v:.3f}' for v in values)}"
    if run.task.startswith("survival"):
        (time, event), risk = row.labels[0], risk_of(row.logits, run.task)[0]
        return f": {'event' if event else 'censored'} at {measurement(time)}, predicted risk {risk:.3f}"
    if run.task == "multiclass":
        true, taken = int(row.labels[0]), int(values.argmax())
        verdict = '<span class="right">(right)</span>' if true == taken else '<span class="wrong">(wrong)</span>'
        return f": class {true}, predicted {taken} with {values[taken]:.3f} {verdict}"
    if run.task != "binary":
        labels = ", ".join(map(measurement, np.atleast_1d(row.labels[0])))
        said = map(measurement, values) if run.task == "regression" else (f"{v:.3f}" for v in values)
        return f": label {labels}, predicted {', '.join(said)}"
    label, chance = bool(row.labels[0]), float(row.probabilities[0])
    right = (row.logits[0] >= 0) == label
    verdict = "right" if right else "wrong"
    meaning = f"{'positive' if label else 'negative'}, predicted {chance:.3f}"
    return f': {meaning} <span class="{verdict}">({verdict} at {THRESHOLD})</span>'


def _facts(bag: BagAttention, positive: np.ndarray | None) -> str:
    facts = [f"{len(bag.scores):,} instances"]
    if positive is not None and positive.any():
        num = int(positive.sum())
        facts.append(f"{num:,} known to be positive ({num / len(positive):.2%})")
        metrics = instance_metrics(np.asarray(bag.y_inst), bag.scores)
        if "instance_auroc" in metrics:
            facts.append(f"instance AUROC {number(metrics['instance_auroc'])}")
        top = np.argpartition(-bag.scores, num - 1)[:num]
        facts.append(f"{int(positive[top].sum()):,} of the {num:,} most attended are positive")
    return "; ".join(facts)


def _views(bag: BagAttention, values: np.ndarray, positive: np.ndarray | None, budget_bytes: int) -> str:
    """Slide, attention and their close-ups, all in the same geometry."""
    assert bag.coords is not None
    grid = lattice(bag.coords)
    low, high = colour_range(values)
    seen = values if positive is None or not positive.any() else np.where(positive, values, -np.inf)
    centre = int(seen.argmax())
    window = grid.window(centre, _CLOSE_UP_CELLS)
    where = "of the peak" if seen is values else "around known positives"
    close, kept = grid.crop(window)
    outline = "" if positive is None else outline_path(grid, positive)
    close_outline = "" if positive is None else outline_path(close, positive[kept])
    box = window if max(grid.shape) > 1.5 * _CLOSE_UP_CELLS else None
    name = esc(bag.key)
    true = (
        f", the true lesion of {int(positive.sum()):,} instances outlined"
        if positive is not None and positive.any()
        else ""
    )
    attention = _frame(
        grid,
        png_uri(attention_image(grid, values, low, high, _COLOUR_MAP)),
        outline,
        box,
        f"Attention map of {name}{true}",
        "on-map",
        pixelated=True,
    )
    attention_close = _frame(
        close,
        png_uri(attention_image(close, values[kept], low, high, _COLOUR_MAP)),
        close_outline,
        None,
        f"Close-up of the attention of {name}, {where}",
        "on-map",
        pixelated=True,
    )
    bar = _colour_bar(low, high)
    picture = _picture(bag)
    if picture is None:
        note = "There are neither patches nor colours to draw the slide from."
        return (
            f'<div class="views two"><figure>{attention}<figcaption><b>Attention.</b> {note}</figcaption>{bar}</figure>'
            f"<figure>{attention_close}<figcaption><b>Close-up</b> {where}.</figcaption></figure></div>"
        )
    slide = _frame(
        grid,
        _within(lambda side: png_uri(picture(grid, None, side)), budget_bytes),
        outline,
        box,
        f"{name}, drawn from its instances{true}",
        "on-slide",
    )
    slide_close = _frame(
        close,
        png_uri(picture(close, kept, 640)),
        close_outline,
        None,
        f"Close-up of {name}, {where}",
        "on-slide",
        pixelated=True,
    )
    what = "drawn from its patches" if bag.patches is not None else "in colours made from its features"
    return (
        f'<div class="views"><figure>{slide}<figcaption><b>Slide</b>, {what}.</figcaption></figure>'
        f"<figure>{attention}<figcaption><b>Attention</b>, against the average.</figcaption>{bar}</figure>"
        f'<div class="closeups"><figure>{slide_close}<figcaption><b>Close-up</b> {where}.</figcaption></figure>'
        f"<figure>{attention_close}<figcaption>Its attention.</figcaption></figure></div></div>"
    )


def _picture(bag: BagAttention) -> Callable[[Lattice, np.ndarray | None, int], np.ndarray] | None:
    """A function that draws the instances ``kept`` (None: all) on a grid with sides of at most so many pixels."""
    if bag.patches is None and bag.rgb is None:
        return None

    def draw(grid: Lattice, kept: np.ndarray | None, max_side: int) -> np.ndarray:
        index: slice | np.ndarray = slice(None) if kept is None else kept
        if bag.patches is not None:
            return slide_image(grid, patches=bag.patches[index], max_side=max_side)
        assert bag.rgb is not None
        return slide_image(grid, rgb=bag.rgb[index], max_side=max_side)

    return draw


def _within(draw: Callable[[int], str], budget_bytes: int) -> str:
    """The sharpest of a few resolutions that fits the budget; the coarsest if none does."""
    for side in (1600, 800, 400):
        uri = draw(side)
        if len(uri) <= budget_bytes:
            break
    return uri


def _frame(
    grid: Lattice,
    uri: str,
    outline: str,
    box: tuple[int, int, int, int] | None,
    label: str,
    css: str,
    pixelated: bool = False,
) -> str:
    """A picture of ``grid`` with lines over it, in units of cells. ``label`` is markup already."""
    rows, cols = grid.shape
    rendering = ' style="image-rendering: pixelated"' if pixelated else ""
    lines = f'<path class="lesion" d="{outline}"/>' if outline else ""
    if box is not None:
        lines += f'<rect class="window" x="{box[1]}" y="{box[0]}" width="{box[3]}" height="{box[2]}"/>'
    return (
        f'<svg class="{css}" viewBox="0 0 {cols} {rows}" role="img" aria-label="{label}">'
        f'<image href="{uri}" width="{cols}" height="{rows}" preserveAspectRatio="none"{rendering}/>{lines}</svg>'
    )


def _colour_bar(low: float, high: float) -> str:
    if high - low < 1e-3:
        return '<p class="colours">The attention is the same everywhere.</p>'
    bar = png_uri(np.ascontiguousarray(colours(_COLOUR_MAP)[None, :, :3]))
    return (
        f'<div class="colours"><span>≤ {_times(low)}</span><img src="{bar}" alt="colour scale, logarithmic">'
        f"<span>≥ {_times(high)}</span></div>"
    )


def _times(value: float) -> str:
    factor = 10.0**value
    return f"{factor:,.0f}×" if factor >= 10 else f"{factor:.2g}×"


def _strip(bag: BagAttention, values: np.ndarray, positive: np.ndarray | None) -> str:
    """The most attended patches in a row, the truly positive ones framed."""
    if bag.patches is None:
        return ""
    num = min(_TOP_PATCHES, len(values))
    top = np.argsort(-values, kind="stable")[:num]
    row = Lattice(np.zeros(num, np.int64), np.arange(num), (1, num), crowded=False)
    tiles = np.split(slide_image(row, patches=bag.patches[top], max_side=96 * num), num, axis=1)
    true = np.zeros(num, bool) if positive is None else positive[top]
    images = "".join(
        f'<img src="{png_uri(tile)}" alt=""{" class=hit" if hit else ""}>' for tile, hit in zip(tiles, true.tolist())
    )
    known = "" if positive is None else f" {int(true.sum())} of {num} are known to be positive (framed)."
    label = f"The {num} most attended patches of {esc(bag.key)}.{known}"
    return (
        f'<figure><div class="strip" role="img" aria-label="{label}">{images}</div>'
        f"<figcaption><b>Most attended patches</b>, highest first.{known}</figcaption></figure>"
    )
