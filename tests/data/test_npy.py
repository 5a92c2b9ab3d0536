from __future__ import annotations

import io

import numpy as np
import pytest

from bigbag.data.npy import NpyBytes, npy_view


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool", ">f4"])
@pytest.mark.parametrize("shape", [(0, 3), (5,), (4, 3), (2, 3, 4)])
def test_round_trip_and_numpy_reads_it(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    content = bytes(NpyBytes(array))
    np.testing.assert_array_equal(npy_view(content, "here"), array)
    np.testing.assert_array_equal(np.load(io.BytesIO(content), allow_pickle=False), array)
    assert npy_view(content, "here").dtype.byteorder in "=|<"


def test_a_strided_array_is_stored_in_c_order() -> None:
    array = np.arange(24).reshape(4, 6)[::2, ::-1]
    np.testing.assert_array_equal(npy_view(bytes(NpyBytes(array)), "here"), array)


def test_the_view_copies_nothing() -> None:
    content = bytearray(bytes(NpyBytes(np.zeros((4, 4), np.float32))))
    view = npy_view(content, "here")
    content[-4:] = np.float32(7).tobytes()
    assert view[3, 3] == 7


def saved(array: np.ndarray, **kwargs: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return file.getvalue()


def header(text: str) -> bytes:
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved(np.array([{"a": 1}], dtype=object), allow_pickle=True), "never unpickled"),
        (saved(np.array(["text"])), "expected plain numbers"),
        (saved(np.asfortranarray(np.ones((3, 2)))), "Fortran"),
        (saved(np.ones(3))[:-1], "the header promises"),
        (saved(np.ones(3)) + b"x", "the header promises"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }"), "promises an array"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,), }"), "here"),
        (header("{'descr': ',f2', 'fortran_order': False, 'shape': (3,), }"), "damaged"),
        (header("__import__('os').system('true')"), "damaged"),
        (b"", "damaged"),
        (b"\x93NUMPY\x09\x00", "damaged"),
    ],
)
def test_hostile_bytes_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match="here") as error:
        npy_view(content, "here")
    assert message in str(error.value)


def test_nothing_is_copied_on_the_way_to_a_shard() -> None:
    array = np.zeros((4, 4), np.float16)
    array.flags.writeable = False
    content = NpyBytes(array)
    array.flags.writeable = True
    array[3, 3] = 7
    assert npy_view(bytes(content), "here")[3, 3] == 7 and len(content) == len(bytes(content))
