# Two commands do everything: `make demo` and `make test`. Each sets up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/gpu
# of `make gpu`: all, or some of them by name where all take too long in one go
OPERATORS ?=
empty :=
EITHER := $(subst $(empty) $(empty), or ,$(strip $(OPERATORS)))

.PHONY: demo test lint bench gpu clean

demo: $(VENV)/ready
	$(BIN)/memattn demo

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

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

# On a machine with a GPU and its own torch: CUDA tests of everything, then the benchmark.
gpu:
	mkdir -p $(OUT)
	$(PYTHON) setup.py --quiet build_ext --inplace
	PYTHONPATH=.:kernels timeout 240 $(PYTHON) -m pytest -q -p no:cacheprovider \
		-m "gpu or operator" $(if $(EITHER),-k "$(EITHER)") --junit-xml=$(OUT)/tests.xml > $(OUT)/tests.txt 2>&1; \
		status=$$?; tail -n 40 $(OUT)/tests.txt; exit $$status
	PYTHONPATH=.:kernels timeout 280 $(PYTHON) -m memattn.bench $(OPERATORS) --suite gpu-bars \
		--out $(OUT)/bench

clean:
	rm -rf $(VENV) build dist runs *.egg-info memattn/_C*.so
