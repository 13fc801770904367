# `make demo` and `make test` are all a newcomer needs; both install what they use into .venv.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv
PINS := uv pip compile -q --python-version 3.11 --no-emit-index-url --no-header --no-emit-package trunkline
.DEFAULT_GOAL := help
.PHONY: help demo test check format pins images e2e e2e-tools test-modal-live bench clean

help:  ## This list.
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

demo: .venv/demo.stamp  ## A whole Trunkline on this machine: a spoken call, a spike, a drain.
	@$(BIN)/trunkline demo

test: check  ## Everything CI runs: the checks, then all tests.
	@$(BIN)/trunkline dev --prepare
	@$(BIN)/python -m trunkline_dev.binaries kube-controller-manager >/dev/null  # no test has time to compile it
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

check: .venv/dev.stamp  ## ruff, mypy --strict and the import rules.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev.stamp  ## Sorts imports and formats.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pins: .venv/uv.stamp  ## Writes the pinned requirements anew from pyproject.toml.
	$(BIN)/$(PINS) --extra dev --extra moshi --group test --group lint pyproject.toml -o requirements/dev.txt
	$(BIN)/$(PINS) --extra dev -c requirements/dev.txt pyproject.toml -o requirements/demo.txt
	$(BIN)/$(PINS) -c requirements/dev.txt pyproject.toml -o requirements/gateway.txt
	$(BIN)/$(PINS) --extra operator -c requirements/dev.txt pyproject.toml -o requirements/operator.txt
	$(BIN)/$(PINS) --extra speech -c requirements/dev.txt pyproject.toml -o requirements/worker-cpu.txt
	$(BIN)/$(PINS) --extra moshi -c requirements/dev.txt pyproject.toml -o requirements/worker-moshi.txt

# FLAGS are for images/build: --install, --registry, --tag, --base, --output.
images:  ## Container images into build/images. IMAGES="worker-moshi" builds that one, with CUDA.
	@$(PYTHON) images/build $(IMAGES) $(FLAGS)

# Only from the command line: nobody's own cluster is taken because KUBECONFIG happens to be set.
export TRUNKLINE_E2E_KUBECONFIG := $(if $(filter command line,$(origin KUBECONFIG)),$(abspath $(KUBECONFIG)))
export TRUNKLINE_E2E_VALUES := $(if $(VALUES),$(abspath $(VALUES)))

# VALUES is a file of Helm values for another cluster: the registry with the images, at least.
e2e: .venv/dev.stamp $(if $(TRUNKLINE_E2E_KUBECONFIG),,images)  ## The chart on a real node (needs root), or KUBECONFIG=… VALUES=… elsewhere.
	$(BIN)/pytest -v tests/e2e

e2e-tools: .venv/dev.stamp  ## As root: the Debian packages and programs that e2e needs.
	$(BIN)/python -m trunkline_dev.cluster install
	$(MAKE) images FLAGS=--install

# It costs money, so it never runs because tokens happen to be set.
test-modal-live: .venv/dev.stamp  ## The contract with Modal, at Modal: MODAL_TOKEN_ID and MODAL_TOKEN_SECRET, 10 minutes, less than $0.10.
	@test -n "$$MODAL_TOKEN_ID" -a -n "$$MODAL_TOKEN_SECRET" || { echo "set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET: docs/burst.md"; exit 2; }
	TRUNKLINE_MODAL_LIVE=1 $(BIN)/pytest -v tests/test_modal_contract.py

bench: .venv/dev.stamp  ## All benchmarks that need no GPU, into docs/benchmarks. Takes half an hour; leave the machine alone.
	$(BIN)/python bench/every.py

clean:  ## Removes what the commands above made in this folder.
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

.venv/uv.stamp:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	@touch $@

# --no-deps: see requirements/README.md.
.venv/demo.stamp: .venv/uv.stamp requirements/demo.txt pyproject.toml
	$(UV) pip install --no-deps --python $(BIN)/python -r requirements/demo.txt -e .
	@touch $@

.venv/dev.stamp: .venv/uv.stamp requirements/dev.txt pyproject.toml
	$(UV) pip install --no-deps --python $(BIN)/python -r requirements/dev.txt -e .
	@touch $@ .venv/demo.stamp
