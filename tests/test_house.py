"""Rules of the house: layers, light import, what the wheel holds."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package may import from the sets named here only (and from itself).
BASE = {"adjacency", "bags", "config", "files", "graphs", "memory", "parts", "segments", "torchmil_files"}
OPS = BASE | {"kernels", "ops"}
DATA = BASE | {"data", "datasets"}
ENGINE = OPS | DATA | {"nn", "models", "engine"}
ALLOWED = {
    "kernels": set(),
    "files": set(),
    "torchmil_files": set(),
    "memory": set(),
    "config": {"files"},
    "parts": set(),
    "adjacency": {"parts"},
    "segments": {"parts"},
    "bags": {"adjacency", "parts", "segments"},
    "graphs": {"adjacency", "bags", "kernels"},
    "ops": BASE | {"kernels"},
    "nn": OPS,
    "models": OPS | {"nn"},
    "data": BASE,
    "datasets": DATA,
    "engine": ENGINE,
    "utils": ENGINE,
    "evaluation": ENGINE,
    "visualize": ENGINE | {"evaluation"},
    "samples": OPS | {"testing"},
    "testing": OPS | {"samples"},
    "bench": ENGINE | {"samples", "testing"},
    "cli": ENGINE | {"evaluation", "visualize", "bench"},
    "__main__": {"cli"},
}


def modules() -> list[Path]:
    """Every Python file of the package, kernels included through their real folder."""
    return [
        path
        for folder in ("bigbag", "kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not (folder == "bigbag" and "kernels" in path.relative_to(ROOT / "bigbag").parts[:1])
    ]


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else (parts[1] if len(parts) > 1 else "")


def imported_layers(path: Path) -> set[str]:
    """The parts of bigbag that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("bigbag.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_from_its_left(path):
    layer = layer_of(path)
    if layer == "__init__":
        assert imported_layers(path) <= {"bags", "models", "torchmil_files"} | {
            "Adjacency",
            "Bag",
            "PackedBags",
            "Segments",
        }
        return
    breaches = imported_layers(path) - ALLOWED[layer] - {layer}
    names = {"Adjacency", "Bag", "PackedBags", "Segments"}  # from bigbag import Bag
    assert not breaches - names, f"{path.relative_to(ROOT)} ({layer}) may not import {sorted(breaches - names)}"


def test_kernels_are_no_importable_top_level_package():
    assert not list((ROOT / "kernels").rglob("__init__.py"))
    assert os.readlink(ROOT / "bigbag" / "kernels") == "../kernels"
    assert not [p for p in ROOT.rglob("triton") if p.is_dir() and ".venv" not in p.parts]


def test_launch_scripts_shadow_nothing():
    names = {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert not names & (
        set(sys.stdlib_module_names) | {"torch", "deepspeed", "triton", "webdataset", "numpy", "kernels"}
    )


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_hold_one_idea(path):
    limit = 500 if layer_of(path) == "kernels" else 400
    assert len(path.read_text().splitlines()) <= limit


def test_import_needs_torch_and_numpy_only():
    code = """
import sys
blocked = ("triton", "xformers", "deepspeed", "webdataset", "numba", "sklearn", "pydantic", "yaml", "matplotlib",
           "tensorboard", "safetensors", "tqdm")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import bigbag
print(bigbag.PackedBags.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip() == "PackedBags", done.stderr


@pytest.mark.slow
def test_wheel_holds_bigbag_with_its_kernels_and_nothing_else(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"bigbag"}
    expected = {f"bigbag/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}
    assert expected and expected | {"bigbag/py.typed", "bigbag/cli.py"} <= set(names)
    assert any("licenses/LICENSE" in name for name in names)
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    code = "import bigbag, bigbag.kernels.cpu.attention_pool as k; print(bigbag.__file__, k.__file__)"
    elsewhere = {"env": {**os.environ, "PYTHONPATH": str(target)}, "cwd": tmp_path}
    done = subprocess.run([sys.executable, "-c", code], **elsewhere, capture_output=True, text=True, check=True)
    assert all(str(target) in place for place in done.stdout.split())
