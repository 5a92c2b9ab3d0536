# Two commands do everything on a fresh machine: `make train` and `make test`; `make gpu` tests what a GPU adds.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/digits.yaml
# Ranks of the main job on a machine without a GPU; with GPUs, DeepSpeed takes all of them.
RANKS ?= 1

# `make gpu GPU_PYTHON=python3` takes the machine's own torch and packages, and installs nothing.
GPU_PYTHON ?= $(BIN)/python
GPU_WORKERS ?= 8

.PHONY: train test gpu lint clean

train: .venv/train.done
	$(BIN)/bigbag pack --config $(CONFIG)
	PATH="$(CURDIR)/$(BIN):$$PATH" LOCAL_SIZE=$(RANKS) $(BIN)/deepspeed launch/train.py --config $(CONFIG)

test: .venv/dev.done lint
	$(BIN)/python -m pytest

# The proof of the operators on the device, by several processes, since most of its time is compilation; then the rest.
gpu: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),.venv/dev.done)
	$(GPU_PYTHON) -m pytest -n $(GPU_WORKERS) -m "gpu and not large" tests/ops
	$(GPU_PYTHON) -m pytest -n 4 --dist=loadfile tests/gpu

lint: .venv/dev.done
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv/train.done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/dev.done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch .venv/train.done $@

clean:
	rm -rf .venv build dist *.egg-info runs data
