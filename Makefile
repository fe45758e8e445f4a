# make train, make test and the other targets set themselves up: a virtual environment in .venv, and the build
# in place. PYTHON3 is the Python that makes .venv. TORCH is what pip installs as torch (2.9 or newer).
# FUSED_LARS_CUDA and TORCH_CUDA_ARCH_LIST choose the CUDA part, see cmake/FusedLarsCuda.cmake. PYTHON=python3
# uses that Python and its torch as they are, and installs nothing.

SHELL := bash
.SHELLFLAGS := -o pipefail -c

PYTHON3 ?= python3
TORCH ?= torch==2.14.1
JOBS ?= $(shell nproc)

VENV := $(CURDIR)/.venv
ifeq ($(origin PYTHON),command line)
BIN := $(shell $(PYTHON) -c 'import os, sys; print(os.path.dirname(sys.executable))')
else
PYTHON := python
BIN := $(VENV)/bin
endif
export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)/torch_ext$(if $(PYTHONPATH),:$(PYTHONPATH))
CXX_FILES = $(shell git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')

.PHONY: train ssl test bench gpu-report build train-cpp sanitize wheels test-wheels format docs lint googletest clean
.DELETE_ON_ERROR:

train: $(VENV)/examples.stamp build
	$(PYTHON) examples/digits.py

# Learns features without labels, by Barlow Twins.
ssl: $(VENV)/examples.stamp build
	$(PYTHON) examples/self_supervised.py

test: $(VENV)/test.stamp googletest
	$(MAKE) build CMAKE_FLAGS=-DFUSED_LARS_TESTS=ON
	ctest --test-dir build --output-on-failure --no-tests=error --parallel $(JOBS)
	$(PYTHON) -m pytest -n 2 --dist worksteal

bench: $(VENV)/bench.stamp build
	$(PYTHON) benchmarks/step.py

# Takes less than ten minutes with the build, unless the build alone takes more than five.
# benchmarks/gpu_report.py lists what it writes.
gpu-report: $(VENV)/test.stamp
	gpu=$$($(PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') && \
	$(MAKE) build FUSED_LARS_CUDA=1 TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$gpu}" && \
	$(PYTHON) benchmarks/gpu_report.py --seconds $$((SECONDS < 330 ? 570 - SECONDS : 240)) $(OPTIONS)

# ---------------------------------------------------------------- build

# Installed into the package, so that a checkout is as complete as an installed wheel.
build: $(VENV)/build.stamp
	cmake -S . -B build $$(command -v ninja >/dev/null && echo -G Ninja) \
	    -DPython3_EXECUTABLE="$$(command -v $(PYTHON))" \
	    -DCMAKE_INSTALL_PREFIX=$(CURDIR)/torch_ext/fused_lars $(CMAKE_FLAGS)
	cmake --build build --parallel $(JOBS)
	cmake --install build >/dev/null

# A program without Python, which trains a model that a Python program has saved.
train-cpp: $(VENV)/examples.stamp build
	$(MAKE) -C examples/train_without_python BUILD=$(CURDIR)/build/train_without_python

# The C++ tests under AddressSanitizer with UndefinedBehaviorSanitizer, then under ThreadSanitizer.
sanitize: sanitize-address sanitize-thread

SANITIZERS_address := address,undefined
SANITIZERS_thread := thread
sanitize-%: $(VENV)/build.stamp googletest
	cmake -S . -B build/$* -G Ninja -DPython3_EXECUTABLE="$$(command -v $(PYTHON))" -DFUSED_LARS_CUDA=0 \
	    -DFUSED_LARS_TESTS=ON -DFUSED_LARS_SANITIZE=$(SANITIZERS_$*)
	cmake --build build/$* --parallel $(JOBS)
	ctest --test-dir build/$* --output-on-failure --no-tests=error --parallel $(JOBS)

# ---------------------------------------------------------------- release

# The torch to compile against, one of each series that the wheel serves, and those to test it with.
TORCHES ?= 2.9.1 2.10.0 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0

# dist/*.whl, with a library for each of TORCHES. auditwheel checks what they need, and gives the wheel its name.
wheels: $(VENV)/wheels.stamp $(TORCHES:%=build/torch/%/torch/version.py)
	rm -rf build/wheels build/lib build/lib.* dist  # setuptools packs what older builds left behind
	FUSED_LARS_TORCHES="$(TORCHES:%=$(CURDIR)/build/torch/%/torch)" FUSED_LARS_CUDA=$${FUSED_LARS_CUDA-1} \
	    $(PYTHON) -m pip wheel --no-build-isolation --no-deps --wheel-dir build/wheels .
	auditwheel repair --plat manylinux_2_28_$$(uname -m) --only-plat --wheel-dir dist \
	    --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude libfused_lars_kernels.so build/wheels/*.whl
	ls -l dist

# In an environment of its own for each of TORCHES. A version such as 2.13.0+cpu may need OPTIONS=--index-url=...
# pip prefers it to 2.13.0 where it finds both.
test-wheels: $(VENV)/wheels.stamp
	for torch in $(TORCHES); do \
	    $(PYTHON) packaging/test_wheel.py dist/*.whl $$torch $(OPTIONS) || exit; \
	done

build/torch/%/torch/version.py: | $(VENV)/wheels.stamp
	$(PYTHON) packaging/fetch_torch.py $* build/torch/$*

# ---------------------------------------------------------------- habits

format: $(VENV)/lint.stamp
	ruff check --fix --exit-zero --quiet
	ruff format
	clang-format -i $(CXX_FILES)

# The API page, build/docs/index.html.
docs: $(VENV)/docs.stamp build
	sphinx-build --quiet --fresh-env --nitpicky --fail-on-warning --keep-going docs/api build/docs

lint: $(VENV)/lint.stamp
	ruff check
	ruff format --check
	mypy
	pyright
	clang-format --dry-run -Werror $(CXX_FILES)

clean:
	rm -rf build dist torch_ext/fused_lars/include torch_ext/fused_lars/lib torch_ext/fused_lars/share

# ---------------------------------------------------------------- set-up

ifeq ($(origin PYTHON),command line)
$(VENV)/%.stamp: ;
else

$(VENV)/bin/python:
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: PYTHON3=...")'
	$(PYTHON3) -m venv $(VENV)

# Installs torch and a group of pyproject.toml. Making wheels takes no torch of this environment. The stamp saves
# the seconds that pip takes to find that all is there.
$(VENV)/%.stamp: pyproject.toml $(VENV)/torch.txt | $(VENV)/bin/python
	pip install --quiet "pip>=25.1"
	pip install --group build --group $* $(if $(filter wheels,$*),,"$(TORCH)") | { grep -v "already satisfied" || true; }
	@touch $@

# Becomes newer than the stamps only if another torch is asked for than last time.
$(VENV)/torch.txt: FORCE | $(VENV)/bin/python
	@echo '$(TORCH)' | cmp --silent - $@ || echo '$(TORCH)' >$@
FORCE:

# Installs nvcc for the installed torch, if the CUDA part is wanted and the machine has no toolkit.
ifeq ($(FUSED_LARS_CUDA)$(shell command -v nvcc || command -v /usr/local/cuda/bin/nvcc),1)
build: $(VENV)/toolkit.stamp
$(VENV)/toolkit.stamp: $(VENV)/build.stamp
	pip install "cuda-toolkit[nvcc,cccl,cudart]==$$(python -c 'from importlib.metadata import version; print(version("cuda-toolkit"))')"
	@touch $@
endif

endif

googletest:
	@echo '#include <gtest/gtest.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1 || { set -x; \
	    $$([ $$(id -u) = 0 ] || echo sudo) apt-get update && \
	    $$([ $$(id -u) = 0 ] || echo sudo) apt-get install --yes libgtest-dev; }
