# `make help` lists what there is. Everything sets itself up; the second time is quick.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
STAMP := $(VENV)/.stamp

.PHONY: help setup demo demo-kubernetes evaluation image plugin test smoke unit what-moves lint format lock proto clean

help:           ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 18

setup: $(STAMP) ## install uv where it is missing, and podferry into .venv

$(STAMP): pyproject.toml requirements.lock requirements-dev.lock requirements-uv.lock scripts/setup
	scripts/setup $(VENV)
	@touch $@

demo: $(STAMP)  ## move a computing job between two nodes of the lab, and prove its result
	$(VENV)/bin/podferry lab demo $(DEMO)

demo-kubernetes: $(STAMP) ## move the pod of a Job between two nodes of a real Kubernetes; PODFERRY_KUBE_BIN has its programs
	$(VENV)/bin/podferry lab demo --kubernetes

evaluation: $(STAMP) ## measure everything for 90 minutes and write evaluation/index.html; goes on where it was interrupted. EVALUATE has options
	$(VENV)/bin/podferry bench evaluate $(EVALUATE)

image: $(STAMP) ## build the container image for a cluster into podferry.tar; needs root
	scripts/image $(VENV) podferry.tar

plugin: $(STAMP) ## build kubectl-podferry as one file for each platform, and its krew manifest, into dist/plugin. PLUGIN has options
	scripts/plugin $(VENV) $(PLUGIN)

what-moves: $(STAMP) ## move every job of tests/lab/matrix.py in each mode, and write docs/what-moves.md; needs root and half an hour
	$(VENV)/bin/python scripts/what-moves --debian trixie $(WHAT)
	$(VENV)/bin/python scripts/what-moves --debian forky $(WHAT)

lint: $(STAMP)  ## formatting, lints, types, import contracts
	$(VENV)/bin/ruff format --check src tests
	$(VENV)/bin/ruff check src tests
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --config-file tests/mypy.ini tests
	$(VENV)/bin/lint-imports

unit: $(STAMP)  ## the unit tests alone
	$(VENV)/bin/pytest -m "unit and not slow" -n auto --dist worksteal

smoke: $(STAMP) ## a few tests of every kind, in minutes: does this machine run them at all?
	$(VENV)/bin/pytest -m smoke

test: lint unit ## every test that this machine can run; what fails is tried once more, alone, to tell flaky tests from broken ones
	scripts/test $(VENV)
	$(VENV)/bin/python scripts/regressions $(VENV)

format: $(STAMP) ## let ruff rewrite the sources
	$(VENV)/bin/ruff format src tests
	$(VENV)/bin/ruff check --fix src tests

lock: $(STAMP)  ## resolve the dependencies anew into the hashed locks
	scripts/lock $(VENV)

proto: $(STAMP) ## regenerate the stubs from src/podferry/protos/*.proto
	scripts/proto $(VENV)

clean:          ## remove the environment; labs are removed by `podferry lab down`
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
