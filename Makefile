# Two commands do all the set-up: `make demo` and `make test`. See README.md.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# transformers 4.x beside 5.x: tests load our model folders with both.
TRANSFORMERS4 := $(VENV)/transformers4

.PHONY: demo test check train clean

demo: $(VENV)/.installed
	$(BIN)/python -m dreambooth demo

# make train ARGS="--pretrained-model FOLDER --train FOLDER --model_dir FOLDER"
train: $(VENV)/.installed
	$(BIN)/python transfer_learning.py $(ARGS)

test: $(VENV)/.installed-dev $(TRANSFORMERS4)/.installed
	OMP_NUM_THREADS=1 DREAMBOOTH_TRANSFORMERS4=$(CURDIR)/$(TRANSFORMERS4) $(BIN)/python -m pytest -n auto --dist worksteal

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is older (set PYTHON=...)." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "Python's venv is missing: sudo apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(TRANSFORMERS4)/.installed: requirements-transformers4.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target $(TRANSFORMERS4) -r requirements-transformers4.txt
	touch $@
