# Every target sets up what it needs. `make install` builds .venv; the rest run inside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPU_WHEELS := https://download.pytorch.org/whl/cpu
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install
install: $(VENV)/.installed

# On a machine without an NVIDIA driver torch comes from a local wheel folder if pip is configured
# with one, else from the CPU index, else from the default registry (a larger build that also runs).
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip 'setuptools>=77' wheel
	if nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/python -m pip install --quiet -c constraints.txt torch; \
	else \
	  $(BIN)/python -m pip install --quiet --no-index --no-deps torch==2.13.0+cpu 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --no-deps --retries 1 --index-url $(CPU_WHEELS) -c constraints.txt torch \
	  || $(BIN)/python -m pip install --quiet -c constraints.txt torch; \
	fi
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[dev]'
	touch $@
