# make run    the embedded default end to end: every method, then the report
# make test   the test suite        make lint   ruff        make setup   the environment alone
# make measure   what results/measured/mini_comparison.csv holds: eight seeds, checkpoints at equal pairs and equal FLOPs
#
# Every target first sets up .venv when it is missing or when the dependencies changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup run test lint measure quotes

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $(STAMP)

run: $(STAMP)
	$(BIN)/bench run --method all --iters 3
	$(BIN)/bench report

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" --durations=10

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# README.md's and results/measured/README.md's numbers, from the files in results/measured/
quotes: $(STAMP)
	$(BIN)/python -m reports.quotes

# Everything is in bench/suites/mini-measured.yaml but this: all 500 test prompts, and no others. The settings
# come from `bench search`.
# Stopped and started again it goes on; JOBS seeds at a time, each on one thread, so that no number depends on how many.
SEEDS ?= 0 1 2 3 4 5 6 7
JOBS ?= 2
MEASURED := results/measured/mini_comparison.csv
AGAINST := base SFT@100 SFT@267 SFT@300 SFT@800 Diffusion-DPO@200 Diffusion-DPO@300 SPIN-1 SPIN-2 SPIN-3 spin-g3-1 spin-g3-2
measure: $(STAMP)
	printf '%s\n' $(SEEDS) | OMP_NUM_THREADS=1 xargs -P $(JOBS) -I {} $(BIN)/bench run --suite mini-measured \
	  --method all --iters 3 --once --wait --seed {} --set "evaluation.prompt_sets={test: {prompts: 'world:test'}}"
	$(BIN)/bench table --format csv > $(MEASURED)
	$(BIN)/bench table --format csv --stat winrate | tail -n +2 >> $(MEASURED)
	for model in $(AGAINST); do $(BIN)/bench table --format csv --against $$model | tail -n +2 >> $(MEASURED); done
	$(BIN)/bench table --format csv --stat seeds --metrics judge > results/measured/mini_seeds.csv
	$(BIN)/bench table --format csv --stat agreement > results/measured/mini_agreement.csv
	$(BIN)/python -m bench.mini.warrant results/runs/* -o results/measured/judge.csv
	$(BIN)/python -c "import glob, json; read = lambda path: json.load(open(path)); \
	  print(json.dumps([{**read(f'{run}/protocol.json'), 'cost': {name: value for name, value in \
	  read(f'{run}/cost.json').items() if 'stages' not in name}} for run in sorted(glob.glob('results/runs/*'))], \
	  indent=1))" > results/measured/mini_comparison.protocols.json
