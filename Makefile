# One-word commands. Each sets up all that it needs in .venv: a machine with Python 3.11 or later will do.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check docs bench release clean

# The first that is new enough; or say it: make demo PYTHON=/opt/python3.12/bin/python3
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$python; break; fi; done)

# The tests start thousands of processes: each would compile all of Tally where this is set.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
INSTALLED := .venv/installed.stamp
DEMO := build/demo

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED)  ## restyle a short clip with sound
	@rm -rf $(DEMO); mkdir -p $(DEMO)
	$(BIN)/tally simulate clip --out $(DEMO)/clip.mp4 --size 480x270
	TALLY_HOME=$(DEMO)/home $(BIN)/tally score $(DEMO)/clip.mp4 --model tally:strokes --out $(DEMO)/styled.mp4
	@echo; echo "Before: $(DEMO)/clip.mp4   After: $(DEMO)/styled.mp4   (Pictures, next: docs/quickstart.md)"

test: .venv/test.stamp  ## run the tests (ARGS="-k pattern" runs some)
	$(BIN)/python -m pytest -n 4 --dist worksteal $(ARGS)

check: .venv/test.stamp .venv/check.stamp  ## lint, check the formatting and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED) .venv/docs.stamp  ## build the site, build/site; a link that leads nowhere is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html -c docs . build/site

bench: .venv/test.stamp  ## run the benchmarks, one after another
	@set -e; for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file; done

release: .venv/release.stamp  ## build dist/, and try it (ARGS=--trial before it is one; CONTRIBUTING.md)
	$(BIN)/python scripts/release.py $(ARGS)

clean:  ## remove what was built, and the caches; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# venv writes pip last: where it is missing, the environment is missing or was cut short.
$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "Tally needs Python 3.11 or later, and there is none on the PATH. \
	Install one, or say where it is: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv

$(INSTALLED): pyproject.toml | $(BIN)/pip
	$(PIP) --upgrade "pip>=25.1"
	$(PIP) --editable .
	@touch $@

# pip has known dependency groups since 25.1.
.venv/%.stamp: pyproject.toml $(INSTALLED)
	$(PIP) --group $*
	@touch $@
