# Two commands do all the set-up: `make demo` and `make test`. See README.md.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Folders of packages that cannot live beside ours, for tests that start a process with one of them:
# transformers 4.x, which must load our model folders too, and the toolkits that must serve them.
APART := transformers4 sagemaker-inference huggingface-toolkit

# Environments of SageMaker's own clients, each with its own packages.
CLIENTS := sdk-v2 sdk-v3 training-toolkit
IMAGE  ?= dreambooth
DOCKER ?= docker
BUILD_ARGS ?=
# `make test-container ONLY="-k fit_deploy"` runs some of them.
ONLY   ?=

.PHONY: demo test test-real-size test-container check train serve image bench clean

demo: $(VENV)/.installed
	$(BIN)/python -m dreambooth demo

# make train ARGS="--pretrained-model FOLDER --train FOLDER --model_dir FOLDER"
train: $(VENV)/.installed
	$(BIN)/python transfer_learning.py $(ARGS)

test: $(VENV)/.installed-dev $(APART:%=$(VENV)/%/.installed)
	OMP_NUM_THREADS=1 \
	  DREAMBOOTH_TRANSFORMERS4=$(CURDIR)/$(VENV)/transformers4 \
	  DREAMBOOTH_SAGEMAKER_INFERENCE=$(CURDIR)/$(VENV)/sagemaker-inference \
	  DREAMBOOTH_HUGGINGFACE_TOOLKIT=$(CURDIR)/$(VENV)/huggingface-toolkit \
	  $(BIN)/python -m pytest -n auto --dist worksteal

# Stable Diffusion 2.1 base with random weights through all commands: minutes, 20 GB of memory.
test-real-size: $(VENV)/.installed-dev
	DREAMBOOTH_REAL_SIZE=1 $(BIN)/python -m pytest -s tests/test_real_size.py

# make serve ARGS="--model FOLDER"
serve: $(VENV)/.installed
	$(BIN)/python -m dreambooth serve $(ARGS)

image:
	DOCKER_BUILDKIT=1 $(DOCKER) build $(BUILD_ARGS) -t $(IMAGE) .

# Builds the image and drives it with docker and with SageMaker's SDKs in local mode.
test-container: image $(VENV)/.installed-dev $(CLIENTS:%=$(VENV)/%/.client)
	DOCKER=$(DOCKER) DREAMBOOTH_IMAGE=$(IMAGE) \
	  DREAMBOOTH_SDK_V2=$(CURDIR)/$(VENV)/sdk-v2/bin/python \
	  DREAMBOOTH_SDK_V3=$(CURDIR)/$(VENV)/sdk-v3/bin/python \
	  DREAMBOOTH_TRAINING_TOOLKIT=$(CURDIR)/$(VENV)/training-toolkit/bin/train \
	  $(BIN)/python -m pytest tests/container $(ONLY)

# The figures of the README: an hour on a quiet machine.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks startup
	$(BIN)/python -m benchmarks train
	$(BIN)/python -m benchmarks probes
	$(BIN)/python -m benchmarks serving
	$(BIN)/python -m benchmarks survive

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

$(VENV)/.installed-dev: requirements/dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements/dev.txt
	touch $@

$(VENV)/%/.installed: requirements/%.txt $(VENV)/.installed
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) -r $<
	touch $@

$(VENV)/%/.client: requirements/%.txt | $(VENV)/bin/python
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -r $<
	touch $@

$(VENV)/huggingface-toolkit/.installed: requirements/sagemaker-inference.txt requirements/transformers4.txt
