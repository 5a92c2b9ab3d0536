"""Types of options on command lines: what ``argparse`` makes of a word, or says was expected in its place."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from pathlib import Path


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def numbers(text: str) -> list[int]:
    """``"256,512"`` as ``[256, 512]``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"expected whole numbers with commas between them, got {text!r}") from None


def sizes(text: str) -> list[int]:
    """:func:`numbers` from 1 on."""
    return [positive(part) for part in text.split(",")]


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """``"cpu,triton"`` as ``["cpu", "triton"]``, each of which is one of ``known``."""

    def chosen(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise ArgumentTypeError(f"unknown {name!r} (choose from {', '.join(known)})")
        return names

    return chosen


def output_file(*endings: str) -> Callable[[str], str]:
    """A file, of one of the endings if there are any, in a folder that exists: known before hours are spent."""

    def checked(text: str) -> str:
        path = Path(text)
        if not path.absolute().parent.is_dir():
            raise ArgumentTypeError(f"{path.parent}: no such folder; make it first")
        if endings and path.suffix not in endings:
            raise ArgumentTypeError(f"{text!r}: expected a name that ends in {', '.join(endings)}")
        return text

    return checked
