"""Imports from torchmil's files find the same names in bigbag."""

import importlib
import importlib.util
import pkgutil
import subprocess
import sys

import pytest

from bigbag.torchmil_files import FILES

torchmil = pytest.importorskip("torchmil")

# What its files define beside what its packages export: helpers of theirs, and a second copy of iRPE and of relevance.
PRIVATE = {
    "torchmil.datasets.shifted_mean_mil_dataset": {"normal_pdf"},
    "torchmil.models.mil_model": {"get_args_names"},
    "torchmil.nn.attention.nystrom_attention": {"moore_penrose_iter_pinv"},
    "torchmil.nn.mlp": {"get_activation"},
    "torchmil.nn.utils": {"detect_large"},
}
UNSUPPORTED = {"torchmil.nn.irpe", "torchmil.nn.relprop", "torchmil.nn.gnns.dense_mincut_pool"}


def files():
    return [m.name for m in pkgutil.walk_packages(torchmil.__path__, "torchmil.") if m.name not in UNSUPPORTED]


@pytest.mark.parametrize("name", files())
def test_every_name_of_a_file_of_torchmil_is_in_ours(name):
    theirs = importlib.import_module(name)
    ours = importlib.import_module(name.replace("torchmil", "bigbag", 1))
    defined = {key for key, value in vars(theirs).items() if getattr(value, "__module__", None) == name}
    missing = {key for key in defined if not key.startswith("_") and not hasattr(ours, key)}
    assert missing == PRIVATE.get(name, set())


def test_files_are_attributes_of_their_packages():
    packages = ("data", "datasets", "models", "nn", "utils", "visualize")
    code = f"""
import bigbag, importlib, operator
for package in {packages}:
    importlib.import_module("bigbag." + package)
for name in {files()}:
    operator.attrgetter(name.removeprefix("torchmil."))(bigbag)
try:
    bigbag.nn.no_such_file
except AttributeError as error:
    print(error)
"""
    # In a process of its own: here other tests have imported them.
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "module 'bigbag.nn' has no attribute 'no_such_file'\n"


def test_names_are_those_of_the_package():
    from bigbag.models.mil_model import MILModel as through_file

    from bigbag.models import MILModel

    assert through_file is MILModel


def test_no_file_of_ours_is_hidden_and_others_are_still_missing():
    for package, names in FILES.items():
        folder = importlib.import_module(package).__path__[0]
        assert not [name for name in names if importlib.util.find_spec(f"{package}.{name}").origin], folder
    with pytest.raises(ModuleNotFoundError, match="no_such_file"):
        importlib.import_module("bigbag.models.no_such_file")
