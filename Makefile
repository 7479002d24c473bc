# make demo: install, train a Vision Permutator on real images, validate it, write a page about it.
# make test: install, run every test.
# make lint docs package coverage test-examples: the rest of what .ci/run asks of a change.
# make demo-token-label: a teacher, its label maps, and students with and without them.
PYTHON ?= python3
PY := .venv/bin/python
TEST := $(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-token-label test test-gpu test-examples coverage lint docs package install clean

install: .venv/installed

.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	touch $@

demo: install
	rm -rf output/train/demo
	$(PY) -m vip make-digits data/digits
	$(PY) train.py data/digits --config models/vip_nano4_32/digits.yaml --experiment demo
	PYTHON=$(PY) bash eval.sh data/digits/val output/train/demo -j 1 --predictions output/train/demo/predictions.npz
	$(PY) -m vip report output/train/demo

demo-token-label: install
	rm -rf output/demo-token-label
	$(PY) -m vip make-digits data/digits
	$(PY) studies/token_labels.py data/digits --recipe models/vip_nano4_32/digits.yaml --epochs 20 --teacher-epochs 20 \
		--students vip_nano4_32 --output output/demo-token-label

test: install
	$(TEST)

coverage: install
	$(TEST) --cov --cov-report=term:skip-covered --ignore=tests/examples

test-gpu: install
	$(PY) -m pytest -m gpu -s tests/benchmark tests/ops tests/training

test-examples: .venv/examples
	$(PY) -m pytest tests/examples

lint: install
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m pre_commit run --all-files --show-diff-on-failure

docs: .venv/docs
	$(PY) -m mkdocs build --strict

package: install
	$(PY) -m build

.venv/docs .venv/examples: .venv/installed
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[$(@F)]'
	touch $@

clean:
	rm -rf .venv output data build dist site *.egg-info
