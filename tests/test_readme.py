"""The code in README.md, run as it stands there but for sizes and files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

CODE = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


def code_with(word: str) -> str:
    (found,) = [code for code in CODE if word in code]
    return found


def test_as_a_library():
    names: dict = {}
    exec(code_with("from bigbag.models import ABMIL").replace("90_000", "9_000"), names)
    assert names["logits"].shape == (2,) and names["attention"].shape == (9_700,)
    small = names["bags"].x[9_000:]
    torch.testing.assert_close(names["model"].eval()(small[None]), names["model"](names["bags"])[1:])
    assert names["loss"].requires_grad and float(names["loss"].detach()) > 0


def test_pictures(test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("openslide")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slide.svs").symlink_to(test_data / "wsi" / "cmu_small_region.svs")  # 2,220 x 2,967
    coords = 512 * np.stack(np.divmod(np.arange(20), 5), 1)
    names: dict = {"coords": coords, "attention": np.arange(20.0)}
    exec(code_with("import Heatmap"), names)
    assert names["picture"].shape == (1000, 1400, 3)
    (region,) = json.loads((tmp_path / "slide.geojson").read_text())["features"]
    assert np.max(region["geometry"]["coordinates"][0], axis=0).tolist() == [4 * 512, 5 * 512]  # that of rank 1
    assert region["properties"]["classification"] == {"name": "tumour?", "color": [214, 39, 40]}
