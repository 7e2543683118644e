# Chores of the project. Everything runs in the active virtual environment, or in .venv, which is made when needed.
#
#   make demo        install what is needed and talk to the demo model
#   make test        install what is needed and run the tests
#   make check       formatting, lint, types
#   make sanitize    the kernels and the thread pool under the address, undefined and thread sanitizers
#   make aarch64-check   the same programs for 64-bit ARM, cross-compiled and run by qemu-user
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
CPP          = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'tests/*.cpp' 'tests/*.h')

# Dozens of processes of the tests import the same thousands of modules: compiled once, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: dev native stubs check format test demo bench eval-demo sanitize sanitize-address sanitize-thread aarch64-check

$(VENV)/bin/python:
	python3 -m venv $(VENV)

# One pip call resolves everything, so that the constraint file holds for all of it. Nothing is compiled to bytecode
# ahead: of 17,000 files a tenth is ever imported.
$(VENV)/.moesaic-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PYTHON) -m pip install -q --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) "scikit-build-core>=0.11" "nanobind>=2.4" cmake ninja
	$(PYTHON) -m pip install -q --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) --no-build-isolation -e ".[dev]" -Cbuild-dir=$(BUILD) $(ISA_OPTION)
	@touch $(BUILD)/.editable $@

dev: $(VENV)/.moesaic-dev native

# Instruction sets that this processor has: the others would take longer to compile than all the rest. Without make, and
# with ISAS=, all are built, so that a package runs everywhere.
ISAS        ?= native
ISA_OPTION   = -Ccmake.define.MOESAIC_ONLY_ISAS="$(ISAS)"

# The editable install is made once; afterwards only what changed is compiled and the one library is replaced.
native:
	@if [ -f $(BUILD)/CMakeCache.txt ] && [ $(BUILD)/.editable -nt pyproject.toml ]; then \
		cmake --build $(BUILD) && cmake --install $(BUILD) --component python --prefix $(SITE) >/dev/null; \
	else \
		$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e . -Cbuild-dir=$(BUILD) $(ISA_OPTION) && touch $(BUILD)/.editable; \
	fi

stubs: native
	$(PYTHON) -m nanobind.stubgen -q -m moesaic._native -o src/moesaic/_native.pyi
	$(PYTHON) -m ruff format -q src/moesaic/_native.pyi

# Instruction sets of other processors are compiled here, quickly: whether they do is what this machine can check.
check: dev
	@$(VENV)/bin/cmake --build $(BUILD) --target left_out_isas
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: dev
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# One thread of numpy's own for each process that tests: its threads wait busily.
test: dev
	@$(VENV)/bin/cmake --build $(BUILD) --target thread_pool_check work_queue_check
	OPENBLAS_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist worksteal tests

# Programs without Python: $(call build_programs,folder,options).
define build_programs
	@$(VENV)/bin/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DMOESAIC_PYTHON=OFF $(2) >/dev/null
	@$(VENV)/bin/cmake --build $(1) --target kernel_check thread_pool_check work_queue_check
endef

# Instruction sets of the address and undefined sanitizers' build; the thread sanitizer's has only the generic one.
SANITIZE_ISAS  ?= $(if $(filter x86_64,$(shell uname -m)),generic;avx2,generic)
ADDRESS_OPTIONS = -DMOESAIC_SANITIZE=address,undefined -DMOESAIC_ONLY_ISAS="$(SANITIZE_ISAS)"
FIXED_ADDRESSES = $(shell setarch -R true 2>/dev/null && echo setarch -R)

sanitize: sanitize-address sanitize-thread

sanitize-address: $(VENV)/.moesaic-dev
	$(call build_programs,$(BUILD)-address,$(ADDRESS_OPTIONS))
	$(BUILD)-address/kernel_check
	$(BUILD)-address/thread_pool_check
	$(BUILD)-address/work_queue_check

# The thread sanitizer cannot place its memory where addresses are randomised widely; it allows threads after a fork
# only if told to.
sanitize-thread: $(VENV)/.moesaic-dev
	$(call build_programs,$(BUILD)-thread,-DMOESAIC_SANITIZE=thread -DMOESAIC_ONLY_ISAS=generic)
	$(FIXED_ADDRESSES) $(BUILD)-thread/kernel_check threads=4 linear heads experts attention threads
	TSAN_OPTIONS=die_after_fork=0 $(FIXED_ADDRESSES) $(BUILD)-thread/thread_pool_check
	$(FIXED_ADDRESSES) $(BUILD)-thread/work_queue_check

aarch64-check: $(VENV)/.moesaic-dev
	@command -v qemu-aarch64 >/dev/null || { echo "needs qemu-aarch64 (Debian: qemu-user)" >&2; exit 1; }
	$(call build_programs,$(BUILD)-aarch64,-DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake)
	qemu-aarch64 $(BUILD)-aarch64/kernel_check
	qemu-aarch64 $(BUILD)-aarch64/thread_pool_check no-fork
	qemu-aarch64 $(BUILD)-aarch64/work_queue_check

demo: dev
	$(VENV)/bin/moesaic run $(MODEL)

bench: dev
	$(PYTHON) benchmarks/kernels.py
	$(PYTHON) benchmarks/ops.py
	$(VENV)/bin/moesaic bench decode --synthetic qwen3-30b-a3b --format Q4_K --layers 4
	$(VENV)/bin/moesaic bench prefill --synthetic qwen3-30b-a3b --format Q4_K --layers 4

eval-demo: dev
	$(PYTHON) -m demo.evaluate --model $(MODEL)
