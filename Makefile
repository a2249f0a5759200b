# Everything runs in .venv, which the first target that needs it makes. Start with: make help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo check test rehearsal serving soak gpu gpu-dry full-size lint typecheck format bench bench-serving tables
.PHONY: eval quantised accuracy docs mutants test-suite hooks release-check workflows clean distclean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: $(STAMP)  ## Export the bundled tiny model and draw pictures with it into out/demo
	$(BIN)/python -m emag_export.cli.main demo --output out/demo

OUTSIDE := browser or ray or triton
SEPARATE := $(OUTSIDE) or rehearsal
# A file's tests stay together, as they share what is slow to make; files in the order that tests/conftest.py says.
PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder

check: lint  ## Lint and the fast tests: what to run while you work
	$(BIN)/python -m pytest $(PARALLEL) -m "not exports and not slow and not gpu and not ($(SEPARATE))"

test: lint test-suite  ## Lint, then run every test but those of make serving and make rehearsal

test-suite: $(STAMP)  ## The tests of make test, without lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not ($(SEPARATE))"

rehearsal: $(STAMP)  ## What make test leaves out: GPU measurements in small, more engines and replays (20 minutes)
	$(BIN)/python -m pytest -m rehearsal -rs

serving: $(STAMP)  ## What needs Chromium, Ray or Triton beside us (installs the latter two; a quarter of an hour)
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[ray]"
	$(BIN)/python -m pytest -m "$(OUTSIDE)" -rs

soak: $(STAMP)  ## Ten minutes of mixed load, cancellations and engine failures on a server
	$(BIN)/python -m benchmarks.serving.soak

gpu: $(STAMP)  ## What only an NVIDIA GPU can show: its tests, then every engine against PyTorch
	$(BIN)/python -m pytest -m gpu -rs; tests=$$?; \
	$(BIN)/python -m benchmarks.gpu --output benchmarks/results && exit $$tests

gpu-dry: $(STAMP)  ## onnxruntime's CUDA provider without a GPU: nothing is computed (downloads 256 MB once)
	$(BIN)/python -m benchmarks.gpu_dry

full-size: $(STAMP)  ## Export and compile models of full size with random weights (half an hour, 20 GB of memory)
	$(BIN)/python -m benchmarks.full_size

lint: $(STAMP)  ## Formatting, style, types and the import arrows between rooms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

typecheck: $(STAMP)  ## Types alone
	$(BIN)/mypy

format: $(STAMP)  ## Rewrite files as lint wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## Measure speed against its targets, beside CFG and the released algorithm (a quarter of an hour)
	$(BIN)/python -m benchmarks.targets
	$(BIN)/python -m benchmarks.families

bench-serving: $(STAMP)  ## Load three servers in turn: ours, ours one request at a time, diffusers (ten minutes)
	$(BIN)/python -m benchmarks.serving

tables: $(STAMP)  ## Write the tables and drawings of README and docs from the results
	$(BIN)/python -m benchmarks.render
	$(BIN)/python -m benchmarks.figures

docs: $(STAMP)  ## Build the documentation site into out/site; a broken link or an undocumented name fails
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

eval: $(STAMP)  ## What every guidance does to the pictures of the embedded models (half an hour)
	$(BIN)/python -m benchmarks.evidence

quantised: $(STAMP)  ## What quantisation does to guidance and pictures, and what it saves (a quarter of an hour)
	$(BIN)/python -m benchmarks.quantised
	$(BIN)/python -m benchmarks.quantised.tables

mutants: $(STAMP)  ## Change the core in small ways and see whether the tests notice (six minutes on two cores)
	$(BIN)/python -m tests.mutants

accuracy: $(STAMP)  ## Measure how well guided pictures follow their prompts
	$(BIN)/python -m benchmarks.prompt_accuracy

hooks: $(STAMP)  ## Format, lint and check types before every commit (pre-commit)
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/pre-commit install

release-check: $(STAMP)  ## Build what is published and try it in clean environments; TAG=v1.2.3 for a release
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[release]"
	$(BIN)/python -m release.check $(if $(TAG),--tag $(TAG)) $(if $(TRIAL),--trial)

workflows: $(STAMP)  ## Lint the workflows (downloads actionlint from GitHub)
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[actionlint]"
	$(BIN)/actionlint

clean:  ## Remove what runs leave behind, but not .venv
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean  ## Remove .venv too
	rm -rf $(VENV)
