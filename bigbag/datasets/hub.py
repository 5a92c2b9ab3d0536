"""Getting the data sets that torchmil's authors publish on the Hugging Face hub."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath

logger = logging.getLogger(__name__)

_SLIDES = ("patches_512/labels", "patches_512/patch_labels", "patches_512/coords", "patches_512/features/features_{}")
_SCANS = ("labels", "slice_labels", "features/features_{}")
REPOSITORIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "CAMELYON16MILDataset": ("torchmil/Camelyon16_MIL", _SLIDES, "UNI"),
    "PANDAMILDataset": ("torchmil/PANDA_MIL", _SLIDES, "UNI"),
    "RSNAMILDataset": ("torchmil/RSNA_ICH_MIL", _SCANS, "resnet50"),
}
"""Class, repository on the hub, folders in it (each a ``dataset/<folder>.tar.gz``), and the usual extractor."""


def download(
    name: str,
    root: str | Path,
    features: str | None = None,
    *,
    revision: str | None = None,
    mirror: str | Path | None = None,
    keep_archives: bool = False,
) -> Path:
    """Get a data set, so that ``CAMELYON16MILDataset(root, features=...)`` and its like read it.

    Run again after an interruption it goes on where it stopped: a folder appears under its name once it is complete,
    and an archive is fetched on from its last byte. Features of one extractor of CAMELYON16 take some 26 GB, as much
    again while they are unpacked.

    Args:
        name: class of the data set: "CAMELYON16MILDataset", "PANDAMILDataset" or "RSNAMILDataset".
        root: folder to put it in; made if absent.
        features: name of the extractor; None: the default of the class.
        revision: branch, tag or commit of the repository; None: its main branch.
        mirror: folder with the repository's files, to take them from instead of the hub.
        keep_archives: leave the archives in ``root/.archives`` instead of deleting each once it is unpacked.

    Returns:
        ``root``.

    Raises:
        ValueError: no such data set, or an archive that is damaged or holds anything but files of arrays.
        FileNotFoundError: a file that ``mirror`` lacks.
        ImportError: huggingface_hub is not installed, and there is no ``mirror``.
    """
    if name not in REPOSITORIES:
        raise ValueError(f"{name!r} is not on the hub, expected one of {', '.join(REPOSITORIES)}")
    repository, folders, usual_features = REPOSITORIES[name]
    target, archives = Path(root), Path(root, ".archives")
    target.mkdir(parents=True, exist_ok=True)
    if not (target / "splits.csv").is_file():
        _copy_atomically(_fetch(repository, "dataset/splits.csv", archives, revision, mirror), target / "splits.csv")
    for folder in (pattern.format(features or usual_features) for pattern in folders):
        if (target / folder).is_dir():
            continue
        archive = _fetch(repository, f"dataset/{folder}.tar.gz", archives, revision, mirror)
        logger.info(f"download: unpacking {archive}")
        _unpack(archive, target / folder)
        if mirror is None and not keep_archives:
            archive.unlink()
    if not keep_archives:
        shutil.rmtree(archives, ignore_errors=True)
    return target


def _fetch(repository: str, file: str, archives: Path, revision: str | None, mirror: str | Path | None) -> Path:
    """A file of the repository, in ``mirror`` or downloaded to ``archives``."""
    if mirror is not None:
        path = Path(mirror, file)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected a copy of that of {repository}")
        return path
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ImportError(f"{repository} is on the Hugging Face hub: install bigbag[hub], or give a mirror") from None
    return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision, local_dir=archives))


def _copy_atomically(source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".incomplete-") as folder:
        os.replace(shutil.copyfile(source, Path(folder, target.name)), target)


def _unpack(archive: Path, target: Path) -> None:
    """Write the ``.npy`` files of a tar into the folder ``target``, which appears once all are there.

    Only their own names count: nothing is written outside, whatever a member is called.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".incomplete-") as folder:
        files = Path(folder, target.name)
        files.mkdir()
        try:
            # tarfile takes a stream that ends between two members for a whole one; gzip knows better at its end.
            with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    if not member.isdir():
                        _write_member(tar, member, files, archive)
                while stream.read(1 << 20):
                    pass
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{archive}: damaged ({error}); delete it and run the download again") from error
        if not any(files.iterdir()):
            raise ValueError(f"{archive}: holds no files; delete it and run the download again")
        os.replace(files, target)


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, archive: Path) -> None:
    path = PurePosixPath(member.name)
    inside = not path.is_absolute() and ".." not in path.parts and path.parts[:-1] in ((), (folder.name,))
    if not member.isfile() or not inside or path.suffix != ".npy":
        raise ValueError(f"{archive}: holds {member.name!r}, expected .npy files of {folder.name}")
    content = tar.extractfile(member)
    assert content is not None
    with open(folder / path.name, "xb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
    if (folder / path.name).stat().st_size != member.size:
        raise ValueError(f"{archive}: {member.name!r} is cut short; delete it and run the download again")
