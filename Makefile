# make run    the embedded default end to end: every method, then the report
# make test   the test suite        make lint   ruff        make setup   the environment alone
# make measure   what results/measured/mini_comparison.csv holds: three seeds, checkpoints at equal pairs and equal FLOPs
#
# Every target first sets up .venv when it is missing or when the dependencies changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup run test lint measure

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

# SFT is also read off where its training FLOPs equal those of one and of three SPIN iterations (8/3 images a pair).
SFT_CHECKPOINTS = [{steps: 100, lr: $(1)}, {steps: 167, lr: $(1)}, {steps: 33, lr: $(1)}, {steps: 500, lr: $(1)}]
