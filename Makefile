# Everything needs only Python 3.11 or 3.12 (PYTHON=...); the first target makes .venv, later ones find it made.
SERVES := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(SERVES)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# processes that share the tests, a file at a time
WORKERS ?= 2
export HF_HUB_OFFLINE = 1

.PHONY: help demo lab test test-slow test-data test-slurm test-slurm-all lint clean

help:
	@echo "make demo       LoRAN, RanLoRA and AuroRA against QLoRA on real sentences (runs/demo/report.html)"
	@echo "make lab        what Sinter costs, whether it is stable and whether it is there (runs/lab/report.html)"
	@echo "make test       the test suite (about 17 minutes on 2 cores)"
	@echo "make test-slow  the tests that take minutes each (SLICE=1/4: a quarter of them)"
	@echo "make test-data DATA=D   every row of the whole data sets below D, in the layout of docs/tasks.md (half a minute)"
	@echo "make test-slurm the job script on a SLURM of three nodes, which it installs and starts; root, Debian (4 minutes)"
	@echo "make test-slurm-all   the same, with everything that can happen to a job"
	@echo "make lint       style"

$(STAMP): requirements.txt requirements-dev.txt requirements-demo.txt requirements-lm-eval.txt adapters/pyproject.toml eval/pyproject.toml training/pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: there is no Python 3.11 or 3.12 here: install one, or say PYTHON=..."; exit 1; }
	@$(PYTHON) -c '$(SERVES)' || { echo "error: $(PYTHON) is not Python 3.11 or 3.12: say PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.txt -r requirements-lm-eval.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m curvelora_training.demo --out runs/demo

lab: $(STAMP)
	$(BIN)/python -c "from curvelora_training.demo import MODEL, export_minilm; export_minilm(MODEL)"
	$(BIN)/curvelora bench compare --config training/recipes/demo.yaml --steps 24 --rounds 3 --seeds 42-43 --sharpness-batches 1 --out runs/lab --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not gpu and not slurm and not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu and not slurm" $(if $(SLICE),--slice $(SLICE))

test-data: $(STAMP)
	@test -d "$(DATA)" || { echo "error: say DATA=D with the folder that holds the tasks' data (layout: docs/tasks.md)"; exit 1; }
	CURVELORA_DATA_DIR="$(DATA)" $(BIN)/python -m pytest tests/eval/benchmarks/test_real_data.py tests/eval/benchmarks/test_samples.py

test-slurm: $(STAMP)
	$(BIN)/python -m pytest -raR -m "slurm and not slow" tests/slurm

test-slurm-all: $(STAMP)
	$(BIN)/python -m pytest -raR -m "slurm" tests/slurm

lint: $(STAMP)
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) runs .models
