#!/usr/bin/env bash
# A Ray cluster inside a Slurm allocation, and one command of raylign as its job; the exit code is the command's.
# Submit it from a directory that all nodes see and that has .venv (bash launch/setup.sh --extras gpu,wandb):
#   sbatch --nodes=2 launch/clusters/slurm.sh align --config lora_8b_gpu.yaml policy.model=/shared/models/my-8b \
#     data.path=/shared/data/*.jsonl.gz evaluate.judge=/shared/models/my-judge run.storage=/shared/runs \
#     resources.num_workers=16 features.num_actors=16 evaluate.num_actors=16
# The last line asks for all 16 GPUs; without it eight of them are paid for and idle.
# Secrets travel by name: RAYLIGN_ENV="WANDB_API_KEY HF_TOKEN" sbatch ...   Ports: RAYLIGN_PORT (default 6379) and
# RAYLIGN_DASHBOARD_PORT (default 8265), for nodes that are shared.
#SBATCH --job-name=raylign
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@60
set -euo pipefail
[ $# -gt 0 ] || { echo "slurm.sh: give a command of raylign, for example: align --config my.yaml" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:?slurm.sh: run this with sbatch}"
if [ -d .venv ]; then export PATH=$PWD/.venv/bin:$PATH; fi
port=${RAYLIGN_PORT:-6379}
dashboard=${RAYLIGN_DASHBOARD_PORT:-8265}

# The token of this cluster: a file that only its owner can read, on storage that all nodes see.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$PWD/.raylign-token-$SLURM_JOB_ID
(umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}  # Slurm runs this script on it
cpus=${SLURM_CPUS_PER_TASK:-$(nproc)}
job=raylign-$SLURM_JOB_ID
pids=()
finish() {
  code=$?
  trap - EXIT TERM INT
  if [ "$code" -ge 128 ]; then ray job stop --address "http://127.0.0.1:$dashboard" "$job" >/dev/null 2>&1 || true; fi
  [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true
  wait || true
  rm -f "$RAY_AUTH_TOKEN_PATH"
  exit "$code"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

# wait until the head listens on ADDRESS PORT
await_head() {
  local limit=${RAYLIGN_HEAD_START_S:-120}
  SECONDS=0
  until (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; do
    if ! kill -0 "${pids[0]}" 2>/dev/null; then
      echo "slurm.sh: the head on $head ended before it listened on $1:$2" >&2
      exit 1
    elif [ "$SECONDS" -ge "$limit" ]; then
      echo "slurm.sh: the head on $head does not listen on $1:$2 after $limit s; raise RAYLIGN_HEAD_START_S" >&2
      exit 1
    fi
    sleep 1
  done
}

address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --all-ip-addresses | tr ' ' '\n' | grep -m1 '[0-9]') || {
  [ ${#nodes[@]} -eq 1 ] || { echo "slurm.sh: node $head has no address that others could reach" >&2; exit 1; }
  address=127.0.0.1
}
# srun does not take --cpus-per-task from the job since Slurm 22.05
srun --nodes=1 --ntasks=1 --cpus-per-task="$cpus" --overlap --nodelist="$head" \
  ray start --head --block --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 \
  --dashboard-port="$dashboard" --num-cpus="$cpus" --disable-usage-stats &
pids+=($!)
others=$((${#nodes[@]} - 1))
if [ "$others" -gt 0 ]; then
  await_head "$address" "$port"  # nodes that find no head give up
  srun --nodes="$others" --ntasks="$others" --cpus-per-task="$cpus" --overlap --exclude="$head" \
    ray start --block --address="$address:$port" --num-cpus="$cpus" --disable-usage-stats &
  pids+=($!)
fi

names=()
for name in ${RAYLIGN_ENV:-}; do names+=(--env "$name"); done
await_head 127.0.0.1 "$dashboard"
# in the background, so that a signal from Slurm is seen at once
raylign submit --address "http://127.0.0.1:$dashboard" --wait 300 --submission-id "$job" ${names[@]+"${names[@]}"} -- "$@" &
pids+=($!)
wait $!
