# The project's commands. `make` alone lists them; each sets up what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
BIN := .venv/bin
export SAM_CLI_TELEMETRY := 0
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help setup demo test lint format types template-checks unit simulation simulate simulate-selftest load load-local bench
.PHONY: contract dashboard-picture e2e deploy environment-id lock clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# --- set-up: four environments, since ministack and the SAM CLI pin what others need newer -------------------

setup: .venv/.done .venv-aws/.done .venv-sam/.done .venv-sandbox/.done  ## make every virtual environment

.venv/.done: requirements-dev.txt
	$(call make_venv)
.venv-aws/.done: requirements-aws.txt
	$(call make_venv)
.venv-sam/.done: requirements-sam.txt
	$(call make_venv)
.venv-sandbox/.done: sandbox/requirements.txt
	$(call make_venv)

define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; '$(PYTHON)' is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up $(@D) from $< (once; about half a minute)"
	@rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement $<
	@touch $@
endef

# --- the main job --------------------------------------------------------------------------------------------

demo: setup  ## serve sessions end to end on a local AWS, with the real template (ARGS="--help" for options)
	@$(BIN)/python -m local.demo $(ARGS)

# --- checks --------------------------------------------------------------------------------------------------

test: lint types template-checks unit simulation contract e2e  ## every check and test; the demo is the end-to-end test

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/hadolint sandbox/Dockerfile

format: setup  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: setup
	$(BIN)/mypy shared local sandbox cli bench tests
	@for function in functions/*/; do $(BIN)/mypy $$function/app.py || exit 1; done

template-checks: setup
	.venv-sam/bin/sam validate --lint --region us-east-1 --template template.yaml
	$(BIN)/cfn-lint template.yaml

# A file's tests share its servers, so a file stays with one worker
PARALLEL := -n auto --dist loadfile

unit: setup  ## the tests that need no server
	$(BIN)/python -m pytest tests/unit -q $(PARALLEL)

simulation: setup  ## some hundred seeds and the named sequences
	$(BIN)/python -m pytest -q tests/simulation

simulate: setup  ## play many seeds of the simulation (SEEDS=2000), or one with its history (SEED=17)
	@$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED) --history,--seeds $(or $(SEEDS),2000))

simulate-selftest: setup  ## break rule after rule: the simulation must catch each
	@$(BIN)/python -m tests.simulation.selftest

load: setup  ## 10,000 sessions at once on the simulation, 1,000 slots (ARGS="--help" for options)
	@$(BIN)/python -m tests.simulation.load $(ARGS)

load-local: setup  ## 200 sessions at once on the local AWS, 8 sandboxes at a time (about ten minutes)
	@$(BIN)/python -m local.demo --sessions 200 --timeout 1500

bench: setup  ## measure beside the official SDK, and what it costs (under ten minutes; ARGS="--help" for options)
	@$(BIN)/python -m bench $(ARGS)

dashboard-picture: setup  ## draw docs/dashboard.png: a simulated day on the template's dashboard
	$(BIN)/python -m tests.simulation.day docs/dashboard.png

contract: setup  ## our parts against the official SDK, the emulator and the local AWS
	$(BIN)/python -m pytest tests/contract -q $(PARALLEL)

e2e: setup  ## the demo, checked from outside; a deploy over running sessions
	$(BIN)/python -m pytest tests/e2e -q

# --- to AWS --------------------------------------------------------------------------------------------------

# Without --guided, which asks for each of the template's parameters (docs/decisions/0008-one-parameter.md)
deploy: environment-id .venv-sam/.done  ## deploy to your AWS account (ENVIRONMENT_ID=env_01ABC, PARAMETERS="NetworkMode=private")
	PATH="$(CURDIR)/.venv-sam/bin:$$PATH" sam build
	.venv-sam/bin/sam deploy --parameter-overrides EnvironmentId=$(ENVIRONMENT_ID) $(PARAMETERS)
	@secret="$$(.venv-sam/bin/sam list stack-outputs --output json | .venv-sam/bin/python -c 'import json, sys; \
	  print(next(o["OutputValue"] for o in json.load(sys.stdin) if o["OutputKey"] == "EnvironmentKeySecretArn"))')"; \
	echo "Deployed. If it is not there yet, put the environment key, from a file that holds nothing else:"; \
	echo "  aws secretsmanager put-secret-value --secret-id $$secret --secret-string file://KEYFILE"

environment-id:
	@[ -n "$(ENVIRONMENT_ID)" ] || { echo "Which environment? make deploy ENVIRONMENT_ID=env_01ABC"; exit 1; }

# --- upkeep --------------------------------------------------------------------------------------------------

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate
lock: .venv/.done  ## pin and hash every requirements file from pyproject.toml
	$(LOCK) pyproject.toml --output-file shared/requirements.txt
	$(LOCK) pyproject.toml --group dev --output-file requirements-dev.txt
	$(LOCK) --group aws --output-file requirements-aws.txt
	$(LOCK) --group sam --output-file requirements-sam.txt
	$(LOCK) --group sandbox --output-file sandbox/requirements.txt

clean:  ## remove what the commands made
	rm -rf .venv .venv-aws .venv-sam .venv-sandbox .aws-sam .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
