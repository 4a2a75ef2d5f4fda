# `make demo` and `make test` are all that a fresh clone needs: Python 3.11+ with venv, and a C++ compiler.
# Nothing is installed outside $(VENV).

PYTHON ?= python3
VENV ?= .venv
# Arguments for the pip line that installs torch, for example --index-url with PyTorch's index of CPU builds where the
# default index would bring the CUDA one.
TORCH_PIP_ARGS ?=
# Arguments for pytest, for example PYTEST_ARGS="-m 'not slow'".
PYTEST_ARGS ?=
# Arguments for the soak, for example SOAK_ARGS="--steps 1000000".
SOAK_ARGS ?=
# How long `make fuzz` looks, all fuzzers together.
FUZZ_SECONDS ?= 600
# The same for each fuzzer of `make fuzz-python`.
FUZZ_PYTHON_SECONDS ?= 60

SYSTEMS := mamba-va mamba-fer ag-ssm reno ms-vssm
BIN := $(VENV)/bin
ORACLE := build/oracle
LITERT := build/litert
STUBS := build/tensorrt-stubs
PIP := $(BIN)/python -m pip --disable-pip-version-check
# An editable install serves Python files from the tree, so only these make a new install necessary.
INSTALL_INPUTS := pyproject.toml constraints.txt $(shell find cmake runtimes/native -type f -not -path '*/tests/*')
CXX_FILES := $(shell find runtimes/native benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu')

# One pin list for what is installed and for what builds it. Builds are isolated, as they are for any user of pip: the
# backend fetches cmake and ninja only where the machine has none, and none of it lands in $(VENV). Isolation ignores
# `pip install -c`; it reads PIP_CONSTRAINT (pip before 25.3) or PIP_BUILD_CONSTRAINT (since).
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt

# pip hides what a build says unless it is given -v, so the pure-Python form is announced here.
SAY_IF_NATIVE = $(BIN)/python -c 'from affect_runtimes import native; print(native.unavailable_reason() or "native step library: ready")'

.DEFAULT_GOAL := help
.PHONY: help install install-dev oracle litert stubs demo export test test-arm64 test-full-size check lint format wheel clean \
	native native-sanitized fused-sanitized native-arm64 fuzz fuzz-python soak docs

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Affect Edge needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first, alone: the resolver then finds the pinned build in place and never looks for another.
$(VENV)/.torch: constraints.txt | $(VENV)/.created
	$(PIP) install $(TORCH_PIP_ARGS) torch
	touch $@

$(VENV)/.installed: $(INSTALL_INPUTS) $(VENV)/.torch
	$(PIP) install -e '.[export,demo]'
	@$(SAY_IF_NATIVE)
	touch $@

# AFFECT_WERROR: a warning of the native library fails its build here, and test_native.py then fails for want of it.
$(VENV)/.installed-dev: $(INSTALL_INPUTS) $(VENV)/.torch
	AFFECT_WERROR=ON $(PIP) install -e '.[export,demo,systems,voice,trust,docs,dev]'
	@$(SAY_IF_NATIVE)
	touch $@ $(VENV)/.installed

install: $(VENV)/.installed ## the package, editable, with what export and demo need

install-dev: $(VENV)/.installed-dev ## the same with what tests and checks need

# The reference that tests/oracles compare with, in a folder that only those tests see: the Python files alone, without
# CUDA kernels and dependencies. MAMBA_FORCE_BUILD: otherwise its setup.py asks GitHub for a CUDA wheel.
$(ORACLE)/.installed: constraints.txt | $(VENV)/.installed-dev
	rm -rf $(ORACLE)
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
		$(PIP) install --no-deps --no-build-isolation --target $(ORACLE) mamba-ssm einops
	touch $@

oracle: $(ORACLE)/.installed ## mamba-ssm's reference, on CPU, for the tests of tests/oracles: build/oracle

# The converter of the target tflite and what it imports, a gigabyte, in a folder that only its tests see.
$(LITERT)/.installed: requirements-litert.txt | $(VENV)/.installed-dev
	rm -rf $(LITERT)
	PIP_CONSTRAINT= $(PIP) install --no-deps --target $(LITERT) -r requirements-litert.txt
	touch $@

litert: $(LITERT)/.installed ## litert-torch, which converts for the target tflite: build/litert

# What TensorRT 10 takes, for the tests of its runtime. Alone: the stubs depend on TensorRT itself, gigabytes.
$(STUBS)/.installed: constraints.txt | $(VENV)/.installed-dev
	rm -rf $(STUBS)
	$(PIP) install --no-deps --target $(STUBS) tensorrt-stubs
	touch $@

stubs: $(STUBS)/.installed ## type stubs of TensorRT 10, which the tests of its runtime are held to: build/tensorrt-stubs

export: install ## the shipped student, exported and verified for this machine: out/bundles/student-cpu
	$(BIN)/affect-export --target cpu --output out/bundles/student-cpu --report out/bundles/student-cpu-report --force

demo: export ## the dashcam demo on a real clip: out/dashcam
	$(BIN)/affect-dashcam --demo-clip --bundle out/bundles/student-cpu --output out/dashcam

test: check docs native native-sanitized fused-sanitized native-arm64 oracle litert stubs ## every check and every test
	$(call need,chromium,chromium)
	$(call need,mosquitto,mosquitto)
	$(call need,espeak-ng,espeak-ng)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(PYTEST_ARGS)
	PYTHONPATH=$(LITERT) $(BIN)/python -m pytest -m litert tests/export
	$(MAKE) soak
	$(MAKE) test-full-size

# The native library alone. These want tools on the path, or cmake in $(VENV), and where one is missing they say which
# package of Debian has it; nothing is skipped. Usage: $(call configure,FOLDER), and so on.
test native native-sanitized native-arm64 fuzz: export PATH := $(PATH):$(abspath $(BIN))
need = @command -v $(1) >/dev/null || { echo "make $@ needs $(1): apt install $(2)" >&2; exit 1; }
need_sanitizers = @echo 'int main() {}' | clang++ -fsanitize=address,undefined -x c++ - -o /dev/null 2>/dev/null || { \
	echo "make $@ needs clang's sanitizers: apt install libclang-rt-dev (Debian 12: libclang-rt-14-dev)" >&2; exit 1; }
configure = cmake -S cmake -B $(1) -DAFFECT_WERROR=ON
build = cmake --build $(1) --parallel $$(nproc)
ctest = ctest --test-dir $(1) --output-on-failure --parallel $$(nproc)
GCC := -DCMAKE_C_COMPILER=gcc -DCMAKE_CXX_COMPILER=g++
CLANG := -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++
ARM64_ROOT := /usr/aarch64-linux-gnu

native: ## the native library with gcc, its tests, and its C example against what it installs: build/native-gcc
	$(call need,cmake,cmake)
	$(call need,g++,g++)
	$(call need,clang,clang)
	$(call configure,build/native-gcc) $(GCC) -DAFFECT_BUILD_TESTS=ON
	$(call build,build/native-gcc)
	$(call ctest,build/native-gcc)
	cmake --install build/native-gcc --prefix build/native-gcc/installed >/dev/null
	@set -e; for compiler in gcc clang; do \
		echo "print_affect.c with $$compiler"; \
		$$compiler -std=c99 -Wall -Wextra -Werror -pedantic -Ibuild/native-gcc/installed/include \
			runtimes/native/examples/print_affect.c -Lbuild/native-gcc/installed/lib -laffect_edge \
			-o build/native-gcc/print_affect_$$compiler; done

native-sanitized: ## the same with clang's address and undefined-behaviour sanitizers: build/native-sanitized
	$(call need,cmake,cmake)
	$(call need,clang++,clang)
	$(need_sanitizers)
	$(call configure,build/native-sanitized) $(CLANG) -DAFFECT_BUILD_TESTS=ON -DAFFECT_SANITIZE=address,undefined
	$(call build,build/native-sanitized)
	$(call ctest,build/native-sanitized)

# What a GPU's own memory checker would look for: the kernels of the fused step, on the processor, at the ends of memory.
fused-sanitized: native-sanitized install-dev ## the CUDA kernels' operations under the same sanitizers
	LD_PRELOAD=$$(clang++ -print-file-name=libclang_rt.asan-$$(uname -m).so) ASAN_OPTIONS=detect_leaks=0 \
		AFFECT_CUDA_HOST=build/native-sanitized/libaffect_cuda_host.so \
		PYTHONPATH=tests/support $(BIN)/python tests/runtimes/test_fused_step.py \
		>build/native-sanitized/fused.log 2>&1 || { tail -n 40 build/native-sanitized/fused.log; exit 1; }

native-arm64: native ## the same for a Jetson, emulated with qemu, and its results compared with this machine's
	$(call need,aarch64-linux-gnu-g++,g++-aarch64-linux-gnu)
	@test -e $(ARM64_ROOT)/include/stdio.h || { echo "make $@ needs a C library: apt install libc6-dev-arm64-cross" >&2; exit 1; }
	$(call need,qemu-aarch64,qemu-user)
	$(call configure,build/native-arm64) --toolchain $(CURDIR)/cmake/toolchains/aarch64-jetson.cmake -DAFFECT_BUILD_TESTS=ON
	$(call build,build/native-arm64)
	$(call ctest,build/native-arm64)
	runtimes/native/tests/compare_digests.sh build/native-gcc build/native-arm64 qemu-aarch64 -L $(ARM64_ROOT)

fuzz: ## weights files, manifests and saved states that nobody would write, for FUZZ_SECONDS: build/fuzz
	$(call need,cmake,cmake)
	$(call need,clang++,clang)
	$(need_sanitizers)
	$(call configure,build/fuzz) $(CLANG) -DAFFECT_FUZZ=ON -DAFFECT_SANITIZE=address,undefined
	$(call build,build/fuzz) --target fuzzers
	runtimes/native/tests/fuzz.sh build/fuzz $(FUZZ_SECONDS)

soak: install-dev ## minutes of one camera with faults, and 16 cameras at once (SOAK_ARGS="--steps 1000000" for an hour)
	$(BIN)/python benchmarks/soak.py $(SOAK_ARGS)

docs: install-dev ## the documentation as a site that needs no network: build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

fuzz-python: install-dev ## manifests, recordings, states, signatures and checkpoints that nobody would write: build/fuzz-python
	mkdir -p build/fuzz-python
	@set -e; cd build/fuzz-python; for name in fuzz_bundle fuzz_safetensors; do \
		PYTHONPATH=$(CURDIR)/tests/support $(abspath $(BIN))/python $(CURDIR)/tests/faults/$$name.py \
			-max_total_time=$(FUZZ_PYTHON_SECONDS); done

test-arm64: install ## bundles on 64-bit Arm, emulated with qemu: wants Debian, and a network the first time
	$(BIN)/affect-export --target cpu-arm64 --output build/arm64/bundles/student --force
	VENV=$(VENV) tests/arm64/run.sh build/arm64/bundles/student sdk/affect_edge/bundles/*

# One process each: together they would not fit into memory.
test-full-size: install-dev ## the five systems exported at full size, one after the other
	@set -e; for name in $(SYSTEMS); do \
		$(BIN)/python -m pytest -m full_size -k $$name --durations=1 tests/export/test_full_size.py; done

check: lint ## lint, types and the import rule
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 --no-warn-return-any sdk runtimes demos
	$(BIN)/lint-imports

lint: install-dev ## style of Python and C++, nothing changed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: install-dev ## style of Python and C++, applied
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: $(VENV)/.created ## dist/*.whl for this platform (AFFECT_PURE_PYTHON=1: for any)
	$(PIP) wheel --no-deps --wheel-dir dist .

clean: ## remove what was built, exported and cached; .venv stays
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
