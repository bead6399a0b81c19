# make pretrain   trains a small LLaMA on real text, no download       make test   runs the tests
# Both make their own virtual environment in .venv first. ARGS="--max_steps 50 ..." passes flags on.
# make test-all   also the slow ones: launchers, examples, slurm, hosts, more ranks, layouts and formats
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
# One GPU a rank where there are GPUs, otherwise two CPU ranks (gloo).
LAUNCH := $(shell nvidia-smi -L >/dev/null 2>&1 || echo --num_accelerators 2)
PYTEST = PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --durations=10
# Tests in one process, and those that start others, whose ranks leave processors idle while they wait for each other.
ALONE := $(wildcard tests/unit tests/threads)
TOGETHER := tests/ranks tests/integration

.PHONY: pretrain test test-slow test-all tests-alone tests-together lint bench clean

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

# Both kinds side by side; what the first prints comes last. With ARGS it is one pytest, which takes files and options.
test: $(BIN)/.installed-bench
ifeq ($(strip $(ARGS)),)
	@$(MAKE) --no-print-directory --jobs=2 --keep-going tests-alone tests-together; code=$$?; \
	  cat build/tests-alone.log; exit $$code
else
	$(PYTEST) $(ARGS)
endif

tests-alone: $(BIN)/.installed-bench
	@mkdir -p build
	@$(PYTEST) $(ALONE) >build/tests-alone.log 2>&1

tests-together: $(BIN)/.installed-bench
	@$(PYTEST) $(TOGETHER)

test-slow: $(BIN)/.installed-bench
	$(PYTEST) -m slow $(ARGS)

test-all: test test-slow

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BIN)/.installed-bench
	for script in equivalence peers step memory; do \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/$$script.py || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info
