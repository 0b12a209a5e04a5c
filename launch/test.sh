#!/usr/bin/env bash
# Set up .venv with the development extras and the CPU build of vLLM, then lint, types and tests. Arguments go to pytest.
set -euo pipefail
bash "$(dirname "$0")/setup.sh" --extras cpu,wandb,dev,bench --vllm
cd "$(dirname "$0")/.."
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
