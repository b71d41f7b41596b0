# make study: a first report on hyperparameters.   make test: lint, types and tests.   make help: all targets.
PYTHON ?= python3
PY := .venv/bin/python
SETUP := .venv/.set-up

# The quick study: bundled digits, few enough trials to end within 5 to 7 minutes on 2 cores, enough for a report.
QUICK := --data digits --task original --epochs 12 --trials 28

.PHONY: help setup study test lint format bench clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(SETUP) ## Make .venv with the pinned packages

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python must be 3.11 or newer; $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.11 ...")'
	@echo 'Setting up .venv: takes some minutes, once'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[cluster,test,dev]'
	@touch $(SETUP)

study: $(SETUP) ## Run the quick study on bundled digits and report its sensitivity
	$(PY) -m study.run $(QUICK)
	$(PY) -m analysis.sensitivity
	@echo 'Next: .venv/bin/mlflow ui                                                      every trial, in a browser'
	@echo '      .venv/bin/python -m study.run --task translated --data mnist            the real study (hours)'

test: lint ## Lint, check types and run the tests
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(SETUP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m basedpyright

format: $(SETUP) ## Format the code
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(SETUP) ## Measure the trainer's speed
	$(PY) -m benchmarks.training

clean: ## Remove the environment (results stay)
	rm -rf .venv
