# Targets call the same commands that you would type; `make` alone lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
INSTALLED_DEV := $(VENV)/installed-dev
GPUS ?= 8

.DEFAULT_GOAL := help
.PHONY: help setup demo prepare-data train plan prepare-chat show-mask sft dpo reward grpo distill eval chat serve export report test test-slow check lint format bench-kernels bench-mfu bench-loader bench-save bench-data compile-ahead picture gpu gpu-tuning bench-tuning bench-generation clean

help: ## List the targets
	@grep -hE '^[a-z -]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-14s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## Create .venv and install the run-time libraries, once

demo: $(INSTALLED) ## From raw text to a trained, resumed and exported model, in minutes, on CPU or GPUs
	$(PY) -m train.demo

prepare-data: $(INSTALLED) ## Text to shards; CONFIG=configs/prepare-example.toml for your own data
	$(PY) -m data_prep prepare $(CONFIG)

train: $(INSTALLED) ## Pretrain on GPUS=8 devices of this machine; CONFIG=configs/smoke.toml, ARGS="--section.key value"
	$(VENV)/bin/torchrun --nproc_per_node=$(GPUS) train/pretrain.py $(CONFIG) $(ARGS)

plan: $(INSTALLED) ## What a run would compute, hold, take, cost and write, without starting it; CONFIG=, GPUS=8xH100
	$(if $(findstring x,$(GPUS)),,WORLD_SIZE=$(GPUS)) $(PY) train/pretrain.py $(CONFIG) --dry-run $(if $(findstring x,$(GPUS)),--gpus $(GPUS)) $(ARGS)

prepare-chat: $(INSTALLED) ## Conversations to shards; DATA=chat.jsonl, TOKENIZER=data/default, OUT=data/chat, ARGS="--kind pairs"
	$(PY) -m data_prep prepare-chat $(DATA) --tokenizer $(or $(TOKENIZER),data/default) --output $(or $(OUT),data/chat) $(ARGS)

show-mask: $(INSTALLED) ## What of prepared conversations is trained, in colour; DATA=data/chat
	$(PY) -m data_prep show-mask $(DATA) $(ARGS)

sft dpo reward grpo distill: $(INSTALLED) ## Train from a trained model; FROM=runs/1b, CONFIG=, GPUS=8, ARGS="--section.key value"
	$(VENV)/bin/torchrun --nproc_per_node=$(GPUS) train/$@.py $(CONFIG) --run.init-from $(FROM) $(ARGS)

eval: $(INSTALLED) ## Multiple choice; RUN=runs/sft TASKS="data/ceval data/cmmlu", ARGS="--shots 5"
	$(PY) -m evaluation.multiple_choice $(RUN) $(TASKS) --out $(RUN)/eval/choice $(ARGS)

chat: $(INSTALLED) ## Talk to a model; RUN=runs/sft
	$(PY) -m evaluation.chat $(RUN) $(ARGS)

serve: $(INSTALLED) ## An OpenAI-style endpoint with a page; RUN=runs/sft, ARGS="--port 8000"
	$(PY) -m evaluation.serve $(RUN) $(ARGS)

export: $(INSTALLED) ## A Hugging Face folder of a model; RUN=runs/sft TO=exported
	$(PY) -m evaluation.export $(RUN) $(TO) $(ARGS)

report: $(INSTALLED) ## One page about a run; RUN=runs/world, VS=golden.json compares
	$(PY) -m evaluation.report $(RUN) $(if $(VS),--golden $(VS))

test: $(INSTALLED_DEV) ## Run the test suite
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(INSTALLED_DEV) ## Run the long tests as well
	$(PY) -m pytest

check: lint test ## Format, lint, layers, types, tests: run it before every commit

lint: $(INSTALLED_DEV) ## The part of check that runs no code
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright

format: $(INSTALLED_DEV) ## Format the code and mend what the linter can
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench-kernels: $(INSTALLED_DEV) ## Kernels beside other projects' ones, then bench-mfu; without a GPU: whether they are right
	$(PY) -m benchmarks.kernels $(ARGS)

bench-mfu: $(INSTALLED_DEV) ## Time a training step beside transformers' Llama, with its MFU on a GPU; results in benchmarks/results
	$(PY) -m benchmarks.step $(ARGS)

bench-data: $(INSTALLED_DEV) ## Time data preparation beside other projects' ways, and what it finds; results in benchmarks/results
	$(PY) -m benchmarks.data $(ARGS)

compile-ahead: $(INSTALLED_DEV) ## Compile every kernel for sm_80 and sm_90, without a GPU: registers, spills, shared memory
	$(PY) -m benchmarks.compile_ahead

bench-loader: $(INSTALLED_DEV) ## Time reading, lookup and restart beside other projects' ways; results in benchmarks/results
	$(PY) -m benchmarks.loader $(ARGS)

bench-save: $(INSTALLED_DEV) ## Time how long training waits for a checkpoint, beside torch's ways; results in benchmarks/results
	$(PY) -m benchmarks.save $(ARGS)

picture: $(INSTALLED) ## Draw docs/data-order.png
	$(PY) docs/draw_data_order.py

gpu: ## On a CUDA machine, with its own Python: GPU tests, kernel speeds, MFU, training check in 9 minutes; OUT=folder
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT))

gpu-tuning: ## The second GPU command: fine-tuning beside pretraining, and generation; OUT=folder
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --set tuning $(if $(OUT),--out $(OUT))

bench-tuning: $(INSTALLED_DEV) ## Time fine-tuning beside pretraining, and its memory; results in benchmarks/results
	$(PY) -m benchmarks.tuning $(ARGS)

bench-generation: $(INSTALLED_DEV) ## Time generation beside transformers; results in benchmarks/results
	$(PY) -m benchmarks.generation $(ARGS)

clean: ## Delete caches (not data/, runs/ or .venv)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -r {} +
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

# The fast encoder is a release of a package that is needed in an older one as well: it gets a folder of its own.
$(INSTALLED): requirements.txt requirements-encoder.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements.txt
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(VENV)/encoder --requirement requirements-encoder.txt
	touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements-dev.txt
	$(PY) -m pip install --quiet --requirement requirements-dev.txt
	touch $@
