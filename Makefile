# Each target sets up what it needs in .venv, on a fresh machine too. To use an interpreter that already has everything:
#   make test BIN=/path/to/environment/bin SETUP=
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN ?= $(VENV)/bin
SETUP ?= $(VENV)/installed

SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test lint format bench bench-quick clean

demo: $(SETUP)
	$(BIN)/python examples/odenet_digits.py

test: $(SETUP)
	$(BIN)/python -m pytest

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.*)

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.* csrc/*/*.*)

bench: $(SETUP)
	$(BIN)/python benchmarks/bench_odeint.py

bench-quick: $(SETUP)
	$(BIN)/python benchmarks/bench_odeint.py small --runs 5

$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "setuptools>=77" wheel ninja pybind11 numpy build
	$(BIN)/pip install --quiet --no-build-isolation -e ".[test,demo,bench,lint]"
	touch $@

clean:
	rm -rf build dist *.egg-info odenet_cuda/*.so demo_results
