# setup · demo · test · test-all · report · paper · docs; each makes .venv first when it is missing or out of date
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all report paper docs
setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'peft_study needs Python 3.11 or later, this is ' + sys.version.split()[0])"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@command -v quarto >/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --retries 0 --timeout 10 quarto-cli >/dev/null 2>&1 \
		|| echo "Quarto could not be downloaded: reports are rendered with pandoc and typst"
	touch $@

demo: setup
	$(BIN)/peft-study demo

# notebooks first: each is prose, code and the tests of that code, and shows what is stored in it; two processes, which
# read the bytecode that others of the hundreds of processes have written
TESTS := -m "not slow"
test-all: TESTS :=
test test-all: export OMP_NUM_THREADS = 1
test test-all: setup
	env -u PYTHONDONTWRITEBYTECODE PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/notebooks.py
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

STUDY ?= demo
report: setup
	$(BIN)/peft-study report $(STUDY)

paper: setup   # reports/paper.html and .pdf, of what is stored
	$(BIN)/python -c "from peft_study.report.facts import make_paper; print(*make_paper(), sep='\n')"

docs: setup
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	command -v quarto >/dev/null || { echo "make docs needs Quarto: https://quarto.org/docs/get-started" >&2; exit 2; }; \
	python -c "from peft_study.report.docs import make_docs; make_docs()"
