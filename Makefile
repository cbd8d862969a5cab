# The commands in the README. Each works in a fresh clone and creates .venv if it is missing.

PYTHON ?= python3
DEVICE ?= auto
BIN := .venv/bin
SOURCES := kernels engine benchmarks docs tests setup.py
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo doctor quick test test-cuda test-eval walk soak lint bench bench-gpu bench-wheels sanitize clean

# uv looks for a driver: the build of torch for its CUDA, or for the CPU where there is none. Without a way to torch's
# own index, pip's choice.
FIRST = -c constraints.txt torch triton numpy setuptools
TORCH_THAT_FITS = UV_HTTP_RETRIES=1 $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend=auto $(FIRST)

setup: .venv/installed

.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt uv
	$(TORCH_THAT_FITS) 2> .venv/uv.log || $(BIN)/pip install --quiet $(FIRST)
	cuda=`$(BIN)/python -c 'import torch; print((torch.version.cuda or "13")[:2])'` && \
		$(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e ".[engine-cu$$cuda,test]"
	touch $@

EVALUATE = $(BIN)/python engine/evaluate.py
JUDGED = runs/demo/jepa-latest --out runs/demo/eval --device $(DEVICE)
demo: setup
	$(BIN)/python engine/jepa/data/synthetic.py data/demo --seed 1
	rm -rf runs/demo
	$(BIN)/deepspeed --num_accelerators 1 engine/train.py --config engine/configs/demo.yaml engine.device=$(DEVICE)
	$(EVALUATE) knn $(JUDGED) --train data/demo/train --val data/demo/val
	$(EVALUATE) linear $(JUDGED) --train data/demo/train --val data/demo/val
	$(EVALUATE) clevr $(JUDGED) --data data/demo
	$(EVALUATE) report runs/demo/eval
	$(BIN)/python engine/visualize.py runs/demo/jepa-latest --images data/demo/val --log runs/demo/jepa.jsonl \
		--out runs/demo

# Whether this machine and what is installed can train. DATA=PATH: looks at every image of a data set instead.
doctor: setup
	$(BIN)/python engine/doctor.py --device $(DEVICE) $(if $(DATA),--data "$(DATA)")

# What a change needs before it is shown: lint, and the tests that need little time, no GPU and no other processes.
# TESTS=tests/data: of one room.
TESTS ?= tests
quick: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) -m "not ranks and not slow and not gpu" --numprocesses 2 --dist loadfile

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The host's side of CUDA runs, on a GPU that computes nothing (tests/nullgpu/README.md). Makes an environment with a
# CUDA build of torch (5 GB), kept in CUDA_ENVS. TORCH=2.10.0 or 2.11.0: the part that other versions may break.
TORCH ?= 2.13.0
CUDA_ENVS ?= $(HOME)/.cache/jepa-test-cuda
CUDA_ENV = $(CUDA_ENVS)/$(TORCH)
NULLGPU = OMP_NUM_THREADS=1 tests/nullgpu/run $(CUDA_ENV)/bin/python
NULLGPU_TEST = $(NULLGPU) -m pytest tests/nullgpu --confcutdir=tests/nullgpu --tb=native --assert=plain --numprocesses 2
test-cuda: setup $(CUDA_ENV)/installed
	$(NULLGPU) tests/nullgpu/check.py
ifeq ($(TORCH),2.13.0)
	NULLGPU_CC=90 $(NULLGPU_TEST)
endif
	for cc in $(if $(filter 2.13.0,$(TORCH)),80 100,80 90 100); do NULLGPU_CC=$$cc $(NULLGPU_TEST) -m any_gpu || exit; done

# `===`: the build for CUDA, even where a local index offers one for CPUs. Each torch takes setuptools of its own choice.
$(CUDA_ENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CUDA_ENV)
	$(CUDA_ENV)/bin/pip install --quiet torch===$(TORCH)
	(grep -v -E "^(torch|triton|nvidia-[a-z0-9-]*|setuptools)==" constraints.txt; echo "torch===$(TORCH)") > $(CUDA_ENV)/constraints.txt
	$(CUDA_ENV)/bin/pip install --quiet -c $(CUDA_ENV)/constraints.txt deepspeed numpy pydantic PyYAML safetensors \
		matplotlib tqdm pillow ninja setuptools pytest pytest-xdist
	touch $@

# The tests of the protocols that need torchvision, in the same environment: its builds fit CUDA builds of torch.
test-eval: setup $(CUDA_ENV)/installed
	$(CUDA_ENV)/bin/pip install --quiet -c $(CUDA_ENV)/constraints.txt hypothesis torchvision timm torchmetrics pycocotools
	OMP_NUM_THREADS=1 $(CUDA_ENV)/bin/python -m pytest --numprocesses 2 --dist loadfile \
		tests/probes/test_finetune.py tests/probes/test_segment.py tests/probes/test_detect.py

# Types every command of README.md and docs/ on a clone of the last commit, an hour; WALK="--pages health" some of them.
walk: setup
	PYTHONPATH=tests/support $(BIN)/python tests/support/walk.py $(WALK)

# Fault injection in real runs, seven to ten minutes: kills, damaged files, moves to other numbers of ranks.
soak: setup
	PYTHONPATH=kernels:engine:tests/support OMP_NUM_THREADS=1 $(BIN)/python tests/support/soak.py

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

# Needs a GPU, for BUDGET_S seconds; fills benchmarks/results. A Python named on the command line (PYTHON=python3) is used
# as it is, without .venv.
BUDGET_S ?= 600
GIVEN := $(filter command,$(origin PYTHON))
bench-gpu: $(if $(GIVEN),,setup)
	$(if $(GIVEN),$(PYTHON),$(BIN)/python) benchmarks/gpu.py --budget $(BUDGET_S) $(if $(CHECKOUT),--checkout $(CHECKOUT))

# What bench-gpu needs and a machine with torch may lack, for one without network: 6 MB of wheels for its Python.
WHEELS_FOR ?= 3.12
LINUX := $(foreach glibc,17 24 27 28,--platform manylinux_2_$(glibc)_x86_64) --platform manylinux2014_x86_64
bench-wheels: setup
	rm -rf wheels
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation -c constraints.txt -w wheels deepspeed
	$(BIN)/pip download --quiet --only-binary=:all: --python-version $(WHEELS_FOR) $(LINUX) -c constraints.txt -d wheels \
		einops hjson msgpack ninja packaging psutil py-cpuinfo pydantic tqdm

clean:
	rm -rf .venv build runs/demo data/demo
