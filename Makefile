# make demo | test | test-slow | lint | clean. See README.md.
PYTHON ?= python3
VENV   ?= .venv
# What pip is given for torch. Without an NVIDIA GPU: a release that package mirrors serve as a CPU build; where yours
# does not, say   make setup TORCH='torch --index-url https://download.pytorch.org/whl/cpu'
TORCH  ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch>=2.9,torch==2.13.0)
BIN    := $(VENV)/bin
# Sized for five minutes on two cores; eight where they have AVX2 only.
DEMO   ?= --image-size 48 --resnet.epochs 4 --resnet.min-steps 0 --pairs 1600 --warm-up 200 --recon-warm-up 200 --lr 1e-3 --ema 0.98 --splits test --evaluated 40 --draws 2

.PHONY: setup demo test test-slow lint format clean
setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '$(firstword $(TORCH))' $(wordlist 2,9,$(TORCH))
	$(BIN)/pip install --quiet --editable '.[pipelines,dev]'
	touch $@

demo: setup
	$(BIN)/python pipelines/full.py --dataset synthetic --preset quick $(DEMO)

test: setup  # two files at once, in their order: most tests wait for programs to start, and the last file is a short one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
