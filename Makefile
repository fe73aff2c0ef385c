# make quickstart: the whole pipeline on this machine. make test, test-reference and test-beam: what CI runs.
PYTHON ?= python3
# One environment per Python version: `make test PYTHON=python3.13` does not touch the default one.
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin

.PHONY: quickstart test test-reference test-beam test-tpu lint clean

quickstart: $(VENV)/quickstart
	$(BIN)/embed pipeline --config=configs/quickstart.py --workdir=runs/quickstart

# Two worker processes, each with one thread pool. All tests of a file run in the same process.
test: $(VENV)/installed
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore=tests/peers --ignore=tests/tpu --ignore=tests/beam tests

# Compares results with PyTorch, transformers, sentence-transformers, onnxruntime and what docs/integrations/ names.
test-reference: $(VENV)/installed-reference
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/peers

# Prepares data on Apache Beam, in an environment of its own, because Beam holds back protobuf.
test-beam: $(VENV)-beam/installed
	JAX_PLATFORMS=cpu $(VENV)-beam/bin/python -m pytest -q tests/beam

# Compiles every stage for TPUs, without a TPU, in half an hour. It has its own environment, because libtpu makes jax
# look for a TPU.
test-tpu: $(VENV)-tpu/installed
	JAX_PLATFORMS=cpu $(VENV)-tpu/bin/python -m pytest -q tests/tpu

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VENV)-beam $(VENV)-tpu

# Without bytecode: pip would take half a minute to compile 12,000 files, and few are imported.
$(VENV)/quickstart: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable '.[data,quickstart]'
	touch $@

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[data,test]'
	touch $@

$(VENV)-beam/installed: setup.py
	$(PYTHON) -m venv $(VENV)-beam
	$(VENV)-beam/bin/pip install --quiet --editable '.[beam,data,hygiene,quickstart]'
	touch $@

$(VENV)-tpu/installed: setup.py
	$(PYTHON) -m venv $(VENV)-tpu
	$(VENV)-tpu/bin/pip install --quiet --editable '.[tpu,test]'
	touch $@

# torch first, at a version that a CPU build (2.13.0+cpu) also satisfies.
$(VENV)/installed-reference: $(VENV)/installed
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[data,test,reference,integrations]'
	touch $@
