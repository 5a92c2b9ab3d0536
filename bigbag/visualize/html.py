"""Small pieces of HTML. Everything that comes from a run is escaped here."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigbag.visualize.figures import png_bytes
from bigbag.visualize.style import STYLE

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def esc(value: Any) -> str:
    """Text that is safe in HTML, attributes included."""
    return html.escape(str(value), quote=True)


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def png_uri(image: np.ndarray) -> str:
    """A uint8 ``(H, W, 3 or 4)`` picture for ``src`` or ``href``."""
    return data_uri(png_bytes(image), "png")


def page(kind: str, title: str, facts: str, lead: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """A whole page without scripts and without anything from elsewhere.

    Args:
        kind: what it is, such as "bigbag report".
        title: its heading.
        facts: one line below it, as markup.
        lead: markup before the first section.
        sections: anchor, heading and markup of each.
        footer: markup.
    """
    links = "".join(f'<li><a href="#{anchor}">{esc(name)}</a></li>' for anchor, name, _ in sections)
    body = "".join(f'<section id="{anchor}"><h2>{esc(name)}</h2>{text}</section>' for anchor, name, text in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{esc(title)}: {esc(kind)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f'<header><p class="kind">{esc(kind)}</p><h1>{esc(title)}</h1><p class="facts">{facts}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f"<main>{lead}{body}</main><footer>{footer}</footer></body></html>\n"
    )


def footer(folder: Path, environment: dict[str, Any]) -> str:
    """Who wrote a page, and from what."""
    versions = environment.get("versions")
    version = f" {versions['bigbag']}" if isinstance(versions, dict) and "bigbag" in versions else ""
    return (
        f"Written by bigbag{esc(version)} from the files in <code>{esc(folder.resolve().name)}/</code>. "
        "For research; not a medical device."
    )


def chart(svg: str, title: str, alt: str, caption: str = "", size: tuple[int, int] = (400, 300)) -> str:
    """A chart of so many pixels with its title above, and a caption below that may hold markup."""
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    shape = f'width="{size[0]}" height="{size[1]}"'
    image = f'<img src="{data_uri(svg.encode(), "svg+xml")}" alt="{esc(alt)}" {shape}>'
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
