# Every target sets up .venv first if it has to. `make help` lists them.
PY := .venv/bin/python
STAMP := .venv/.setup-done
DEMO := --config=configs/demo.py --workdir=runs/demo
# Large buffers in huge pages: a training step on CPU takes a third less time (docs/training.md).
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
set_up = @python=$$(scripts/find_python.sh) && "$$python" scripts/make_venv.py

.PHONY: help setup tpu demo test test-slow test-all test-lowest bench lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## make .venv and install everything into it

# The second rule is for a .venv whose Python has gone: its stamp alone would look up to date.
$(STAMP): setup.cfg pyproject.toml | $(PY)
	$(set_up)

$(PY):
	$(set_up)

# Large, so not part of setup: the tests that need it say so when it is absent.
tpu: setup  ## add the TPU compiler, which compiles the kernels for chips that are not here
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[tpu]'

demo: setup  ## train a small model, then measure it from 16K to 1M tokens of memory
	$(PY) train.py $(DEMO)
	$(PY) eval.py $(DEMO) --memory_tokens=16384,65536,262144,1048576

PYTEST := $(PY) -m pytest -n 2 --dist worksteal -q

test: lint  ## ruff and mypy, then every test that is not marked slow: about 8 minutes on two cores
	$(PYTEST)

test-slow: setup  ## the tests marked slow alone: whole matrices, whole trainings
	$(PYTEST) -m slow

test-all: lint  ## ruff and mypy, then every test there is
	$(PYTEST) -m "slow or not slow"

bench: setup  ## time the routing
	$(PY) -m benchmarks.routing

lint: setup  ## ruff, and mypy over the public names
	$(PY) -m ruff check
	$(PY) -m mypy

test-lowest:  ## the tests with the lowest versions that setup.cfg allows; TESTS="tests/data" runs some of them
	@python=$$(scripts/find_python.sh) && "$$python" scripts/lowest.py .venv-lowest
	.venv-lowest/bin/python -m pytest -n 2 --dist worksteal -q $(TESTS)

clean:  ## remove caches and build leftovers; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
