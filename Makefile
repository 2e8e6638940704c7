# `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTEST := .venv/bin/pytest

.PHONY: help setup setup-test demo test test-fast lint format lock bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## packages, virtual environment, guest kernel; quick when done
	@scripts/setup

setup-test: setup ## what the tests need beyond that: a real MinIO
	@scripts/install-minio

demo: setup ## show the main job on two nodes
	@.venv/bin/torpor demo

test: setup-test ## all tests
	@$(PYTEST) tests/style tests/unit tests/property tests/fuzz tests/contract tests/commands tests/host tests/vm tests/chaos

test-fast: setup-test ## tests without VMs
	@$(PYTEST) -m "not vm" tests/style tests/unit tests/property tests/fuzz tests/contract tests/commands tests/host

lint: setup ## ruff and mypy
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

format: setup ## let ruff format the code
	@.venv/bin/ruff check --fix . && .venv/bin/ruff format .

lock: setup ## pin what pyproject.toml asks for
	@.venv/bin/uv pip compile -q --generate-hashes --no-header --no-emit-index-url --extra dev --extra plot \
		--python-version 3.11 pyproject.toml -o requirements.lock

bench: setup-test ## all benchmarks
	@for name in restore pause push pull; do .venv/bin/torpor bench $$name || exit; done

clean: ## remove what was built in the tree
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
