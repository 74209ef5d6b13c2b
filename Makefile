# Everything a newcomer needs: `make demo`, `make ui`, `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo ui test lint typecheck unit chaos mutants bench-catalog bench-extraction bench-clusters bench-similar bench-scale bench-overhead bench-tissue audit clean

help: ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

install: $(INSTALLED) ## Install into .venv, with pinned versions

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(INSTALLED) ## Run everything on a real slide and a synthetic cohort, into demo/
	$(BIN)/histoencoder demo --folder demo

ui: $(INSTALLED) ## Open the platform on the demo's cohort, on 127.0.0.1:3000
	$(BIN)/python -m histoencoder_dagster.demo --folder demo --ui

test: lint typecheck unit ## Lint, check types, run all tests

lint: $(INSTALLED) ## Check format, style and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

typecheck: $(INSTALLED) ## Check types
	$(BIN)/mypy

unit: $(INSTALLED) ## Run the tests and the examples in docstrings
	$(BIN)/pytest -n 2 --dist loadfile

chaos: $(INSTALLED) ## Kill every stage a hundred times and more, fill disks, take folders away
	HISTOENCODER_CHAOS_KILLS=110 $(BIN)/pytest -s tests/core/test_kills.py tests/core/test_faults.py \
	  tests/core/test_locks.py tests/dagster/test_killed_runs.py

bench-catalog: $(INSTALLED) ## Measure the catalog on a generated cohort; BENCH=<more options>
	$(BIN)/python benchmarks/catalog.py $(BENCH)

bench-extraction: $(INSTALLED) ## Measure extraction; PEER=<python with histoencoder 0.1.1>, BENCH=<more options>
	$(BIN)/python benchmarks/extraction.py $(if $(PEER),--peer $(PEER)) $(BENCH)

bench-clusters: $(INSTALLED) ## Measure the fit of a cluster model beside scikit-learn's; BENCH=<more options>
	$(BIN)/python benchmarks/clusters.py $(BENCH)

bench-similar: $(INSTALLED) ## Measure nearest tiles; BENCH=<more options>
	$(BIN)/python benchmarks/similar.py $(BENCH)

mutants: $(INSTALLED) ## Bring 1,000 damaged slides through the stages; needs HISTOENCODER_TEST_DATA; BENCH=<more options>
	$(BIN)/python benchmarks/mutants.py $(HISTOENCODER_TEST_DATA)/slides $(BENCH)

bench-scale: $(INSTALLED) ## Measure ticks, catalog, commands and servers at up to 50,000 slides; BENCH=<more options>
	$(BIN)/python benchmarks/scale.py $(BENCH)

bench-overhead: $(INSTALLED) ## Measure what Dagster adds to a slide and stage; BENCH=<more options>
	$(BIN)/python benchmarks/overhead.py $(BENCH)

bench-tissue: $(INSTALLED) ## Measure how much ink passes for tissue; needs HISTOENCODER_TEST_DATA; BENCH=<more options>
	$(BIN)/python benchmarks/tissue.py $(BENCH)

audit: $(INSTALLED) ## Look up known vulnerabilities of the installed packages, over the network
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/python audit/run.py

clean: ## Remove the environment and the demo
	rm -rf $(VENV) demo
