# Chores of the project; `make native` rebuilds the extension incrementally.
PYTHON ?= python
BUILD ?= build
SITE = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('platlib'))")

.PHONY: native
# The editable install is made once; afterwards only what changed is compiled and the one library is replaced.
native:
	@if [ -f $(BUILD)/CMakeCache.txt ] && [ $(BUILD)/.editable -nt pyproject.toml ]; then \
		cmake --build $(BUILD) && cmake --install $(BUILD) --component python --prefix $(SITE) >/dev/null; \
	else \
		$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e . -Cbuild-dir=$(BUILD) && touch $(BUILD)/.editable; \
	fi
