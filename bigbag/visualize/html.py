"""Small pieces of HTML. Everything that comes from a run is escaped here."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bigbag.visualize.figures import png_bytes


def esc(value: Any) -> str:
    """Text that is safe in HTML, attributes included."""
    return html.escape(str(value), quote=True)


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def png_uri(image: np.ndarray) -> str:
    """A uint8 ``(H, W, 3 or 4)`` picture for ``src`` or ``href``."""
    return data_uri(png_bytes(image), "png")


def chart(svg: str, title: str, alt: str, caption: str = "") -> str:
    """A chart with its title above, and a caption below that may hold markup."""
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    image = f'<img src="{data_uri(svg.encode(), "svg+xml")}" alt="{esc(alt)}" width="400" height="300">'
    return f'<figure><p class="title">{esc(title)}</p>{image}{note}</figure>'


def absent(title: str, reason: str) -> str:
    """What stands in the place of a chart that the data do not allow."""
    return f'<figure><p class="title">{esc(title)}</p><p class="muted">{esc(reason)}</p></figure>'


def note(text: str) -> str:
    return f'<p class="note">{esc(text)}</p>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", css: str = "") -> str:
    """A table whose cells are markup already; the first cell of each row is its heading."""
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    title = f"<caption>{esc(caption)}</caption>" if caption else ""
    kind = f' class="{css}"' if css else ""
    return f'<div class="scroll"><table{kind}>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def details(summary: str, body: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{esc(summary)}</summary>{body}</details>"


def settings(values: dict[str, Any]) -> str:
    """Names and values; dicts below are spelled out with a dot."""
    pairs = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in _flat(values))
    return f'<dl class="settings">{pairs}</dl>'


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{name}", f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)
