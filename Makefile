# make demo   sets everything up in .venv and finds the salient instances of the photographs in samples/
# make test   sets everything up, checks the style and the types and runs the tests
# make app    installs gradio too and starts a page in the browser for photographs, see docs/app.md
# make test-app   tests that page in Chromium
# make notebook   runs examples/salient_instances.ipynb and stores its outputs
# make benchmarks   times operators, infer.py and their peers on this machine, and writes the tables into docs/
# make mutants   sets everything up, changes the sources in one place after another, and lists the changes no test notices
# make PYTHON=python3.12 ... chooses the interpreter (3.10 or newer)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OPERATOR_SOURCES := setup.py $(wildcard ops/*.py ops/csrc/*.* ops/csrc/*/*)

.PHONY: setup demo app test test-app notebook benchmarks mutants clean
.DELETE_ON_ERROR:

setup: $(VENV)/requirements.stamp $(VENV)/operators.stamp

demo: setup
	$(BIN)/python infer.py --img samples --out output
	@echo; echo "The pictures:"; ls -1 "$(CURDIR)"/output/*_overlay.jpg

app: setup $(VENV)/requirements-app.stamp
	$(BIN)/python app.py

test: setup $(VENV)/requirements-test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest

test-app: setup $(VENV)/requirements-app-test.stamp
	$(BIN)/python -m pytest -rs tests/test_app.py

notebook: setup $(VENV)/requirements-notebook.stamp
	cd examples && ../$(BIN)/jupyter execute --inplace salient_instances.ipynb

benchmarks: setup $(VENV)/requirements-test.stamp
	$(BIN)/python benchmarks/bench_ops.py --growth --page docs/operators.md
	$(BIN)/python benchmarks/bench_infer.py --growth --page docs/performance.md
	$(BIN)/python benchmarks/bench_infer.py --growth --page docs/performance.md --weights weights/wsid_net.pt

mutants: setup $(VENV)/requirements-test.stamp
	$(BIN)/python tests/mutations.py

clean:
	rm -rf $(VENV) build output

$(VENV)/requirements.stamp: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"Python 3.10 or newer is needed; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

$(VENV)/requirements-%.stamp: requirements-%.txt $(VENV)/requirements.stamp
	$(BIN)/python -m pip install -r $<
	@touch $@

# Not built, everything still works, on the plain PyTorch operators; the next make tries again. Where there is a compiler,
# make test fails then (tests/test_setup.py).
$(VENV)/operators.stamp: $(VENV)/requirements.stamp $(OPERATOR_SOURCES)
	@if $(BIN)/python setup.py build_ext --inplace; then touch $@; else \
		echo; echo "WARNING: the compiled operators could not be built (see above)."; \
		echo "WARNING: the slower PyTorch operators are used instead."; echo; fi
