# `make` prints the targets: the sentence behind `##` of each. The README repeats that list.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Folders of packages that cannot live beside ours, for tests that start a process with one of them:
# transformers 4.x, which must load our model folders too, and the toolkits that must serve them.
APART := transformers4 sagemaker-inference huggingface-toolkit

# Environments of SageMaker's own clients, each with its own packages. (That of the notebooks is
# made in the same way.)
CLIENTS := sdk-v2 sdk-v3 training-toolkit
IMAGE  ?= dreambooth
DOCKER ?= docker
BUILD_ARGS ?=
# `make test-container ONLY="-k fit_deploy"` runs some of them.
ONLY   ?=
WRITE  ?=

.PHONY: help demo studio picture test test-studio test-benchmarks test-real-size test-notebooks test-container notebooks check train serve image bench clean

help:
	@sed -n 's/^\([a-z][a-z-]*\):.*## /make \1|/p' Makefile | while IFS='|' read -r command sentence; \
	  do printf '%-22s%s\n' "$$command" "$$sentence"; done

demo: $(VENV)/.installed ## fine-tune the embedded model on eight pictures of a cat, draw a sheet
	$(BIN)/python -m dreambooth demo

studio: $(VENV)/.installed-studio ## open a page on which runs are made and watched (ARGS="--model FOLDER")
	$(BIN)/python -m dreambooth studio $(ARGS)

# The first five rows of the sheet, in 256 colours.
picture: demo ## make the README's picture from that sheet
	$(BIN)/python -c "from PIL import Image; Image.open('out/demo/sheet.png') \
	  .crop((0, 0, 1089, 835)).quantize(256, kmeans=1).save('docs/demo.png', optimize=True)"

notebooks: $(VENV)/.installed $(VENV)/notebooks/.client ## open the notebooks of examples/ in Jupyter (as root: ARGS=--allow-root)
	SAGEMAKER_SUPPRESS_V2_WARNING=1 $(VENV)/notebooks/bin/jupyter lab $(ARGS) \
	  examples/fun_images_of_your_pet.ipynb

train: $(VENV)/.installed ## train with ARGS="--pretrained-model FOLDER --train FOLDER --model_dir FOLDER"
	$(BIN)/python transfer_learning.py $(ARGS)

# Python may write bytecode: a hundred processes then need not compile the package and its tests.
test: $(VENV)/.installed-dev $(APART:%=$(VENV)/%/.installed) ## run the tests
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= \
	  DREAMBOOTH_TRANSFORMERS4=$(CURDIR)/$(VENV)/transformers4 \
	  DREAMBOOTH_SAGEMAKER_INFERENCE=$(CURDIR)/$(VENV)/sagemaker-inference \
	  DREAMBOOTH_HUGGINGFACE_TOOLKIT=$(CURDIR)/$(VENV)/huggingface-toolkit \
	  $(BIN)/python -m pytest -n auto --dist worksteal

check: $(VENV)/.installed-dev ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# `make test` leaves out those of its tests that need NiceGUI, unless `make studio` has installed it.
# The story in a browser needs a Chromium on the path (Debian's package is `chromium`).
test-studio: $(VENV)/.installed-studio-tests ## run the tests of the studio page, in a browser too
	OMP_NUM_THREADS=1 DREAMBOOTH_STUDIO_TESTS=1 $(BIN)/python -m pytest tests/studio $(ONLY)

test-benchmarks: $(VENV)/.installed-dev ## run the tests left out for time: benchmarks, tiny_world's studies
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m on_demand -n auto --dist worksteal

# Stable Diffusion 2.1 base with random weights through all commands.
test-real-size: $(VENV)/.installed-dev ## run the tests at full size: minutes, 20 GB of memory
	DREAMBOOTH_REAL_SIZE=1 $(BIN)/python -m pytest -s tests/test_real_size.py

# `make test-notebooks WRITE=1` writes the outputs of the run into the notebooks.
test-notebooks: $(VENV)/.installed-dev $(VENV)/notebooks/.client ## run the notebooks from top to bottom: minutes
	OMP_NUM_THREADS=1 DREAMBOOTH_WRITE_NOTEBOOKS=$(WRITE) \
	  DREAMBOOTH_NOTEBOOKS=$(CURDIR)/$(VENV)/notebooks/bin/python \
	  $(BIN)/python -m pytest -s tests/examples

serve: $(VENV)/.installed ## serve with ARGS="--model FOLDER"
	$(BIN)/python -m dreambooth serve $(ARGS)

image: ## build the image
	DOCKER_BUILDKIT=1 $(DOCKER) build $(BUILD_ARGS) -t $(IMAGE) .

test-container: image $(VENV)/.installed-dev $(CLIENTS:%=$(VENV)/%/.client) ## build the image, drive it with docker and SageMaker's SDKs
	DOCKER=$(DOCKER) DREAMBOOTH_IMAGE=$(IMAGE) \
	  DREAMBOOTH_SDK_V2=$(CURDIR)/$(VENV)/sdk-v2/bin/python \
	  DREAMBOOTH_SDK_V3=$(CURDIR)/$(VENV)/sdk-v3/bin/python \
	  DREAMBOOTH_TRAINING_TOOLKIT=$(CURDIR)/$(VENV)/training-toolkit/bin/train \
	  $(BIN)/python -m pytest tests/container $(ONLY)

bench: $(VENV)/.installed-dev ## run the benchmarks of docs/measurements.md: an hour
	$(BIN)/python -m benchmarks startup
	$(BIN)/python -m benchmarks train
	$(BIN)/python -m benchmarks probes
	$(BIN)/python -m benchmarks serving
	$(BIN)/python -m benchmarks survive

clean: ## remove .venv, out and the tools' caches
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is older (set PYTHON=...)." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "Python's venv is missing: sudo apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt requirements/clip-vocabulary.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/clip-vocabulary.txt
	touch $@

$(VENV)/.installed-dev: requirements/dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements/dev.txt
	touch $@

$(VENV)/.installed-studio: requirements/studio.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements/studio.txt
	touch $@

$(VENV)/.installed-studio-tests: requirements/studio-tests.txt $(VENV)/.installed-dev $(VENV)/.installed-studio
	$(BIN)/python -m pip install --quiet -r requirements/studio-tests.txt
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
