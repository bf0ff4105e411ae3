# make demo and make test set up everything they need in .venv; repeated, they work offline.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_JSON ?= .benchmarks/latest.json
CASES ?= 5000
IMAGES ?= 10000
FILES ?= 10000
SEED ?= 1
SECONDS ?= 60

BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
SOURCES := setup.py $(wildcard build_tools/*.py) \
    $(shell find csrc -type d -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test bench bench-engine exactness engine-exactness engine-fuzz lint format csrc-test csrc-fuzz clean FORCE
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo 'make demo       train and run a small dynamic network, no download of data needed'
	@echo 'make test       run the test suite (PYTEST_ARGS=... is passed on)'
	@echo 'make bench      run the benchmarks and report them (BENCH_JSON=... says where to)'
	@echo 'make exactness  compare the kernels with the reference (CASES=5000 SEED=1 OUT=...)'
	@echo 'make bench-engine      time frozen networks beside their peers, and report the table'
	@echo 'make engine-exactness  compare engines with eager networks (IMAGES=10000 SEED=1 DATA=...)'
	@echo 'make engine-fuzz       load and run damaged engine files (FILES=10000 SEED=1 SANITIZE=1)'
	@echo 'make lint       check style and types; make format: fix style'
	@echo 'bench/gpu_check.sh  everything that needs an NVIDIA GPU; --help says more'
	@echo 'make csrc-test  C++ tests without Python (SANITIZE=address,undefined or thread)'
	@echo 'make csrc-fuzz  fuzz the C++ kernels under sanitizers (SECONDS=60)'
	@echo 'make clean      remove what was built, .venv too'

demo: $(VENV)/.built $(VENV)/.installed-demo
	@$(BIN)/dfs demo

test: $(VENV)/.built $(VENV)/.installed-test
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.built $(VENV)/.installed-bench
	@mkdir -p $(dir $(BENCH_JSON))
	@$(BIN)/python -m pytest bench/ --benchmark-only --benchmark-json=$(BENCH_JSON) $(PYTEST_ARGS)
	@$(BIN)/python -m bench.report $(BENCH_JSON)

exactness: $(VENV)/.built $(VENV)/.installed-test
	@$(BIN)/python -m tests.kernels.exactness --cases $(CASES) --seed $(SEED) $(if $(OUT),--out $(OUT))

engine-exactness: $(VENV)/.built $(VENV)/.installed-test
	@$(BIN)/python -m tests.framework.engine_exactness --images $(IMAGES) --seed $(SEED) \
	    $(if $(DATA),--data $(DATA)) $(if $(OUT),--out $(OUT))

engine-fuzz: $(VENV)/.built $(VENV)/.installed-test
	@$(BIN)/python -m tests.framework.engine_fuzz --files $(FILES) --seed $(SEED) \
	    $(if $(SANITIZE),--sanitize) $(if $(OUT),--out $(OUT))

bench-engine: $(VENV)/.built $(VENV)/.installed-bench
	@mkdir -p $(dir $(BENCH_JSON))
	@$(BIN)/python -m pytest bench/bench_engine.py --benchmark-only --benchmark-json=$(BENCH_JSON) $(PYTEST_ARGS)
	@$(BIN)/python -m bench.report $(BENCH_JSON)

lint: $(VENV)/.built $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.built $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format -i

csrc-test: $(VENV)/.build-requirements
	@$(BIN)/python -m build_tools.csrc_tests $(if $(SANITIZE),--sanitize $(SANITIZE))

csrc-fuzz: $(VENV)/.build-requirements
	@$(BIN)/python -m build_tools.csrc_fuzz --seconds $(SECONDS)

clean:
	rm -rf build dist $(VENV) *.egg-info
	rm -f dfs_kernels/*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { \
	    echo 'error: $(PYTHON) not found; name a Python of 3.10 or later: make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: Python 3.10 or later is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	        'name another one: make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo 'error: $(PYTHON) has no venv module (Debian, Ubuntu: apt install python3-venv)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Before the package, or pip would choose the build of torch by itself.
$(VENV)/.torch: $(VENV)/.created FORCE
	@if [ "$$(cat $@ 2>/dev/null)" != '$(TORCH)' ]; then \
	    echo 'pip install $(TORCH)' && $(PIP) install $(TORCH) && echo '$(TORCH)' > $@; fi

# The build runs in this environment, so that rebuilding needs no network.
$(VENV)/.build-requirements: pyproject.toml $(VENV)/.created
	$(PIP) install 'setuptools>=77.0.3' 'pybind11>=2.13' 'ninja>=1.11'
	@touch $@

$(VENV)/.installed-%: pyproject.toml setup.py $(VENV)/.torch $(VENV)/.build-requirements
	$(PIP) install --no-build-isolation --editable '.[$*]'
	@touch $@

$(VENV)/.built: $(SOURCES) pyproject.toml $(VENV)/.build-requirements
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
