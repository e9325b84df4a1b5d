# make demo   train, combine and judge small experts on this machine (about three minutes)
# make test   the whole test suite
# make ptxas  registers and spills of the CUDA kernels, for each architecture (needs nvcc)
# make lint   every check that reads code: ruff, clang-format, mypy --strict
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Pinned versions, for the package and for the tools that build it.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip

SOURCES := pyproject.toml constraints.txt CMakeLists.txt README.md \
           $(shell find csrc python -type f -not -name '*.pyc' -not -name '*.so')
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test ptxas lint clean

demo: $(VENV)/.installed
	$(BIN)/robustgate demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

ptxas:
	$(PYTHON) benchmarks/cuda_resources.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created $(SOURCES)
	$(PIP) install '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist
