# Every target is .PHONY: folders are named proto, tests, agent, ... and make would call them up to date.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint proto check-proto bench clean

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ENGINE ?= simulated
VLLM   ?= 1
NAME   ?=
ARGS   ?=
GROUPS := dev

help: ## what can be made
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.ready ## make .venv with everything in it (by uv where present, else venv and pip)

# Rebuilt only when the dependencies change: the package itself is installed editable.
$(VENV)/.ready: pyproject.toml
	@tests/tools/setup_venv "$(PYTHON)" "$(VENV)"
	@touch $@

lint: setup ## linters, strict types, import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: ## generate code from the .proto files
	@tests/tools/generate_proto

check-proto: ## fail if the generated code is not what the .proto files give
	@tests/tools/generate_proto --check
