# make demo: set up, train on the embedded digits, show samples.   make test: the whole test suite.
PYTHON ?= python3
# make setup EXTRA=cuda (or tpu) installs the accelerator's jax as well.
EXTRA ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed$(if $(EXTRA),-$(EXTRA))
comma := ,

.PHONY: setup demo test test-slow faults parity parity-slow lint format pictures clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.txt $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into $(VENV): a minute or two, about 2.5 GB."
	$(PYTHON) -m venv $(VENV) || { echo "The venv module is needed (on Debian: apt install python3-venv)"; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[train,ode,test$(if $(EXTRA),$(comma)$(EXTRA))]'
	@touch $(STAMP)

demo: setup
	$(BIN)/python main.py --config=configs/digits.py --workdir=runs/digits
	$(BIN)/python main.py --workdir=runs/digits --mode=sample
	$(BIN)/python main.py --workdir=runs/digits --mode=evaluate --config.evaluation.likelihood=False --config.evaluation.num_samples=100

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -q -m "slow and not parity and not faults"

# Fifty SIGKILLs and what else can go wrong: 15 minutes on two cores.
faults: setup
	$(BIN)/python -m pytest -q -s -m faults

parity: setup
	$(BIN)/pip install --quiet --editable '.[parity]'
	$(BIN)/python -m pytest -q -m "parity and not slow"

# The published networks at full width: gigabytes of memory.
parity-slow: setup
	$(BIN)/pip install --quiet --editable '.[parity]'
	$(BIN)/python -m pytest -q -m "parity and slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The README's pictures, from the demo's run.
pictures: demo
	cp "$$(ls -t runs/digits/samples/step*_trajectory.png | head -1)" docs/images/noise_to_digits.png
	cp "$$(ls -t runs/digits/samples/step*_n100.png | head -1)" docs/images/digits.png

# Leaves runs/ alone: those are results.
clean:
	rm -rf $(VENV)
