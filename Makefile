# The project's commands; .ci/run calls the same ones. `make help` lists them.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo
SHARED ?= $(or $(HELO_FAST_SHARED),../shared)
JOBS   ?= 2
STAMP  := $(VENV)/.helo-fast-installed
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)

.DEFAULT_GOAL := help
.PHONY: help venv install lint test sanitize demo bench recordings performance profile gpu-static gpu-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv:  ## create .venv with torch, where it is not there
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)" numpy

install: $(STAMP)  ## create .venv and install the package with all extras (a torch already there is used)

$(STAMP): pyproject.toml setup.py $(NATIVE)
	@$(MAKE) --no-print-directory venv
	$(BIN)/python -m pip install --quiet -e ".[train,triton,dev]"
	@# The metrics are tested against pyldl's, which need none of its dependencies (keras among them).
	$(BIN)/python -m pip install --quiet --no-deps python-ldl==0.1.2
	@touch $@

lint: $(STAMP)  ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A torch thread a process: on small problems, more of them mostly wait for each other. Tests of threads ask for several themselves.
test: $(STAMP)  ## the whole test suite, doctests included, in JOBS processes (2)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST)
	$(BIN)/pytest --doctest-modules helo_fast -q

sanitize: $(STAMP)  ## the cpp back end's tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tests/sanitize.py

demo: $(STAMP)  ## train on embedded synthetic data, under five minutes on two cores
	$(BIN)/helo-fast train --data synthetic --optimizer.lr 1e-3 --epochs 25 --folds S01 S02 S03 S04 --out $(OUT) --overwrite

bench: $(STAMP)  ## the benchmarks, and their ratios beside the targets
	@mkdir -p .benchmarks
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-json=.benchmarks/latest.json -q $(BENCH)
	$(BIN)/python benchmarks/ratios.py .benchmarks/latest.json

recordings: $(STAMP)  ## train for a few epochs on the real recordings in SHARED (../shared), and report
	@test -d "$(SHARED)/data/wesad" || { echo "the recordings at $(SHARED)/data/wesad are needed" >&2; exit 1; }
	$(BIN)/helo-fast train --data wesad --data.root "$(SHARED)/data/wesad" --protocol loso --seeds 0 --epochs 3 \
	  --out runs/recordings --overwrite --quiet
	test -s runs/recordings/report.html && test -s runs/recordings/metrics.json

performance: $(STAMP)  ## the benchmarks with the large sizes, into docs/performance.md and its plots (an idle machine, twenty minutes)
	@mkdir -p .benchmarks
	$(BIN)/pytest benchmarks --benchmark-only -m "large or not large" --benchmark-json=.benchmarks/performance.json -q
	$(BIN)/python -m benchmarks.report .benchmarks/performance.json docs

profile: $(STAMP)  ## where a training step spends its time, an operator a row
	$(BIN)/python -m benchmarks.profile_step

gpu-static: $(STAMP)  ## the GPU kernels as compiled, without a GPU: registers, shared memory, spills, occupancy
	$(BIN)/python -m benchmarks.gpu_static $(STATIC)

gpu-check:  ## on a machine with a GPU: build, test, sanitise, benchmark, write benchmarks/results (nine minutes; downloads nothing)
	$(PYTHON) -m benchmarks.gpu_check $(CHECK)

clean:  ## remove what the build made
	rm -rf build dist *.egg-info helo_fast/*.so
