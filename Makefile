# `make demo` and `make test` need python3 (3.11 or newer) and make; they make their own environment.
# Packages are installed once; after that no network is needed. Another Python, another place:
#   make test PYTHON=python3.13 VENV=.venv-3.13
# Some tests: make test-all TESTS="tests/jaxcp -k ring"

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The benchmarks have an environment of their own: tokamax needs Python 3.12 or newer.
BENCH_VENV ?= .venv-bench

# Demo and tests emulate eight devices on the CPU, whatever the machine has.
export JAX_PLATFORMS = cpu
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-all test-hf lint bench-deviceless bench-cp bench-cp-cpu bench-inference bench-train soak clean

demo: $(VENV)/.installed
	$(BIN)/jaxcp demo

# Every room, and every value of an option: 10 minutes on 2 quick cores, 40 on slow ones. A file's tests share a worker, and
# so what they have compiled.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" --costs $(TESTS)

# And what is left to a machine that waits: every two options that meet, real sizes, more meshes,
# every compiler. SHARE=2/4: of that the second quarter.
test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --costs $(if $(SHARE),--share $(SHARE)) $(TESTS)

# Files with tests that compare with transformers or torch; SHARE as above. The import first: without them the tests
# would be skipped.
HF_TESTS = $(shell grep -rl 'importorskip."\(transformers\|torch\)"' tests --include='test_*.py')

test-hf: $(VENV)/.installed-hf
	$(BIN)/python -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
	$(BIN)/python -m pytest -q $(if $(SHARE),--share $(SHARE)) $(HF_TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without such a Python what is compared with tokamax says so, and the target fails.
bench-deviceless: $(BENCH_VENV)/.installed
	$(BENCH_VENV)/bin/python -m benchmarks.deviceless --out benchmarks/results \
	  --picture docs/tile_cost.png

bench-cp: bench-cp-cpu
	$(BENCH_VENV)/bin/python -m benchmarks.cp.deviceless --out benchmarks/results

# Wall clock: minutes on a machine with nothing else to do.
bench-cp-cpu: $(BENCH_VENV)/.installed
	$(BENCH_VENV)/bin/python -m benchmarks.cp.cpu --out benchmarks/results

# Minutes of wall clock, on the CPU of this machine.
bench-inference: $(VENV)/.installed
	$(BIN)/python -m benchmarks.inference --out benchmarks/results

# Minutes, beside PyTorch on as many threads; on a machine with nothing else to do.
bench-train: $(VENV)/.installed-hf
	$(BIN)/python -m benchmarks.train --out benchmarks/results

# Kills, signals, damaged files: each run must end bit for bit as one that nothing happened to.
soak: $(VENV)/.installed
	$(BIN)/python -m benchmarks.soak --minutes 15

clean:
	rm -rf $(VENV) $(BENCH_VENV) build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found="$$($(PYTHON) --version 2>&1)" || found="not there"; \
	  echo "jaxcp needs Python 3.11 or newer; $(PYTHON) is $$found." \
	       "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }

# -qq: a quiet pip still warns about each index it cannot reach, by its address.
# A marker is newer than pyproject.toml when what the file asks for is installed.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -qq -e '.[pictures]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -qq -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -qq -e '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

# An index that has a CPU build of this torch gives it to a plain name; elsewhere it brings CUDA along.
$(VENV)/.installed-hf: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -qq -e '.[test,hf]' 'torch==2.13.*'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

# A name on PATH may be a pyenv shim that runs nothing: only one that says its version counts.
$(BENCH_VENV)/.installed: pyproject.toml
	@for python in python3.13 python3.12 python3.14 \
	    "$$HOME"/.pyenv/versions/3.1[2-9]*/bin/python $(PYTHON); do \
	  "$$python" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null && break; \
	done; \
	echo "making the environment $(BENCH_VENV) with $$python"; "$$python" -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install -qq -e '.[bench]'
	@touch $@
