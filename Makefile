# make demo and make test do all their own set-up in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   ?= demo
CORES  := $(shell nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS ?= $(CORES)

.PHONY: setup demo test test-all check bench ui clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt nfnet/kernels/native.c
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "normfree needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The whole promise on embedded data: shards, pretraining, transfer, scorecard, MLflow.
demo: setup
	$(BIN)/normfree data prepare glyphs --out $(DEMO)/data/glyphs
	$(BIN)/normfree data prepare digits --out $(DEMO)/data/digits
	$(BIN)/normfree pretrain nfnet_tiny_glyphs --data.url $(DEMO)/data/glyphs --out $(DEMO)/pretrain \
		--tracking-uri sqlite:///$(abspath $(DEMO))/mlflow.db
	$(BIN)/normfree transfer $(DEMO)/pretrain --suite demo --data-root $(DEMO)/data --out $(DEMO)/transfer \
		--tracking-uri sqlite:///$(abspath $(DEMO))/mlflow.db
	$(BIN)/normfree report $(DEMO)/transfer --out $(DEMO)/report
	@echo "next: open $(DEMO)/report/scorecard.html, or: make ui"

ui: setup
	$(BIN)/normfree ui --tracking-uri sqlite:///$(abspath $(DEMO))/mlflow.db

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(CORES) --dist loadfile -m "not slow and not gpu"

test-all: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(CORES) --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
