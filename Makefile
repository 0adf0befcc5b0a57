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

VLLM_VENV    := .venv-vllm
VLLM_COMMAND := $(CURDIR)/$(VLLM_VENV)/bin/python -m vllm.entrypoints.openai.api_server
FAST         := not network and not etcd and not vllm and not root and not slow
# Modules that FAST leaves out as a whole: to read them costs as much as many a test.
NOT_FAST      = $(shell grep -rlE '^pytestmark = .*mark\.(network|etcd|vllm|root|slow)\b' tests --include='test_*.py')
# One thread of linear algebra for each process, as there is a process for each core; a quarter of the examples of each
# property, all of which `make test` tries; compiled modules are kept, whatever the environment says.
FAST_ENV     := OPENBLAS_NUM_THREADS=1 ENOVA_TEST_EXAMPLES_SHARE=0.25 PYTHONDONTWRITEBYTECODE=

help: ## what can be made
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.ready ## make .venv with everything in it (by uv where present, else venv and pip)

# Rebuilt only when the dependencies change: the package itself is installed editable.
$(VENV)/.ready: pyproject.toml
	@tests/tools/setup_venv "$(PYTHON)" "$(VENV)"
	@touch $@

demo: setup ## bring up, deploy, replay a trace, scale, break, recover (ENGINE=vllm: a real one, 4 to 12 minutes)
ifeq ($(ENGINE),vllm)
	@tests/tools/setup_vllm "$(PYTHON)" "$(VLLM_VENV)"
	@$(BIN)/python -m enova_cli.demo --engine vllm --model "$(CURDIR)/$(VLLM_VENV)/tiny-model" \
	  --engine-command "$(VLLM_COMMAND)" $(ARGS)
else
	@$(BIN)/python -m enova_cli.demo --engine "$(ENGINE)" $(ARGS)
endif

test: setup ## all tests, real etcd and real vLLM included (VLLM=0 leaves vLLM out; ARGS for pytest)
	@tests/tools/run_tests "$(PYTHON)" "$(VLLM_VENV)" "$(VLLM)" $(ARGS)

test-fast: setup ## the tests that need neither network nor servers, under a minute
	@$(FAST_ENV) $(BIN)/pytest -q -n auto --dist worksteal -m "$(FAST)" $(addprefix --ignore=,$(NOT_FAST)) $(ARGS)

lint: setup ## linters, strict types, import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: ## generate code from the .proto files
	@PYTHON="$(PYTHON)" tests/tools/generate_proto

check-proto: ## fail if the generated code is not what the .proto files give
	@PYTHON="$(PYTHON)" tests/tools/generate_proto --check

bench: setup ## one benchmark: make bench NAME=ingress ARGS=...; without a name it lists them
	@if [ -z "$(NAME)" ]; then cd tests/benchmarks && ls -1 -- *.py | sed 's/\.py$$//'; \
	else PYTHONPATH=tests $(BIN)/python "tests/benchmarks/$(NAME).py" $(ARGS); fi

clean: ## remove what make made: environments, caches, builds
	rm -rf $(VENV) $(VLLM_VENV) .venv-proto .venv-detectors .cache build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
