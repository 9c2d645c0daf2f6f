# lcjax: every command a newcomer needs. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { command -v $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow lint format types lock clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.ready  ## make .venv with the locked versions

$(VENV)/.ready: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "lcjax needs Python 3.12 or newer; install it, or run 'make PYTHON=/path/to/python3.12'"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

include mk/models.mk
include mk/pods.mk

train: setup  ## prepare a corpus, train the quickstart model, decode a sample
	$(BIN)/python train.py --gin_file=configs/run/quickstart.gin --output=runs/quickstart

test: setup  ## run the tests
	$(BIN)/python -m pytest -m "not slow and not gpu" -n auto --maxprocesses 4 --dist loadfile

test-slow: setup  ## run the long sweeps too
	$(BIN)/python -m pytest -m "not gpu" -n auto --maxprocesses 4 --dist loadfile

lint: setup  ## ruff, lint rules
	$(BIN)/ruff check .

format: setup  ## ruff, formatting (check only; `ruff format .` rewrites)
	$(BIN)/ruff format --check .

types: setup  ## ty, static types
	$(BIN)/ty check --python $(VENV)

lock:  ## resolve requirements.lock again (needs uv)
	uv pip compile --quiet --no-emit-index-url --no-emit-find-links --no-annotate --generate-hashes --universal \
		--python-version 3.12 --extra dev --custom-compile-command "make lock" pyproject.toml -o requirements.lock

clean:  ## remove the environment and caches (runs/ and models/ stay)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
