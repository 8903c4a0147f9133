# `make` lists the targets. Each sets up what it needs in .venv, once.

PYTHON ?= python3
WORKLOAD ?= dense

BIN := .venv/bin
# What an installation depends on; Python files need none, since it is editable.
BUILD := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h)

# pip reads its settings from the environment, PIP_INDEX_URL for one; `make NAME=value` sets
# them too. The versions in constraints.txt also bind the isolated build: older pips take
# them from the first variable, newer ones from the second.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The libraries of the CPU levels are compiled side by side.
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help setup demo test test-all check sanitize bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a small model on the handwritten digits that scikit-learn ships"
	@echo "make test    run the tests"
	@echo "make test-all   run the exhaustive rest of the tests: every setting, many seeds, peaks of memory"
	@echo "make check   format, lint and type checks"
	@echo "make sanitize   run the kernels on random graphs under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench   run a benchmark: make bench WORKLOAD=$(WORKLOAD)"
	@echo "make setup   install everything for development into .venv"
	@echo "make clean   remove .venv, builds and caches"

setup: .venv/installed-dev

demo: .venv/installed-demo
	@echo "Running the demo."
	@$(BIN)/anyattention demo

# Test files are shared among processes of one thread each; what needs more threads sets their number.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test: .venv/installed-test
	@echo "Running the tests and the examples in the documentation."
	@$(PYTEST) -m "not exhaustive" $(PYTEST_ARGS)

test-all: .venv/installed-test
	@echo "Running the exhaustive rest of the tests."
	@$(PYTEST) -m exhaustive $(PYTEST_ARGS)

check: .venv/installed-dev
	@echo "Checking the format."
	@$(BIN)/ruff format --check .
	@echo "Checking for mistakes."
	@$(BIN)/ruff check .
	@echo "Checking the types."
	@$(BIN)/pyright

# Needs g++ and its sanitizers, and nothing of .venv. SEED=n draws other graphs.
SANITIZE_SECONDS ?= 30
SEED ?= 0
SANITIZE := -std=c++17 -O1 -g -Wall -Wextra -Wno-psabi -fopenmp -fno-math-errno -fno-trapping-math \
  -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED := $(patsubst csrc/%.cpp,%.o,$(wildcard csrc/*.cpp csrc/tests/*.cpp))
# The level with products of its own too, where this processor runs it.
SANITIZE_LEVELS ?= baseline $(if $(shell grep -ow avx512_bf16 /proc/cpuinfo 2>/dev/null),v4-bf16)

sanitize: $(SANITIZE_LEVELS:%=build/sanitize/%/properties)
	@for level in $(SANITIZE_LEVELS); do \
	  echo "Running the kernels for $$level under AddressSanitizer and UndefinedBehaviorSanitizer."; \
	  ANYATTENTION_GRAIN=0 build/sanitize/$$level/properties $(SANITIZE_SECONDS) $(SEED) || exit 1; \
	done

define COMPILE_SANITIZED
	@echo "Compiling $< with sanitizers for $(1)."
	@mkdir -p $(@D)
	@$(CXX) $(SANITIZE) $(2) -DANYATTENTION_VERSION='"sanitize"' -DANYATTENTION_LEVEL='"$(1)"' -c $< -o $@
endef

build/sanitize/baseline/properties: $(SANITIZED:%=build/sanitize/baseline/%)
build/sanitize/v4-bf16/properties: $(SANITIZED:%=build/sanitize/v4-bf16/%)
build/sanitize/%/properties:
	@$(CXX) $(SANITIZE) $^ -o $@

build/sanitize/baseline/%.o: csrc/%.cpp $(wildcard csrc/*.h csrc/tests/*.h)
	$(call COMPILE_SANITIZED,baseline)
build/sanitize/v4-bf16/%.o: csrc/%.cpp $(wildcard csrc/*.h csrc/tests/*.h)
	$(call COMPILE_SANITIZED,v4-bf16,-march=x86-64-v4 -mavx512bf16)

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
