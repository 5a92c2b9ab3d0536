"""The commands as a user types them, on CAMELYON16's published layout in small; and every way to get them wrong."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bigbag.cli import main
from bigbag.files import write_json
from bigbag.testing import free_port

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "camelyon16.yaml")
SIZES = {"train": 24, "test": 8}


def write_slides(root: Path, width: int = 1024) -> None:
    """Slides in the layout of torchmil's processed CAMELYON16: every other one holds a few tumour patches."""
    rng = np.random.default_rng(0)
    folder = root / "patches_512"
    for name in ("features/features_UNI", "labels", "patch_labels", "coords"):
        (folder / name).mkdir(parents=True)
    rows = []
    for split, count in SIZES.items():
        for i in range(count):
            name, size = f"{split}_{i:03d}", int(rng.integers(20, 60))
            tumour = (np.arange(size) < 3) * (i % 2)
            x = rng.normal(size=(size, width)) + 2.0 * tumour[:, None]
            np.save(folder / "features/features_UNI" / f"{name}.npy", x.astype(np.float32))
            np.save(folder / "labels" / f"{name}.npy", np.array([i % 2]))
            np.save(folder / "patch_labels" / f"{name}.npy", tumour[:, None])
            places = np.stack(np.divmod(rng.permutation(100)[:size], 10), 1)
            np.save(folder / "coords" / f"{name}.npy", places * 512 + 1024)
            rows.append((name, split))
    with open(root / "splits.csv", "w", newline="") as file:
        csv.writer(file).writerows([("bag_name", "split"), *rows])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(source folder, packed shards)."""
    root = tmp_path_factory.mktemp("camelyon")
    write_slides(root / "source")
    arguments = [f"data.source.root={root / 'source'}", f"data.shards={root / 'shards'}"]
    assert main(["pack", "--config", CONFIG, *arguments]) == 0
    return root / "source", root / "shards"


@pytest.fixture
def places(packed, tmp_path):
    """A private copy of both, for damaging."""
    source, shards = (Path(shutil.copytree(p, tmp_path / p.name)) for p in packed)
    return source, shards


def arguments(shards: Path, out: Path, *more: str) -> list[str]:
    quick = ["train.epochs=3", "data.num_workers=0", "model.att_dim=16", "optim.lr=0.003", "optim.warmup_epochs=0"]
    return ["--config", CONFIG, f"data.shards={shards}", f"out={out}", *quick, *more]


def fails(capsys, command: list[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def test_camelyon16_from_files_to_report(packed, tmp_path, capsys):
    assert main(["train", *arguments(packed[1], tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "thread(s), torch (only under a launcher: engine.zero_stage), bf16" in shown
    run_dir = tmp_path / "camelyon16"
    results = json.loads((run_dir / "results.json").read_text())
    assert results["test"]["auroc"] > 0.9 and results["test"]["instance_auroc"] > 0.9
    assert results["test"]["num_bags"] == 8 and results["val"]["num_bags"] == 2  # a stratified tenth of 24
    assert f"auroc {results['test']['auroc']:.4f}" in shown and str(run_dir / "report.html") in shown
    assert (run_dir / "report.html").read_text().count("<h2") >= 3


def test_grid_coordinates_come_from_the_stride(packed):
    from bigbag.data import open_store

    store = open_store(str(packed[1]))
    bag = store.read(0)
    assert bag.coords.min() == 0 and bag.coords.max() <= 9
    raw = np.load(packed[0] / "patches_512/coords" / f"{bag.key}.npy")
    np.testing.assert_array_equal(bag.coords, raw // 512 - (raw // 512).min(0))


@pytest.mark.slow
def test_both_launchers_start_the_same_job_on_two_ranks(packed, tmp_path):
    """The main command itself, under the launchers of DeepSpeed and of torch: ranks, exit status, results."""
    launchers = {
        "deepspeed": ["--num_gpus", "2", "--master_port", str(free_port())],
        "torchrun": ["--nproc-per-node", "2", "--master-port", str(free_port())],
    }
    environment = {**os.environ, "PATH": f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"}
    results = []
    for launcher, options in launchers.items():
        out = tmp_path / launcher
        job = [str(ROOT / "launch/train.py"), *arguments(packed[1], out, "engine.zero_stage=2")]
        command = [launcher, *options, *job]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        results.append(json.loads((out / "camelyon16/results.json").read_text()))
        devices = json.loads((out / "camelyon16/environment.json").read_text())["devices"]
        assert devices["ranks"] == 2 and "ZeRO 2" in devices["backend"]
    assert results[0]["test"]["auroc"] > 0.9 and results[0]["test"]["num_bags"] == 8
    assert results[1]["test"] == pytest.approx(results[0]["test"], rel=1e-6)


def test_unknown_key(packed, tmp_path, capsys):
    text = fails(capsys, ["train", *arguments(packed[1], tmp_path), "train.epoch=3"])
    assert "'train.epoch'" in text and "did you mean 'epochs'" in text


def test_restart_deletes_runs_only(packed, tmp_path, capsys):
    other = tmp_path / "camelyon16" / "precious.txt"
    other.parent.mkdir()
    other.touch()
    text = fails(capsys, ["train", *arguments(packed[1], tmp_path), "--restart"])
    assert "holds no run" in text and str(other.parent) in text and other.is_file()
    other.rename(other.with_name("identity.json"))
    (other.parent / "checkpoints").mkdir()
    fails(capsys, ["train", *arguments(packed[1], tmp_path), "model.name=ABMI", "--restart"])
    assert not other.parent.exists()


def test_shards_that_are_not_there(tmp_path, capsys):
    text = fails(capsys, ["train", *arguments(tmp_path / "nowhere", tmp_path)])
    assert "nowhere" in text and "pack" in text


def test_missing_shard(places, tmp_path, capsys):
    shard = next(places[1].glob("*.tar"))
    shard.unlink()
    assert shard.name in fails(capsys, ["train", *arguments(places[1], tmp_path)])


@pytest.mark.parametrize("keep", [0.5, None], ids=["inside a member", "at the end of a member"])
def test_truncated_shard(places, tmp_path, capsys, keep):
    import tarfile

    shard = next(places[1].glob("*.tar"))
    with tarfile.open(shard) as tar:
        at_member_end = tar.getmembers()[-4].offset
    os.truncate(shard, int(shard.stat().st_size * keep) if keep else at_member_end)
    text = fails(capsys, ["train", *arguments(places[1], tmp_path)])
    assert shard.name in text and "bytes" in text


def test_flipped_byte_with_digests_checked(places, tmp_path, capsys):
    shard = next(places[1].glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    text = fails(capsys, ["train", *arguments(places[1], tmp_path, "data.check_digests=true")])
    assert shard.name in text


def damage(path: Path, change) -> None:
    np.save(path, change(np.load(path)))


def pack_fails(capsys, source: Path, out: Path) -> str:
    text = fails(capsys, ["pack", "--config", CONFIG, f"data.source.root={source}", f"data.shards={out}"])
    assert not (out / "manifest.json").exists()
    return text


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda x: np.where(np.arange(len(x))[:, None] == 3, np.nan, x), "NaN"),
        (lambda x: x[:, :-1], "1023"),
        (lambda x: x[:0], "empty|no instances|0 instances"),
        (lambda x: x[:-1], "rows|instances"),
        (lambda x: x * 1e6, "float16"),
    ],
    ids=["NaN", "width", "empty", "length", "overflow"],
)
def test_bad_features(places, tmp_path, capsys, change, expected):
    damage(places[0] / "patches_512/features/features_UNI/train_003.npy", change)
    text = pack_fails(capsys, places[0], tmp_path / "out")
    assert "train_003" in text and re.search(expected, text)


def test_missing_label(places, tmp_path, capsys):
    (places[0] / "patches_512/labels/train_003.npy").unlink()
    text = pack_fails(capsys, places[0], tmp_path / "out")
    assert "train_003" in text and "label" in text


def test_no_positive_bag_in_training(places, tmp_path, capsys):
    for path in (places[0] / "patches_512/labels").glob("train_*.npy"):
        damage(path, np.zeros_like)
        damage(places[0] / "patches_512/patch_labels" / path.name, np.zeros_like)
    out = tmp_path / "negative"
    assert main(["pack", "--config", CONFIG, f"data.source.root={places[0]}", f"data.shards={out}"]) == 0
    assert "positive" in fails(capsys, ["train", *arguments(out, tmp_path)])


def test_features_of_another_width_than_the_model(packed, tmp_path, capsys):
    text = fails(capsys, ["train", *arguments(packed[1], tmp_path), "model.in_shape=[512]"])
    assert "512" in text and "1024" in text


def test_nan_that_slipped_in_stops_the_run_by_name(places, tmp_path, capsys):
    """A byte flipped into a NaN after packing, digests unchecked: the loss is refused and the bag named."""
    from bigbag.data import open_store

    store = open_store(str(places[1]))
    name = "train_005"
    index = [info.name for info in store.infos].index(name)
    x = store.read(index).x.tobytes()
    shard = places[1] / store.infos[index].shard
    content = shard.read_bytes()
    start = content.index(x)
    shard.write_bytes(content[:start] + b"\xff\xff" + content[start + 2 :])
    text = fails(capsys, ["train", *arguments(places[1], tmp_path)])
    assert name in text and "not finite" in text


def test_disk_full_while_packing_leaves_no_set(packed, tmp_path, capsys):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        text = pack_fails(capsys, packed[0], small / "out")
        assert "space" in text and str(small) in text
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_report_command_and_missing_run(packed, tmp_path, capsys):
    text = fails(capsys, ["report", *arguments(packed[1], tmp_path)])
    assert str(tmp_path) in text


def test_evaluating_what_is_not_there(packed, tmp_path, capsys):
    text = fails(capsys, ["evaluate", *arguments(packed[1], tmp_path)])
    assert str(tmp_path) in text and "no such run; train it first" in text
    for path in (tmp_path / "predictions.csv", tmp_path):
        assert f"{path}: no such table; expected predictions.csv" in fails(
            capsys, ["evaluate", "--predictions", str(path)]
        )


def test_ctrl_c_ends_in_one_line(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bigbag.visualize.write_report", interrupted)
    assert main(["report", "--config", CONFIG]) == 130
    assert capsys.readouterr().err == "interrupted: the same command again goes on where it can\n"


@pytest.mark.parametrize("number, said", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_signals_end_in_one_line_and_leave_nothing_temporary(number, said, tmp_path, monkeypatch, capsys):
    def signalled(*_):
        assert list(tmp_path.iterdir())
        os.kill(os.getpid(), number)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("bigbag.bench.loader.measure", signalled)
    assert main(["bench", "loader", "--bags=1", "--instances=9", "--width=4", f"--folder={tmp_path}"]) == 128 + number
    assert capsys.readouterr().err == f"{said}: the same command again goes on where it can\n"
    assert signal.getsignal(signal.SIGTERM) is before and not list(tmp_path.iterdir())


def test_home_is_expanded_after_an_option_too(tmp_path, monkeypatch, capsys):
    """``--out=~/x``, which shells leave as it is, would make a folder called ``~``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "none.yaml") in fails(capsys, ["train", "--config=~/none.yaml"])
    assert f"{tmp_path}/features: no such file" in fails(capsys, ["pack", "--from=~/features", "--out=~/set"])
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_ends_the_command_quietly():
    """As in ``bigbag ... | head -1``: status 141, as of other commands, and a line about going on."""
    command = [sys.executable, "-m", "bigbag", "compare", "--config", CONFIG, "--folds", "3", "--list"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141
    assert said == "the reader of the output is gone: the same command again goes on where it can\n"


def test_a_full_disk_has_a_remedy_whoever_writes(monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("bigbag.visualize.write_report", full)
    said = fails(capsys, ["report", "--config", CONFIG])
    assert said.endswith(
        "left on device: make room where the command writes; the same command again goes on where it can\n"
    )


def test_what_does_not_fit_on_the_disk_is_named(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"old": 1})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left .* as it was; make room, and run the same .*results\.json"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]
