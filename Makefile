# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/digits.yaml
# Ranks of the main job on a machine without a GPU; with GPUs, DeepSpeed takes all of them.
RANKS ?= 1

.PHONY: train test lint clean

train: .venv/train.done
	$(BIN)/bigbag pack --config $(CONFIG)
	PATH="$(CURDIR)/$(BIN):$$PATH" LOCAL_SIZE=$(RANKS) $(BIN)/deepspeed launch/train.py --config $(CONFIG)

test: .venv/dev.done lint
	$(BIN)/python -m pytest

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
