# LLM Runner Router. `make help` lists what can be made; CI runs the same lines.
#
# Needs nothing but Python 3.11 or newer, make, and a package registry that pip is set up for.
# Everything goes into .venv and .cache in this folder and into DATA_DIR; `make clean` removes the first two.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TEST_MODEL := .cache/models/smollm2-135m-instruct.gguf
DEFAULT_MODEL := smollm2-135m-instruct
# Two processes, because the timing tests of the suite want a core for themselves; a file is never split.
PYTEST_ARGS ?= -n 2 --dist loadfile

# The first Python on the PATH that is new enough; empty if there is none.
PYTHON ?= $(shell for candidate in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$candidate; break; }; done)

# No address or option of a person's own pip or uv settings may find its way into a lock file.
UV_COMPILE = env -u PIP_FIND_LINKS -u PIP_INDEX_URL -u PIP_EXTRA_INDEX_URL -u UV_FIND_LINKS -u UV_DEFAULT_INDEX -u UV_INDEX \
	-u UV_INDEX_URL -u UV_EXTRA_INDEX_URL $(BIN)/uv pip compile --no-config --universal --generate-hashes \
	--python-version 3.11 --no-emit-index-url --quiet --custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help serve install test check soak fuzz lock bench bench-peers clean test-tools

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.runtime ## install what is missing, take the default model, start the router (HOST PORT METRICS_PORT DATA_DIR LOG_DIR)
	@if test ! -e llm-router.yaml; then $(BIN)/llm-router models pull $(DEFAULT_MODEL); fi
	@exec $(BIN)/llm-router serve

install: $(VENV)/.runtime ## install the program into .venv

test: $(VENV)/.test test-tools $(TEST_MODEL) check ## run every check and every test
	@PYTHONPATH=$(CURDIR)/src LLM_ROUTER_TEST_MODEL=$(CURDIR)/$(TEST_MODEL) $(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.test ## style, types, layers: what needs no running program
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: $(VENV)/.test ## load and random kills for a long time (SOAK_S seconds, 600; SEED repeats a run)
	@PYTHONPATH=$(CURDIR)/src SOAK_S=$(or $(SOAK_S),600) $(BIN)/python -m pytest -s --timeout 0 tests/acceptance/test_soak.py

fuzz: $(VENV)/.test ## property tests with thirty times as many examples, other ones in each run
	@PYTHONPATH=$(CURDIR)/src HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest $(PYTEST_ARGS) --timeout 0 -m hypothesis

bench: $(VENV)/.test ## measure the gateway beside nginx and the bare backend
	@WANTED="nginx wrk" sh tests/tools.sh
	$(BIN)/python -m benchmarks

bench-peers: $(VENV)/.test ## the same, beside other gateways (downloads them)
	@WANTED="nginx wrk" sh tests/tools.sh
	$(BIN)/python -m benchmarks --peers

lock: $(BIN)/uv ## bring the lock files up to the newest versions that the ranges allow
	$(UV_COMPILE) --upgrade pyproject.toml --output-file requirements/runtime.lock
	$(UV_COMPILE) --upgrade --constraints requirements/runtime.lock requirements/build.in --output-file requirements/build.lock
	$(UV_COMPILE) --upgrade --constraints requirements/runtime.lock --constraints requirements/build.lock \
		pyproject.toml requirements/build.in requirements/test.in --output-file requirements/test.lock

clean: ## remove what make made in this folder; models and data of the router stay
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

test-tools:
	@sh tests/tools.sh

# -- files ------------------------------------------------------------------------------------------

# `error` says one line and stops; a failing command would add make's own.
$(BIN)/python:
	$(if $(PYTHON),,$(error Python 3.11 or newer is needed and not on the PATH: install it, or say where it is with PYTHON=/path/to/python3))
	$(if $(shell $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) and print("new")' 2>/dev/null),,$(error $(PYTHON) is no Python 3.11 or newer))
	$(if $(shell $(PYTHON) -c 'import ensurepip, venv; print("able")' 2>/dev/null),,$(error $(PYTHON) cannot make virtual environments: install the package python3-venv (Debian, Ubuntu: apt-get install python3-venv)))
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# A stamp is written last: an interrupted installation is begun again.
$(VENV)/.runtime: $(BIN)/python requirements/runtime.lock requirements/build.lock pyproject.toml
	@echo "installing $$(grep -c == requirements/runtime.lock) libraries (versions and hashes from requirements/)"
	@$(PIP) install --require-hashes -r requirements/runtime.lock -r requirements/build.lock
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.runtime requirements/test.lock
	@echo "installing what tests need"
	@$(PIP) install --require-hashes -r requirements/test.lock
	@touch $@

$(TEST_MODEL): | $(VENV)/.runtime
	@$(BIN)/llm-router models pull --data-dir .cache $(DEFAULT_MODEL)

$(BIN)/uv: | $(BIN)/python
	@$(PIP) install uv
