# Each verb sets up what it needs; `make` alone lists them.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
STAMP := $(VENV)/.installed
DEMO := runs/demo
SANITIZED := build/sanitized
# Build requirements are pinned too: older pips read the first variable for them, newer the second.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
INSTALL := -m pip install --quiet --disable-pip-version-check
EXTRAS := dev,gguf,hf,serve
NATIVE := $(wildcard native/*.cpp native/*.h native/*.inc)
# A process for each core, of one thread each.
WORKERS ?= auto
SUITE := OMP_NUM_THREADS=1
SUITE_ARGS := -m "not gpu" -n $(WORKERS) --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help

help: ## list these verbs
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

# The CPU build of torch is enough for everything here but `make gpu`.
# The native kernels are built by the install; without a C++ compiler it succeeds without them.
$(STAMP): pyproject.toml constraints.txt $(wildcard native/*)
	@echo "setting up $(VENV) (a minute or two the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PINNED) $(BIN)/python $(INSTALL) -e '.[$(EXTRAS)]'
	@touch $(STAMP)

install: $(STAMP) ## create .venv with everything

demo: $(STAMP) ## train a mixture and its dense twin, look inside, talk to it (10 minutes)
	@rm -rf $(DEMO)
	@$(BIN)/moestro compare --minutes 6 --out $(DEMO)
	@$(BIN)/moestro probe $(DEMO)/moe --out $(DEMO)/probe
	@echo; echo "A sample of the mixture, each token coloured by its first expert:"
	@$(BIN)/moestro generate $(DEMO)/moe "def " --max-tokens 300 --temperature 0.7 --seed 1 --show-experts
	@echo; echo "Figures: $(DEMO)/compare.png and $(DEMO)/probe/*.png"
	@echo "Try: $(BIN)/moestro generate $(DEMO)/moe \"What is \" --max-tokens 200"

test: $(STAMP) ## the whole test suite
	@$(SUITE) $(BIN)/python -m pytest $(SUITE_ARGS)

test-latest: ## the suite with the newest release of everything, in .venv-latest
	@$(PYTHON) -m venv --clear .venv-latest
	@.venv-latest/bin/python $(INSTALL) -e '.[$(EXTRAS)]'
	@.venv-latest/bin/python tests/probe/foreign_zoo.py
	@$(SUITE) .venv-latest/bin/python -m pytest $(SUITE_ARGS)

test-lowest: ## the suite with the oldest releases that pyproject.toml allows, in .venv-lowest
	@$(PYTHON) -m venv --clear .venv-lowest
	@$(PYTHON) tests/lowest.py > .venv-lowest/constraints.txt
	@.venv-lowest/bin/python $(INSTALL) -c .venv-lowest/constraints.txt -e '.[$(EXTRAS)]'
	@$(SUITE) .venv-lowest/bin/python -m pytest $(SUITE_ARGS)

update: ## pin the newest release of everything but torch in constraints.txt
	@$(PYTHON) -m venv --clear .venv-update
	@grep '^torch==' constraints.txt > .venv-update/torch.txt
	@.venv-update/bin/python $(INSTALL) -c .venv-update/torch.txt '.[$(EXTRAS),tensorboard]' \
	  scikit-build-core cmake ninja
	@(echo "# What every install here uses; \`make update\` writes it, but for the version of torch."; \
	  .venv-update/bin/python -m pip freeze --exclude moestro | sed 's/+cpu$$//') > .venv-update/new.txt
	@mv .venv-update/new.txt constraints.txt && rm -rf .venv-update

check-native: $(STAMP) ## the native kernels' tests under the address and undefined sanitizers
	@cmake -S native -B $(SANITIZED) -DMOESTRO_SANITIZE=ON > /dev/null
	@cmake --build $(SANITIZED) --parallel 2 > /dev/null
	@env MOESTRO_NATIVE_LIBRARY=$(CURDIR)/$(SANITIZED)/libmoestro.so \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider \
	  tests/kernels/test_packing.py tests/kernels/test_native_*.py tests/checkpoints/test_streamed.py

lint: $(STAMP) ## ruff, and clang-format for native/
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(NATIVE)

types: $(STAMP) ## mypy --strict
	@$(BIN)/mypy

check: lint types test ## what CI runs

format: $(STAMP) ## let ruff and clang-format rewrite
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	@$(BIN)/clang-format -i $(NATIVE)

bench: $(STAMP) ## the CPU benchmarks, tables and benchmarks/results/*.json
	@$(BIN)/python benchmarks/train_step.py
	@$(BIN)/python benchmarks/train_step.py --dtype float32
	@$(BIN)/python benchmarks/layer_scaling.py
	@$(BIN)/python benchmarks/step_memory.py
	@$(BIN)/python benchmarks/load.py
	@$(BIN)/python benchmarks/decode.py
	@$(BIN)/python benchmarks/native.py
	@$(BIN)/python benchmarks/plug.py

bench-quick: $(STAMP) ## decode and prefill of this machine in three minutes
	@$(BIN)/python benchmarks/quick.py

gpu: $(STAMP) ## GPU tests and benchmarks; needs a CUDA build of torch in .venv
	@$(BIN)/python -m pytest -m gpu
	@$(BIN)/python benchmarks/gpu_layer.py

clean: ## remove caches and .venv; runs/ stays
	rm -rf $(VENV) .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/*.egg-info

.PHONY: help install demo test test-latest test-lowest update check-native lint types check format bench bench-quick gpu clean
