# Two commands do everything, setup included: `make pretrain` and `make test`.

PYTHON ?= python3
RECIPE ?= configs/digits/pretrain.py
# Parallel test processes; each uses a core and up to 5 GB.
JOBS ?= 2
# The newest interpreter that runs. pyenv has shims for inactive versions, too, so try each.
NEWEST_PYTHON = for p in python3.13 python3.12 $$HOME/.pyenv/versions/3.13*/bin/python3.13 \
	$$HOME/.pyenv/versions/3.12*/bin/python3.12; do if $$p -c "" 2>/dev/null; then echo $$p; break; fi; done

.PHONY: pretrain post-train test slow parity lint compat gpu gpu-wheels benchmarks clean

pretrain: .venv/installed  ## train the demo model, evaluate it and draw the picture
	.venv/bin/stepjax pretrain $(RECIPE) $(ARGS)

post-train: .venv/installed  ## SFT, RLVR and RLHF from the demo's checkpoint, measured and drawn
	.venv/bin/python -m pip install --quiet --editable '.[cpu,plot]'
	.venv/bin/python benchmarks/post_train.py $(ARGS)

test: .venv-test/installed  ## the test suite, in its own environment, without torch
	.venv-test/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
		-m "not slow" $(ARGS)

slow: .venv-test/installed  ## what `make test` leaves out: every kernel shape on every chip (half an hour)
	.venv-test/bin/python -m pytest -n $(JOBS) -m slow $(ARGS)

parity: .venv-parity/installed  ## live comparison with PyTorch and Transformers
	.venv-parity/bin/python -m pytest tests/parity $(ARGS)

lint: .venv-dev/installed  ## style, types, and the Dockerfile
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/pyright --pythonpath .venv-dev/bin/python
	.venv-dev/bin/hadolint Dockerfile

compat: COMPAT_PYTHON ?= $(shell $(NEWEST_PYTHON))
compat:  ## a fast subset on the newest JAX, which needs Python 3.12 or 3.13
	@test -n "$(COMPAT_PYTHON)" || { echo "make compat: no Python 3.12 or 3.13 here; install one, or say COMPAT_PYTHON=PATH"; exit 1; }
	$(MAKE) .venv-compat/installed PYTHON=$(COMPAT_PYTHON)
	.venv-compat/bin/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 0 -m "not slow" $(COMPAT_TESTS) $(ARGS)

COMPAT_TESTS = tests/models/test_qwen3.py tests/models/test_paged_cache.py tests/models/test_attention.py \
	tests/models/test_step_vl.py tests/inference/test_async_engine.py tests/training/test_step.py

# For a machine with an H100 or H200, JAX on CUDA, flax, optax and Orbax. Needs no network and 8 minutes; DRY=1: on CPU.
gpu: $(if $(DRY),.venv-test/installed)  ## numerics and speed of one GPU
	$(if $(DRY),.venv-test/bin/python,$(PYTHON)) benchmarks/gpu.py $(if $(DRY),--dry) $(ARGS)

WHEEL_PLATFORMS = $(foreach libc,2_28 2_27 2_24 2_17,--platform manylinux_$(libc)_x86_64) --platform manylinux2014_x86_64
gpu-wheels:  ## the packages that such a machine lacks, for Python 3.12, into .whl/
	$(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 --implementation cp \
		$(WHEEL_PLATFORMS) --requirement benchmarks/gpu_wheels.txt --dest .whl
	du -sh .whl

benchmarks: .venv-parity/installed  ## remake every figure that a CPU can make, one script after the other
	.venv-parity/bin/python -m pip install --quiet --editable '.[cpu,benchmarks]'
	.venv-parity/bin/python benchmarks/all.py $(ARGS)

# Rebuild an environment when the project's requirements change.
.venv/installed: EXTRAS = cpu
.venv-test/installed: EXTRAS = cpu,test
.venv-parity/installed: EXTRAS = cpu,parity
.venv-dev/installed: EXTRAS = cpu,dev
.venv-compat/installed: EXTRAS = cpu,test

.venv/installed .venv-test/installed .venv-parity/installed .venv-dev/installed .venv-compat/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("stepjax needs Python 3.11 or newer; say PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv .venv-* runs build *.egg-info
