# Every target makes .venv when it is missing (scripts/setup_venv.sh); nothing else is needed beforehand than
# Python 3.11 or later and a C compiler.
BIN := .venv/bin

.PHONY: setup demo test lint format clean

setup:
	@scripts/setup_venv.sh

demo: setup  ## quantize the tiny model, serve it, show what it cost and saved
	$(BIN)/python scripts/demo.py

test: setup  ## all tests, the real vLLM servers included
	@# Small products, imports and compilation keep one core busy: two files at a time.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not server and not vllm"
	@# In the order of their names: the file with the fewest tests is not the shortest.
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
		$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "server or vllm"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile*
	$(BIN)/shellcheck docker/*.sh scripts/*.sh .ci/run

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv demo-out .mypy_cache .pytest_cache .ruff_cache
