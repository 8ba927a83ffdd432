# On a new machine run `make demo` or `make test`. Both first create .venv and install the package.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-gpu chaos bench docs lint clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or later is needed, got $$($(PYTHON) --version); set PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(INSTALLED)

install: $(INSTALLED) ## create .venv and install the package with its test tools

demo: $(INSTALLED) ## unlearn on generated data with a small model: no network, no GPU, under three minutes
	$(BIN)/python -m simnpo_pl fit --config configs/demo.yaml
	$(BIN)/python -m simnpo_pl report

test: $(INSTALLED) ## all fast tests, on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(INSTALLED) ## all tests, including slow ones
	$(BIN)/python -m pytest -m 'not gpu and not network'

test-gpu: $(INSTALLED) ## on a machine with a GPU: README's commands on a 1B model with random weights; compare losses with the CPU
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py

# With --quiet, strict mode does not see warnings.
docs: $(INSTALLED) ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

chaos: $(INSTALLED) ## interrupt and resume 200 runs of a tiny model, compare the results, write docs/reliability.md; about ten minutes
	$(BIN)/python scripts/chaos.py --kills 50 --write docs/reliability.md

bench: $(INSTALLED) ## compare time and memory with the public recipe, write docs/performance.md; all but the GPU; 20 minutes
	$(BIN)/python -m bench --write docs/performance.md

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check src tests scripts examples bench
	$(BIN)/ruff format --check src tests scripts examples bench
	$(BIN)/mypy

clean: ## remove the environment and caches; keep runs/
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
