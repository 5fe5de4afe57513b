# demo, test, lint, bench: each sets up its own environment in .venv the first time. PYTHON=… chooses the interpreter.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python3.10; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= demo/

.PHONY: help demo test test-all lint format bench clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo      the embedded model end to end: export, build, validate, bench, pack (writes demo/)'
	@echo 'make test      the tests that need no GPU and no network'
	@echo 'make test-all  the slow ones too, and those for a GPU where there is one'
	@echo 'make lint      ruff and mypy'
	@echo 'make bench     latency of the demo bundles (more: docs/benchmarks.md)'
	@echo 'make format    let ruff format the code'
	@echo 'make clean     remove what these targets made'

demo: $(READY)
	$(BIN)/edgetrim demo -o $(OUT)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadgroup

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadgroup -m 'not device'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(READY)
	@test -f $(OUT)/image/manifest.json || $(MAKE) demo
	$(BIN)/edgetrim bench $(OUT)/image
	$(BIN)/edgetrim bench $(OUT)/clip

# onnxruntime-genai, for the tests of its layout, comes without its dependency: onnxruntime would overwrite onnxruntime-gpu.
# The extra `rtx` installs nothing outside x86-64 Linux (a marker in pyproject.toml).
$(READY): pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'No Python 3.10 or newer with venv found. Install one, or: make PYTHON=/path/to/python3 …'; exit 1; }
	@echo 'Setting up $(VENV) with $(PYTHON) (some minutes the first time) …'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
		-e '.[export,ort,rtx,video,dev]' -c constraints.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -c constraints.txt \
		'onnxruntime-genai; python_version >= "3.11" and sys_platform == "linux"'
	@touch $@

clean:
	rm -rf $(VENV) demo out build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
