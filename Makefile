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

# On all 500 test prompts. At equal pairs every method is read off after 100, 200 and 300 steps; SFT also where its training FLOPs equal those of
# one and of three SPIN iterations (8/3 of its images). The search of the learning rates is `python -m bench.search`.
SEEDS ?= 0 1 2
SFT_LR ?= 3e-4
DPO = lr: 2e-5, beta: 300
MEASURED := results/measured/mini_comparison.csv
measure: $(STAMP)
	for seed in $(SEEDS); do $(BIN)/bench run --method all --iters 3 --seed $$seed \
	  --set "evaluation.prompt_sets={test: {prompts: 'world:test'}}" \
	  --set "methods.sft.iterations=[{steps: 100, lr: $(SFT_LR)}, {steps: 100, lr: $(SFT_LR)}, {steps: 67, \
	  lr: $(SFT_LR)}, {steps: 33, lr: $(SFT_LR)}, {steps: 500, lr: $(SFT_LR)}]" \
	  --set "methods.diffusion_dpo.iterations=[{steps: 100, $(DPO)}, {steps: 100, $(DPO)}, {steps: 100, $(DPO)}]" \
	  || exit 1; done
	$(BIN)/bench table --format csv > $(MEASURED)
	$(BIN)/bench table --format csv --against base | tail -n +2 >> $(MEASURED)
	$(BIN)/bench table --format csv --stat winrate | tail -n +2 >> $(MEASURED)
