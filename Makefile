# make demo, make test: all they need goes into .venv, under the versions of constraints.txt.
# make test-newest: the same tests under the newest versions, in an environment of their own.
# make bench-gpu: tests and figures of a machine with a GPU, into benchmarks/results/gpu.
PYTHON ?= python3
export SACL_FAST_BUILD_EXT ?= auto

VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
SOURCES := pyproject.toml setup.py MANIFEST.in sacl_fast/_version.py $(shell find csrc -type f)
COPIED := $(wildcard *.toml *.py *.in *.txt *.md .pre-commit-config.yaml LICENSE Makefile CITATION.cff) \
	$(wildcard sacl_fast kernels csrc tests benchmarks docs examples)
CXX_FILES = $(shell find csrc tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')
# Which tests: make test TESTS='tests/slim -k skip'
TESTS ?= tests
# What is measured on a GPU: make bench-gpu GPU='--stages B C --minutes 5'
GPU ?=
PYTEST = OMP_NUM_THREADS=1 $(1)/python -m pytest -n 2 --dist worksteal $(TESTS)

.PHONY: demo test test-newest bench-gpu lint clean

demo: $(VENV)/.installed
	$(BIN)/sacl-fast train demo

test: lint
	$(call PYTEST,$(BIN))

# From a copy of the sources, since the compiled module lies among them and is of one torch.
test-newest: $(NEWEST)/.installed-dev
	$(copy_sources)
	$(NEWEST)/bin/sacl-fast train demo --out $(NEWEST)/runs/$$(date +%Y%m%d-%H%M%S)
	cd $(NEWEST)/src && $(call PYTEST,../bin)

bench-gpu: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/on_gpu.py $(GPU)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# Leaves the environments, which take minutes to make; rm -rf .venv .venv-newest removes them too.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache sacl_fast/_C.*.so
	rm -rf $(VENV)/.installed* $(NEWEST)/.installed* $(NEWEST)/src $(NEWEST)/runs
	find sacl_fast kernels tests -name __pycache__ -prune -exec rm -rf {} +

%/.python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("sacl-fast needs Python 3.11 or later and this is " + sys.version.split()[0] + "; name another one with make PYTHON=...")'
	$(PYTHON) -m venv $(@D)
	@touch $@

# What the package is built with, since it is built without isolation.
$(VENV)/.build-tools: constraints.txt | $(VENV)/.python
	$(call pip,$<) --quiet setuptools wheel ninja pybind11 torch
	@touch $@

$(NEWEST)/.build-tools: constraints-newest.txt | $(NEWEST)/.python
	$(call pip,$<) --quiet setuptools wheel ninja pybind11 torch
	@touch $@

$(VENV)/.installed: $(SOURCES) constraints.txt | $(VENV)/.build-tools
	$(call install_package,constraints.txt,.)
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) constraints.txt | $(VENV)/.build-tools
	$(call install_package,constraints.txt,.[dev])
	@touch $(VENV)/.installed $@

$(NEWEST)/.installed-dev: $(SOURCES) constraints-newest.txt | $(NEWEST)/.build-tools
	$(copy_sources)
	$(call install_package,constraints-newest.txt,$(NEWEST)/src[dev])
	@touch $@

# pip of the environment that is being made.
pip = $(@D)/bin/python -m pip --disable-pip-version-check install --constraint $(1)

# pip shows what setup.py says of the compiled module only with --verbose.
define install_package
@echo 'installing sacl-fast (log: $(@D)/install.log)'
@$(call pip,$(1)) --verbose --no-build-isolation --editable '$(2)' \
	> $(@D)/install.log 2>&1 || { tail -n 40 $(@D)/install.log; exit 1; }
@sed -n 's/^ *\(sacl-fast: \)/\1/p' $(@D)/install.log
endef

define copy_sources
@mkdir -p $(NEWEST)/src && find $(NEWEST)/src -name '*.py' -delete
@tar --create --exclude='*.so' --exclude=__pycache__ $(COPIED) | tar --extract --directory $(NEWEST)/src
endef
