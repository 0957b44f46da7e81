# make demo: train and test an AW network on real handwritten digits.  make demo-detection: the same for a detector.
# make test: all tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-detection test test-fast lint format lock clean

# pictures this small gain little from a second thread, and lose much where another program wants the core
demo: $(VENV)/installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python lightning_cli.py fit --test_after_fit true

# threads that wait spin but a moment: where another program wants the core, long spinning slows both many times over
demo-detection: $(VENV)/installed
	GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-1000} $(BIN)/python lightning_cli.py fit -c configs/recipes/digit_scenes.yaml \
		-c configs/models/aw_faster_rcnn_resnet18_small.yaml --test_after_fit true

# a process for each core, of which four are enough: each imports torch, and holds a gigabyte or two
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test: $(VENV)/installed
	$(PYTEST)

test-fast: $(VENV)/installed
	$(PYTEST) -m "not slow"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# constraints.txt pins what was tested together, and uv.txt what installs it, by the hash of each file; uv takes seconds
# where pip takes minutes
$(VENV)/installed: pyproject.toml constraints.txt uv.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r uv.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

# takes the newest of everything into constraints.txt and uv.txt; run the tests, and read the diff before it is kept
LOCK := $(BIN)/uv pip compile --quiet --universal --upgrade --generate-hashes --no-annotate --custom-compile-command "make lock"
lock: $(VENV)/installed
	$(LOCK) pyproject.toml --extra dev -o constraints.txt
	echo uv | $(LOCK) - --python-version 3.11 -o uv.txt

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
