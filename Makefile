# Two commands are all a newcomer needs, with only Python >= 3.11 and make on the machine:
#   make tune    find, verify and write a mixed-precision plan for the bundled model
#   make test    lint, types, tests, import order, README snippets
# Both build .venv on first use and again when pyproject.toml or constraints.txt changes.

MODEL ?= models/kvbits-tiny
BITS ?= 4.5
MODE ?= kivi
RUN ?= runs/$(notdir $(MODEL))
PYTEST_ARGS ?=

# Extra arguments for installing torch, such as --index-url of the CPU or of a CUDA wheel index.
TORCH_FLAGS ?=
TORCH_PIN := $(shell grep -i '^torch==' constraints.txt)
FIND_PYTHON := for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done
PYTHON ?= $(shell $(FIND_PYTHON))

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MINIMUM := .venv-minimum
WHEEL := .venv-wheel

export PIP_DISABLE_PIP_VERSION_CHECK := 1
test test-minimum test-slow: export OMP_NUM_THREADS := 1
test test-minimum test-slow: export TOKENIZERS_PARALLELISM := false

.PHONY: help install tune test lint types format test-minimum test-slow test-wheel bench bench-gpu clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,4p' Makefile
	@echo "others: install lint types format test-minimum test-slow test-wheel bench bench-gpu clean"

install: $(STAMP)

# torch goes first and pinned: left to the resolver it may fetch another, far larger build.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make needs Python >= 3.11 on PATH, found none; set PYTHON=" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH_FLAGS) $(TORCH_PIN)
	$(BIN)/python -m pip install -q -e '.[dev]' -c constraints.txt
	@touch $@

tune: $(STAMP)
	$(BIN)/kvbits tune $(MODEL) --bits $(BITS) --mode $(MODE) --objective balanced -o $(RUN)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(PYTEST_ARGS)

# The oldest transformers pyproject.toml allows, and the huggingface_hub it asks for.
$(MINIMUM)/.installed: pyproject.toml constraints.txt
	test -x $(MINIMUM)/bin/python || $(PYTHON) -m venv $(MINIMUM)
	grep -v -i -E '^(transformers|tokenizers|huggingface_hub|hf-xet)==' constraints.txt \
		> $(MINIMUM)/constraints.txt
	$(MINIMUM)/bin/python -m pip install -q $(TORCH_FLAGS) $(TORCH_PIN)
	$(MINIMUM)/bin/python -m pip install -q -e '.[dev]' 'transformers==5.17.*' \
		-c $(MINIMUM)/constraints.txt
	@touch $@

test-minimum: $(MINIMUM)/.installed
	$(MINIMUM)/bin/python -m pytest -n 2 --dist worksteal tests/cache tests/attention $(PYTEST_ARGS)

# The wheel has to work away from the repository, in an environment that never saw it.
test-wheel: $(STAMP)
	rm -rf build/wheel
	$(BIN)/python -m pip wheel -q --no-deps -w build/wheel .
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/python -m pip install -q $(TORCH_FLAGS) $(TORCH_PIN)
	$(WHEEL)/bin/python -m pip install -q -c constraints.txt build/wheel/*.whl
	cd / && $(CURDIR)/$(WHEEL)/bin/python $(CURDIR)/tests/wheel_check.py

# Speed and memory of the packed cache on this machine's CPU; records go to benchmarks/results/cpu/.
LONG := --shape 1x1024 --shape 1x4096 --shape 1x16384
CPU := --device cpu -o benchmarks/results/cpu
CACHES := --plan dynamic --plan K8V8 --plan K4V4 --plan K4V2 --plan K4V2@kivi --plan K2V2
bench: $(STAMP)
	for impl in compiled reference; do for model in $(MODEL) benchmarks/shapes/llama-3.1-8b-layer; do \
		$(BIN)/kvbits bench decode $$model $(CACHES) $(LONG) --impl $$impl --repeats 5 $(CPU) \
		|| exit 1; done; done
	$(BIN)/kvbits bench memory $(MODEL) $(CACHES) $(CPU)

# The same on a CUDA device: kernels, whole steps and the largest batches of an 8B-shaped model.
LLAMA := benchmarks/shapes/llama-3.1-8b
TUNED := benchmarks/plans/kvtuner-llama-3.1-8b-c
WIDTHS := --plan K16V16 --plan K8V8 --plan K4V4 --plan K4V2 --plan K2V2
TUNERS := $(foreach bits,3.25 4.91,--plan $(TUNED)$(bits).yaml@kivi --plan $(TUNED)$(bits).yaml)
GPU := $(WIDTHS) $(TUNERS) -o benchmarks/results
bench-gpu: $(STAMP)
	$(BIN)/kvbits bench kernels --search -o benchmarks/results
	$(BIN)/kvbits bench decode $(LLAMA) --shape 8x32768 --shape 16x32768 --shape 1x131072 $(GPU)
	$(BIN)/kvbits bench decode $(LLAMA) --prompt --new-tokens 338 --shape 64x128 --shape 16x512 \
		--shape 8x1024 $(GPU)
	$(BIN)/kvbits bench memory $(LLAMA) $(GPU)

clean:
	rm -rf $(VENV) $(MINIMUM) $(WHEEL) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
