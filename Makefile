# make demo   a tiny Llama from Meta weights to an exported model, on the CPU
# make test   the test suite
# make lint   the linters
# make drill  the slow tests and the long drills: every layout with every family; every planted fault; writers and ranks killed; hours on few cores
# make sanitize   the compiled helpers' tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make test-cluster   what clusters do to a training, on a Slurm of its own; SHORT=1: the shortest, in minutes
# Each sets itself up first, in .venv. Useful variables:
#   make demo PYTHON=python3.12              another Python, 3.11 or later
#   make demo TORCH=path/to/torch-cpu.whl    another torch: a wheel, or a requirement as torch==2.13.0
PYTHON ?= python3
TORCH ?= torch==2.13.0
CORES ?= all

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-cluster lint drill sanitize setup

BIN := $(CURDIR)/.venv/bin
# Threads that wait give their core away: on a busy machine spinning makes small models several times slower.
export OMP_WAIT_POLICY := PASSIVE
INSTALLED := .venv/.installed
LINTERS := .venv/.linters
HAS_TORCH := -c 'import torch; version = tuple(map(int, torch.__version__.split(".")[:2])); exit(version < (2, 11))'

setup: $(INSTALLED)

# The package with its compiled helpers, anew when what it is built from changes. torch goes first, so that pip does not
# choose one; where the Python in use has one that will do, that is kept.
$(INSTALLED): pyproject.toml CMakeLists.txt $(wildcard cpp/* cpp/*/*) | .venv/.made
	@$(BIN)/python $(HAS_TORCH) 2> /dev/null || $(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install --editable '.[test]'
	@touch $@

# By name, for '.[lint]' would build the package once more.
$(LINTERS): pyproject.toml $(INSTALLED)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["lint"], sep="\n")' \
	    | $(BIN)/pip install --requirement /dev/stdin
	@touch $@

# Debian's Python comes without venv and without headers, and a small machine without a compiler.
.venv/.made:
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2]); exit(sys.version_info < (3, 11))') || \
	    { echo "llmpipe needs Python 3.11 or later, and $(PYTHON) is $${version:-not there}: name another, as in make demo PYTHON=python3.12" >&2; exit 1; }; \
	missing=; \
	[ -n "$${CXX:-}" ] || command -v c++ g++ clang++ > /dev/null || missing+=" g++"; \
	$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || missing+=" python$$version-venv"; \
	headers=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	[ -f "$$headers/Python.h" ] || missing+=" python$$version-dev"; \
	if [ -n "$$missing" ]; then \
	    install="apt-get install -y --no-install-recommends$$missing"; \
	    [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null || \
	        { echo "To build llmpipe this machine lacks$$missing: run 'sudo $$install', then make again" >&2; exit 1; }; \
	    export DEBIAN_FRONTEND=noninteractive; $$install || { apt-get update && $$install; }; \
	fi
	@system=; $(PYTHON) $(HAS_TORCH) 2> /dev/null && system=--system-site-packages || true; \
	$(PYTHON) -m venv --clear $$system .venv
	@touch $@

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --durations 20 --durations-min 10

test-cluster: $(INSTALLED)
	tests/cluster/install.sh
	LLMPIPE_SCREENSHOTS="$${LLMPIPE_SCREENSHOTS:-build/screenshots}" LLMPIPE_CLUSTER=yes OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest --timeout 3600 --durations 0 tests/cluster \
	    $(if $(SHORT),$(addprefix --ignore tests/cluster/,test_drills.py test_slurm_profile.py))

lint: $(LINTERS)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/snakefmt --check workflow demo
	$(BIN)/python .ci/lint_workflow.py .
	$(BIN)/python .ci/lint_workflow.py demo

drill: $(INSTALLED)
	LLMPIPE_SLOW=yes OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 3600 -m slow
	LLMPIPE_SLOW=yes .ci/sanitize
	$(BIN)/python benchmarks/layout_parity.py
	$(BIN)/python benchmarks/planted_faults.py
	folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(BIN)/python benchmarks/kill_drill.py "$$folder/writers"; \
	$(BIN)/python benchmarks/rank_drill.py "$$folder/ranks" --more

sanitize: $(INSTALLED)
	.ci/sanitize

# The lock keeps a second `make demo` waiting. Who has it may clear Snakemake's own lock, which a killed Snakemake leaves;
# --rerun-incomplete makes again what it left half made.
demo: $(INSTALLED)
	@export PATH="$(BIN):$$PATH"; cd demo; exec 9> .lock; \
	flock --nonblock 9 || { echo "another make demo is at work here: waiting for it"; flock 9; }; \
	if compgen -G '.snakemake/locks/*' > /dev/null; then snakemake --unlock --quiet all; fi; \
	snakemake --cores $(CORES) --rerun-incomplete --quiet rules; \
	if [ ! -f results/report.html ] || \
	    [ -n "$$(find results/*/*/tracked results/runs/*/report.html -newer results/report.html)" ]; then \
	    snakemake --cores 1 --quiet all --report results/.report.html; mv results/.report.html results/report.html; \
	fi
	@printf '%s\n' "" "The demo is finished. In demo/results, from the repository's folder:" \
	    "  the exported model   demo/results/runs/tiny_llama/export" \
	    "      .venv/bin/python -c \"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('demo/results/runs/tiny_llama/export'))\"" \
	    "  the report           demo/results/report.html   (open it in a browser; a run's page: demo/results/runs/tiny_llama/report.html)" \
	    "  the MLflow store     demo/mlflow.db" \
	    "      cd demo && ../.venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db   (then open http://127.0.0.1:5000)"
