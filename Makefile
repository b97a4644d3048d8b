# Every target makes its own .venv when there is none, and brings it up to date when the pins change.
#   PYTHON=python3.12 make test        another interpreter
#   TORCH_FLAGS="--index-url URL"      pip's flags for torch alone, to take a build for another device
PYTHON ?= python3
EXTRAS ?= export,report,tasks,test
TORCH_FLAGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test slow check chaos fuzz bench figures wheel clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

# torch goes first and alone, so that nothing else can pull in another, larger build of it.
# What no-deps.txt names comes without its dependencies: one of them is torchvision, and only the weights are wanted.
.venv/installed: pyproject.toml constraints.txt no-deps.txt
	@echo "Installing into .venv (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Orchardist needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt $(TORCH_FLAGS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	$(BIN)/python -m pip install -q --no-deps -r no-deps.txt
	@touch $@

demo: .venv/installed ## 40 prune-train trials on MNIST digits with two workers, and their front in front.png
	$(BIN)/orchardist run examples/mnist.toml --workers 2 --store ./orchard
	@$(BIN)/orchardist front mnist-lenet --store ./orchard --plot front.png > /dev/null
	@echo "The front is drawn in front.png."

test: .venv/installed ## every test that takes seconds
	$(BIN)/python -m pytest -m "not slow"

slow: .venv/installed ## the other tests, which take minutes
	$(BIN)/python -m pytest -m slow

check: .venv/installed ## lint, format, types, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict orchestrator search
	$(BIN)/python -m pytest -q tests/test_layering.py

bench: .venv/installed ## the figures beside Ray Tune and Optuna, as one Markdown table (about ten minutes)
	@$(BIN)/python -m tests.benchmarks

chaos: .venv/installed ## everything is killed, torn, filled up or told the wrong time, as a Markdown table (about ten minutes)
	@$(BIN)/python -m tests.chaos

fuzz: .venv/installed ## 10,000 damaged study files and 1,000 damaged stores (about five minutes)
	$(BIN)/python -m pytest -m slow tests/orchestrator/test_spec_fuzz.py tests/orchestrator/store/test_fuzz.py

figures: .venv/installed ## what papers on lottery tickets found, measured here, as Markdown tables (about an hour)
	@$(BIN)/python -m tests.figures

wheel: .venv/installed ## a wheel in dist/
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

clean: ## remove what the targets left, but keep .venv and the stores
	rm -rf dist build front.png .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find orchestrator search tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
