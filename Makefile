# `make demo` and `make test` set everything up themselves; they need Python 3.11 or newer, pip and make.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-versions lint format setup clean
.DELETE_ON_ERROR:

demo: setup ## train two small models on this machine's own documentation, compare them, sample from the better one
	$(BIN)/prime-v2 demo

# One process a core, a test file never split over two of them (its fixtures are made once); tests/conftest.py
# gives each process its share of the threads.
SUITE := --numprocesses logical --maxprocesses 8 --dist loadfile

test: setup ## every test
	$(BIN)/python -m pytest $(SUITE) $(PYTEST_ARGS)

# VERSIONS_ARGS=--quick is what CI runs.
test-versions: setup ## every test with the lowest and with the newest dependencies, and the record of it
	$(BIN)/python benchmarks/versions.py $(VERSIONS_ARGS) -- $(SUITE) $(PYTEST_ARGS)

lint: setup .typings ## style, format, types, and that the bounds and pins are the ones tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --package prime_v2
	$(BIN)/python benchmarks/versions.py --check

format: setup ## rewrite the files as `lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(INSTALLED)

# A new file in a package folder needs no new installation: the editable install maps folders, not files.
$(INSTALLED): setup.cfg pyproject.toml _build.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit(f"prime-v2 needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; name another: make PYTHON=python3.12")'
	@test -x $(BIN)/pip || $(MAKE) --no-print-directory $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

# Some systems ship Python without ensurepip, which `venv` takes pip from; then the system's pip installs one.
.PHONY: $(VENV)
$(VENV):
	if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv --clear $@; \
	else $(PYTHON) -m venv --clear --without-pip $@ && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; fi

# mypy cannot follow the editable install; these links show it the tree that an installed package has.
ROOMS := output tokenization hub_card data eval training studies commands
.PHONY: .typings
.typings:
	@rm -rf $@ && mkdir -p $@/prime_v2
	@cd $@/prime_v2 && ln -s ../../modeling_prime_v2/* $(addprefix ../../,$(ROOMS)) .

clean: ## all that make, the build and the tools wrote; runs/ stays
	rm -rf $(VENV) .venv-lowest .venv-newest .typings build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
