# Two commands do everything: `make demo` and `make test`. Both make .venv first; nothing else is installed.
PYTHON ?= python3
# An open range would pull the newest build with several GB of GPU libraries; set TORCH=torch==... for another one.
TORCH ?= torch==2.13.0
CUTLASS := nvidia-cutlass==4.2.0.0
VENV := .venv
RUN := OMP_NUM_THREADS=1 $(VENV)/bin/python

.PHONY: help demo test lint types tests matrix bench kernels clean

help:
	@echo "make demo   train a small GPT on 2 processes with ZeRO-3, print and write the report (about 3 minutes)"
	@echo "make test   lint, types and all tests"
	@echo "make matrix  the combinations of models, schedules and meshes that make test leaves out"
	@echo "make bench  side by side with DDP, FSDP2 and plain Inductor (about 15 minutes)"
	@echo "make kernels  compile the CUDA kernels, CUTLASS's too, and their binding to torch (minutes, needs nvcc and g++)"
	@echo "make clean  remove .venv and what the demo wrote"

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check '$(TORCH)' -c constraints.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(VENV)/.ready
	OMP_NUM_THREADS=1 TORCH_CPP_LOG_LEVEL=ERROR $(VENV)/bin/torchrun --nproc_per_node 2 -m examples.train_gpt

test: lint types tests

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .

types: $(VENV)/.ready
	$(VENV)/bin/mypy
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

tests: $(VENV)/.ready
	$(RUN) -m pytest -n 2 --dist loadfile --durations 20

# Most of them are in one file, so single tests are handed out.
matrix: $(VENV)/.ready
	$(RUN) -m pytest -n 2 --dist load --whole-matrix -m whole_matrix

bench: $(VENV)/.ready
	$(VENV)/bin/python -m benchmarks zero

# Headers alone: what the package asks for is for its Python interface, which nothing here imports. CUTLASS_PATH goes first.
kernels: $(VENV)/.ready
	test -n "$$CUTLASS_PATH" || $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps '$(CUTLASS)'
	$(VENV)/bin/python -m dspass kernels --cutlass

clean:
	rm -rf $(VENV) out
