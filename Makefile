# Two commands do everything: `make serve` and `make test`. Both set up what is missing first.
# The newest Python that this machine has, of those that we run on.
PYTHON ?= $(or $(firstword $(foreach p,python3.13 python3.12 python3.11,$(shell $(p) -c pass \
    2>/dev/null && echo $(p)))),python3.13)
MODEL ?= traffic-signs
PORT ?= 8080
BIN := .venv/bin
# Lock files are complete, and what is never imported need not be compiled.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-compile
ARCHIVE := model_store/$(MODEL).mar
SOURCES := $(shell find handlers hardening export rampart -name '*.py')
# Where NVIDIA's driver is, ONNX Runtime comes with CUDA: make GPU= leaves it out.
GPU ?= $(wildcard /proc/driver/nvidia/version)
RUNTIME := $(if $(GPU),gpu,serve)
# A model that ships its graph is packed without torch.
PACKER := $(if $(wildcard model_store/$(MODEL)/graph-*.onnx),.venv/serve,.venv/harden)

ifneq ($(filter serve,$(or $(MAKECMDGOALS),serve)),)
ifeq ($(wildcard model_store/$(MODEL)/weights.safetensors $(ARCHIVE)),)
SHIPPED := $(patsubst model_store/%/weights.safetensors,%,$(wildcard model_store/*/weights.safetensors))
$(error model_store has no $(MODEL). Say make serve MODEL=... with one of: $(SHIPPED))
endif
endif

.PHONY: serve test slow quick servers bench check format dist docs graphs lock audit clean

serve: $(ARCHIVE)
	@$(BIN)/rampart serve --archive $(ARCHIVE) --port $(PORT)

# Compiled files are kept even where the environment forbids it: without them each process that
# imports torch compiles it anew, and the suite takes half as long again.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test slow quick servers: export PYTHONDONTWRITEBYTECODE :=

test: .venv/dev
	@echo "Running the test suite (a few minutes; TorchServe is started for real) ..."
	@# Two files at a time; a thread each, or they would wait for each other's cores. Files are
	@# taken as tests/conftest.py orders them, and not by how many tests they have.
	@$(PYTEST) -m "not slow"

slow: .venv/dev
	@echo "Running the tests that take ten seconds and more each ..."
	@$(PYTEST) -m slow

quick: .venv/dev
	@$(PYTEST) -q -m "not server and not training and not slow"

# Writes docs/servers.md by what passes.
servers: .venv/dev .venv/triton .venv/ray
	@$(PYTEST) -q -m feature --servers=docs/servers.md

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(ARCHIVE): $(PACKER) $(wildcard model_store/$(MODEL)/*) $(SOURCES)
	@echo "Building $@ from model_store/$(MODEL) ..."
	@$(BIN)/rampart archive model_store/$(MODEL) --out $@

# Said before minutes of downloads, not after them: GB that what is fetched and unpacked takes, where
# a package is not there yet.
room = @free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1000000)}'); \
    test -d "$$(echo .venv/lib/python*/site-packages/$(2))" || test "$$free" -ge $(1) || \
    { echo "$@ needs $(1) GB of disk, and $$free GB are free in $(CURDIR)"; exit 1; }

.venv/serve: requirements/$(RUNTIME).txt pyproject.toml
	$(call room,$(if $(GPU),4,1),onnxruntime)
	@$(PYTHON) -c pass || { echo "Rampart needs Python 3.11 to 3.13: install one, or name yours with" \
	    "PYTHON=..."; exit 1; }
	@echo "Installing what serving needs into .venv ($(if $(GPU),about 2.5 GB with CUDA,350 MB)) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# Of an environment of before: see only_runtime.
	@$(BIN)/python -m pip uninstall -qy $(if $(GPU),onnxruntime,onnxruntime-gpu) 2>/dev/null
	@$(PIP) --require-hashes -r requirements/$(RUNTIME).txt
	@$(PIP) -q --no-build-isolation -e .
	@touch $@

.venv/harden: .venv/serve requirements/harden.txt
	$(call room,8,torch)
	@echo "Installing what exporting, training and attacking need (about 5 GB, a few minutes) ..."
	@$(PIP) --require-hashes -r requirements/harden.txt
	@$(only_runtime)
	@touch $@

.venv/dev: .venv/serve requirements/dev.txt requirements/kserve.txt
	$(call room,9,torch)
	@echo "Installing what tests and benchmarks need (about 6 GB, a few minutes) ..."
	@$(PIP) --require-hashes -r requirements/dev.txt
	@$(only_runtime)
	@# KServe wants other versions of what we have: it gets a place of its own.
	@$(BIN)/python -m venv .venv/kserve
	@.venv/kserve/bin/python -m pip install -q --require-hashes -r requirements/kserve.txt
	@touch $@

# Both onnxruntime and onnxruntime-gpu bring the module `onnxruntime`, and one spoils the other.
define only_runtime
$(if $(GPU),$(BIN)/python -m pip uninstall -qy onnxruntime onnxruntime-gpu && \
    $(PIP) -q --require-hashes -r requirements/gpu.txt)
endef

# A real Triton, which dies of pictures where NumPy is 2: a Python with a NumPy before that.
.venv/triton: .venv/dev requirements/triton.txt
	@rm -rf $@
	@$(firstword $(foreach p,python3.12 python3.11,$(shell $(p) -c pass 2>/dev/null && echo $(p))) \
	    $(BIN)/python) -m venv $@
	@$@/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes \
	    -r requirements/triton.txt

.venv/docs: requirements/docs.txt
	@$(PYTHON) -m venv $@
	@$@/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes \
	    -r requirements/docs.txt
	@touch $@

# Every claim about speed, in 15 minutes on cores that do nothing else.
bench: .venv/peers .venv/triton
	@$(BIN)/python benchmarks/claims.py

# The site, in build/site; a broken link is an error. Not by -q, which keeps warnings from the strict
# mode that counts them.
docs: .venv/docs
	@mkdir -p build
	@NO_MKDOCS_2_WARNING=1 PYTHONPATH=. .venv/docs/bin/mkdocs build 2> build/docs.log || \
	    { cat build/docs.log; exit 1; }

# A real Ray.
.venv/ray: .venv/dev requirements/ray.txt
	@rm -rf $@
	@$(BIN)/python -m venv $@
	@$@/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes \
	    -r requirements/ray.txt

# The source distribution and the wheel, in dist/.
dist: .venv/dev
	@$(BIN)/python -m build --no-isolation

# Builds the graphs that model folders ship anew, once the code that exports has changed.
graphs: .venv/dev
	for model in $(sort $(dir $(wildcard model_store/*/graph-*.onnx))); do \
	    $(BIN)/rampart export $$model --ship || exit 1; done

.venv/peers: .venv/dev requirements/peers.txt
	@$(BIN)/python -m pip install -q --require-hashes -r requirements/peers.txt
	@touch $@

# Writes the lock files anew from pyproject.toml, for all its Pythons: hashes, and no address of any
# index.
LOCK := uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-header --upgrade
SERVING := --group pyproject.toml:build --extra torchserve --extra http --extra redis
lock:
	$(LOCK) pyproject.toml $(SERVING) -o requirements/serve.txt
	$(LOCK) pyproject.toml --extra http --extra redis -c requirements/serve.txt -o requirements/http.txt
	$(LOCK) pyproject.toml --extra dev --extra benchmark -c requirements/serve.txt -o requirements/dev.txt
	$(LOCK) pyproject.toml --extra harden -c requirements/dev.txt -o requirements/harden.txt
	$(LOCK) pyproject.toml $(SERVING) --extra gpu --no-emit-package onnxruntime \
	    -c requirements/dev.txt -o requirements/gpu.txt
	$(LOCK) pyproject.toml --extra docs -c requirements/dev.txt -o requirements/docs.txt
	$(LOCK) pyproject.toml --extra peers -c requirements/dev.txt -o requirements/peers.txt
	$(LOCK) pyproject.toml --extra ray --extra ray-train -c requirements/dev.txt -o requirements/ray.txt
	$(LOCK) pyproject.toml --extra kserve --no-annotate -o requirements/kserve.txt
	printf '%s\n' nvidia-pytriton 'numpy<2' onnxruntime flatbuffers packaging protobuf pillow pyyaml lmdb redis \
	    | $(LOCK) - --no-annotate --no-deps -o requirements/triton.txt

# Known weaknesses of what serving installs, by PyPI's advisories.
audit: .venv/dev
	@$(BIN)/pip-audit --strict --disable-pip --progress-spinner off -r requirements/serve.txt || \
	    { echo "Not clean, or not to be audited from here: see above. The versions are of" \
	    "$$(git log -1 --format=%cs requirements/serve.txt)."; exit 1; }

clean:
	rm -rf .venv dist model_store/*.mar
