"""``bigbag bench`` as a user types it: what its help names, what it prints, and options that it refuses."""

import re

import pytest
import torch

from bigbag.bench import measure
from bigbag.cli import main

LOADER = ["bench", "loader", "--bags", "2", "--instances", "40", "--width", "8", "--rounds", "1"]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *words])
    return capsys.readouterr().err


def test_help_names_all_benchmarks_and_one_its_own_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    assert "{ops,models,loader,ranks,tune}" in capsys.readouterr().out
    for name in ("ops", "models", "loader", "ranks", "tune"):
        with pytest.raises(SystemExit, match="0"):
            main(["bench", name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: bigbag bench {name} ")
    assert "invalid choice: 'opps' (choose from" in refused(capsys, "opps")


def test_loader_prints_a_line_for_each_contender_and_training(tmp_path, capsys):
    assert main([*LOADER, "--workers", "0,1", "--models", "MeanMIL", "--folder", str(tmp_path)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "2 bags of 0.0 MB, float16" in head
    names = ["np.load copies", "stream, 0 workers", "stream, 1 workers", "webdataset decode"]
    assert [line[:20].rstrip() for line in lines[:4]] == names
    number = r" *(\d+\.\d+)"
    pattern = rf".{{20}} {number} GB/s \({number} to {number}\), {number} of the copy, {number} of webdataset; resident"
    rates = [re.match(pattern, line) for line in lines[:4]]
    assert float(rates[0][4]) == float(rates[3][5]) == 1  # of itself
    waits = [
        re.fullmatch(r"training MeanMIL, (\d) workers: \d+\.\d+ s an epoch, .*% of it waiting", x) for x in lines[4:]
    ]
    assert [wait[1] for wait in waits] == ["0", "1"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, expected",
    [
        (["ops", "--sizes", "10,x"], "argument --sizes: expected a whole number from 1 on, got 'x'"),
        (["ops", "--rounds", "0"], "argument --rounds: expected a whole number from 1 on"),
        (["ops", "--impls", "cpu,tritn"], "argument --impls: unknown 'tritn' (choose from triton, cpu, reference, "),
        (["ops", "--device", "gpu"], "argument --device: expected cpu or cuda, got 'gpu'"),
        (["ops", "--csv", "/nowhere/o.csv"], "argument --csv: /nowhere: no such folder"),
        (["ops", "--plot", "o.txt"], "argument --plot: 'o.txt': expected a name that ends in .png, .pdf, .svg"),
        (["models", "--dtypes", "float16"], "argument --dtypes: unknown 'float16' (choose from float32, bfloat16)"),
        (["loader", "--workers", "a"], "argument --workers: expected whole numbers"),
        (["ranks", "--model", "ABML"], "argument --model: invalid choice: 'ABML'"),
        (["ranks", "--backends", "mpi"], "argument --backends: unknown 'mpi' (choose from torch, deepspeed)"),
        (["ranks", "--smallest", "9", "--largest", "8"], "--smallest 9 is above --largest 8"),
        pytest.param(["tune", "--op", "spmm"], "argument --device: cuda: torch finds no such device", marks=NO_GPU),
    ],
)  # fmt: skip
def test_options_are_refused_before_anything_is_measured(words, expected, capsys):
    assert expected in refused(capsys, *words)


def test_an_error_within_is_one_line(tmp_path, capsys):
    assert main([*LOADER, "--folder", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: [Errno 2] No such file or directory: ")


def test_the_rate_of_slow_instructions(monkeypatch):
    """Products of 16 bits without instructions for them are asked once, and count as those of 32."""
    asked = []

    def slow(step, device):
        asked.append(device)
        return 0.25 if len(asked) <= 4 else 16.0

    monkeypatch.setattr(measure, "seconds", slow)
    rates = measure.gemm_rates("cpu", (torch.float32, torch.bfloat16))
    assert len(asked) == 5 and rates[torch.bfloat16] == rates[torch.float32] == 2 * 8192 * 1024 * 256 / 0.25 / 1e9
