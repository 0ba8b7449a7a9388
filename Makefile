# Every target needs Python >= 3.10 with venv, and nothing else: it builds its own environment in .venv first. `make help` lists them.

PYTHON ?= python3
OUTPUT ?= runs/digits
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help train ablation test check soak lint format native sanitize emulate wheel wheel-matrix clean

help: # lists the targets
	@sed -n 's/^\([a-z-]*\):[^#]*# /\1\t/p' Makefile | expand -t 16

train: $(VENV)/.installed-train # trains on scikit-learn's digits and evaluates
	$(BIN)/genrep train --output $(OUTPUT) --resume

ablation: $(VENV)/.installed-train # the five rows of the paper's ablation
	$(BIN)/genrep train --ablation --output runs/ablation

# Tensors of tests are tiny: more threads would only wait for each other. A file's tests run in one process, so that what they build and
# train is made once; tests/conftest.py says which files come first. No test measures by pytest-benchmark, which would warn of the processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -p no:benchmark -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed-test # all tests
	$(PYTEST)

# What one wants after each edit, in less than a minute; native code and packages are built by `make test` alone.
CHECKED := $(addprefix tests/,ops alignment scoring packaging/test_architecture.py)
CHECKED += tests/training/test_training.py::test_no_diffusion_stage_and_no_perception_stage
check: $(VENV)/.installed-test # operators on the CPU, aligner, optimizer, scorer, two steps of training
	$(PYTEST) -q -x -m "not slow" $(CHECKED)

# Rounds of the soak tests, each with a seed of its own, which is printed.
SOAK_MINUTES := 15
soak: $(VENV)/.installed-test # random walks, fuzzers, killed runs and damaged files, for SOAK_MINUTES
	$(BIN)/python tests/soak/soak.py $(SOAK_MINUTES)

# The CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, which must be loaded before Python. Python itself leaks at exit.
# Their reports are written where pytest would not show them without --capture=sys. They keep freed memory, which is not measured therefore.
SANITIZED := $(CURDIR)/build/sanitized
SANITIZERS = $$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)
SANITIZED_TESTS := $(addprefix tests/,ops/test_alignment.py ops/test_optimizer.py kernels)
SANITIZED_CASES := not triton and not inductor and not hold_steps
sanitize: $(VENV)/.installed-test # C++ kernels under sanitizers
	rm -rf $(SANITIZED)
	GENREP_FAST_SANITIZE=1 GENREP_FAST_CUDA=0 $(BIN)/pip install --no-build-isolation --no-deps --target $(SANITIZED) .
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=$(SANITIZED) OMP_NUM_THREADS=2 $(BIN)/pytest --capture=sys $(SANITIZED_TESTS) -k "$(SANITIZED_CASES)"

# The CUDA kernels, compiled for the host (tests/device), under the tests of the kernels: SANITIZE=1 for the sanitizers, EMULATED_TESTS for
# some of them. A process a processor; what measures memory or compiles by Triton is left to the other targets.
EMULATOR = $(CURDIR)/build/emulator$(if $(SANITIZE),-sanitized)
EMULATED_TESTS = tests/kernels tests/ops/test_alignment.py tests/ops/test_optimizer.py
EMULATED_CASES := not test_triton.py and not inductor and not hold_steps
emulate: $(VENV)/.installed-test # CUDA kernels on the host; SANITIZE=1: under sanitizers
	$(BIN)/python tests/device/build_emulator.py $(EMULATOR) $(if $(SANITIZE),--sanitize)
	$(if $(SANITIZE),LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0) \
		GENREP_FAST_EMULATED=$(EMULATOR)/_C_emulated.so $(PYTEST) -q $(if $(SANITIZE),--capture=sys) $(EMULATED_TESTS) -k "$(EMULATED_CASES)"

CXX_SOURCES = $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/device/*.h tests/device/*.cpp)
lint: $(VENV)/.installed-dev # ruff, clang-format and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --diff
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(VENV)/.installed-dev # formats Python and C++
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

native: $(VENV)/.installed-test # compiles what changed in csrc, and writes compile_commands.json
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/ninja -C "$$(ls -td build/temp.*/ | head -1)" -t compdb cxx python nvcc > compile_commands.json

# One wheel for every Python and for torch >= 2.11, in dist/; torch's own libraries are left to torch. setuptools copies whatever lies in
# build/lib into it, deleted modules too.
WHEEL_ARCHITECTURES := 8.0;8.6;8.9;9.0;10.0;12.0+PTX
wheel: $(VENV)/.installed-test repaired-wheel # one wheel for every Python, in dist/

.PHONY: repaired-wheel
repaired-wheel:
	rm -rf build dist
	GENREP_FAST_CUDA=$(or $(GENREP_FAST_CUDA),1) TORCH_CUDA_ARCH_LIST='$(WHEEL_ARCHITECTURES)' \
		$(BIN)/pip wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --wheel-dir dist build/wheel/*.whl

# Beside the oldest and the newest torch, each in an environment of its own without a compiler. Fetches gigabytes.
WHEEL_TORCHES := 2.11.0 2.14.1
wheel-matrix: wheel # tests the wheel beside the oldest and the newest torch
	$(BIN)/python tests/packaging/clean_environment.py dist/*.whl $(WHEEL_TORCHES)

# Runs stay: they took longer than anything that is deleted here.
clean: # everything that was built, but no runs
	rm -rf $(VENV) build dist *.egg-info .mypy_cache compile_commands.json genrep_fast/*.so genrep_fast/build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stem is an extra of pyproject.toml. Editable: sources are read where they lie, so that only a change of these files asks for another
# installation. torch comes first, because the native code is built with its headers.
INCLUDED_test := train
INCLUDED_dev := test train
$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*) | $(BIN)/pip
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e '.[$*]'
	@touch $@ $(addprefix $(VENV)/.installed-,$(INCLUDED_$*))

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
