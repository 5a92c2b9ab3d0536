"""`bigbag predict` with pictures: a real slide in TRIDENT's layout, volumes, and what cannot be drawn."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from bigbag.cli import main
from bigbag.config import ModelConfig, TaskConfig
from bigbag.models import build_model, save_model
from bigbag.visualize.slide_image import SlideImage

NAME, PATCH = "cmu_small_region", 96


def make_model(folder, width=3):
    torch.manual_seed(0)
    settings = ModelConfig(name="ABMIL", att_dim=8), (width,), TaskConfig()
    save_model(folder, build_model(*settings).state_dict(), *settings)
    return folder


def predict(checkpoint, root, out, *options):
    arguments = ["--checkpoint", checkpoint, "--from", root, "--out", out, *options]
    return main(["predict", *map(str, arguments)])


@pytest.fixture(scope="module")
def job(test_data, tmp_path_factory):
    """TRIDENT's job of the slide: its path, that of the slides, corners of the patches, and where there is tissue."""
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("openslide")
    path = test_data / "wsi" / f"{NAME}.svs"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set BIGBAG_TEST_DATA")
    with SlideImage(path) as slide:
        width, height = slide.size
        pixels = slide.picture((height, width)).astype(np.float32)
    tissue = pixels.max(2) - pixels.min(2) > 25
    x, y = (grid.reshape(-1) for grid in np.meshgrid(np.arange(0, width, PATCH), np.arange(0, height, PATCH)))
    kept = np.array([tissue[b : b + PATCH, a : a + PATCH].mean() > 0.5 for a, b in zip(x, y)])
    x, y = x[kept], y[kept]
    features = np.stack([pixels[b : b + PATCH, a : a + PATCH].mean((0, 1)) / 128 for a, b in zip(x, y)])
    root = tmp_path_factory.mktemp("trident")
    folder = root / "10x_48px_0px_overlap" / "features_colour"
    folder.mkdir(parents=True)
    with h5py.File(folder / f"{NAME}.h5", "w") as file:
        file["features"] = features
        coords = file.create_dataset("coords", data=np.stack([x, y], 1))
        # At 10x a patch of 48 pixels is 96 pixels of level 0.
        coords.attrs.update(patch_size=48, patch_size_level0=96, level0_magnification=20, target_magnification=10)
        coords.attrs.update(overlap=0, level0_width=width, level0_height=height)
    return root, path.parent, np.stack([x, y], 1), tissue


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_everything_of_a_real_slide(job, tmp_path):
    root, slides, corners, tissue = job
    height, width = tissue.shape
    out = tmp_path / "out"
    options = ["--slides", slides, "--heatmaps", "--geojson", "--deepzoom", "--top-k", 5, "--max-side", 990]
    assert predict(make_model(tmp_path / "model"), root, out, *options) == 0
    overlay = np.asarray(Image.open(out / "heatmaps" / f"{NAME}.overlay.png"))
    assert overlay.shape == (990, 741, 4)
    drawn = np.zeros((height, width), bool)
    for a, b in corners:
        drawn[b : b + PATCH, a : a + PATCH] = True
    # Pixel i shows rows from i * height / 990 on: sharp edges come back within a pixel.
    rows, columns = (np.arange(n) * side // n for n, side in ((990, height), (741, width)))
    assert iou(overlay[..., 3] > 127, drawn[rows][:, columns]) > 0.98
    picture = np.asarray(Image.open(out / "heatmaps" / f"{NAME}.png")).astype(int)
    with SlideImage(slides / f"{NAME}.svs") as slide:
        thumbnail = slide.picture((990, 741)).astype(int)
    clear = overlay[..., 3] == 0
    assert picture.shape[0] == 990 and picture.shape[1] > 800
    assert np.array_equal(picture[:, :741][clear], thumbnail[clear])
    assert (np.abs(picture[:, :741] - thumbnail)[~clear].max(1) > 3).mean() > 0.95
    on_thumbnail = thumbnail.max(2) - thumbnail.min(2) > 25
    assert iou(~clear, on_thumbnail) >= iou(drawn, tissue) - 0.02

    with np.load(out / "scores" / f"{NAME}.npz") as file:
        scores = file["scores"]
        assert np.array_equal(file["coords"], corners)
    top = json.loads((out / "geojson" / f"{NAME}.top.geojson").read_text())["features"]
    best = np.argsort(-scores, kind="stable")[:5]
    assert [f["geometry"]["coordinates"][0][0] for f in top] == corners[best].tolist()
    assert [f["properties"]["name"] for f in top] == list("12345")
    every = json.loads((out / "geojson" / f"{NAME}.instances.geojson").read_text())["features"]
    found = [f["properties"]["measurements"]["score"] for f in every]
    assert len(found) == len(corners) and np.allclose(found, scores, rtol=1e-5)
    regions = json.loads((out / "geojson" / f"{NAME}.regions.geojson").read_text())["features"]
    ranks = scores.argsort().argsort() / (len(scores) - 1)
    assert sum(f["properties"]["measurements"]["instances"] for f in regions) == (ranks >= 0.9).sum()
    assert {f["properties"]["classification"]["name"] for f in regions} == {"score rank >= 0.9"}
    assert min(f["properties"]["measurements"]["mean score rank"] for f in regions) >= 0.9
    assert (out / "heatmaps" / f"{NAME}.dzi").is_file() and (out / "top" / f"{NAME}.png").is_file()


def test_pictures_are_drawn_again_only_where_something_changed(job, tmp_path):
    root, slides, _, _ = job
    out, model = tmp_path / "out", make_model(tmp_path / "model")
    picture, lines = out / "heatmaps" / f"{NAME}.png", out / "geojson" / f"{NAME}.regions.geojson"
    base = ["--slides", slides, "--max-side", 200]

    def drawn(*options):
        time.sleep(0.01)
        before = time.time_ns()
        assert predict(model, root, out, *base, *options) == 0
        return [path.stat().st_mtime_ns >= before for path in (picture, lines) if path.is_file()]

    assert drawn("--heatmaps") == [True]
    assert drawn("--heatmaps") == [False]
    assert drawn("--heatmaps", "--geojson")[1:] == [True]
    assert drawn("--heatmaps", "--geojson") == [False, False]
    assert drawn("--geojson", "--threshold", "0.5") == [False, True]
    assert drawn("--heatmaps", "--threshold", "0.5", "--opacity", "0.2") == [True, False]


def test_without_the_slide(job, tmp_path):
    """The box is the slide's, whose size TRIDENT wrote down; white where nothing is. All instances may be the top."""
    root, _, corners, tissue = job
    out = tmp_path / "out"
    options = ["--heatmaps", "--scale", "linear", "--top-k", 10_000]
    assert predict(make_model(tmp_path / "model"), root, out, *options) == 0
    with np.load(out / "scores" / f"{NAME}.npz") as file:
        order = np.argsort(-file["scores"], kind="stable")
    top = json.loads((out / "geojson" / f"{NAME}.top.geojson").read_text())["features"]
    assert [f["geometry"]["coordinates"][0][0] for f in top] == corners[order].tolist()
    overlay = np.asarray(Image.open(out / "heatmaps" / f"{NAME}.overlay.png"))
    assert overlay.shape[:2] == (round(tissue.shape[0] / 6), round(tissue.shape[1] / 6)), "16 pixels a patch"
    picture = np.asarray(Image.open(out / "heatmaps" / f"{NAME}.png"))[:, : overlay.shape[1]]
    assert (picture[overlay[..., 3] == 0] == 255).all()
    x, y = corners[7] / 6 + 8
    assert overlay[int(y), int(x), 3] == 255


def volumes(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, coords in (("scan", np.arange(30)[:, None]), ("block", rng.integers(0, 12, (400, 3)))):
        np.savez(folder / f"{name}.npz", features=rng.normal(size=(len(coords), 3)).astype(np.float32), coords=coords)
    return folder


def test_volumes_by_slice(tmp_path, capsys):
    out = tmp_path / "out"
    root, model = volumes(tmp_path / "new"), make_model(tmp_path / "model")
    assert predict(model, root, out, "--heatmaps") == 0
    for name in ("scan", "block"):
        assert np.asarray(Image.open(out / "heatmaps" / f"{name}.png")).std() > 20
    assert predict(model, root, out, "--geojson") == 2
    assert "it is a volume" in capsys.readouterr().err


def test_what_cannot_be_drawn(job, tmp_path, capsys):
    """Scores are there all the same, and other slides are drawn."""
    _, slides, _, _ = job
    model, new, out = make_model(tmp_path / "model"), tmp_path / "new", tmp_path / "out"
    new.mkdir()
    grid = np.stack(np.divmod(np.arange(30), 6), 1)
    x = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    np.savez(new / f"{NAME}.npz", features=x, coords=grid)
    assert predict(model, new, out, "--slides", slides, "--heatmaps") == 2
    assert "count patches" in capsys.readouterr().err
    np.savez(new / f"{NAME}.npz", features=x, coords=grid * 1000)
    assert predict(model, new, out, "--slides", slides, "--heatmaps") == 2
    assert "21 of 30 instances lie outside" in capsys.readouterr().err
    np.savez(new / f"{NAME}.npz", features=x)
    assert predict(model, new, out, "--heatmaps") == 2
    assert "no coordinates" in capsys.readouterr().err
    np.savez(new / "other.npz", features=x, coords=grid * 256)
    assert predict(model, new, out, "--heatmaps") == 2
    assert (out / "heatmaps" / "other.png").is_file() and (out / "scores" / f"{NAME}.npz").is_file()
    assert predict(model, new, out, "--slides", slides, "--heatmaps") == 2
    assert "no image of 1 of 2 slides ('other')" in capsys.readouterr().err


@pytest.mark.slow
def test_a_slide_of_592_349_nuclei(test_data, tmp_path):
    """Prediction, heatmap and GeoJSON of all of them: 8 s and 1.0 GiB on two idle cores; 60 s and 3 GiB are allowed."""
    if not (test_data / "hgsc").is_dir():
        pytest.skip(f"{test_data / 'hgsc'} is absent; set BIGBAG_TEST_DATA")
    out, code = tmp_path / "out", "import resource, sys; from bigbag.cli import main; code = main(sys.argv[1:])"
    code += "; print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    arguments = ["--checkpoint", make_model(tmp_path / "model", 7), "--from", test_data / "hgsc", "--format", "hgsc"]
    command = ["predict", *arguments, "--out", out, "--heatmaps", "--geojson", "--top-k", 10, "--threads", 2]
    before = os.times().children_user
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=True)
    assert os.times().children_user - before < 60, "seconds of processor time, which others can't lengthen"
    assert int(done.stdout.split("peak ")[1]) < 3 * 2**20
    with open(out / "geojson" / "hgsc.instances.geojson") as file:
        lines = file.readlines()
    assert len(lines) == 592_349 + 2 and len(json.loads("[" + "".join(lines[1:-1]) + "]")) == 592_349
    overlay = np.asarray(Image.open(out / "heatmaps" / "hgsc.overlay.png"))
    assert max(overlay.shape) == 2000 and 0.3 < (overlay[..., 3] > 127).mean() < 0.8
