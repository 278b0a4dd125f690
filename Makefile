# Every target sets up what it needs. `make install` builds .venv; the rest run inside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPU_WHEELS := https://download.pytorch.org/whl/cpu
FOUND_GPU_PYTHON := $(if $(GPU_PYTHON),$(shell command -v $(GPU_PYTHON)))
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
	  $(BIN)/python -m pip install -c constraints.txt torch; \
	else \
	  $(BIN)/python -m pip install --no-index --no-deps torch==2.13.0+cpu 2>/dev/null \
	  || $(BIN)/python -m pip install --no-deps --retries 1 --index-url $(CPU_WHEELS) -c constraints.txt torch \
	  || $(BIN)/python -m pip install -c constraints.txt torch; \
	fi
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -c constraints.txt --editable '.[dev]'
	touch $@

# Three workers on two cores: ranks of a test wait for each other.
.PHONY: test test-long lint
test: MARKED := not long
test-long: MARKED := long
test test-long: lint
	@extensions=$$(mktemp -d) && trap 'rm -rf "$$extensions"' EXIT && \
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR="$$extensions" \
	  $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m '$(MARKED)'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On a machine without a GPU two ranks share the cores; with GPUs there are 1, 2 or 4 ranks.
QUICKSTART := runs/quickstart
PRETRAIN := launchers/pretrain.py launchers/recipes/quickstart.yaml \
	--deepspeed ds_configs/cpu_smoke.json --output_dir $(QUICKSTART)

.PHONY: quickstart
quickstart: install $(QUICKSTART)/data-bin/databin.json
	@gpus=$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())') && \
	if [ "$$gpus" -eq 0 ]; then \
	  threads=$$(( ($$(nproc) + 1) / 2 )); \
	  DS_ACCELERATOR=cpu OMP_NUM_THREADS=$$threads deepspeed --num_accelerators 2 $(PRETRAIN); \
	else \
	  ranks=$$(( gpus >= 4 ? 4 : gpus >= 2 ? 2 : 1 )); \
	  deepspeed --num_accelerators $$ranks $(PRETRAIN); \
	fi
	$(BIN)/megamod generate --model $(QUICKSTART)/model --prompt "def " "The " --max_new_tokens 40

$(QUICKSTART)/data-bin/databin.json: | install
	$(BIN)/megamod preprocess --builtin --tokenizer sentencepiece:4096 \
	  --output_dir $(QUICKSTART)/data-bin

.PHONY: bench
bench: install
	$(BIN)/python tests/bench/run.py

# On a machine with an NVIDIA GPU, in less than eight minutes; tables go into docs/. With
# GPU_PYTHON=python3 nothing is installed: an interpreter that has torch and triton, without network.
GPU_OUTPUT ?= runs/bench

.PHONY: bench-gpu
bench-gpu: $(if $(GPU_PYTHON),,install)
	$(or $(FOUND_GPU_PYTHON),$(GPU_PYTHON),$(BIN)/python) tests/bench/gpu.py --output_dir $(GPU_OUTPUT)

# Runs and .venv stay.
.PHONY: clean
clean:
	rm -rf build dist-wheels .pytest_cache .ruff_cache .hypothesis
	find megamod kernels launchers tests -name __pycache__ -prune -exec rm -rf {} +
