# make help lists the targets. PYTHON names the interpreter that the environment is made with.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
MODEL ?=
SWEEP ?=
BENCH_RUN := outputs/bench_model

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench curves notebooks clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with everything that running and testing needs, once

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install torch==2.13.0
	$(RUN) -m pip install -e '.[dev]' -c constraints.txt
	touch $@

demo: setup  ## train and measure a pruned classifier of movie reviews
	$(RUN) -m tokprune_exp +experiment=demo

test: setup  ## run all tests
	$(RUN) -m pytest -n auto

lint: setup  ## style, format and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

bench: setup  ## measure the speed of a trained model: make bench [MODEL=directory]
	test -n "$(MODEL)" || $(RUN) -m tokprune_exp +method=ltp task=rotten_tomatoes trainer=smoke logger=none run_dir=$(BENCH_RUN)
	$(RUN) -m tokprune_exp.bench $(or $(MODEL),$(BENCH_RUN)/model) --reductions 2.1 4 --examples 128 --rounds 3

curves: setup  ## draw accuracy against FLOPs: make curves SWEEP=multirun/NAME
	$(RUN) -m tokprune_exp.curves $(SWEEP)

notebooks: setup  ## execute every notebook
	$(RUN) -m pytest tests/test_notebooks.py -rs

clean:  ## remove the environment and the caches, but no results
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
