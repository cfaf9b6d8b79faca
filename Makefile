# The commands of this project; CI calls exactly these. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SRC := vaetrain tools tests

FLOOR_BIN := .venv-floor/bin
FLOOR_STAMP := .venv-floor/.installed
FLOOR_TESTS := tests/test_activations.py tests/test_autoencoder.py tests/test_checkpoint.py tests/test_older_versions.py

BENCH_BIN := .venv-bench/bin
BENCH_STAMP := .venv-bench/.installed

# Python keeps what it has compiled, also where the environment says that it should not: every start of a command would
# compile torch's sources anew, which costs three times what its import does.
unexport PYTHONDONTWRITEBYTECODE

EXPLORE_BIN := .venv-explore/bin
EXPLORE_STAMP := .venv-explore/.installed

.PHONY: help setup demo test floor explore check format bench bench-data requirements clean

help:
	@echo "make setup         .venv with every pinned, hash-checked dependency"
	@echo "make demo          draw 2,000 animal faces, train a VAE on them, sample and score it (CPU, minutes)"
	@echo "make test          all tests"
	@echo "make floor         tests of model, training and checkpoints with the lowest versions of pyproject.toml (in .venv-floor)"
	@echo "make explore       tests of the page of tools/explore.py, with gradio (in .venv-explore)"
	@echo "make check         lint, format and types"
	@echo "make format        rewrite the code in the house format"
	@echo "make bench         images per second of training on this machine, against bare PyTorch loops"
	@echo "make bench-data    the same of reading and sharding, against bare loops and other libraries (in .venv-bench)"
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

PIN := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
  --custom-compile-command "make requirements"
EXTRAS := --extra tensorboard --extra fast --extra parquet --extra hub --extra onnx --extra archives --extra photos

requirements: pyproject.toml
	$(PIN) --upgrade pyproject.toml --group dev $(EXTRAS) -o requirements/dev.txt
	$(PIN) --upgrade pyproject.toml --group dev --group bench $(EXTRAS) -o requirements/bench.txt
	$(PIN) --upgrade pyproject.toml --group dev --extra explore --extra fast -o requirements/explore.txt
	$(PIN) --upgrade pyproject.toml --group floor --resolution lowest-direct -o requirements/floor.txt
	grep '^uv==' requirements/dev.txt | sed 's/ .*//' | $(PIN) - -o requirements/uv.txt

# The demo's run directory keeps everything; running `make demo` again goes on where it stopped, or finds all done.
# On a CPU accelerate launch would use a single thread, had OMP_NUM_THREADS no value.
demo: export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
demo: setup
	$(BIN)/python tools/make_shards.py faces datasets/faces64 --size 64 --num-images 2000 --val-count 10%
	$(BIN)/accelerate launch --config_file launch/gpu1.yaml vaetrain/train.py --config configs/demo.yaml
	$(BIN)/accelerate launch --config_file launch/gpu1.yaml vaetrain/evaluate.py --run runs/demo \
	  --likelihood.num-images 16 --likelihood.num-samples 100 --priors standard gaussian gmm --fit.gmm-components 10
	test -e runs/demo/samples/manifest.json || \
	  $(BIN)/accelerate launch --config_file launch/gpu1.yaml vaetrain/sample.py --run runs/demo --num-images 200 --out runs/demo/samples
	test -e runs/demo/export/config.json || $(BIN)/python tools/export.py runs/demo runs/demo/export
	$(BIN)/python tools/report.py runs/demo
	@echo "Pictures: $(foreach name,reconstructions samples interpolations priors nearest losses kl,runs/demo/figures/$(name).png)"
	@echo "All of it, in a browser: runs/demo/report.html"

test: setup
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# Without the type checks of `make test`, whose plugin of then came too late, and the tests that train for long.
floor: $(FLOOR_STAMP)
	$(FLOOR_BIN)/pytest --override-ini addopts= --quiet --disable-warnings $(FLOOR_TESTS) -k "not learned_by_heart"

$(FLOOR_STAMP): $(STAMP) requirements/floor.txt
	test -x $(FLOOR_BIN)/python || $(BIN)/python -m venv --without-pip .venv-floor
	$(BIN)/uv pip sync --quiet --python $(FLOOR_BIN)/python --require-hashes requirements/floor.txt
	$(BIN)/uv pip install --quiet --python $(FLOOR_BIN)/python --no-deps --no-build-isolation -e .
	@touch $(FLOOR_STAMP)

# gradio wants an older Pillow than the other tests have.
explore: $(EXPLORE_STAMP)
	$(EXPLORE_BIN)/pytest tests/test_explorer.py tests/test_explore_page.py

$(EXPLORE_STAMP): $(STAMP) requirements/explore.txt
	test -x $(EXPLORE_BIN)/python || $(BIN)/python -m venv --without-pip .venv-explore
	$(BIN)/uv pip sync --quiet --python $(EXPLORE_BIN)/python --require-hashes requirements/explore.txt
	$(BIN)/uv pip install --quiet --python $(EXPLORE_BIN)/python --no-deps --no-build-isolation -e .
	@touch $(EXPLORE_STAMP)

check: setup
	$(BIN)/ruff check $(SRC)
	$(BIN)/ruff format --check $(SRC)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix $(SRC)
	$(BIN)/ruff format $(SRC)

bench: setup
	$(BIN)/python tools/bench_train.py

bench-data: $(BENCH_STAMP)
	$(BENCH_BIN)/python tools/bench_data.py

$(BENCH_STAMP): $(STAMP) requirements/bench.txt
	test -x $(BENCH_BIN)/python || $(BIN)/python -m venv --without-pip .venv-bench
	$(BIN)/uv pip sync --quiet --python $(BENCH_BIN)/python --require-hashes requirements/bench.txt
	$(BIN)/uv pip install --quiet --python $(BENCH_BIN)/python --no-deps --no-build-isolation -e .
	@touch $(BENCH_STAMP)

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache
