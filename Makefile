# make demo, make test: all they need goes into .venv, under the versions of constraints.txt.
PYTHON ?= python3
export SACL_FAST_BUILD_EXT ?= auto

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt sacl_fast/_version.py $(shell find csrc -type f)

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/sacl-fast train demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

# Leaves the environment, which takes minutes to make; rm -rf .venv removes that too.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache sacl_fast/_C.*.so $(VENV)/.installed*
	find sacl_fast kernels tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("sacl-fast needs Python 3.11 or later and this is " + sys.version.split()[0] + "; name another one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# What the package is built with, since it is built without isolation.
$(VENV)/.build-tools: constraints.txt | $(VENV)/.python
	$(INSTALL) setuptools wheel ninja pybind11 torch
	@touch $@

$(VENV)/.installed: $(SOURCES) | $(VENV)/.build-tools
	$(call install_package,.)
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/.build-tools
	$(call install_package,.[dev])
	@touch $(VENV)/.installed $@

# pip shows what setup.py says of the compiled module only with --verbose.
define install_package
@echo 'installing sacl-fast (log: $(VENV)/install.log)'
@$(PIP) install --verbose --constraint constraints.txt --no-build-isolation --editable '$(1)' \
	> $(VENV)/install.log 2>&1 || { tail -n 40 $(VENV)/install.log; exit 1; }
@sed -n 's/^ *\(sacl-fast: \)/\1/p' $(VENV)/install.log
endef
