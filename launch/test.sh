#!/usr/bin/env bash
# Set up .venv with the development extras and the CPU build of vLLM, then lint, types (of all code but the tests),
# documentation (warnings are errors; the pages lie in build/docs) and tests. Arguments go to pytest.
# Tests that need neither Ray nor vLLM run beside the others; what they print comes after. Where an argument chooses
# tests (a path, -m, -k), all that it chose run one after the other.
set -euo pipefail
bash "$(dirname "$0")/setup.sh" --extras cpu,wandb,dev,docs,bench,sweep --vllm
cd "$(dirname "$0")/.."
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m sphinx -W --keep-going -n -E -q -b html docs build/docs
for argument in "$@"; do
  case $argument in
    -m* | -k* | [!-]*) exec .venv/bin/python -m pytest "$@" ;;
  esac
done
out=$(mktemp)
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not ray and not vllm" "$@" >"$out" 2>&1 &
light=$!
trap 'kill "$light" 2>/dev/null || true; rm -f "$out"' EXIT
trap 'exit 130' INT TERM
.venv/bin/python -m pytest -m "ray or vllm" "$@" && first=0 || first=$?
wait "$light" && second=0 || second=$?
cat "$out"
exit $((first ? first : second))
