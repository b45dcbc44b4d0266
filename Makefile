# Every target makes the environment that it needs, in .venv; PYTHON and VENV choose others.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
MODULES = clupy.py clupy_master.py clupy_server.py
SOURCES = $(MODULES) test_clupy.py examples setup.cfg pyproject.toml README.md CHANGELOG.md LICENSE Makefile .ci
PYTEST = $(VENV)/bin/python -m pytest -q -p no:cacheprovider -n 4 --dist worksteal test_clupy.py     # four at a time: most of it is waiting

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(VENV)/ready  ## run the main example on this machine's cores
	$(VENV)/bin/python examples/primes.py

test: $(VENV)/test services  ## run all tests, with real Redis, ZooKeeper and Chromium
	CLUPY_TEST_SERVICES=required $(PYTEST)

test-fast: $(VENV)/test  ## run the tests; those that need Redis, ZooKeeper or Chromium only where these are installed
	$(PYTEST)

chaos: $(VENV)/test services  ## lose, delay, kill, stop and starve while calls run, on a network of its own (root): some 10 minutes
	CLUPY_CHAOS=all CLUPY_TEST_SERVICES=required $(PYTEST) -k test_chaos

lint: $(VENV)/test  ## look for mistakes that can be seen without running anything
	$(VENV)/bin/ruff check --select E,F,W,B --ignore B006,B018,B023,B904,B905,E701,E731 --line-length 130 .
	MYPYPATH=. $(VENV)/bin/mypy --cache-dir=/dev/null --follow-imports=silent --warn-unused-ignores examples/typed.py
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python examples/typed.py

bench: $(VENV)/test  ## measure against the process pools of the standard library
	$(VENV)/bin/python examples/benchmark.py

soak: $(VENV)/ready  ## make a million calls under kills and changes, and see what memory and files are left: some 20 minutes
	$(VENV)/bin/python examples/soak.py

fuzz: $(VENV)/test  ## give a million inputs to all that reads what comes from outside: some 20 minutes
	FUZZ=300 $(PYTEST) -k rubbish

dist: $(VENV)/test  ## build the files for a package index
	@rm -rf build dist && mkdir build && cp -R $(SOURCES) build
	@printf '%s\n' 'include *.md *.py Makefile' 'graft .ci' 'graft examples' 'global-exclude *.pyc' >build/MANIFEST.in
	@$(VENV)/bin/python -m build --quiet --no-isolation --outdir dist build 2>build/log >&2 || { cat build/log; exit 1; }
	@rm -rf build && ls dist/*

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info __pycache__ .pytest_cache .ruff_cache

services:  ## install redis-server, ZooKeeper and Chromium where they are missing (Debian; elsewhere it says how)
	@sh .ci/services

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("CluPy needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready: setup.cfg pyproject.toml $(MODULES) | $(VENV)/bin/python
	$(PIP) .
	@rm -rf build clupy.egg-info
	@touch $@

$(VENV)/test: setup.cfg pyproject.toml $(MODULES) | $(VENV)/bin/python
	$(PIP) '.[test]'
	@rm -rf build clupy.egg-info
	@touch $@ $(VENV)/ready

.PHONY: help demo test test-fast chaos lint bench soak fuzz dist clean services
