# Every target works as the first and only command after a clone; .venv is made on demand.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
DATA ?= shapes
FONT ?= /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
COMPILER := $(if $(filter default,$(origin CXX)),c++,$(firstword $(CXX)))

.PHONY: install test demo bench gpu lint clean

install: $(INSTALLED)

$(INSTALLED): requirements.txt setup.py pyproject.toml $(shell find csrc -type f)
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dalle_fast needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v $(COMPILER) >/dev/null || \
	  { echo "dalle_fast needs a C++ compiler, for example g++; name one with: make CXX=..." >&2; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -r requirements.txt
	DALLE_FAST_BUILD=require $(VENV)/bin/pip install --no-build-isolation --no-deps -e .
	@touch $@

test: install
	$(VENV)/bin/pytest

demo: install
	$(VENV)/bin/dalle-fast demo --data $(DATA) --out demo $(if $(filter emoji,$(DATA)),--font $(FONT))

bench: install
	$(VENV)/bin/pytest benchmarks --benchmark-only

# With what $(PYTHON) has, and not .venv: a machine lent for its GPU may have no network.
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(DRY_RUN),--dry-run) $(if $(PART),--part $(PART))

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build dist demo *.egg-info dalle_fast/_C.*.so
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
