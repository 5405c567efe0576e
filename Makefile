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
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The files that see most without a C++ compiler: about a minute on two cores.
QUICK := house plain methods dtypes solve errors hidden_state events odeint_parity transforms checkpoint stepper families \
	regularizers per_sample dense times_per_sample stiff failed_rows restarts adjoint_drift
.PHONY: test-quick
test-quick: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(QUICK:%=tests/test_%.py)

# The C++ kernels under sanitizers; a quarter of an hour. Needs g++.
.PHONY: test-sanitize
test-sanitize: $(SETUP)
	$(BIN)/python tests/sanitize.py

# Random fields, changes, systems, gradients, lifetimes and processes, with new seeds; needs a C++ compiler for some.
MINUTES ?= 10
.PHONY: fuzz
fuzz: $(SETUP)
	$(BIN)/python tests/fuzz/run.py --minutes $(MINUTES)

# The machine code of compiled fields of every width, for every instruction set, against torch; needs g++ or clang++.
.PHONY: test-grid
test-grid: $(SETUP)
	$(BIN)/python tests/machine_code.py

# A build with the oldest torch that is served; downloads its wheel.
.PHONY: build-oldest
build-oldest: $(SETUP)
	$(BIN)/python tests/oldest_torch.py

# Programs written for torchdiffeq, with it and with this package in its place; fetches them with git and pip. ONLY: some of them.
.PHONY: test-clients
test-clients: $(SETUP)
	$(BIN)/python tests/clients.py $(if $(ONLY),--only $(ONLY))

# An sdist and a wheel, checked by twine, and tests of the wheel in a fresh environment, which downloads torch.
WHEEL_SETUP ?= $(if $(SETUP),$(VENV)/publish)
.PHONY: wheel
wheel: $(WHEEL_SETUP)
	$(BIN)/python tests/wheel.py --torch "$(TORCH)"

$(VENV)/publish: $(VENV)/installed
	$(BIN)/pip install --quiet build twine
	touch $@

# The documentation, in build/docs; every warning is an error.
DOCS_SETUP ?= $(if $(SETUP),$(VENV)/docs)
.PHONY: docs
docs: $(DOCS_SETUP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo build/docs/index.html

# The extra of the package that was installed: installing that again would build it again.
$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -c 'from importlib.metadata import requires; print(*[x.split(";")[0] for x in requires("odenet-cuda") if "docs" in x.split(";")[-1]], sep="\n")' > $(VENV)/docs.txt
	$(BIN)/pip install --quiet -r $(VENV)/docs.txt
	touch $@

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.* tests/native/*.* benchmarks/*/*.cu benchmarks/*/*.h)

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.* csrc/*/*.* tests/native/*.* benchmarks/*/*.cu benchmarks/*/*.h)

bench: $(SETUP)
	mkdir -p build/bench
	$(BIN)/python benchmarks/bench_ops.py --json build/bench/ops.json
	$(BIN)/python benchmarks/bench_call.py --json build/bench/call.json
	$(BIN)/python benchmarks/bench_times.py --json build/bench/times.json
	$(BIN)/python benchmarks/bench_doses.py --json build/bench/doses.json
	$(BIN)/python benchmarks/bench_events.py --json build/bench/events.json
	$(BIN)/python benchmarks/bench_stiff.py --json build/bench/stiff.json
	$(BIN)/python benchmarks/bench_stiff_ensemble.py --json build/bench/stiff_ensemble.json
	$(BIN)/python benchmarks/bench_odeint.py --json build/bench/odeint.json
	$(BIN)/python benchmarks/work_precision.py --json build/bench/precision.json --png build/bench
	$(BIN)/python benchmarks/bench_gradients.py --json build/bench/gradients.json
	$(BIN)/python benchmarks/bench_training.py --json build/bench/training.json
	$(BIN)/python benchmarks/bench_compiled.py --json build/bench/compiled.json

bench-quick: $(SETUP)
	mkdir -p build/bench
	$(BIN)/python benchmarks/bench_ops.py --quick --json build/bench/ops-quick.json
	$(BIN)/python benchmarks/bench_call.py --quick --json build/bench/call-quick.json
	$(BIN)/python benchmarks/bench_times.py --quick --json build/bench/times-quick.json
	$(BIN)/python benchmarks/bench_doses.py --quick --json build/bench/doses-quick.json
	$(BIN)/python benchmarks/bench_events.py --quick --json build/bench/events-quick.json
	$(BIN)/python benchmarks/bench_stiff.py --quick --json build/bench/stiff-quick.json
	$(BIN)/python benchmarks/bench_stiff_ensemble.py --quick --json build/bench/stiff-ensemble-quick.json
	$(BIN)/python benchmarks/bench_odeint.py --quick --json build/bench/odeint-quick.json
	$(BIN)/python benchmarks/work_precision.py --quick --json build/bench/precision-quick.json --png build/bench/quick
	$(BIN)/python benchmarks/bench_gradients.py --quick --json build/bench/gradients-quick.json
	$(BIN)/python benchmarks/bench_training.py --quick --json build/bench/training-quick.json
	$(BIN)/python benchmarks/bench_compiled.py --quick --json build/bench/compiled-quick.json

$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "setuptools>=77" wheel ninja pybind11 numpy build
	$(BIN)/pip install --quiet --no-build-isolation -e ".[test,demo,bench,lint]"
	touch $@

clean:
	rm -rf build dist *.egg-info odenet_cuda/*.so demo_results
