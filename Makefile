# make train   environment and the main job           make test   environment and the tests
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python

.PHONY: help train test bench peers lint types check clean
help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "qat needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 train"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile --constraint constraints.txt torch
	@echo "installing the rest, and compiling kernels beside it"
	@$(RUN) -P -W ignore qat/numerics/native.py & \
		$(VENV)/bin/pip install --quiet --no-compile --constraint constraints.txt --editable '.[all]' && wait
	@touch $@

train: $(STAMP) ## install what is missing and run the main job; ARGS="quant=w4a4_lsq" for another
	$(RUN) train.py $(ARGS)

test: $(STAMP) ## install what is missing and run the tests; ARGS="tests/test_scheme.py" for some
	$(RUN) -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder $(ARGS)

bench: $(STAMP) ## what a step of quantized training costs, against the committed results (4 minutes)
	$(RUN) -m experiments.speed.training --short

PEERS := torchao==0.18.0 brevitas==0.13.4 nvidia-modelopt==0.47.0 nncf==3.4.0 requests huggingface_hub
peers: $(STAMP) ## an environment with other frameworks, to measure them too
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --no-compile --constraint constraints.txt torch
	.venv-peers/bin/pip install --quiet $(PEERS)

lint: $(STAMP) ## ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP) ## mypy
	$(VENV)/bin/mypy

check: test lint types ## all three

clean: ## remove the environment and every run
	rm -rf $(VENV) .venv-peers outputs multirun
