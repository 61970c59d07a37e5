# `make demo` and `make test` work on a fresh machine with Python 3.11 (or later) and make: the first call makes .venv.
#
#   make demo [MODEL=<folder or hub id>]   quantize a small chat model, reload it, measure it, let it answer
#   make test                              linters, types, tests; `make check` is the same
#   make format                            put the code into its canonical form
#   make cpu, make asan, make cuda         see Makefile.cpu, Makefile.cuda
#   make test-ipex                         see Makefile.ipex
#   make test-interop, make test-vllm, make test-eval      see Makefile.interop
#   make bench-cpu                         see Makefile.bench
#
# PYTHON      the interpreter that .venv is made from
# TORCH_ARGS  passed to `pip install torch`: on Linux, PyPI's torch brings several GB of CUDA libraries; with
#             TORCH_ARGS="--index-url <the index of CPU builds that pytorch.org names>" it does not

PYTHON ?= $(shell sh -c 'command -v python3.11 || command -v python3 || echo python3.11')
TORCH_ARGS ?=
MODEL ?=
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: demo test check lint tests format venv clean

demo: $(READY)
	$(PY) -m woq.cli demo $(MODEL)

test: lint tests

check: test

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Two processes with one thread each: small models gain nothing from threads, and two pools fight over two cores.
tests: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

venv: $(READY)

# torch first and by itself, so that TORCH_ARGS reaches it alone.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'woq needs Python 3.11 or later; set PYTHON=')"
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q $(TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	$(PY) -m pip install -q -c constraints.txt -e '.[dev,demo]'
	touch $@

clean:
	rm -rf .venv .venv-ipex .venv-interop .venv-vllm .venv-eval .venv-bench build dist woq.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

-include Makefile.cpu Makefile.cuda Makefile.ipex Makefile.interop Makefile.bench
