"""Arrays as ``.npy`` bytes and back, without copies and without ever unpickling."""

from __future__ import annotations

import io
import math
import re
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

_MAX_HEADER_BYTES = 16_384
_KINDS = "biuf"
_HEADER = re.compile(
    rb"\x93NUMPY(?:\x01\x00..|\x02\x00....)"
    rb"\{'descr': '([<>|=][A-Za-z?]\d{0,8})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,19}, ?)*(?:\d{1,19})?)\), \} *\n",
    re.DOTALL,
)


class NpyBytes:
    """``array`` as the bytes of an ``.npy`` file, little-endian and C-ordered; an array that is so is not copied.

    Attributes:
        pieces: the bytes, one after the other.
    """

    def __init__(self, array: np.ndarray) -> None:
        assert array.dtype.kind in _KINDS, array.dtype
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        header = io.BytesIO()
        npy_format.write_array_header_1_0(header, npy_format.header_data_from_array_1_0(array))
        self.pieces = (memoryview(header.getvalue()), array.reshape(-1).view(np.uint8).data)

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces)


def npy_view(buffer: Any, where: str) -> np.ndarray:
    """The array in the ``.npy`` bytes ``buffer``, as a view of them.

    Nothing is allocated by what the header says: it must describe exactly the bytes that are there.

    Raises:
        ValueError: not an ``.npy``, an array of Python objects or text, or a header that does not fit the bytes.
    """
    view = memoryview(buffer).cast("B")
    try:
        shape, fortran, dtype, start = _parse_header(bytes(view[: _header_bytes(view)]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: damaged .npy header ({error}); check the set with check_digests") from None
    if fortran and len(shape) > 1:
        raise ValueError(f"{where}: Fortran-ordered array, expected C order")
    count = math.prod(shape)
    if start + count * dtype.itemsize != len(view):
        raise ValueError(
            f"{where}: the header promises an array {tuple(shape)} of {dtype}, {count * dtype.itemsize} bytes, but "
            f"{len(view) - start} bytes follow; check the set with check_digests"
        )
    return np.frombuffer(view, dtype=dtype, offset=start, count=count).reshape(shape)


def _header_bytes(view: memoryview) -> int:
    """Bytes before the array, by the length that the header states; more than there may be where it is damaged."""
    size = 2 if view[6:7] == b"\x01" else 4
    return min(8 + size + int.from_bytes(view[8 : 8 + size], "little"), _MAX_HEADER_BYTES)


@lru_cache(maxsize=4096)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, dtype and length of a header.

    Only what numpy writes for plain arrays is read, by a pattern: numpy's own reader evaluates the text, and fails in
    as many ways as Python's parser does.
    """
    found = _HEADER.fullmatch(header)
    if found is None:
        raise ValueError(f"{header[:40]!r}... is none of a plain array")
    kind, fortran, shape = (text.decode("latin-1") for text in found.groups())
    if kind[1:2] not in _KINDS:
        raise ValueError(f"array of {kind!r}, expected plain numbers: Python objects are never unpickled")
    return tuple(map(int, re.findall(r"\d+", shape))), fortran == "True", np.dtype(kind), len(header)
