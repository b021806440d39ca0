# Every target works as the first command after a clone: what it needs is installed into .venv, once.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install --constraint constraints.txt
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --constraint constraints.txt
SUBJECT ?= coral-car
BASE ?= miniature
S3_FOLDER := output/s3
SERVICES_FOLDER := output/services
# Packages that commands do without, since diffusers would import them in each command; and the tests that need them.
EXTRAS := $(abspath $(VENV))/extras
EXTRAS_TESTS := tests/unit/models/test_low_rank.py tests/unit/training/test_optimizer.py \
    tests/integration/training/test_optimizers.py tests/integration/worker/test_engines.py \
    tests/integration/plan/test_memory.py
TWO_AT_ONCE := --numprocesses logical --maxprocesses 2 --dist loadfile --no-loadscope-reorder

# The caller's VIRTUAL_ENV or PYTHONPATH must not leak other packages into ours.
unexport PYTHONPATH VIRTUAL_ENV

# Shell: sets $python to a Python that is new enough, or says that there is none.
define find_python
python=""; \
for candidate in $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14 python; do \
    if command -v $$candidate >/dev/null 2>&1 && \
        $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
        python=$$candidate; break; \
    fi; \
done; \
if [ -z "$$python" ]; then \
    echo "Python 3.11 or newer is needed and none was found; install it, or say where it is: make PYTHON=/path/to/python3" >&2; \
    exit 2; \
fi;
endef

.DEFAULT_GOAL := help
.PHONY: help install demo test test-extras test-recovery test-slow test-gpu check fix bench bench-batch bench-gpu benchmarks-page docs s3 s3-stop clean services services-stop cluster-demo audit

help: ## Show what can be made
	@echo "Usage: make TARGET"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## Create .venv and install everything into it

$(INSTALLED): pyproject.toml constraints.txt
	@$(find_python) \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    echo "[1/3] Creating $(VENV) with $$($$python --version)"; \
	    $$python -m venv --clear $(VENV) || { \
	        echo "Could not create $(VENV); on Debian and Ubuntu, 'apt install python3-venv' brings what is missing" >&2; \
	        exit 2; \
	    }; \
	else \
	    echo "[1/3] Using $(VENV), which is there already"; \
	fi
	@# torch goes first and by the constraints file, so that the build that is found here is the one all others get.
	@echo "[2/3] Installing torch (the largest download)"
	@$(PIP) torch
	@echo "[3/3] Installing Ray, DeepSpeed, diffusers, MLflow and this project (some minutes the first time)"
	@# uv takes half of pip's time, but knows nothing of pip's configuration: behind a mirror that only pip is told of, it fails.
	@$(PIP) uv && $(UV) --editable '.[dev]' || { \
	    echo "uv could not install that; pip tries (slower)"; \
	    $(PIP) --editable '.[dev]'; \
	}
	@touch $@
	@echo "Installed."

demo: $(INSTALLED) ## Fine-tune a built-in model (BASE) on one of its subjects (SUBJECT); see output/demo/
	$(BIN)/dreambooth run --base-model $(BASE) --images dreambooth/miniature/subjects/$(SUBJECT) --workers 2 \
	    --zero-stage 2 --set train.micro_batch_size=1 --output output/demo

test: $(INSTALLED) ## Run the unit tests, then the integration tests, with RECOVERY=1 also those of test-recovery; none marked slow
	$(BIN)/python -m pytest tests/unit -m "not slow" --numprocesses logical --maxprocesses 4 --dist worksteal
	$(BIN)/python -m pytest tests/integration -m "not slow$(if $(RECOVERY),, and not recovery)" $(TWO_AT_ONCE)

test-extras: $(EXTRAS)/.installed ## Run the tests of adamw8bit and LoRAs, which need torchao and peft
	PYTHONPATH=$(EXTRAS) $(BIN)/python -m pytest $(EXTRAS_TESTS) -m extras $(TWO_AT_ONCE)

$(EXTRAS)/.installed: $(INSTALLED)
	@$(PIP) --upgrade --no-deps --target $(EXTRAS) accelerate peft torchao
	@PYTHONPATH=$(EXTRAS) $(BIN)/python -c 'import accelerate, peft, torchao'
	@touch $@

test-recovery: $(INSTALLED) ## Run the tests that kill workers, drivers and the queue in the middle (some ten minutes)
	$(BIN)/python -m pytest tests/integration -m recovery $(TWO_AT_ONCE)

test-slow: $(INSTALLED) ## Run the tests that take minutes each
	$(BIN)/python -m pytest tests -m slow

test-gpu: $(INSTALLED) ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest tests/gpu

check: $(INSTALLED) ## Check lint, format, types and which folder imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

fix: $(INSTALLED) ## Apply ruff's fixes, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## Measure loop efficiency, prior speed-up and start-up; figures go to output/bench/main.json
	$(BIN)/python tests/bench/main.py

bench-gpu: $(INSTALLED) ## Measure steps of Stable Diffusion 1.5 and SDXL on a GPU, and its load; see output/bench/gpu.json
	$(BIN)/python tests/bench/gpu.py

bench-batch: $(INSTALLED) ## Measure a batch against runs one by one, and with PEER=path against diffusers' train_dreambooth.py
	$(BIN)/python tests/bench/batch.py $(if $(PEER),--peer "$(PEER)")

benchmarks-page: $(INSTALLED) ## Put the figures of output/bench/ into docs/benchmarks.md
	$(BIN)/python tests/bench/benchmarks_page.py

docs: $(INSTALLED) ## Build the documentation into site/; a broken link or name is an error
	@$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || $(PIP) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "To read it: open site/index.html, or with search: $(BIN)/python -m http.server --directory site"

s3: ## Start an S3 store on this machine (OpenStack Swift), with data in output/s3/, and show how to use it
	@$(find_python) $$python infra/s3/swift.py start --folder $(S3_FOLDER)
	@echo
	@echo "To use it in this shell:  . $(S3_FOLDER)/credentials.env"
	@echo "Then, for example:        $(BIN)/dreambooth run --images ... --set storage.root=s3://dreambooth/results"
	@echo "To stop it:               make s3-stop"

s3-stop: ## Stop that store; its data stay
	@$(find_python) $$python infra/s3/swift.py stop --folder $(S3_FOLDER)

clean: ## Remove caches and build products, but neither .venv nor output
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find dreambooth pipelines tests -name __pycache__ -type d -prune -exec rm -rf {} +

services: $(INSTALLED) ## Start MLflow with passwords on Postgres and S3, on this machine; data in output/services/
	@$(BIN)/python infra/services/services.py start --folder $(SERVICES_FOLDER)
	@echo
	@echo "To use them in this shell:  . $(SERVICES_FOLDER)/client.env"
	@echo "Then, for example:          $(BIN)/dreambooth run --images ... --set storage.root=s3://dreambooth/results"
	@echo "To stop them:               make services-stop"

services-stop: $(INSTALLED) ## Stop them; their data stay
	@$(BIN)/python infra/services/services.py stop --folder $(SERVICES_FOLDER)

cluster-demo: $(INSTALLED) ## Run a batch on a cluster of three nodes here, with MLflow, Postgres and S3; kill a node
	$(BIN)/python infra/ray/cluster_demo.py --folder output/cluster-demo

audit: $(INSTALLED) ## Check for known vulnerabilities in the pinned versions (needs the network)
	@$(PIP) pip-audit
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt
