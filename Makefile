# make train, make test and the rest do their own set-up: a virtual environment in .venv, and the build in place.
# PYTHON3 is the Python to make .venv with, TORCH what pip installs as torch (2.6 or newer). FUSED_LARS_CUDA and
# TORCH_CUDA_ARCH_LIST choose the CUDA part, see cmake/FusedLarsCuda.cmake.

SHELL := bash
.SHELLFLAGS := -o pipefail -c

PYTHON3 ?= python3
TORCH ?= torch==2.14.1
JOBS ?= $(shell nproc)

VENV := $(CURDIR)/.venv
STAMP := $(subst =,,$(TORCH)).stamp
export PATH := $(VENV)/bin:$(PATH)
export PYTHONPATH := $(CURDIR)/torch_ext$(if $(PYTHONPATH),:$(PYTHONPATH))
CXX_FILES = $(shell git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')

.PHONY: train test bench build train-cpp sanitize format lint googletest clean
.DELETE_ON_ERROR:

train: $(VENV)/examples-$(STAMP) build
	python examples/digits.py

test: $(VENV)/test-$(STAMP) googletest
	$(MAKE) build CMAKE_FLAGS=-DFUSED_LARS_TESTS=ON
	ctest --test-dir build --output-on-failure --no-tests=error --parallel $(JOBS)
	python -m pytest

bench: $(VENV)/bench-$(STAMP) build
	python benchmarks/step.py

# ---------------------------------------------------------------- build

# Installed into the package, so that the checkout is as complete as an installed wheel.
build: $(VENV)/build-$(STAMP)
	cmake -S . -B build -G Ninja -DPython3_EXECUTABLE=$(VENV)/bin/python \
	    -DCMAKE_INSTALL_PREFIX=$(CURDIR)/torch_ext/fused_lars $(CMAKE_FLAGS)
	cmake --build build --parallel $(JOBS)
	cmake --install build >/dev/null

# A program without Python that trains a model saved by one with it.
train-cpp: $(VENV)/examples-$(STAMP) build
	$(MAKE) -C examples/train_without_python BUILD=$(CURDIR)/build/train_without_python

# The C++ tests under AddressSanitizer with UndefinedBehaviorSanitizer, then under ThreadSanitizer.
sanitize: sanitize-address sanitize-thread

SANITIZERS_address := address,undefined
SANITIZERS_thread := thread
sanitize-%: $(VENV)/build-$(STAMP) googletest
	cmake -S . -B build/$* -G Ninja -DPython3_EXECUTABLE=$(VENV)/bin/python -DFUSED_LARS_CUDA=0 \
	    -DFUSED_LARS_TESTS=ON -DFUSED_LARS_SANITIZE=$(SANITIZERS_$*)
	cmake --build build/$* --parallel $(JOBS)
	ctest --test-dir build/$* --output-on-failure --no-tests=error --parallel $(JOBS)

# ---------------------------------------------------------------- habits

format: $(VENV)/lint.stamp
	ruff check --fix --exit-zero --quiet
	ruff format
	clang-format -i $(CXX_FILES)

lint: $(VENV)/lint.stamp
	ruff check
	ruff format --check
	clang-format --dry-run -Werror $(CXX_FILES)

clean:
	rm -rf build dist torch_ext/fused_lars/include torch_ext/fused_lars/lib torch_ext/fused_lars/share

# ---------------------------------------------------------------- set-up

$(VENV)/bin/python:
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: PYTHON3=...")'
	$(PYTHON3) -m venv $(VENV)

# torch and a group of pyproject.toml. What is there already costs pip seconds, and the stamp spares those.
$(VENV)/lint.stamp: pyproject.toml | $(VENV)/bin/python
	pip install --quiet "pip>=25.1"
	pip install --quiet --group lint
	@touch $@

$(VENV)/%-$(STAMP): pyproject.toml | $(VENV)/bin/python
	pip install --quiet "pip>=25.1"
	pip install --group build --group $* "$(TORCH)" | { grep -v "already satisfied" || true; }
	@touch $@

# nvcc for the torch that is installed, where the CUDA part is wanted and the machine has no toolkit.
ifeq ($(FUSED_LARS_CUDA)$(shell command -v nvcc || command -v /usr/local/cuda/bin/nvcc),1)
build: $(VENV)/toolkit.stamp
$(VENV)/toolkit.stamp: $(VENV)/build-$(STAMP)
	pip install "cuda-toolkit[nvcc,cccl,cudart]==$$(python -c 'from importlib.metadata import version; print(version("cuda-toolkit"))')"
	@touch $@
endif

googletest:
	@echo '#include <gtest/gtest.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1 || { set -x; \
	    $$([ $$(id -u) = 0 ] || echo sudo) apt-get update && \
	    $$([ $$(id -u) = 0 ] || echo sudo) apt-get install --yes libgtest-dev; }
