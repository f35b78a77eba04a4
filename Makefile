# make demo: set up, train on the embedded digits, show samples.   make test: the tests; make test-all: with runs of the program and slower tests.
# make accelerator: the first command on a machine with a GPU or TPU.
PYTHON ?= python3
# make setup EXTRA=cuda (or tpu) installs the accelerator's jax as well.
EXTRA ?=
# A second Python beside the first: make test PYTHON=python3.13 VENV=.venv-3.13
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed$(if $(EXTRA),-$(EXTRA))
comma := ,

.PHONY: setup demo test test-all test-slow faults fresh accelerator tpu parity parity-slow mutants fuzz docs browser lint format reference pictures clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into $(VENV): about a minute, 2.9 GB."
	$(PYTHON) -m venv $(VENV) || { echo "The venv module is needed (on Debian: apt install python3-venv)"; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[train,tfds,ode,arrays,gcs,s3,hub,trackers,test$(if $(EXTRA),$(comma)$(EXTRA))]'
	@touch $(STAMP)

# PyTorch and diffusers, cosmic-ray, or Sphinx, into the same environment.
$(VENV)/installed-parity $(VENV)/installed-mutants $(VENV)/installed-docs: $(VENV)/installed-%: $(STAMP)
	$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@

demo: setup
	$(BIN)/python main.py --config=configs/digits.py --workdir=runs/digits
	$(BIN)/python main.py --workdir=runs/digits --mode=sample
	$(BIN)/python main.py --workdir=runs/digits --mode=evaluate --config.evaluation.likelihood=False --config.evaluation.num_samples=100
	@echo "These metrics of 100 samples show that all modes work. They are too uncertain to compare models. For 1,000 samples:"
	@echo "    $(BIN)/python main.py --workdir=runs/digits --mode=evaluate"

# Compiling takes longer than computing here, so XLA optimizes little; JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= make test tests
# the programs that users run, as .ci/run does on a second Python, and .github/workflows/ci.yml with test-all.
test test-all mutants: export JAX_DISABLE_MOST_OPTIMIZATIONS ?= 1
test test-all mutants: export XLA_FLAGS ?= --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
test: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# With runs of the program, several processes, and the slower tests of the library.
test-all: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not parity and not faults and not browser and not tpu"

test-slow: setup
	$(BIN)/python -m pytest -q -m "slow and not parity and not faults"

# Fifty SIGKILLs and what else can go wrong: 15 minutes on two cores.
faults: setup
	$(BIN)/python -m pytest -q -s -m faults

# requirements.txt in a new environment, which prepares a small data set and trains on it: the README's first command.
fresh:
	$(PYTHON) tests/fresh_installation.py

# Compares the devices of this machine with its CPU, checks resuming and splitting over devices, and times a step, in at most
# ten minutes: make accelerator EXTRA=cuda (or tpu).
accelerator: setup
	$(BIN)/python benchmarks/first_contact.py

# Compiles small programs for four TPUs with libtpu, which needs no TPU: four minutes, in an environment with libtpu.
tpu:
	$(MAKE) setup EXTRA=tpu VENV=$(VENV)-tpu
	JAX_PLATFORMS=cpu $(VENV)-tpu/bin/python -m pytest -q -s -m tpu

parity: setup $(VENV)/installed-parity
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "parity and not slow"

# The published networks at full width: gigabytes of memory.
parity-slow: setup $(VENV)/installed-parity
	$(BIN)/python -m pytest -q -m "parity and slow"

# How many single-line mutants of the package the tests notice, into docs/results/reliability.md: an hour or two; a relaunch
# goes on. make mutants MUTANTS="--core=5 --elsewhere=5" draws fewer.
MUTANTS ?=
mutants: setup $(VENV)/installed-mutants
	$(BIN)/python benchmarks/mutants.py $(MUTANTS)

# Changes one byte or key in 2,000 copies of a run, and bytes and operations in 2,000 pickles, and checks what the program does,
# into docs/results/reliability.md: 40 minutes.
# make fuzz FUZZ="--count=100" runs fewer.
FUZZ ?=
fuzz: setup
	$(BIN)/python benchmarks/fuzz.py $(FUZZ)
	$(BIN)/python benchmarks/fuzz_pickles.py $(FUZZ)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation site, with its notebooks executed, into docs/_build/html; warnings are errors.
docs: setup $(VENV)/installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html
	$(BIN)/python docs/check_site.py

# Opens every page of the site, and reports of runs, in Chromium, as wide as a phone and as a desktop; screenshots into
# docs/_build/screenshots.
browser: docs
	$(BIN)/python -m pytest -q -n 0 -m browser tests/documents/test_browser.py tests/report/test_report_in_browser.py

# Writes docs/reference/configuration.md and command_line.md, completely or not at all.
reference: setup
	$(BIN)/python docs/write_reference.py

# Lists the pictures of the documents that are older than the code that draws them, with their commands.
pictures: setup
	$(BIN)/python docs/check_pictures.py

# Leaves runs/ alone: those are results.
clean:
	rm -rf $(VENV)
