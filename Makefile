# The commands of this project; CI calls exactly these. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SRC := vaetrain tools tests

.PHONY: help setup demo test check format bench requirements clean

help:
	@echo "make setup         .venv with every pinned, hash-checked dependency"
	@echo "make demo          draw 3,000 animal faces, train a VAE on them, sample and score it (CPU, minutes)"
	@echo "make test          all tests"
	@echo "make check         lint, format and types"
	@echo "make format        rewrite the code in the house format"
	@echo "make bench         the benchmarks that run on this machine"
	@echo "make requirements  renew the pinned requirements (see CONTRIBUTING.md)"

setup: $(STAMP)

$(STAMP): requirements/uv.txt requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "vaetrain needs Python 3.11 or newer; name one, for example: make PYTHON=python3.11 setup"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $(STAMP)

requirements: pyproject.toml
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
	  --custom-compile-command "make requirements" pyproject.toml --group dev --extra tensorboard -o requirements/dev.txt
	grep '^uv==' requirements/dev.txt | sed 's/ .*//' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --custom-compile-command "make requirements" - -o requirements/uv.txt
