# Two commands do everything, set-up included: `make demo` and `make test`.
# Behind a package mirror, or to choose torch's CPU or GPU build, configure pip as usual (pip.conf, PIP_* variables).

SHELL := /bin/bash
VENV  := .venv
BIN   := $(VENV)/bin
# The first Python that is new enough; override with `make PYTHON=/path/to/python3.12 demo`.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench bench-published clean clean-compiled

demo: $(VENV)/.installed
	$(BIN)/headway run examples/gpt.py

test: lint
	$(BIN)/pytest -n 2 --dist loadgroup

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --warnings
	$(BIN)/lint-imports --no-logo

bench: $(VENV)/.installed-bench
	$(BIN)/python bench/prediction_local.py
	$(BIN)/python bench/collectives.py
	$(BIN)/python bench/allreduce.py
	$(BIN)/python bench/fusion.py
	$(BIN)/python bench/aggregator.py
	$(BIN)/python bench/simulation.py
	$(BIN)/python bench/search.py
	$(BIN)/python bench/disk.py
	$(BIN)/python bench/host_optimizer.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/zero.py
	$(BIN)/python bench/offload.py
	$(BIN)/python bench/swapping.py --output bench/results/swapping.json --picture docs/images/swapping.png
	$(BIN)/python bench/which_tier.py
	$(BIN)/python bench/remote_memory.py
	$(BIN)/python bench/scheduling.py
	$(BIN)/python bench/spread.py

# Against measurements that others published: make bench-published DATA=folder of their tables (docs/validation.md).
# bench/policies.py reads published traces and says where it looks for them (docs/schedule.md).
bench-published: $(VENV)/.installed-bench
	@test -d "$(DATA)" || { echo "name the folder: make bench-published DATA=…" >&2; exit 1; }
	$(BIN)/python bench/prediction.py --data "$(DATA)"
	$(BIN)/python bench/learned.py --data "$(DATA)"

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Headway needs Python 3.11 or newer; name it with: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[bench,solve]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.installed

# What numba compiled: it does not notice changes in other files (docs/architecture.md).
clean-compiled:
	find src -name '*.nb[ic]' -delete

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis
