# A fresh machine needs python3 (3.11 or newer) and make. PYTHON=… chooses another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SCENARIO ?= all
MINUTES ?= 5
SEED ?=

.DEFAULT_GOAL := help
.PHONY: help setup run compiled test check chaos lint bench clean

help: ## What can be made
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

setup: $(READY) ## Create .venv and install everything into it

run: $(READY) ## Start the whole product here, with a sandbox provider and a demo key
	@exec $(BIN)/tollgate up --sandbox

compiled: $(READY) ## Compile the hot path, if there is a C compiler: a minute, once per change
	@$(BIN)/python -m proxy.compiled

test: lint ## The whole test suite, against real Redis and Postgres; the proxy's also compiled
	@$(BIN)/python -m pytest
	@found=$$($(BIN)/python -m proxy.compiled); case $$? in \
	  0) COMPILED_PROXY=$$found $(BIN)/python -m pytest tests/proxy tests/fuzz;; \
	  3) ;; \
	  *) exit 1;; esac

check: lint ## Style, types and the quick tests: seconds
	@$(BIN)/python -m pytest --ignore=tests/journeys -m "not processes and not stores"

chaos: $(READY) ## Kill and stop parts of the whole product under load, then fuzz (MINUTES=5; SEED=… again)
	@$(BIN)/python -m tests.chaos $(MINUTES) $(SEED)

lint: $(READY) ## Style and types
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

bench: $(READY) ## Measure Tollgate beside nginx (SCENARIO=rate, cadence, … or all: ten minutes)
	@$(BIN)/python -m proxy.compiled >/dev/null || true
	@$(BIN)/python -m benchmarks $(SCENARIO)

clean: ## Remove what was installed or built; the data in .tollgate stays
	@rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Tollgate needs Python 3.11 or newer; try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "python3 cannot create virtual environments: install the package python3-venv"; exit 1; }
	@test -x $(BIN)/pip || { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing packages"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation -e .
	@touch $@
