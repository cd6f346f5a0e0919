# Every target builds `.venv` from plain python3 and pip when it is missing or stale, and downloads nothing when it is not.
# `make train PYTHON=python3.12` picks another interpreter; ARGS goes to the command behind a target: `make test ARGS="-k router"`.

PYTHON ?= python3
ARGS ?=
# Processes that tests run in, a file of tests in one of them (those of parity are one file, and shared out).
WORKERS ?= 2
UV ?= uv

VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile
# Machine code as programs outside the tests have it; most tests compile it unoptimized, in less time.
OPTIMIZED := DSV3_JAX_OPTIMIZED=1
PIP := $(RUN) -m pip -qq --disable-pip-version-check --no-input
READY := $(VENV)/ready
PARITY_READY := $(VENV)/ready-parity
TPU_READY := $(VENV)/ready-tpu
CUDA_READY := $(VENV)/ready-cuda
# These compilers exist for this system only; elsewhere the tests that need them are skipped and say so.
COMPILER_HOST := $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -))

# What a .venv belongs to: this interpreter, in this folder (an environment does not survive being moved).
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
OWNER := $(PYTHON_VERSION) $(shell $(PYTHON) -c 'import sys; print(sys.base_prefix)' 2>/dev/null) $(CURDIR)
STALE := $(if $(filter-out $(OWNER),$(shell cat $(READY) 2>/dev/null || echo missing)),stale)

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow test-nightly parity tpu-compiler cuda-compiler map lint fmt lock clean stale
MAKEFLAGS += --no-print-directory

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

setup: $(READY)  ## build .venv from the pinned requirements
	@:

train: setup  ## train configs/tiny.py on real text, or continue it, and show a sample
	@$(RUN) train.py --config configs/tiny.py --run-dir runs/tiny --resume $(ARGS)
	@$(RUN) infer.py --checkpoint runs/tiny

test: lint $(if $(COMPILER_HOST),$(TPU_READY))  ## lint, types, then the default test suite; needs no torch and no TPU
	@$(PYTEST) $(ARGS)

test-slow: setup $(if $(COMPILER_HOST),$(TPU_READY) $(CUDA_READY))  ## the tests that take minutes
	@$(PYTEST) --no-loadscope-reorder -m "slow and not nightly" $(ARGS)

test-nightly: setup $(if $(COMPILER_HOST),$(TPU_READY) $(CUDA_READY))  ## the thorough repeats that CI leaves out, compiled as users' programs are
	@$(OPTIMIZED) $(PYTEST) --no-loadscope-reorder -m nightly $(ARGS)

parity: $(PARITY_READY)  ## compare live with Hugging Face (adds torch and transformers to .venv)
	@$(OPTIMIZED) $(PYTEST) --dist worksteal -m parity $(ARGS)

tpu-compiler: $(TPU_READY)  ## add the TPU compiler, for python -m dsv3_jax.plan --topology
	@:

cuda-compiler: $(CUDA_READY)  ## add the CUDA compiler, to compile kernels for GPUs without one
	@:

map:  ## write docs/files.md, the list of every file
	@$(PYTHON) docs/make_map.py

lint: setup  ## ruff, mypy, and the lint of the words
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --quiet --check . || { echo "error: the files above are not formatted; run make fmt" >&2; exit 1; }
	@$(RUN) -m mypy
	@$(RUN) tests/words.py

fmt: setup  ## format, and fix what ruff can fix
	@$(RUN) -m ruff check --fix-only --quiet .
	@$(RUN) -m ruff format .

# One lock serves every supported Python and platform. Pins already there are kept; ARGS=--upgrade renews them all.
LOCK := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links
lock:  ## pin the requirements again after a change of pyproject.toml (needs uv)
	$(LOCK) $(ARGS) pyproject.toml --extra test --group build --output-file requirements.txt
	$(LOCK) $(ARGS) --group parity-without-torch --constraint requirements.txt --output-file requirements-parity.txt
	$(LOCK) $(ARGS) --group tpu-compiler --output-file requirements-tpu.txt
	$(LOCK) $(ARGS) --group cuda-compiler --constraint requirements.txt --output-file requirements-cuda.txt

clean:  ## remove .venv and every cache; runs/ stays
	@rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt pyproject.toml $(STALE)
	@test -n "$(PYTHON_VERSION)" || { echo "error: $(PYTHON) does not run; name a Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
		{ echo "error: $(PYTHON) is Python $(PYTHON_VERSION); 3.11 to 3.14 is needed: make PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up $(VENV) with Python $(PYTHON_VERSION) (a few minutes the first time)"
	@$(PYTHON) -m venv $(if $(STALE),--clear) $(VENV)
	@$(PIP) install --require-hashes --requirement requirements.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@echo "$(OWNER)" > $@

# torch is not in the lock: its builds differ by machine. On Linux the default index brings the CUDA build, gigabytes that
# no test here uses; where pip also finds a CPU build of this version (say, PIP_EXTRA_INDEX_URL is set to PyTorch's CPU index)
# it prefers that one.
$(PARITY_READY): $(READY) requirements-parity.txt
	@echo "adding torch and transformers to $(VENV)"
	@$(PIP) install --require-hashes --requirement requirements-parity.txt
	@$(PIP) install torch==2.13.0
	@touch $@

# A folder of its own, where JAX does not see it: with libtpu among its packages it would look for a TPU at every start.
$(TPU_READY): $(READY) requirements-tpu.txt
	@echo "adding the TPU compiler to $(VENV)"
	@$(PIP) install --require-hashes --no-deps --upgrade --target $(VENV)/tpu --requirement requirements-tpu.txt
	@touch $@

# The same for JAX's CUDA plugin, which would warn at every start that there is no GPU.
$(CUDA_READY): $(READY) requirements-cuda.txt
	@echo "adding the CUDA compiler to $(VENV)"
	@$(PIP) install --require-hashes --no-deps --upgrade --target $(VENV)/cuda --requirement requirements-cuda.txt
	@touch $@
