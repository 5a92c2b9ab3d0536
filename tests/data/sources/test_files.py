"""Reading single files: the fast way through HDF5, and files that are damaged or mean harm."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigbag.data.sources import h5 as h5_module
from bigbag.data.sources.arrays import FILE_TYPES, read_file
from bigbag.data.sources.h5 import open_h5, read_dataset

h5py = pytest.importorskip("h5py")


def write_h5(path: Path, values: np.ndarray, **options: object) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=values, **options)
    return path


def read(path: Path) -> np.ndarray:
    with open_h5(path) as file:
        return read_dataset(file["features"])


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"shuffle": True, "compression": "lzf"}])
def test_chunks_of_rows(tmp_path: Path, rows: int, options: dict) -> None:
    values = np.random.default_rng(0).normal(size=(1001, 16)).astype(np.float16)
    path = write_h5(tmp_path / "a.h5", values, chunks=(rows, 16), maxshape=(None, 16), **options)
    np.testing.assert_array_equal(read(path), values)


def test_rows_written_in_any_order_and_two_sets_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values, order = rng.normal(size=(500, 4)).astype(">f4"), rng.permutation(500)
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        features = file.create_dataset("features", (500, 4), ">f4", chunks=(1, 4), maxshape=(None, 4))
        other = file.create_dataset("other", (500, 2), "i8", chunks=(1, 2), maxshape=(None, 2))
        for row in order:
            features[row], other[row] = values[row], row
    np.testing.assert_array_equal(read(tmp_path / "a.h5"), values)


def test_the_fast_way_is_taken_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    original = h5_module._gather_rows
    monkeypatch.setattr(h5_module, "_gather_rows", lambda *a: taken.append(a) or original(*a))
    values = np.ones((200, 8), np.float32)
    read(write_h5(tmp_path / "a.h5", values, chunks=(1, 8), maxshape=(None, 8)))
    assert len(taken) == 1
    for i, options in enumerate(
        ({}, {"chunks": (100, 8)}, {"chunks": (1, 8), "compression": "gzip"}, {"chunks": (1, 4)})
    ):
        read(write_h5(tmp_path / f"{i}.h5", values, **options))
    assert len(taken) == 1


def test_shapes_that_promise_more_than_the_file_has(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", shape=(10**12, 1024), chunks=(1, 1024), dtype="f4")
        file.create_dataset("zipped", shape=(10**9, 1024), chunks=(1, 1024), dtype="f4", compression="gzip")
    for name in ("features", "zipped"):
        with (
            open_h5(tmp_path / "a.h5") as file,
            pytest.raises(ValueError, match=rf"a.h5, {name}: promises .* not written"),
        ):
            read_dataset(file[name])


def test_data_outside_the_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 4000)
    write_h5(tmp_path / "other.h5", np.ones((10, 4)))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", (10, 4), "f4", external=[(str(tmp_path / "secret"), 0, 160)])
        file["coords"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "features")
        layout = h5py.VirtualLayout((10, 4), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "features", (10, 4))
        file.create_virtual_dataset("embeddings", layout)
    with open_h5(tmp_path / "a.h5") as file:
        assert "coords" not in h5_module.dataset_names(file)
        for name in ("features", "embeddings"):
            with pytest.raises(ValueError, match=r"is stored in another file"):
                read_dataset(file[name])


class Harm:
    def __reduce__(self) -> tuple:
        return os.mkdir, (str(Harm.place),)

    place: Path


@pytest.mark.parametrize("kind", ["pt", "legacy", "npy", "npz", "pickle"])
def test_nothing_is_unpickled(tmp_path: Path, kind: str) -> None:
    Harm.place = tmp_path / "harmed"
    content = np.array([Harm()], dtype=object)
    path = tmp_path / f"a.{kind if kind.startswith('np') else 'pt'}"
    if kind in ("pt", "legacy"):
        torch.save({"features": torch.ones(3, 2), "x": Harm()}, path, _use_new_zipfile_serialization=kind == "pt")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"slide": [Harm()]}))
    elif kind == "npy":
        np.save(path, content, allow_pickle=True)
    else:
        np.savez(path, features=content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_file(path)
    assert not Harm.place.exists()


def test_numpy_in_torch_files(tmp_path: Path) -> None:
    for dtype in (np.float16, np.float32, np.int64):
        torch.save(np.ones((3, 2), dtype), tmp_path / "a.pt")
        assert read_file(tmp_path / "a.pt").features().dtype == dtype
    torch.save(np.array([Harm()], dtype=object), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b.pt: holds objects that are neither tensors"):
        read_file(tmp_path / "b.pt")


def test_a_header_of_exabytes(tmp_path: Path) -> None:
    header = np.lib.format.magic(1, 0)
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000, 1024), }".ljust(117) + b"\n"
    huge = header + len(text).to_bytes(2, "little") + text + b"\0" * 64
    (tmp_path / "a.npy").write_bytes(huge)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("features.npy", huge)
    (tmp_path / "a.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    for kind in ("npy", "npz", "safetensors"):
        with pytest.raises(ValueError, match=rf"a.{kind}: not a readable"):
            read_file(tmp_path / f"a.{kind}")


def samples(folder: Path, write: SimpleNamespace) -> dict[str, bytes]:
    from safetensors.numpy import save_file

    x = write.features(40)
    write.save_h5(folder / "a.h5", {"features": x, "coords": write.places(40)})
    np.save(folder / "a.npy", x)
    np.savez(folder / "a.npz", features=x)
    torch.save({"feats": torch.from_numpy(x)}, folder / "a.pt")
    save_file({"features": x}, folder / "a.safetensors")
    write.table(folder / "a.csv", x.tolist())
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_clear_errors(
    tmp_path_factory: pytest.TempPathFactory, write: SimpleNamespace, data: st.DataObject
) -> None:
    """Cut or flipped anywhere: numbers (a flipped bit of a float is one), or an error that names the file."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    if not (kept := _SAMPLES):
        kept.update(samples(folder, write))
    kind = data.draw(st.sampled_from(sorted(kept)))
    content = bytearray(kept[kind])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.one_of(st.integers(0, 400), st.integers(0, len(content) - 1)))
            content[min(place, len(content) - 1)] ^= 1 << data.draw(st.integers(0, 7))
    path = folder / f"broken{kind}"
    path.write_bytes(bytes(content))
    try:
        contents = read_file(path)
        x = contents.features()
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert x.ndim == 2 and x.dtype.kind in "biuf"


_SAMPLES: dict[str, bytes] = {}


def test_unknown_types_and_absent_files(tmp_path: Path) -> None:
    for kind in FILE_TYPES:
        with pytest.raises(ValueError, match=rf"a{kind}: no such file"):
            read_file(tmp_path / f"a{kind}")
    with pytest.raises(ValueError, match=r"type '.pkl' is not known; expected one of .npy"):
        read_file(tmp_path / "a.pkl")


def test_coordinates_are_no_features(tmp_path: Path) -> None:
    """A file whose features can't be read has its coordinates left, which are not taken for them."""
    coords = np.zeros((4, 2), np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["coords"], file["features"] = coords, np.zeros((4, 3), np.complex64)
    np.savez(tmp_path / "b.npz", coords=coords)
    torch.save({"coords": torch.from_numpy(coords)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"a\.h5, features: is of type complex64, expected numbers"):
        read_file(tmp_path / "a.h5").features()
    np.savez(tmp_path / "d.npz", other=coords)
    assert read_file(tmp_path / "d.npz").features().shape == (4, 2)
    with pytest.raises(ValueError, match=r"d\.npz: holds other, expected features under one of the names x"):
        read_file(tmp_path / "d.npz").features(("x",))
    for name in ("b.npz", "c.pt"):
        with pytest.raises(ValueError, match=rf"{name}: holds coords, expected features"):
            read_file(tmp_path / name).features()


def test_tensors_that_numpy_lacks(tmp_path: Path) -> None:
    x, path = torch.randn(4, 3), tmp_path / "a.pt"
    for kind in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        torch.save(x.to(kind), path)
        np.testing.assert_array_equal(read_file(path).features(), x.to(kind).float().numpy())
    for other in (x.to_sparse(), x.to("meta")):
        torch.save(other, path)
        with pytest.raises(ValueError, match=r"a\.pt: holds a tensor of torch\.float32.*save it dense"):
            read_file(path)


def test_no_line_of_a_table_is_lost_or_taken_for_features(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",f0,f1\n0,1.5,2\n1,3,4\n")  # pandas writes its index so
    np.testing.assert_array_equal(read_file(path).features(), [[1.5, 2], [3, 4]])
    for text, message in (("1,2\n#3,4\n5,6\n", "'#3'"), ("x,y,f0\n1,2\n3,4\n", "2 columns under a header of 3")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"a\.csv: not a table of numbers \(.*{message}"):
            read_file(path)


def test_damaged_names_and_numbers_that_are_none(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "a.h5", np.zeros((4, 3), np.float32))
    with h5py.File(path, "a") as file:
        file["features"].attrs["name"] = "slide"
        file["features"].attrs["mpp"] = np.nan
    assert read_file(path).attributes["features"] == {"name": "slide", "mpp": None}
    path.write_bytes(path.read_bytes().replace(b"features\x00", b"feat\xffres\x00"))
    with pytest.raises(ValueError, match=r"a\.h5: damaged HDF5 file \(.*codec"):
        read_file(path)
