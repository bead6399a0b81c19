# make pretrain   trains a small LLaMA on real text, no download       make test   runs the tests
# Both make their own virtual environment in .venv first. ARGS="--max_steps 50 ..." passes flags on.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
# One GPU a rank where there are GPUs, otherwise two CPU ranks (gloo).
LAUNCH := $(shell nvidia-smi -L >/dev/null 2>&1 || echo --num_accelerators 2)

.PHONY: pretrain test lint bench clean

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

# Editable here too: an ordinary install would put a copy in its place, and tests would run against stale code.
$(BIN)/.installed-bench: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,bench,examples,trl]"
	touch $@

pretrain: $(BIN)/.installed
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	  $(BIN)/deepspeed $(LAUNCH) launch/pretrain.py --deepspeed configs/zero2.json $(ARGS)

test: $(BIN)/.installed-bench
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(ARGS)

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BIN)/.installed-bench
	for script in equivalence peers step memory; do \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/$$script.py || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info
