"""Downloading, from a local folder in the layout of the hub's repositories."""

import io
import shutil
import sys
import tarfile
import types

import pytest

from bigbag.datasets import CAMELYON16MILDataset, RSNAMILDataset, TADMILDataset, download
from bigbag.datasets.hub import REPOSITORIES


def archive(folder, path, prefix="./"):
    """``tar -czf path -C folder ./``, as the repositories' archives were made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=".", recursive=False)
        for file in sorted(folder.iterdir()):
            tar.add(file, arcname=f"{prefix}{file.name}")


@pytest.fixture
def camelyon_mirror(slides_root, tmp_path):
    """A copy of the repository; one archive with its folder's name inside."""
    mirror, source = tmp_path / "mirror", slides_root / "patches_512"
    for kind in ("labels", "patch_labels", "coords", "features/features_UNI"):
        prefix = "labels/" if kind == "labels" else "./"
        archive(source / kind, mirror / f"dataset/patches_512/{kind}.tar.gz", prefix)
    shutil.copy(slides_root / "splits.csv", mirror / "dataset/splits.csv")
    return mirror


def test_camelyon_from_a_mirror(camelyon_mirror, slides_root, tmp_path):
    root = download("CAMELYON16MILDataset", tmp_path / "c16", mirror=camelyon_mirror)
    mine, original = CAMELYON16MILDataset(root), CAMELYON16MILDataset(slides_root)
    assert mine.bag_names == original.bag_names == ["b", "slide.with.dots"]
    assert all((a["X"] == b["X"]).all() and (a["coords"] == b["coords"]).all() for a, b in zip(mine, original))
    assert sorted(path.name for path in root.iterdir()) == ["patches_512", "splits.csv"]
    shutil.rmtree(camelyon_mirror)
    download("CAMELYON16MILDataset", root, mirror=camelyon_mirror)  # everything is there: nothing is asked for
    with pytest.raises(FileNotFoundError, match=r"features_resnet50_bt\.tar\.gz"):
        download("CAMELYON16MILDataset", root, "resnet50_bt", mirror=camelyon_mirror)


def test_rsna_from_the_hub(sequences_root, tmp_path, monkeypatch):
    """The repository, its files and the arguments of the hub's client, which a stand-in takes."""
    hub, asked = tmp_path / "hub", []
    for kind in ("labels", "slice_labels", "features/features_resnet50"):
        archive(sequences_root / kind, hub / f"dataset/{kind}.tar.gz")
    shutil.copy(sequences_root / "splits.csv", hub / "dataset/splits.csv")

    def hf_hub_download(repo_id, filename, *, repo_type, revision, local_dir):
        asked.append((repo_id, filename, repo_type, revision))
        target = local_dir / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(hub / filename, target))

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download))
    root = download("RSNAMILDataset", tmp_path / "rsna", revision="v1")
    files = ["splits.csv", "labels.tar.gz", "slice_labels.tar.gz", "features/features_resnet50.tar.gz"]
    assert asked == [("torchmil/RSNA_ICH_MIL", f"dataset/{file}", "dataset", "v1") for file in files]
    assert len(RSNAMILDataset(root, partition="test")) == 2
    assert not (root / ".archives").exists()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"install bigbag\[hub\]"):
        download("PANDAMILDataset", tmp_path / "panda")


@pytest.mark.parametrize("damage", ["truncated", "no tar", "empty"])
def test_damaged_archives_leave_nothing_and_are_asked_for_again(damage, camelyon_mirror, tmp_path):
    path = camelyon_mirror / "dataset/patches_512/coords.tar.gz"
    whole = path.read_bytes()
    if damage == "empty":
        with tarfile.open(path, "w:gz"):
            pass
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"not a tar at all")
    root = tmp_path / "c16"
    with pytest.raises(ValueError, match=r"coords\.tar\.gz: (damaged|holds no files)"):
        download("CAMELYON16MILDataset", root, mirror=camelyon_mirror)
    assert sorted(path.name for path in (root / "patches_512").iterdir()) == ["labels", "patch_labels"]
    path.write_bytes(whole)
    download("CAMELYON16MILDataset", root, mirror=camelyon_mirror)
    assert len(CAMELYON16MILDataset(root, partition=None)) == 4


@pytest.mark.parametrize(
    "kind", ["../evil.npy", "/tmp/evil.npy", "other/a.npy", "a.pkl", "link", "hard link", "device"]
)
def test_archives_write_nowhere_else(kind, camelyon_mirror, tmp_path):
    path = camelyon_mirror / "dataset/patches_512/labels.tar.gz"
    special = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
    member = tarfile.TarInfo("a.npy" if kind in special else kind)
    member.type, member.linkname = special.get(kind, tarfile.REGTYPE), "/etc/passwd"
    content = b"" if kind in special else b"x"
    member.size = len(content)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(member, io.BytesIO(content))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"labels\.tar\.gz: (holds|damaged)"):
        download("CAMELYON16MILDataset", tmp_path / "c16", mirror=camelyon_mirror)
    new = {str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*")) - before}
    assert new == {"c16", "c16/patches_512", "c16/splits.csv"}


def test_names():
    assert {name: entry[0] for name, entry in REPOSITORIES.items()} == {
        "CAMELYON16MILDataset": "torchmil/Camelyon16_MIL",
        "PANDAMILDataset": "torchmil/PANDA_MIL",
        "RSNAMILDataset": "torchmil/RSNA_ICH_MIL",
    }
    with pytest.raises(ValueError, match="'TADMILDataset' is not on the hub, expected one of CAMELYON16MILDataset"):
        download(TADMILDataset.__name__, "anywhere")
