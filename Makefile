# make demo   trains a private network on digits, from nothing but Python 3.11
# make test   sets up and runs the tests on both backends
# make bench  times a private step beside the plain one

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test test-slow bench lint clean

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

test-slow: $(VENV)/.installed
	KERAS_BACKEND=tensorflow $(RUN) -m pytest -n 2 -q -m slow

bench: $(VENV)/.installed
	$(RUN) -m experiments.speed

clean:
	rm -rf $(VENV) build *.egg-info
