"""Names of bags: what tables and folders make of them."""

from __future__ import annotations

import re

from bigbag.data.manifest import make_keys

SUFFIXES = (
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".czi", ".vms", ".vmu", ".bif", ".isyntax", ".dcm",
    ".h5", ".hdf5", ".pt", ".pth", ".npy", ".npz", ".csv", ".safetensors", ".zarr", ".png", ".jpg", ".jpeg",
)  # fmt: skip
"""Extensions of slides, images and features that are no part of a slide's name."""


def bare_name(name: str) -> str:
    """``name`` without folders and without any of the :data:`SUFFIXES` at its end (``a.svs.h5`` is ``a``).

    Only known extensions are cut, since names have dots of their own (TCGA's ``...-DX1.<uuid>``).
    """
    name = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    while True:
        stem, dot, suffix = name.rpartition(".")
        if not stem or f".{suffix.lower()}" not in SUFFIXES:
            return name
        name = stem


def file_name(name: str) -> str:
    """``name`` where it is fit for a file's name, else a key made of it, so that each name has a file of its own."""
    return name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,149}", name) else make_keys([name])[0]
