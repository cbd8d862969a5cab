# The commands in the README. Each works in a fresh clone and creates .venv if it is missing.

PYTHON ?= python3
DEVICE ?= auto
BIN := .venv/bin
SOURCES := kernels engine benchmarks tests setup.py
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo test test-cuda soak lint bench bench-gpu sanitize clean

setup: .venv/installed

.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch triton setuptools
	cuda=`$(BIN)/python -c 'import torch; print((torch.version.cuda or "13")[:2])'` && \
		$(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e ".[engine-cu$$cuda,test]"
	touch $@

demo: setup
	$(BIN)/python engine/jepa/synthetic.py data/demo --seed 1
	rm -rf runs/demo
	$(BIN)/deepspeed --num_accelerators 1 engine/train.py --config engine/configs/demo.yaml engine.device=$(DEVICE)
	$(BIN)/python engine/evaluate.py runs/demo/jepa-latest --train data/demo/train --val data/demo/val \
		--label shape --label count --label distance --device $(DEVICE)
	$(BIN)/python engine/visualize.py runs/demo/jepa-latest --images data/demo/val --log runs/demo/jepa.jsonl --out runs/demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The host's side of CUDA runs, on a GPU that computes nothing (tests/nullgpu/README.md). Makes an environment with a
# CUDA build of torch (5 GB), kept in CUDA_ENVS. TORCH=2.10.0 or 2.11.0: the part that other versions may break.
TORCH ?= 2.13.0
CUDA_ENVS ?= $(HOME)/.cache/jepa-test-cuda
CUDA_ENV = $(CUDA_ENVS)/$(TORCH)
NULLGPU = OMP_NUM_THREADS=1 tests/nullgpu/run $(CUDA_ENV)/bin/python
NULLGPU_TEST = $(NULLGPU) -m pytest tests/nullgpu --confcutdir=tests/nullgpu --tb=native --numprocesses 2
test-cuda: setup $(CUDA_ENV)/installed
	$(NULLGPU) tests/nullgpu/check.py
ifeq ($(TORCH),2.13.0)
	NULLGPU_CC=90 $(NULLGPU_TEST)
endif
	for cc in $(if $(filter 2.13.0,$(TORCH)),80 100,80 90 100); do NULLGPU_CC=$$cc $(NULLGPU_TEST) -m any_gpu || exit; done

# `===`: the build for CUDA, even where a local index offers one for CPUs.
$(CUDA_ENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CUDA_ENV)
	$(CUDA_ENV)/bin/pip install --quiet torch===$(TORCH)
	grep -v -E "^(torch|triton|nvidia)" constraints.txt > $(CUDA_ENV)/constraints.txt
	$(CUDA_ENV)/bin/pip install --quiet -c $(CUDA_ENV)/constraints.txt deepspeed numpy pydantic PyYAML safetensors \
		matplotlib tqdm pillow ninja setuptools pytest pytest-xdist
	touch $@

# Fault injection in real runs, seven to ten minutes: kills, damaged files, moves to other numbers of ranks.
soak: setup
	PYTHONPATH=kernels:engine OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/nullgpu/*.[ch]

# The C++ kernels under the address and undefined-behaviour sanitizers.
sanitize: setup
	tests/sanitize.sh

bench: setup
	$(BIN)/python benchmarks/kernels.py --device cpu
	$(BIN)/python benchmarks/masks.py

# Needs a GPU; fills benchmarks/results.
bench-gpu: setup
	@test -d "$(CHECKOUT)/src/models" || { echo "set CHECKOUT=PATH, a checkout of facebookresearch/ijepa"; exit 2; }
	$(BIN)/python benchmarks/kernels.py --device cuda
	for model in vit_huge_14 vit_large_16 vit_giant_16; do $(BIN)/python benchmarks/blocks.py --device cuda --model $$model || exit; done
	$(BIN)/python benchmarks/throughput.py --config engine/configs/in1k_vith14_ep300_ijepa.yaml --device cuda \
		--without all --with all --against reference=$(CHECKOUT) --reference-sdpa --reference-compile \
		engine.global_batch_size=null data.root_path=images

clean:
	rm -rf .venv build runs/demo data/demo
