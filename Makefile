# Every target sets itself up in .venv first. Nothing is needed before but Python 3.11 to 3.13 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More than one thread on a contended CPU can be many times slower; the models here are tiny.
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MKL_NUM_THREADS=1

BASE ?= HEAD

.PHONY: help setup quickstart words scenes bench-methods bench-speed test test-method test-slow test-lowest test-wheel check-release dist notebooks gauge lint format docs docs-site clean

help:
	@echo "make quickstart   train a 4-step generator on the embedded pipeline, with a before/after table"
	@echo "make words        teach a model that writes words to be read by an OCR engine, with a before/after table"
	@echo "make scenes       teach a model to draw what a caption asks, by GenEval's rules, with a before/after table"
	@echo "make bench-methods  every preset on both embedded tasks, into docs/benchmarks.md (an hour and a half on two cores)"
	@echo "make bench-speed  an iteration over the evaluations that it asks for, methods against each other (15 minutes)"
	@echo "make test         the tests (under 8 minutes on two cores)"
	@echo "make test-method  those of the mathematics alone (under a minute)"
	@echo "make test-slow    the slow ones"
	@echo "make test-lowest  the tests of method, families and training with the lowest releases that setup.cfg allows (gigabytes)"
	@echo "make test-wheel   wheel and sdist in new environments: quickstart, train, evaluate, sample, serve-reward (gigabytes)"
	@echo "make dist         wheel and sdist into dist/, checked as PyPI would; make test-wheel DIST=dist tries these"
	@echo "make check-release TAG=v0.1.0  whether version, CITATION.cff and CHANGELOG.md are the tag's"
	@echo "make notebooks    run the notebooks anew and keep what they show (a few minutes)"
	@echo "make gauge BASE=COMMIT  whether this tree computes what that commit does, to the bit (3 minutes)"
	@echo "make lint         ruff, and mypy: the mathematics strictly, signatures everywhere"
	@echo "make format       repair what ruff can"
	@echo "make docs         write docs/configuration.md anew"
	@echo "make docs-site    the documentation as a site, in build/site; any broken link or name is an error"
	@echo "make clean        remove .venv and runs"

setup: $(VENV)/.installed

# uv installs in seconds what pip takes minutes for; where it can't be had, pip does. uv compiles nothing unless told to,
# and where Python may write no bytecode (PYTHONDONTWRITEBYTECODE) each process would compile the libraries for 12 s.
$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, {v[0]}.{v[1]} found; use make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv || true
	if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[dev]' || $(BIN)/python -m pip install --quiet -e '.[dev]'; \
	else $(BIN)/python -m pip install --quiet -e '.[dev]'; fi
	touch $@

quickstart: setup
	$(ONE_THREAD) $(BIN)/python examples/digits/quickstart.py

words: setup
	$(ONE_THREAD) $(BIN)/python examples/words_ocr.py

scenes: setup
	$(ONE_THREAD) $(BIN)/python examples/scenes_geneval.py

bench-methods: setup
	$(ONE_THREAD) $(BIN)/python examples/benchmarks/methods.py

bench-speed: setup
	$(ONE_THREAD) $(BIN)/python examples/benchmarks/speed.py

test: setup
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-method: setup
	$(ONE_THREAD) $(BIN)/python -m pytest tests/method

test-slow: setup
	$(ONE_THREAD) $(BIN)/python -m pytest -m slow -n 0

# For a machine that may ask the package index; PIP_CONSTRAINT and UV_CONSTRAINT say which releases.
test-wheel: setup
	$(BIN)/python tests/wheel/run.py $(if $(DIST),--dist $(DIST))

# The lowest release of each requirement of setup.cfg, and the highest of what these require. Needs uv, which resolves so.
LOWEST := runs/lowest
test-lowest: setup
	mkdir -p runs && rm -rf $(LOWEST)
	$(BIN)/uv venv --quiet --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --python $(BIN)/python --extra dev setup.cfg -o $(LOWEST)/requirements.txt
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python -r $(LOWEST)/requirements.txt
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --no-deps -e .
	$(ONE_THREAD) $(LOWEST)/bin/python -m pytest tests/method tests/pipelines/test_families.py tests/training

$(VENV)/.release: $(VENV)/.installed
	if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[release]' || $(BIN)/python -m pip install --quiet -e '.[release]'; \
	else $(BIN)/python -m pip install --quiet -e '.[release]'; fi
	touch $@

dist: $(VENV)/.release
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

# Needs nothing installed.
check-release:
	$(PYTHON) .ci/check_release.py '$(TAG)'

notebooks: setup
	$(ONE_THREAD) $(BIN)/python tests/notebooks.py

# Another commit beside this tree: the same small runs in both, compared. GAUGE_REMOVED names settings that only one has.
gauge: setup
	rm -rf runs/gauge && mkdir -p runs/gauge
	git archive --prefix=base/ $(BASE) | tar -x -C runs/gauge
	PYTHONPATH=runs/gauge/base:runs/gauge/base/tests $(ONE_THREAD) $(BIN)/python tests/gauge/bit_equal.py write runs/gauge/base.pt
	PYTHONPATH=.:tests $(ONE_THREAD) $(BIN)/python tests/gauge/bit_equal.py write runs/gauge/here.pt
	$(BIN)/python tests/gauge/bit_equal.py compare runs/gauge/base.pt runs/gauge/here.pt $(GAUGE_REMOVED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_learning.py

$(VENV)/.docs: $(VENV)/.installed
	if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[docs]' || $(BIN)/python -m pip install --quiet -e '.[docs]'; \
	else $(BIN)/python -m pip install --quiet -e '.[docs]'; fi
	touch $@

docs-site: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) runs logs build dist *.egg-info
