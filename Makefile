# make demo | test | lint | build | format | clean | acceptance DIFFUSERS=PATH
#
# Needs Python 3.10 to 3.13 and a C++ compiler, nothing else: the first run creates .venv, installs
# the exact versions of requirements/lock.txt and builds in place. On Linux without a GPU, let
# PIP_EXTRA_INDEX_URL name PyTorch's CPU index to spare yourself gigabytes of CUDA libraries.
#
# make PYTHON=python3 ... uses that interpreter as it is: nothing is installed, no network is used.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))

ifdef PYTHON
  PY := $(PYTHON)
  demo_needs :=
  test_needs :=
  lint_needs :=
  acceptance_needs :=
else
  PY := .venv/bin/python
  demo_needs := .venv/demo.stamp
  test_needs := .venv/test.stamp
  lint_needs := .venv/lint.stamp
  acceptance_needs := .venv/acceptance.stamp
endif

# Tools that are programs, not modules: those of the interpreter in use, else those on PATH.
export PATH := $(abspath $(dir $(shell command -v $(PY) || echo .venv/bin/python))):$(PATH)

# Without a GPU toolkit and without a GPU, a CUDA build of torch gets an extension without GPU part.
GPU_TOOLS := $(shell for tool in nvcc nvidia-smi hipcc rocm-smi; do command -v $$tool; done)
ifeq ($(GPU_TOOLS)$(CUDA_HOME)$(CUDA_PATH)$(ROCM_HOME)$(wildcard /usr/local/cuda /opt/rocm),)
  export BLOCKSWAP_BUILD ?= cpu
endif

# These load a simulated accelerator, which must be alone in its process.
ALONE := $(wildcard tests/fake tests/accelerator)
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP := $(foreach file,$(CPP),$(if $(filter hip.% hip_% %_hip.cpp %_hip.h,$(notdir $(file))),,$(file)))

.PHONY: help build demo test test-plain test-accelerator acceptance lint format lock clean distclean

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

build: $(demo_needs)
	@command -v "$${CXX:-c++}" >/dev/null || { echo "No C++ compiler: install g++ or set CXX." >&2; exit 1; }
	@mkdir -p build; echo "building blockswap._C (build/build.log)"
	@$(PY) setup.py -q build_ext --inplace >build/build.log 2>&1 || { cat build/build.log; exit 1; }

demo: build
	$(PY) -m blockswap demo

# BLOCKSWAP_CHECK: every stateful class checks itself after each action and poisons what it frees.
# HF_HUB_OFFLINE: a test that would download a model fails.
test: export BLOCKSWAP_CHECK := 1
test: export HF_HUB_OFFLINE := 1
# The two processes share the machine: one thread each for PyTorch's own work.
test: export OMP_NUM_THREADS := 1
test: $(test_needs) build
	$(MAKE) -j2 test-plain test-accelerator

test-plain:
	$(PY) -m pytest tests $(addprefix --ignore=,$(ALONE)) | sed -u 's/^/plain       | /'

test-accelerator:
	$(PY) -m pytest $(ALONE) | sed -u 's/^/accelerator | /'

# DIFFUSERS: a checkout of diffusers, whose tests are copied; docs/acceptance.md.
acceptance: export BLOCKSWAP_CHECK := 1
acceptance: export OMP_NUM_THREADS := 1
acceptance: $(acceptance_needs) build
	@[ -d "$(DIFFUSERS)" ] || { echo "Name a checkout: make acceptance DIFFUSERS=PATH" >&2; exit 1; }
	$(PY) -m tests.acceptance --diffusers-tests $(DIFFUSERS)

lint: $(lint_needs) build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	clang-format --dry-run -Werror $(CPP)
	$(PY) -m codespell_lib
	$(PY) .ci/check_tree.py
	$(PY) .ci/check_files.py

format: $(lint_needs)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	clang-format -i $(CPP)

# Needs uv. Resolves once for all supported Pythons.
lock:
	@{ sed -n '1,2p' requirements/lock.txt; \
	  grep -hvE '^(#|-)' requirements/{demo,test,lint}.txt \
	  | uv pip compile -q --universal --python-version 3.10 --no-header --no-annotate - \
	  | grep -vE '^(nvidia-|cuda-|triton=|#)'; } > requirements/lock.new
	@mv requirements/lock.new requirements/lock.txt

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
	rm -f blockswap/_C*.so blockswap/_build_info.py csrc/*_hip.* csrc/*/*_hip.* csrc/*/hip.* csrc/*/hip_*
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

.venv/bin/python:
	@for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	  if $$python -c '$(SUPPORTED)' 2>/dev/null; then exec $$python -m venv .venv; fi; \
	done; echo "No Python 3.10 to 3.13 found: install one, or name one with PYTHON=." >&2; exit 1

.venv/%.stamp: requirements/%.txt requirements/lock.txt | .venv/bin/python
	$(PY) -m pip install --disable-pip-version-check -q -r $<
	@touch $@

.venv/test.stamp: requirements/demo.txt
.venv/lint.stamp .venv/acceptance.stamp: requirements/demo.txt requirements/test.txt
