# make quickstart   align the bundled model and see the proof (makes .venv on the first run)
# make test         the tests that take minutes; make test-all adds the long ones
# Another Python or another place: make test PYTHON=python3.12 VENV=/somewhere/venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 VALIGN_PROGRESS=0
DEV := $(VENV)/.installed-dev

.PHONY: quickstart bench test test-all lint golden mutants docs docs-methods install install-dev clean

quickstart: $(VENV)/.installed
	$(BIN)/valign quickstart -o runs/quickstart

bench: $(VENV)/.installed
	$(BIN)/valign bench methods -o runs/methods

test: $(DEV)
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-all: $(DEV)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Does the working tree compute what revision BASE computed? Both lie at one path, since adapters record the model folder, and run benchmarks/golden.py; ONLY="name name" runs less.
golden: $(DEV)
	@test -n "$(BASE)" || { echo "make golden needs a revision to compare with. Run: make golden BASE=HEAD~1" >&2; exit 2; }
	@set -e; work=$$(mktemp -d); trap 'git worktree remove --force "$$work/base"; rm -rf "$$work"' EXIT; \
	git worktree add -q --detach "$$work/base" "$(BASE)"; \
	ln -s "$$work/base/src" "$$work/src"; \
	PYTHONPATH="$$work/src" $(BIN)/python benchmarks/golden.py run "$$work/old" $(ONLY:%=--only %); \
	ln -sfn "$(CURDIR)/src" "$$work/src"; \
	PYTHONPATH="$$work/src" $(BIN)/python benchmarks/golden.py run "$$work/new" $(ONLY:%=--only %); \
	$(BIN)/python benchmarks/golden.py compare "$$work/old" "$$work/new"

# Which changes of the code would no test notice? All of the rooms in [tool.mutmut] take hours; ONLY="valign.objectives*" takes some.
mutants: $(DEV) $(VENV)/.installed-mutants
	$(ONE_THREAD) $(BIN)/mutmut run --max-children $(WORKERS) $(ONLY)
	$(BIN)/mutmut results

docs: $(VENV)/.installed-docs
	$(BIN)/zensical build --strict

docs-methods: $(VENV)/.installed
	$(BIN)/valign methods --markdown > docs/methods.md.new
	mv docs/methods.md.new docs/methods.md

install: $(VENV)/.installed

install-dev: $(DEV)

clean:
	rm -rf site mutants .mypy_cache .ruff_cache .import_linter_cache

# A stamp is written last, so an interrupted installation starts again where pip's cache left it.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "valign needs Python 3.11 or later, got $$($(PYTHON) --version). Run: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[$*]"
	@touch $@
