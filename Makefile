# make demo                 sets everything up, once, and makes a picture
# make demo PROMPT="..."    ... of whatever you like
# make serve                sets everything up, once, and serves a page at http://127.0.0.1:7860
# make serve SERVE="--port 8000 --model some/folder"
# make test                 what each change must pass: lint, then the tests, a process for each core; minutes
# make lint                 ruff's rules and its format, and mypy; seconds
# make test-full            all tests that this machine can run; longer
# make test-isa             the tests of what is fast, as on other processors: AVX2, an old one, no C++ compiler
# make test-isa ISA_TESTS=tests     the whole suite so; or some of its files
# make mutants              do the tests notice faults? runs those of tests/faults.py; longer still
# make mutants MUTANTS="--only samplers --jobs 4"
# make docs                 the documentation as a site with search and an API reference: build/docs/html/index.html
# make notebooks            docs/notebooks/, a notebook for each page of docs/ with Python in it
# make torture              mutated files, kills, many clients: an hour, then what was lost, doubled, went wrong
# make torture TORTURE="--minutes 5 --seed 0"
# No environment needs to be activated: everything runs in .venv, which is made here.

PROMPT ?= a red apple on a yellow background
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
export PROMPT

.PHONY: demo serve lint test test-full test-isa mutants docs notebooks torture

demo: .venv/installed
	@.venv/bin/plainsd generate "$$PROMPT"

serve: .venv/installed-serve
	@.venv/bin/plainsd serve $(SERVE)

lint: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not full and not gpu" -n auto --dist loadfile

test-full: .venv/installed-test
	.venv/bin/python -m pytest

ISA_TESTS ?= tests/test_kernels.py tests/test_processors.py tests/test_speed.py
ISA := .venv/bin/python -m pytest -m "not full and not gpu" -k "not step_waits" $(ISA_TESTS)
test-isa: .venv/installed-test
	$(ISA)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(ISA)
	ATEN_CPU_CAPABILITY=default $(ISA)
	CXX=no-compiler $(ISA)

mutants: .venv/installed-test
	.venv/bin/python tests/mutants.py $(MUTANTS)

docs: .venv/installed-docs
	.venv/bin/python docs/scripts/website.py

notebooks: .venv/installed-docs
	.venv/bin/python docs/scripts/notebooks.py

torture: .venv/installed-test
	.venv/bin/python tests/torture $(TORTURE)

.venv/installed: pyproject.toml constraints.txt | .venv
	@echo "installing plainsd and what it needs into .venv"
	@$(PIP) --editable . && touch $@

.venv/installed-serve: .venv/installed
	@echo "installing what serving needs into .venv"
	@$(PIP) --editable ".[serve]" && touch $@

.venv/installed-docs: .venv/installed
	@echo "installing what the documentation needs into .venv"
	@$(PIP) --editable ".[docs]" && touch $@

# spandrel without its torchvision, which for PyTorch's CPU build is not on PyPI: the tests stand in for it.
.venv/installed-test: .venv/installed
	@echo "installing what the tests need into .venv"
	@$(PIP) --editable ".[test]" && $(PIP) --no-deps spandrel==0.4.2 einops==0.8.2 && touch $@

# Where Python comes without ensurepip, the pip outside puts one inside.
.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "plainsd needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -m venv .venv 2>/dev/null || \
		{ $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --quiet --python .venv/bin/python install pip; } || \
		{ rm -rf .venv; echo "cannot make .venv; install Python's venv and pip (Debian: apt install python3-venv)" >&2; exit 2; }
