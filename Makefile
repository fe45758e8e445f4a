PYTHON := .venv/bin/python

.PHONY: build
build:
	$(PYTHON) -m cmake --version >/dev/null
	.venv/bin/cmake -S . -B build -G Ninja -DPython3_EXECUTABLE=$(CURDIR)/$(PYTHON) \
	  -DCMAKE_INSTALL_PREFIX=$(CURDIR)/torch_ext/fused_lars
	.venv/bin/cmake --build build --parallel 2 --target install
