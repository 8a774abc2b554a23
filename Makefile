# Python 3.11 or newer, make and a package index are all this needs.
# A CPU build of torch, where an index offers one:  make demo TORCH='torch==2.13.0+cpu' TORCH_OPTIONS='--index-url …'

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_OPTIONS ?=
ASSETS ?= assets
DEMO_OPTIONS ?=
TEST_PROCESSES ?= 4
PYTEST_OPTIONS ?=

# What the tests can use beside Python packages, installed where apt-get is and we are root.
# Without the Ceph packages (286 MB) the S3 tests walk moto alone: make test CEPH_PACKAGES=
CEPH_PACKAGES ?= ceph-mon ceph-osd radosgw ceph-common
SYSTEM_PACKAGES ?= chromium $(CEPH_PACKAGES)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN_STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-for-tests
SYSTEM_STAMP := $(VENV)/.system-packages

.PHONY: help venv venv-tests system assets demo demo-steering demo-consolidation demo-retention bench test test-fast lint format clean

help:
	@echo "make demo    environment, assets, and the whole pipeline on a real model and corpus"
	@echo "make demo-steering   case studies and steering: do function tokens carry the context's features, and decide?"
	@echo "make demo-consolidation   two models trained from scratch, and what their checkpoints learn (half an hour)"
	@echo "make demo-retention   which tokens a model must keep: caches that forget, under every policy (20 minutes)"
	@echo "make test    everything the tests need, then the tests"
	@echo "make test-fast   those that start no process, server, cluster or browser: for the inner loop"
	@echo "make bench   how fast, side by side: the table of bench/README.md (half an hour)"
	@echo "make lint    ruff, strict mypy, and who may import whom"
	@echo "make venv    the environment alone, in $(VENV)"
	@echo "make clean   remove the environment, caches, assets and the demos' runs"

venv: $(RUN_STAMP)

venv-tests: $(TEST_STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "functok needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch by itself and first, so that a build without CUDA can be taken where one is offered.
$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(TORCH_OPTIONS) '$(TORCH)'
	$(PIP) --editable .
	@touch $@

$(TEST_STAMP): $(RUN_STAMP)
	$(PIP) --editable '.[dev]'
	@touch $@

$(SYSTEM_STAMP): | $(BIN)/python
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  dpkg --status $(SYSTEM_PACKAGES) >/dev/null 2>&1 \
	    || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SYSTEM_PACKAGES) >/dev/null; } \
	    || echo "could not install $(SYSTEM_PACKAGES): the tests that use them will be skipped" >&2; \
	else \
	  echo "not root, or no apt-get: tests that need $(SYSTEM_PACKAGES) are skipped where they are missing" >&2; \
	fi
	@touch $@

system: $(SYSTEM_STAMP)

assets: $(RUN_STAMP)
	$(BIN)/python -m infra.demo_assets $(ASSETS)

demo: assets
	$(BIN)/functok run configs/demo.toml $(DEMO_OPTIONS)

demo-steering: assets
	$(BIN)/functok run configs/steering.toml $(DEMO_OPTIONS)

demo-consolidation: assets
	$(BIN)/functok run configs/consolidation.toml $(DEMO_OPTIONS)

demo-retention: assets
	$(BIN)/functok run configs/retention.toml $(DEMO_OPTIONS)

bench: assets
	$(BIN)/python -m bench.run_all

# What goes to which process, and what is left out of the fast ones: tests/suite.py
# More processes than cores: some wait for servers, which the fast tests have none of.
PYTEST = $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder --numprocesses

test: $(TEST_STAMP) $(SYSTEM_STAMP)
	$(PYTEST) $(TEST_PROCESSES) $(PYTEST_OPTIONS)

test-fast: $(TEST_STAMP)
	$(PYTEST) 2 -m 'not (server or cluster or s3 or chromium or process or slow)' $(PYTEST_OPTIONS)

lint: $(TEST_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(TEST_STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(ASSETS) runs/demo runs/steering runs/consolidation runs/retention build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
