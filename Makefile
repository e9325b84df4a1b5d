# make demo   train, combine and judge small experts on this machine (about three minutes)
# make test   the whole test suite
# make test-oldest  what leans on transformers, on the oldest version supported
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

.PHONY: demo test test-oldest ptxas lint clean

demo: $(VENV)/.installed
	$(BIN)/robustgate demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

OLDEST := $(VENV)-oldest
test-oldest: $(SOURCES)
	$(PYTHON) -m venv $(OLDEST)
	grep -v -e '^transformers==' -e '^huggingface_hub==' constraints.txt > $(OLDEST)/constraints.txt
	PIP_CONSTRAINT=$(OLDEST)/constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	  $(OLDEST)/bin/python -m pip install -C cmake.define.ROBUSTGATE_CUDA=OFF \
	  '.[lm]' transformers==5.17.0 pytest pytest-timeout scipy
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(wildcard tests/lm/test_causal*.py)

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
	$(PIP) install mypy ruff clang-format
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist
