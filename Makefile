# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CUDA builds of torch bring their own; elsewhere its interpreter runs the GPU's kernels in the tests. Newest tested.
TRITON := triton==3.6.0
# The oldest and the newest transformers that its integration is tested with.
TRANSFORMERS := 5.17.0 5.23.0

.PHONY: demo test test-all test-transformers lint bench clean

demo: $(VENV)/ready
	$(BIN)/flash-inference demo

test: $(VENV)/ready-dev
	$(BIN)/python -m pytest -m "not slow and not gpu" -n auto

test-all: $(VENV)/ready-dev
	$(BIN)/python -m pytest -m "not gpu" --slow -n auto

test-transformers: $(TRANSFORMERS:%=.transformers-%/ready)
	set -e; for version in $(TRANSFORMERS); do .transformers-$$version/bin/python -m pytest tests/test_transformers.py -n auto; done

# A thin environment of its own for each version: it sees the packages of $(VENV), so that torch is there once.
.transformers-%/ready: $(VENV)/ready-dev
	$(BIN)/python -m venv .transformers-$*
	.transformers-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > .transformers-$*/site
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > "$$(cat .transformers-$*/site)/shared.pth"
	.transformers-$*/bin/python -m pip install --quiet --disable-pip-version-check transformers==$*
	touch $@

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(VENV)/ready-dev
	$(BIN)/flash-inference bench

# torch comes first and alone: its tested version is a CPU build where one is configured, while an unpinned
# resolution may bring several gigabytes of CUDA libraries.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; run: make PYTHON=python3.11 demo")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check $(TRITON) || true
	touch $@

clean:
	rm -rf $(VENV) .transformers-* build dist *.egg-info src/*.egg-info
