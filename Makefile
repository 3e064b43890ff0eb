# `make help` lists what there is. Everything runs from .venv, which the first command sets up from requirements.lock.
PYTHON ?= python3
UV_VERSION := 0.13.8
FAST := not slow and not cluster and not browser and not gpu and not hostile

BIN := .venv/bin
UV := $(BIN)/uv
UV_READY := .venv/.uv-$(UV_VERSION)
READY := .venv/.ready
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
  --extra dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo docs test test-unit test-all test-cluster test-gpu test-hostile test-lowest test-dist lint format lock \
  lock-lowest dist clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## Install everything into .venv (each command below does it when needed)

demo: $(READY) ## The complete pipeline on generated images: prepare, train, predict, evaluate
	@$(BIN)/raydet demo

docs: $(READY) ## Build the site into build/site; a broken link is an error
	@$(BIN)/python docs/make_site.py
	@NO_COLOR=1 $(BIN)/zensical build --strict
	@echo 'open build/site/index.html'

test-unit: $(READY) ## The tests that need neither Ray nor a model, under 90 seconds
	@$(BIN)/pytest -q -m "$(FAST) and not ray and not integration" -n logical --maxprocesses 4

test: $(READY) ## The fast tests
	@$(BIN)/pytest -q -m "$(FAST)" -n logical --maxprocesses 4 --no-loadscope-reorder

test-all: $(READY) ## Every test that needs no GPU
	@$(BIN)/pytest -q -m "not gpu and not hostile"

test-cluster: $(READY) ## Jobs on several nodes that are killed, and a job server
	@$(BIN)/pytest -q -m cluster

test-gpu: $(READY) ## The tests that need a GPU
	@$(BIN)/pytest -q -m gpu

test-hostile: $(READY) ## Thousands of hostile files and options, in child processes with limits; an hour
	@$(BIN)/pytest -q -m hostile

test-dist: $(READY) ## Build the wheel and try it in an empty environment; ten minutes, and downloads what is not cached
	@$(BIN)/pytest -q tests/test_distribution.py

# An environment of its own, beside .venv.
test-lowest: $(UV_READY) ## The fast tests with the oldest supported versions, in .venv-lowest
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv-lowest
	@$(UV) pip sync --quiet --compile-bytecode --python .venv-lowest/bin/python --require-hashes requirements-lowest.lock
	@$(UV) pip install --quiet --python .venv-lowest/bin/python --no-deps --no-build-isolation -e .
	@.venv-lowest/bin/pytest -q -m "$(FAST)" -n logical --maxprocesses 4 --no-loadscope-reorder

lint: $(READY) ## Check style, format, types and the order of imports
	@$(BIN)/ruff check --quiet --output-format concise
	@$(BIN)/ruff format --check --quiet || { $(BIN)/ruff format --check; echo 'make format puts this right'; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@report=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$report"; exit 1; }
	@echo 'lint: all checks passed'

format: $(READY) ## Format the code and apply automatic fixes
	@$(BIN)/ruff check --fix --quiet || true
	@$(BIN)/ruff format

# LOCK_FLAGS=--upgrade takes the newest versions that pyproject.toml allows; without it only what must change does.
lock: $(UV_READY) ## Regenerate requirements.lock from pyproject.toml
	@$(COMPILE) $(LOCK_FLAGS) -o requirements.lock pyproject.toml

lock-lowest: $(UV_READY) ## Regenerate requirements-lowest.lock: the oldest versions that pyproject.toml allows
	@$(COMPILE) --resolution lowest-direct -o requirements-lowest.lock pyproject.toml

# The wheel is built from the sdist, so that both hold the same files.
dist: $(READY) ## Build the wheel and the sdist into dist/
	@$(UV) build --quiet --clear --no-build-isolation --python $(BIN)/python --out-dir dist

clean: ## Remove .venv and every cache; runs/ stays
	@rm -rf .venv .venv-lowest build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find raydet jobs tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(UV_READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "raydet needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." \
	    "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo 'setting up .venv'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

# setuptools, which builds the editable install, is in the lock: nothing is fetched without a hash. Bytecode is compiled
# here once, because each of Ray's worker processes would otherwise compile what it imports.
$(READY): requirements.lock pyproject.toml | $(UV_READY)
	@echo 'installing requirements.lock'
	@$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@
