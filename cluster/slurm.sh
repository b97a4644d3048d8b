#!/bin/bash
# sbatch cluster/slurm.sh STUDY STORE [options of `orchardist run`]
# Starts Ray on every node of the job, runs the study on it, and ends with the study's exit code. When the time is up,
# submit the same line again: the study goes on from the store.
#SBATCH --job-name=orchardist
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: sbatch cluster/slurm.sh STUDY STORE [options of orchardist run]" >&2
    exit 2
fi
study=$1 store=$2
shift 2

export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
export RAY_ROTATION_MAX_BYTES=67108864 RAY_ROTATION_BACKUP_COUNT=1 # what workers print has no bound otherwise
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # without it a step has one core, whatever the job has

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000)) # jobs of others may share the node
address=$head:$port
room=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --temp-dir="/tmp/ray-$SLURM_JOB_ID")
here=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head")

trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
"${here[@]}" ray start --head --block --port="$port" --ray-client-server-port=$((port + 20000)) \
    --include-dashboard=false "${room[@]}" &
if [ "$SLURM_NNODES" -gt 1 ]; then
    others=$((SLURM_NNODES - 1))
    # shellcheck disable=SC2016 # what stands in single quotes is for the other nodes
    srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" bash -c '
        until ray health-check --address "$0" 2> /dev/null; do sleep 2; done
        exec ray start --block --address "$0" "$@"
    ' "$address" "${room[@]:0:2}" &
fi

# The study begins when the head is there; the other nodes join it when they come.
for ((attempt = 1; ; attempt++)); do
    "${here[@]}" ray health-check --address "$address" 2> /dev/null && break
    if [ "$attempt" -ge 60 ]; then
        echo "Ray does not start on $head: see above" >&2
        exit 1
    fi
    sleep 2
done

"${here[@]}" python -m orchestrator.jobs.entrypoint "$study" --store "$store" --address "$address" "$@" &
driver=$!
trap 'kill -TERM "$driver"' TERM # the driver alone: it needs Ray to stop cleanly
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2> /dev/null; do # a signal ends `wait` early
    code=0
    wait "$driver" || code=$?
done
exit "$code"
