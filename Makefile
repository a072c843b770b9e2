# Needs: Python 3.11 or newer, git, make and a package index. Everything else is installed into .venv.
# `make` lists the targets.

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& command -v $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
TESTS ?=
BENCH ?=

.PHONY: help setup demo test chaos test-pg check format docs bench bench-quick clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(STAMP) ## install bsup and its tools into .venv

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer with the venv module is needed (Debian: apt install python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (a minute the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP) ## build this repository with bsup: its own daemon, its own PostgreSQL, live output
	@$(BIN)/bsup demo

test: $(STAMP) ## run the tests (all but the slow ones; BSUP_SLOW=1 or CI=true: all)
	$(BIN)/pytest -n $(WORKERS) $(TESTS)

chaos: export BSUP_SLOW = 1
chaos: export BSUP_CHAOS_KILLS ?= 100
chaos: export BSUP_CHAOS_CYCLES ?= 1000
chaos: $(STAMP) ## kill, starve and cut off everything, with the full counts (needs root and the packages that .ci/run installs)
	$(BIN)/pytest -n $(WORKERS) tests/chaos tests/vm tests/model/test_lease_model.py

test-pg: $(STAMP) ## run the store's tests on the server that BSUP_TEST_DSN names
	@test -n "$$BSUP_TEST_DSN" || { echo "make: set BSUP_TEST_DSN" >&2; exit 1; }
	$(BIN)/pytest -n $(WORKERS) tests/store --ignore-glob='*/test_embedded*'

check: $(STAMP) ## lint, types, import contracts, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/zensical build --strict --clean

format: $(STAMP) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## show the docs at http://localhost:8000
	$(BIN)/zensical serve

bench: $(STAMP) ## measure bsup and its peers (25 minutes); writes benchmarks/RESULTS.md
	$(BIN)/python benchmarks/run.py $(BENCH)

bench-quick: $(STAMP) ## measure the core of it (3 minutes); RESULTS.md keeps the rest
	$(BIN)/python benchmarks/run.py --quick $(BENCH)

clean: ## remove what was built (not .venv)
	rm -rf site build dist .cache .build-cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
