# make run    the embedded default end to end: every method, then the report
# make test   the test suite        make lint   ruff        make setup   the environment alone
#
# Every target first sets up .venv when it is missing or when the dependencies changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup run test lint

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $(STAMP)

run: $(STAMP)
	$(BIN)/bench run --method all --iters 3
	$(BIN)/bench report

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu" --durations=10

lint: $(STAMP)
	$(BIN)/python -m ruff check .
