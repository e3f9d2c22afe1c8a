PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= report
JOBS   ?= 2

.PHONY: help venv report test lint gpu tracr clean

help:
	@echo 'make report   the report of SmolLM2-135M in $(OUT)/index.html'
	@echo 'make test     all tests that need no GPU'
	@echo 'make lint     ruff and mypy'
	@echo 'make gpu      tests and benchmarks that need a GPU, with PYTHON=... as it is; figures in $(OUT)/'
	@echo 'make venv     the environment in $(VENV)'
	@echo 'make tracr    the compiled programs in tests/oracle, anew, in an environment of their own'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "mi-workbench needs Python 3.11 to 3.13; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

venv: $(STAMP)

report: $(STAMP)
	$(BIN)/workbench report --out $(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu:
	mkdir -p $(OUT)
	PYTHONPATH=.:kernels:circuits $(PYTHON) -m pytest -p no:cacheprovider -m gpu --gpu-required tests/gpu
	PYTHONPATH=.:kernels:circuits $(PYTHON) -m workbench.bench.sweep --device cuda --json $(OUT)/sweep.json
	PYTHONPATH=.:kernels:circuits $(PYTHON) -m workbench_kernels.bench --device cuda --json $(OUT)/kernels.json --markdown $(OUT)/kernels.md

tracr:
	$(PYTHON) -m venv .venv-tracr
	.venv-tracr/bin/python -m pip install --quiet --disable-pip-version-check 'tracr-pypi==1.0.0' 'jax<0.6'
	JAX_PLATFORMS=cpu .venv-tracr/bin/python tests/oracle/tracr_compile.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
