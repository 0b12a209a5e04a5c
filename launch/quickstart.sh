#!/usr/bin/env bash
# Everything from a bare machine to a report: set up .venv, then run the main job on the embedded default.
# Arguments are passed on:  bash launch/quickstart.sh train.objective=dpo run.name=my-dpo
set -euo pipefail
bash "$(dirname "$0")/setup.sh"
cd "$(dirname "$0")/.."
exec .venv/bin/raylign align "$@"
