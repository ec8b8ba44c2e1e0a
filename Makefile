# Targets call the same commands that you would type; `make` alone lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
INSTALLED_DEV := $(VENV)/installed-dev
GPUS ?= 8

.DEFAULT_GOAL := help
.PHONY: help setup demo prepare-data train plan test test-slow check lint format bench-kernels bench-mfu bench-loader bench-save bench-data compile-ahead picture gpu clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-14s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## Create .venv and install the run-time libraries, once

demo: $(INSTALLED) ## From raw text to a trained, resumed and exported model, in minutes, on CPU or GPUs
	$(RUN) -m train.demo

prepare-data: $(INSTALLED) ## Text to shards; CONFIG=configs/prepare-example.toml for your own data
	$(RUN) -m data_prep prepare $(CONFIG)

train: $(INSTALLED) ## Pretrain on GPUS=8 devices of this machine; CONFIG=configs/smoke.toml, ARGS="--section.key value"
	$(VENV)/bin/torchrun --nproc_per_node=$(GPUS) train/pretrain.py $(CONFIG) $(ARGS)

plan: $(INSTALLED) ## What a run would compute, hold and write, without starting it; CONFIG=, GPUS=
	WORLD_SIZE=$(GPUS) $(RUN) train/pretrain.py $(CONFIG) --dry-run $(ARGS)

test: $(INSTALLED_DEV) ## Run the test suite
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(INSTALLED_DEV) ## Run the long tests as well
	$(RUN) -m pytest

check: lint test ## Format, lint, layers, types, tests: run it before every commit

lint: $(INSTALLED_DEV) ## The part of check that runs no code
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright

format: $(INSTALLED_DEV) ## Format the code and mend what the linter can
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

bench-kernels: $(INSTALLED_DEV) ## Kernels beside other projects' ones, then bench-mfu; without a GPU: whether they are right
	$(RUN) -m benchmarks.kernels $(ARGS)

bench-mfu: $(INSTALLED_DEV) ## Time a training step beside transformers' Llama, with its MFU on a GPU; results in benchmarks/results
	$(RUN) -m benchmarks.step $(ARGS)

bench-data: $(INSTALLED_DEV) ## Time data preparation beside other projects' ways, and what it finds; results in benchmarks/results
	$(RUN) -m benchmarks.data $(ARGS)

compile-ahead: $(INSTALLED_DEV) ## Compile every kernel for sm_80 and sm_90, without a GPU: registers, spills, shared memory
	$(RUN) -m benchmarks.compile_ahead

bench-loader: $(INSTALLED_DEV) ## Time reading, lookup and restart beside other projects' ways; results in benchmarks/results
	$(RUN) -m benchmarks.loader $(ARGS)

bench-save: $(INSTALLED_DEV) ## Time how long training waits for a checkpoint, beside torch's ways; results in benchmarks/results
	$(RUN) -m benchmarks.save $(ARGS)

picture: $(INSTALLED) ## Draw docs/data-order.png
	$(RUN) docs/draw_data_order.py

gpu: ## On a CUDA machine, with its own Python: GPU tests, kernel speeds, MFU, training check in 9 minutes; OUT=folder
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT))

clean: ## Delete caches (not data/, runs/ or .venv)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -r {} +
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

# The fast encoder is a release of a package that is needed in an older one as well: it gets a folder of its own.
$(INSTALLED): requirements.txt requirements-encoder.txt pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	$(RUN) -m pip install --quiet --no-deps --upgrade --target $(VENV)/encoder --requirement requirements-encoder.txt
	touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements-dev.txt
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt
	touch $@
