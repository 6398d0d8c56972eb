# Everything here does its own set-up: a machine needs Python 3.11+ with venv and make.
PYTHON ?= python3
BIN := .venv/bin
QUICKSTART := runs/quickstart
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# Byte code on all cores at once; a process without it takes 12 seconds longer to start. Packages
# carry a few files that are no Python of today: those stay as they are.
COMPILE := $(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true

# Large pages where glibc allocates make training steps on a CPU shorter (docs/performance.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help quickstart test test-all test-plan lint scenes clean

help:
	@echo "make quickstart  draw the scenes, train GRAIN on them, evaluate (12 minutes on 2 CPU cores)"
	@echo "make test        the tests, in about a quarter of an hour on 2 CPU cores"
	@echo "make test-all    the long ones too"
	@echo "make test-plan   those that need the compilers of requirements-plan.txt, in .venv-plan"
	@echo "make lint        ruff"
	@echo "make clean       takes away the environments and the caches; data and runs stay"
	@echo "make scenes      the embedded data alone, into data/scenes"

.venv/installed: requirements.txt
	@echo "installing into .venv (about 2 minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/it"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) -r requirements.txt
	@$(COMPILE)
	@touch $@

.venv/installed-tests: .venv/installed requirements-test.txt requirements-test-nodeps.txt
	@$(PIP) -r requirements-test.txt
	@$(PIP) --no-deps -r requirements-test-nodeps.txt
	@$(COMPILE)
	@touch $@

scenes: .venv/installed
	@$(BIN)/python -m grain_jax.data.build --source=scenes --out=data/scenes

quickstart: scenes
	$(BIN)/python -m grain_jax.main --config=configs/quickstart.py --workdir=$(QUICKSTART)

lint: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: .venv/installed-tests lint  # one process more than cores: tests wait for processes of theirs
	$(BIN)/python -m pytest -n 3 --dist worksteal

test-all: .venv/installed-tests lint
	GRAIN_JAX_LONG=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.venv-plan/installed: requirements-plan.txt requirements.txt requirements-test.txt
	@test -x .venv-plan/bin/python || $(PYTHON) -m venv .venv-plan
	@.venv-plan/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r requirements-plan.txt $$(grep -E '^(pytest|hypothesis)' requirements-test.txt)
	@touch $@

test-plan: .venv-plan/installed
	.venv-plan/bin/python -m pytest -m plan tests/plan/test_plan.py tests/runtime/test_mesh.py

clean:
	rm -rf .venv .venv-plan .cache .pytest_cache .ruff_cache
