# make demo   trains a private network on digits, from nothing but Python 3.11
# make test   sets up and runs the tests on both backends
# make docs   builds the documentation site into build/site, and fails at a broken link
# make bench  times private steps beside plain ones, and beside other libraries; build/speed.md

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test test-slow bench docs lint clean

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

# make test-slow PART=4 runs one in four.
test-slow: $(VENV)/.installed
	KERAS_BACKEND=tensorflow $(RUN) -m pytest -n 2 -q -m slow --slow-part=$(or $(PART),1)

bench: $(VENV)/.installed
	$(RUN) -m experiments.speed --against=all

$(VENV)/.docs: $(VENV)/.installed
	$(RUN) -m pip install --quiet --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build *.egg-info
