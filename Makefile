# Two targets for a fresh machine: `make demo` and `make test`. Each sets up all that it needs.
.DEFAULT_GOAL := help
.PHONY: help setup demo check test nightly lint types imports fast fast-torch fast-others parity contract e2e
SHELL := /bin/bash
bin := .venv/bin
pytest := $(bin)/python -m pytest
heavy := tests/parity tests/contract tests/e2e
with_torch := tests/model tests/serving tests/training
# Without byte code every process compiles our sources, and pytest every test's assertions, anew.
unexport PYTHONDONTWRITEBYTECODE

help:  ## What can be made
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup:  ## The packages in .venv, and the servers that tests need (what cannot be installed is named)
	@scripts/setup.sh --servers wanted

demo:  ## A real model on Ray, asked through the gateway, billed to the token
	@scripts/setup.sh
	@$(bin)/python -m zenray.cli.demo

check:  ## Lint, types, import contracts, fast tests: under a minute
	@scripts/setup.sh
	@$(MAKE) --no-print-directory -j2 --keep-going --output-sync=target fast-others fast-torch types lint imports

test:  ## All that CI runs: check, parity, contract, e2e
	@scripts/setup.sh --servers needed
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory parity
	@$(MAKE) --no-print-directory contract
	@$(MAKE) --no-print-directory e2e

nightly:  ## The tests and benchmarks that take too long for every run
	@scripts/setup.sh --servers needed
	@$(pytest) tests $(heavy:%=--ignore=%) -n 2 --hypothesis-profile nightly --timeout 3600
	@$(pytest) $(heavy) -m nightly --timeout 3600; code=$$?; [ $$code -eq 0 ] || [ $$code -eq 5 ]  # 5: there are none
	@for file in benchmarks/*.py; do name=$$(basename $$file .py); \
	  grep -q '"--quick"' $$file || continue; echo "benchmarks.$$name"; $(bin)/python -m benchmarks.$$name || exit 1; done

lint:
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .

types:
	@$(bin)/mypy

imports:
	@$(bin)/lint-imports --no-logo

# A layer without a single test is an error: pytest then exits with 5.
# Two processes, one for each half: only one of them loads torch, transformers and Ray, which takes as long as many tests.
fast:
	@$(MAKE) --no-print-directory -j2 --keep-going --output-sync=target fast-torch fast-others

fast-torch:
	@echo "== fast tests with torch"; $(pytest) $(with_torch) -m "not nightly"

fast-others:
	@echo "== fast tests without torch"; $(pytest) tests $(heavy:%=--ignore=%) $(with_torch:%=--ignore=%) -m "not nightly"

parity e2e:
	@echo "== $@ tests"; $(pytest) tests/$@ -m "not nightly" --timeout 900 --durations 5

contract:
	@echo "== $@ tests"; $(pytest) tests/$@ -m "not nightly" --timeout 900 --durations 15 -n 2 --dist loadfile --no-loadscope-reorder
