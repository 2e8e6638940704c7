# `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
# Images of Python set it: then each of some hundred processes would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := .venv/bin/pytest

# Tests that change the host - namespaces, links, mounts, VMs - run in two processes that are each on a
# host of its own, in network and mounts; the others before them. `slow` ones are for `make test` alone.
# Those of level 1 are in a VM of their own, one at a time. It starts first and has a processor to itself:
# what runs in it is slow and waits for nobody, those before the host's need no time of the clock.
HOST := host or vm or chaos or kvm
KVM_LOG := .pytest-kvm.log
PARALLEL := $(PYTEST) -n 2 --dist worksteal --durations=25

.PHONY: help setup setup-test demo test test-kvm test-fast lint format settings lock bench wheel clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## packages, virtual environment, guest kernel; quick when done
	@scripts/setup

setup-test: setup ## what the tests need beyond that: a real MinIO, a level-1 VM
	@scripts/install-minio
	@scripts/install-rig >/dev/null

demo: setup ## show the main job on two nodes
	@.venv/bin/torpor demo

test: setup-test ## all tests; the later ones run too when earlier ones fail
	@status=0; \
	TORPOR_TEST_RIGS=1 $(PYTEST) --durations=25 tests/kvm >$(KVM_LOG) 2>&1 & kvm=$$!; \
	trap 'kill $$kvm 2>/dev/null; wait $$kvm; exit 130' INT TERM; \
	nice $(PARALLEL) -m "not ($(HOST))" tests || status=$$?; \
	$(PARALLEL) --own-hosts -m "($(HOST)) and not kvm" tests || status=$$?; \
	wait $$kvm || status=$$?; cat $(KVM_LOG); \
	exit $$status

test-kvm: setup-test ## tests under real KVM, in a level-1 VM
	@$(PYTEST) tests/kvm

test-fast: setup-test ## in about a minute: no VMs, no host, nothing slow
	@$(PARALLEL) -m "not ($(HOST) or slow)" tests

lint: setup ## ruff and mypy
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

format: setup ## let ruff format the code
	@.venv/bin/ruff check --fix . && .venv/bin/ruff format .

settings: setup ## write docs/settings.md from the settings table
	@.venv/bin/python scripts/settings_reference.py

lock: setup ## pin what pyproject.toml asks for
	@.venv/bin/uv pip compile -q --generate-hashes --no-header --no-emit-index-url --extra dev --extra plot \
		--python-version 3.11 pyproject.toml -o requirements.lock

bench: setup-test ## those of wakes, pauses, pushes and paging; `torpor bench --help` names the others
	@for name in restore pause push pull paging crowd; do .venv/bin/torpor bench $$name || exit; done

wheel: setup ## build dist/torpor-*.whl; `scripts/make-venv --into DIRECTORY` installs one
	@.venv/bin/uv build --quiet --wheel --offline --no-build-isolation --python .venv/bin/python -o dist
	@ls dist/*.whl

clean: ## remove what was built in the tree
	@rm -rf $(KVM_LOG) .venv dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
