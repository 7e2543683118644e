# Chores of the project. Everything runs in the active virtual environment, or in .venv, which is made when needed.
#
#   make demo        install what is needed and talk to the demo model
#   make test        install what is needed and run the tests
#   make check       formatting, lint, types
#   make native      rebuild the extension incrementally
#   make stubs       types of the extension's functions, from the extension itself
#   make bench       measure this machine: kernels, decode, prefill
#   make eval-demo   accuracies of the demo model, per task and language
VENV        ?= $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
PYTHON      ?= $(VENV)/bin/python
CONSTRAINTS ?= constraints-cpu.txt
BUILD       ?= build
MODEL       ?= demo
SITE         = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('platlib'))")
CPP          = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h')

.PHONY: dev native stubs check format test demo bench eval-demo

$(VENV)/bin/python:
	python3 -m venv $(VENV)

# One pip call resolves everything, so that the constraint file holds for all of it.
$(VENV)/.moesaic-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PYTHON) -m pip install -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) "scikit-build-core>=0.11" "nanobind>=2.4" cmake ninja
	$(PYTHON) -m pip install -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) --no-build-isolation -e ".[dev]" -Cbuild-dir=$(BUILD)
	@touch $(BUILD)/.editable $@

dev: $(VENV)/.moesaic-dev native

# The editable install is made once; afterwards only what changed is compiled and the one library is replaced.
native:
	@if [ -f $(BUILD)/CMakeCache.txt ] && [ $(BUILD)/.editable -nt pyproject.toml ]; then \
		cmake --build $(BUILD) && cmake --install $(BUILD) --component python --prefix $(SITE) >/dev/null; \
	else \
		$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e . -Cbuild-dir=$(BUILD) && touch $(BUILD)/.editable; \
	fi

stubs: native
	$(PYTHON) -m nanobind.stubgen -q -m moesaic._native -o src/moesaic/_native.pyi

check: dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: dev
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

test: dev
	$(PYTHON) -m pytest -q -n 2 --dist worksteal tests

demo: dev
	$(VENV)/bin/moesaic run $(MODEL)

bench: dev
	$(PYTHON) benchmarks/kernels.py
	$(PYTHON) benchmarks/ops.py
	$(VENV)/bin/moesaic bench decode --synthetic qwen3-30b-a3b --format Q4_K --layers 4
	$(VENV)/bin/moesaic bench prefill --synthetic qwen3-30b-a3b --format Q4_K --layers 4

eval-demo: dev
	$(PYTHON) -m demo.evaluate --model $(MODEL)
