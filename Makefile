# make demo   trains a private network on digits, from nothing but Python 3.11
# make test   sets up and runs the tests on both backends; test-changed those of what differs from
#             main, test-all also the slow ones, test-slow PART=n a part of these
# make docs   builds the documentation site into build/site, and fails at a broken link
# make bench  times private steps beside plain ones, and beside other libraries; build/speed.md

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test test-all test-changed test-slow bench docs lint clean

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(RUN) -m experiments.digits

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# What no backend changes is tested once: the accountants, examples of docstrings, and more.
test: lint
	KERAS_BACKEND=tensorflow $(RUN) -m pytest -n 2 -q
	KERAS_BACKEND=jax $(RUN) -m pytest -n 2 -q tests/lipdp

# The tests of what differs from main, on one backend: make test-changed KERAS_BACKEND=jax
test-changed: $(VENV)/.installed
	tests=$$($(RUN) -m tests.changed) && if [ -n "$$tests" ]; then $(RUN) -m pytest -q $$tests; fi

# The whole catalogue.
test-all: $(VENV)/.installed
	KERAS_BACKEND=tensorflow $(RUN) -m pytest -n 2 -q -m "slow or not slow"

# make test-slow PART=16 runs one slow test in 16: others for each commit, all of them in 16 commits.
OFFSET ?= $(shell git rev-list --count HEAD 2>/dev/null || echo 0)
test-slow: $(VENV)/.installed
	KERAS_BACKEND=tensorflow $(RUN) -m pytest -n 2 -q -m slow --slow-part=$(or $(PART),1) --slow-offset=$(OFFSET)

bench: $(VENV)/.installed
	$(RUN) -m experiments.speed --against=all

$(VENV)/.docs: $(VENV)/.installed
	$(RUN) -m pip install --quiet --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build *.egg-info
