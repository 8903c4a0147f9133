# `make` lists the targets. Each sets up what it needs in .venv, once.

PYTHON ?= python3
WORKLOAD ?= dense

BIN := .venv/bin
# What an installation depends on; Python files need none, since it is editable.
BUILD := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

# pip reads its settings from the environment, PIP_INDEX_URL for one; `make NAME=value` sets
# them too. The versions in constraints.txt also bind the isolated build: older pips take
# them from the first variable, newer ones from the second.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The libraries of the CPU levels are compiled side by side.
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help setup demo test check bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a small model on the handwritten digits that scikit-learn ships"
	@echo "make test    run all tests"
	@echo "make check   format, lint and type checks"
	@echo "make bench   run a benchmark: make bench WORKLOAD=$(WORKLOAD)"
	@echo "make setup   install everything for development into .venv"
	@echo "make clean   remove .venv, builds and caches"

setup: .venv/installed-dev

demo: .venv/installed-demo
	@echo "Running the demo."
	@$(BIN)/anyattention demo

test: .venv/installed-test
	@echo "Running the tests and the examples in the documentation."
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: .venv/installed-dev
	@echo "Checking the format."
	@$(BIN)/ruff format --check .
	@echo "Checking for mistakes."
	@$(BIN)/ruff check .
	@echo "Checking the types."
	@$(BIN)/pyright

bench: .venv/installed-bench
	@echo "Running the benchmark $(WORKLOAD)."
	@$(BIN)/python -m benchmarks.$(WORKLOAD)

clean:
	@echo "Removing .venv, builds and caches."
	@rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/created:
	@echo "Creating a virtual environment in .venv."
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/installed-%: .venv/created $(BUILD)
	@echo "Installing anyattention with what '$*' needs, and compiling its kernels."
	@$(BIN)/python -m pip install --quiet -e '.[$*]'
	@touch $@
