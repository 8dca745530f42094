# Two commands set up a fresh machine by themselves: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONWARNINGS ?=

.PHONY: demo test lint bench chaos test-gpu clean

# pip, not another resolver: the constraints pin a torch that pip finds as a CPU build where one is at hand.
.venv/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[recipes,finetune,dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/tempo train examples/demo.toml

test: .venv/.installed
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Ratios, one thread on every side. KEEP=HARDWARE-DATE keeps them in benchmarks/.
bench: .venv/.installed
	$(if $(KEEP),mkdir -p benchmarks/kernels benchmarks/trusted-side/$(KEEP))
	$(BIN)/python benchmarks/kernels.py $(if $(KEEP),--json benchmarks/kernels/$(KEEP).json)
	$(BIN)/tempo bench --model vit-small $(if $(KEEP),--json benchmarks/trusted-side/$(KEEP)/vit-small.json)

chaos: .venv/.installed
	TEMPO_CHAOS_RUNS=200 TEMPO_CHAOS_KILLS=100 TEMPO_CHAOS_TABLE=chaos.json \
		$(BIN)/python -m pytest -q tests/integration/test_chaos.py tests/integration/test_killed_runs.py

test-gpu: .venv/.installed
	$(BIN)/python -m pytest -m gpu tests/gpu

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache runs
