# `make help` lists what there is. Everything lives in .venv and build/, which can be deleted at any time (what
# build/converted holds is converted again), and compiled kernels in ~/.cache/llama-on-torchserve.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# A machine with NVIDIA GPUs takes torch's default build; TORCH_INDEX picks another, such as
# https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TESTS ?= tests

.PHONY: help
help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: $(VENV)/.installed  ## prepare .venv (TORCH_INDEX=URL picks torch's build)

$(VENV)/.installed: requirements.txt requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or newer, or say make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version); Python 3.11 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	@echo "preparing $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)" numpy
	@$(PIP) -r requirements-dev.txt
	@touch $@

.PHONY: test
test: install  ## run all tests (TESTS=tests/test_x.py for some)
	@$(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart 0 $(TESTS)

.PHONY: lint
lint: install  ## check the code's style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }

# What was said on make's command line, but for make's own words: TP=2 CHECKPOINT=DIR MAX_SEQ_LEN=2048 ...
SAID = $(foreach name,$(filter-out PYTHON TORCH TORCH_INDEX TESTS SHELL,$(.VARIABLES)),\
  $(if $(filter command,$(firstword $(origin $(name)))),'$(name)=$(subst ','\'',$($(name)))'))

.PHONY: serve
serve: install  ## serve the demo model, or CHECKPOINT=DIR TP=N PORT=N DEVICE=cuda KEY=VALUE (of model-config.yaml)
	@$(BIN)/python -m tools.serve start $(SAID)

.PHONY: stop
stop:  ## end the server
	@if test -x $(BIN)/python; then $(BIN)/python -m tools.serve stop $(SAID); fi

.PHONY: status
status: install  ## say whether the server runs and answers
	@$(BIN)/python -m tools.serve status $(SAID)

.PHONY: archive
archive: install  ## pack the model for TorchServe: build/model_store/llama.mar, and as a folder in build/model_folder
	@$(BIN)/python -m tools.archive $(SAID)

.PHONY: parity
parity: install  ## compare lm-eval's scores of the server with those of transformers (sets lm-eval up under build/)
	@$(BIN)/python -m tools.parity $(SAID)

.PHONY: check-peers
check-peers: install  ## compare with llama.cpp: texts, tokens, quantized files (compiles it under build/, about 12 minutes)
	@$(BIN)/python -m tools.peers setup
	@$(BIN)/python -m tools.llamacpp_check

.PHONY: bench
bench: install  ## measure engine and service beside this machine's best, half an hour (BENCH=--quick: two minutes)
	@$(BIN)/python -m tools.bench $(BENCH)

.PHONY: bench-peers
bench-peers: install  ## measure llama.cpp and transformers beside it, in turns: build/bench/ratios.json (half an hour)
	@$(BIN)/python -m tools.bench_peers $(BENCH)

MUTATIONS ?= 10000
.PHONY: fuzz
fuzz: install  ## read damaged files of every format (MUTATIONS=N of each; about 10 minutes for 10000)
	@$(BIN)/python -m tools.fuzz --mutations $(MUTATIONS)

.PHONY: demo-model
demo-model: install  ## train the demo model again (about 45 minutes on one core)
	$(BIN)/python demo/train.py --out demo/model

.PHONY: clean
clean:  ## end the server and remove build/, with all that was converted there
	@test -z "$(if $(filter command,$(firstword $(origin BUILD))),said)" || { echo "clean removes build/; make stop BUILD=$(BUILD), and remove that folder yourself"; exit 1; }
	@$(MAKE) --no-print-directory stop
	rm -rf build
