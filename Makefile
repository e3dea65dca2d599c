# `make demo`, `make test`, `make quality`, `make matrix`, `make build`. Each sets up `.venv` first, if it is not there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Tests and examples make their own models and data; nothing may wait for a network.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help install test quality matrix build format demo learning report cost operations architectures embedded clean

help:
	@echo "make demo      train, resume, evaluate, merge and reload a residual prompt (3 minutes, no network)"
	@echo "make test      run all tests; PYTEST_ARGS=--full with every repetition"
	@echo "make quality   ruff, import-linter and mypy"
	@echo "make matrix    run the core tests with other versions of PEFT's world (an hour; MATRIX_ARGS='-s oldest' for one)"
	@echo "make build     make wheel and source distribution in build/dist, and check them"
	@echo "make format    let ruff rewrite what it can"
	@echo "make learning  compare methods, write docs/learning.md and the README's table (an hour on 2 CPU cores)"
	@echo "make report    write docs/learning.md and the table from docs/learning.json"
	@echo "make cost      measure times and memory, write docs/cost.md (half an hour on an idle CPU)"
	@echo "make operations count operations and kept memory, write docs/operations.md (5 minutes)"
	@echo "make architectures check every architecture, write docs/architectures.md (ten minutes)"
	@echo "make embedded  pretrain the embedded model into build/embedded (15 minutes)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

test: $(INSTALLED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

quality: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

matrix: $(INSTALLED)
	$(BIN)/nox $(MATRIX_ARGS)

build: $(INSTALLED)
	rm -rf build/dist build/lib
	$(BIN)/python -m build --outdir build/dist
	$(BIN)/twine check --strict build/dist/*
	$(BIN)/check-wheel-contents build/dist/*.whl

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(INSTALLED)
	$(OFFLINE) $(BIN)/python examples/demo.py --output_dir build/demo --overwrite $(DEMO_ARGS)

learning: $(INSTALLED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -W ignore examples/benchmarks/learning.py --output build/learning
	cp build/learning/learning.json docs/
	$(MAKE) report

report: $(INSTALLED)
	$(BIN)/python examples/benchmarks/learning_report.py docs --include README.md

cost: $(INSTALLED)
	$(OFFLINE) $(BIN)/python -W ignore examples/benchmarks/cost.py $(COST_ARGS)
	cp build/cost/cost*.md build/cost/cost*.png docs/

architectures: $(INSTALLED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/architectures_report.py

operations: $(INSTALLED)
	$(OFFLINE) $(BIN)/python -W ignore examples/benchmarks/operations.py
	cp build/cost/operations.md build/cost/operations.png docs/

embedded: $(INSTALLED)
	$(BIN)/python examples/embedded/pretrain.py --output build/embedded

clean:
	rm -rf build $(VENV)
