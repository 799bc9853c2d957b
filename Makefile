# make demo | test | lint | docs | examples | wheel | bench | bench-cpu | bench-eager | bench-passes | dialects | libraries | models |
# promises | setup. Each does all the set-up it needs, the first time only. make gpu-check installs nothing.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint docs examples wheel bench bench-cpu bench-eager bench-passes dialects libraries models promises gates gpu-check clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Extra arguments of pytest, of the demo, of the benchmark and of the table: make test ARGS="-k ops"
ARGS ?=
# Of gpu-check: ceilings linears chains compile
SECTIONS ?= ceilings linears chains compile

# The environment is up to date when the stamp of these two files' content is there. Its name is their checksum, so a
# fresh checkout, a touched file or a switched branch does not install again, and an edit does.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

help:
	@echo "make demo          a real sentence encoder, quantized twice and compiled by fx_quant (some minutes)"
	@echo "make test          the tests"
	@echo "make lint          formatting, lint and types"
	@echo "make docs          the documentation, into site/ (a warning or a dead link is an error)"
	@echo "make examples      every example as it stands, compiled (many minutes)"
	@echo "make wheel         a wheel, checked, and tried in a fresh environment (TORCH=2.11.0 for another PyTorch there)"
	@echo "make bench         the demo's models, timed"
	@echo "make bench-cpu     quantized linears on this CPU against every peer (hours; ARGS=--quick takes some minutes)"
	@echo "make bench-eager   single quantized linears without torch.compile, timed (some minutes)"
	@echo "make bench-passes  what share of a Llama's compile the passes take (many minutes)"
	@echo "make dialects      what becomes of each way to quantize a linear; ARGS='--group all --variants all' for all"
	@echo "make libraries     the tests of other libraries' real modules, in $(LIBRARIES), where each must run (some minutes)"
	@echo "make models        what becomes of real architectures, however quantized: writes docs/models.md (20 minutes)"
	@echo "make promises      attack every promise and write docs/promises.md (half an hour; ARGS=--quick takes some minutes)"
	@echo "make gates         compile every Triton kernel for GPUs that are not here, by two Tritons (some 10 minutes)"
	@echo "make gpu-check     on a GPU machine, by its own $(PYTHON): GPU tests, benchmark, report (10 minutes a section)"
	@echo "make setup         only install, into $(VENV)"
	@echo "make clean         remove $(VENV) and what tools left behind"

setup: $(STAMP)

$(STAMP): | pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) was not found; name a Python 3.11 or newer: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "setup: constraints.txt pins versions that need Python 3.11 or newer, got $$($(PYTHON) -V); name another: make PYTHON=..." >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || \
	  echo "setup: no C++ compiler was found; torch.compile needs one (package g++ or clang)" >&2
	@echo "setup: installing into $(VENV) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and by its exact version, which lets pip take a CPU build where one is offered.
	@echo "setup: 1/2 $$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	@echo "setup: 2/2 fx_quant and what the demo and the tests need"
	@# Where pip compiles no modules, those that every process of PyTorch's imports are compiled by an import meanwhile.
	@if [ "$${PIP_COMPILE:-1}" = 0 ]; then $(BIN)/python -c 'import torch._inductor.compile_fx' 2>/dev/null & fi; \
	  $(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"; wait
	@rm -f $(VENV)/.installed-*
	@touch $@
	@echo "setup: done"

demo: $(STAMP)
	@$(BIN)/python examples/01_minilm.py $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

# The environment of the documentation is that of the tests, and what the site is made with.
DOCS := $(VENV)/.docs-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
docs: $(DOCS)
	@$(BIN)/python -m mkdocs build --strict $(ARGS)

$(DOCS): $(STAMP)
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	@rm -f $(VENV)/.docs-*
	@touch $@

examples: $(STAMP)
	@set -e; for example in examples/[0-9]*.py; do echo "== $$example"; $(BIN)/python $$example; done

# What a user gets, in an environment that has nothing else; the newest PyTorch unless told.
TORCH ?=
wheel: $(STAMP)
	@rm -rf dist .venv-wheel
	@$(BIN)/python -m pip install -q build twine
	@$(BIN)/python -m build
	@$(BIN)/python -m twine check --strict dist/*
	@$(PYTHON) -m venv .venv-wheel
	@.venv-wheel/bin/python -m pip install -q "torch$(if $(TORCH),==$(TORCH))" dist/*.whl
	@cd dist && ../.venv-wheel/bin/python ../examples/00_core.py

bench: $(STAMP)
	@$(BIN)/python benchmarks/minilm.py $(ARGS)

bench-cpu: $(STAMP)
	@$(BIN)/python benchmarks/cpu.py linears $(ARGS)

bench-passes: $(STAMP)
	@$(BIN)/python benchmarks/pass_time.py $(ARGS)

dialects: $(STAMP)
	@$(BIN)/python -m tests.dialects $(ARGS)

# What CI's environment lacks, beside it in one of its own.
LIBRARIES := .venv-libraries
LIBRARIES_STAMP := $(LIBRARIES)/.installed-$(shell cat pyproject.toml constraints.txt constraints-libraries.txt | cksum | cut -d' ' -f1)
libraries: $(LIBRARIES_STAMP)
	@FX_QUANT_LIBRARIES=1 $(LIBRARIES)/bin/python -m pytest -q tests/test_libraries.py $(ARGS)
	@# But those of 4 bits, for which quanto builds C++ of its own and did not end here: ARGS="-k quanto" names them.
	@FX_QUANT_LIBRARIES=1 $(LIBRARIES)/bin/python -m pytest -q tests/test_prepare.py -k "quanto and not 4_bit and not cannot" $(ARGS)

$(LIBRARIES_STAMP): | pyproject.toml constraints.txt constraints-libraries.txt
	@test -x $(LIBRARIES)/bin/python || $(PYTHON) -m venv $(LIBRARIES)
	@$(LIBRARIES)/bin/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	@# Without their dependencies, as some ask for versions of what is pinned that they do not need here.
	@$(LIBRARIES)/bin/python -m pip install -q --no-deps -r constraints-libraries.txt
	@$(LIBRARIES)/bin/python -m pip install -q -c constraints.txt -e ".[dev]"
	@rm -f $(LIBRARIES)/.installed-*
	@touch $@

# Libraries of models beside those of dev, which transformers would find and import: not in $(VENV).
MODELS := .venv-models
models: $(MODELS)/.installed
	@$(MODELS)/bin/python -m tests.model_matrix --write --compile $(ARGS)

$(MODELS)/.installed: pyproject.toml constraints.txt
	@test -x $(MODELS)/bin/python || $(PYTHON) -m venv $(MODELS)
	@$(MODELS)/bin/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	@$(MODELS)/bin/python -m pip install -q -c constraints.txt -e ".[dev,models]"
	@touch $@

promises: $(STAMP)
	@$(BIN)/python -m tests.promises --write $(ARGS)

bench-eager: $(STAMP)
	@$(BIN)/python benchmarks/eager.py $(ARGS)

# Of the oldest Triton that is supported, which GPU machines have with PyTorch 2.11.
OLDEST := .venv-triton-3.6
gates: $(STAMP) $(OLDEST)/.installed
	@$(BIN)/python -m tests.gpu_gates $(ARGS)
	@$(OLDEST)/bin/python -m tests.gpu_gates $(ARGS)

$(OLDEST)/.installed:
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install -q torch==2.11.0
	@$(OLDEST)/bin/python -m pip install -q triton==3.6.0 "numpy<2.4" tabulate packaging
	@touch $@

gpu-check:
	@PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks/gpu_check.py --sections $(SECTIONS) $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) $(LIBRARIES) $(MODELS) .venv-ci .venv-wheel site .pytest_cache .ruff_cache .hypothesis dist build
