# Two commands do everything: `make demo` and `make test`. Each sets up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/gpu
PLAN ?=
GPU_SECONDS ?= 480

.PHONY: demo test test-transformers transformers-families lint bench dist gpu gpu-dry clean

demo: $(VENV)/ready
	$(BIN)/memattn demo

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# the tests that transformers has for its own models, for ours; fetched once, into build/; the page
# of results is written where they fail, too
test-transformers: $(VENV)/ready
	$(BIN)/python tests/transformers_suite.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --all-of-transformers \
		--junit-xml=build/transformers.xml tests/test_transformers_suite.py; status=$$?; \
	PYTHONPATH=tests $(BIN)/python tests/transformers_suite.py build/transformers.xml; \
	exit $$status

# every family of transformers under memattn_segmented against eager attention; goes on where it was
transformers-families: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/transformers_families.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# wheel and source distribution in dist/, each installed and tried away from this folder
dist: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --upgrade --target build/dist-tools 'build>=1.2' 'twine>=6'
	PYTHONPATH=$(CURDIR)/build/dist-tools $(BIN)/python scripts/build_dist.py

bench: $(VENV)/ready
	$(BIN)/memattn bench

# torch comes first and alone: its own build decides which Triton belongs to it
$(VENV)/ready: setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	if $(BIN)/python -c "import sys, torch; sys.exit(torch.version.cuda is None)"; \
	then grep -v '^triton==' constraints.txt; else cat constraints.txt; fi > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

# On a machine with a GPU, its own torch, Triton, pytest and pytest-xdist: checks, speed beside
# peers, CUDA tests and tuning within GPU_SECONDS. PLAN names stages and operators, all by default.
gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m memattn.bench.gpu $(PLAN) --seconds $(GPU_SECONDS) --out $(OUT)

# The same on a CPU: kernels interpreted, tiny shapes, nothing timed.
gpu-dry: $(VENV)/ready
	PYTHONPATH=.:kernels $(BIN)/python -m memattn.bench.gpu $(PLAN) --dry --out $(OUT)-dry

clean:
	rm -rf $(VENV) build dist runs *.egg-info memattn/_C*.so
