# make demo, make test: each installs what it needs into .venv first. `make help` lists the rest.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PARALLEL ?=
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
OPERATORS := $(shell find csrc -type f)
# pip shows its progress where somebody looks on, and says nothing elsewhere.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install \
	$(shell [ -t 2 ] || echo --quiet)
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: help setup demo test check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: $(STAMPS)/package ## install everything into .venv (the others do it by themselves)
	@:

demo: setup ## train a small model to solve word problems; PARALLEL="--pipeline 2" chooses the layout
	@$(BIN)/python tools/demo.py $(PARALLEL)

test: setup ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

check: setup ## format, lint, types, floors
	@echo "check: ruff format" && $(BIN)/ruff format --check .
	@echo "check: ruff" && $(BIN)/ruff check .
	@echo "check: mypy" && $(BIN)/mypy --strict mcore_sft
	@echo "check: torch.cuda is named in mcore_sft/runtime only"
	@! grep -rn --include='*.py' 'torch\.cuda' mcore_sft | grep -v '^mcore_sft/runtime/'
	@echo "check: floors" && $(BIN)/lint-imports --no-logo

clean: ## remove what was built and cached; .venv and results stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
	find mcore_sft -name '*.so' -delete
	rm -f $(STAMPS)/package

$(STAMPS)/venv:
	@echo "setup: making $(VENV) with $(PYTHON)"
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not there;" \
		"install Python 3.11 or name yours: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) -V), needed is 3.11 or 3.12;" \
		"name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
		echo "error: '$(PYTHON) -m venv' failed;" \
		"install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	@echo "setup: installing $(TORCH) (the largest part; the README says how to choose a CPU build)"
	@$(PIP) '$(TORCH)' || { $(NO_INDEX); }
	@$(PIP) -c constraints.txt setuptools wheel ninja || { $(NO_INDEX); }
	@touch $@

$(STAMPS)/package: $(STAMPS)/torch pyproject.toml setup.py $(OPERATORS)
	@command -v "$${CXX:-g++}" >/dev/null || { echo "error: no C++ compiler ($${CXX:-g++});" \
		"install one (Debian, Ubuntu: apt install g++) or name yours: make CXX=clang++" >&2; exit 1; }
	@echo "setup: installing the packages that constraints.txt pins and building csrc (minutes)"
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[dev,plot]' || { echo "error: see above:" \
		"either csrc did not build, or pip reached no package index (set PIP_INDEX_URL to one that" \
		"answers); mend it and run make again" >&2; exit 1; }
	@touch $@

NO_INDEX = echo "error: pip could not install this; if it reached no package index," \
	"set PIP_INDEX_URL to one that answers, then run make again" >&2; exit 1
