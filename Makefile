# The commands of this project; each sets up .venv by itself.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# A file of tests stays with one process: what its fixtures made is made once. Each takes a core and some 2 GB.
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: demo test test-all check bench support clean help

help:
	@echo "make demo      compare full, intra-document and anchor attention on real documents (about 4 minutes)"
	@echo "make test      the tests; make test-all runs the slow ones too"
	@echo "make check     format, lint, types, docs"
	@echo "make bench     time attention, routes, a training step, block masks and packing against their rivals"
	@echo "make support   run every family test and write the README's table by its outcome"
	@echo "make clean     remove .venv and what was built"

# torch first and by itself: the version that constraints.txt names is the one everything else then finds installed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, got $$($(PYTHON) -V 2>&1); pass PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/anchor-attn compare --out runs/demo

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST)

# Types need an ordinary install: type checkers do not follow the mapping of an editable one.
check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build && $(BIN)/pip install --quiet --no-deps --target build/types .
	cd build && MYPYPATH=types ../$(BIN)/mypy --config-file ../pyproject.toml -p anchor_attn
	$(BIN)/python -m pytest -q tests/test_docs.py

bench: $(READY)
	$(BIN)/anchor-attn bench attention
	$(BIN)/anchor-attn bench routes
	$(BIN)/anchor-attn bench step
	$(BIN)/anchor-attn bench mask
	$(BIN)/anchor-attn bench packing

support: $(READY)
	$(BIN)/python -m pytest -q tests/test_wrap_families.py --support-matrix README.md

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
