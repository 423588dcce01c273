# Two commands do everything: `make serve` and `make test`. Both set up what is missing first.
PYTHON ?= python3.11
MODEL ?= cifar10
PORT ?= 8080
BIN := .venv/bin
ARCHIVE := model_store/$(MODEL).mar
SOURCES := $(wildcard handlers/*.py hardening/*.py export/*.py) rampart.py

ifneq ($(filter serve,$(or $(MAKECMDGOALS),serve)),)
ifeq ($(wildcard model_store/$(MODEL)/weights.safetensors $(ARCHIVE)),)
SHIPPED := $(patsubst model_store/%/weights.safetensors,%,$(wildcard model_store/*/weights.safetensors))
$(error model_store has no $(MODEL). Say make serve MODEL=... with one of: $(SHIPPED))
endif
endif

.PHONY: serve test check format lock audit clean

serve: $(ARCHIVE)
	@$(BIN)/rampart serve --model $(ARCHIVE) --port $(PORT)

test: .venv/dev
	@echo "Running the test suite (a few minutes; TorchServe is started for real) ..."
	@# Two files at a time; a thread each, or they would wait for each other's cores.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(ARCHIVE): .venv/serve $(wildcard model_store/$(MODEL)/*) $(SOURCES)
	@echo "Building $@ from model_store/$(MODEL) (export, parity gate, archive) ..."
	@$(BIN)/rampart archive model_store/$(MODEL) --out $@

.venv/serve: requirements/serve.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Rampart needs Python 3.11: install it, or name yours with PYTHON=..."; exit 1; }
	@echo "Installing what serving needs into .venv (about 5 GB, a few minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --require-hashes -r requirements/serve.txt
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

.venv/dev: .venv/serve requirements/dev.txt requirements/kserve.txt
	@echo "Installing what tests and benchmarks need ..."
	@$(BIN)/python -m pip install -q --require-hashes -r requirements/dev.txt
	@# KServe's client wants other versions of what we have: it gets a place of its own.
	@$(BIN)/python -m venv .venv/kserve
	@.venv/kserve/bin/python -m pip install -q --require-hashes -r requirements/kserve.txt
	@touch $@

.venv/peers: .venv/dev requirements/peers.txt
	@$(BIN)/python -m pip install -q --require-hashes -r requirements/peers.txt
	@touch $@

# Writes the lock files anew from pyproject.toml: hashes, and no address of any index.
lock:
	uv pip compile pyproject.toml -q --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-emit-find-links --upgrade -o requirements/serve.txt
	uv pip compile pyproject.toml -q --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-emit-find-links --extra evaluate --extra test --extra benchmark -c requirements/serve.txt \
	    --upgrade -o requirements/dev.txt
	uv pip compile pyproject.toml -q --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-emit-find-links --extra peers -c requirements/dev.txt \
	    --upgrade -o requirements/peers.txt
	echo kserve | uv pip compile - -q --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-emit-find-links --no-header --no-annotate --upgrade -o requirements/kserve.txt

# Known weaknesses of what serving installs, by PyPI's advisories.
audit: .venv/dev
	@$(BIN)/pip-audit --strict --disable-pip --progress-spinner off -r requirements/serve.txt || \
	    { echo "Not clean, or not to be audited from here: see above. The versions are of" \
	    "$$(git log -1 --format=%cs requirements/serve.txt)."; exit 1; }

clean:
	rm -rf .venv model_store/*.mar
