#!/usr/bin/env bash
# Submits launch/slurm_gpu.sbatch, each of whose settings is a variable:
#   NODES=2 PARTITION=gpu ACCOUNT=me launch/slurm.sh --config=configs/cc12m.py --workdir=/shared/runs/cc12m
# NODES (2), GPUS a node (8), PARTITION, ACCOUNT, QOS, TIME (24:00:00), NAME (grain), CPUS_PER_TASK (a
# task's share in the cores of a node), CONTAINER and MOUNTS, ENVIRONMENT, PYTHON, LOGS (logs), SBATCH
# (further flags). docs/launching.md says more. DRY_RUN=1 prints the commands instead.
set -euo pipefail
cd "$(dirname "$0")/.."

gpus=${GPUS:-8}
[[ "${NODES:-2} $gpus ${CPUS_PER_TASK:-1}" =~ ^[1-9][0-9]*\ [1-9][0-9]*\ [1-9][0-9]*$ ]] || {
  echo "error: NODES=${NODES:-2}, GPUS=$gpus and CPUS_PER_TASK=${CPUS_PER_TASK:-} are numbers from" \
    "1." >&2
  exit 2
}
command=(
  sbatch "--job-name=${NAME:-grain}" "--nodes=${NODES:-2}" "--ntasks-per-node=$gpus"
  "--gpus-per-node=$gpus" "--time=${TIME:-24:00:00}"
)
[ -z "${PARTITION:-}" ] || command+=("--partition=$PARTITION")
[ -z "${ACCOUNT:-}" ] || command+=("--account=$ACCOUNT")
[ -z "${QOS:-}" ] || command+=("--qos=$QOS")
[ -z "${CPUS_PER_TASK:-}" ] || command+=("--cpus-per-task=$CPUS_PER_TASK")
read -ra more <<<"${SBATCH:-}"
command+=(${more[@]+"${more[@]}"} launch/slurm_gpu.sbatch "$@")
if [ "${DRY_RUN:-0}" != 0 ]; then
  printf '%q ' "${command[@]}"
  echo
  exec bash launch/slurm_gpu.sbatch "$@"
fi
# The variables of the job go with it, also where a site sets SBATCH_EXPORT=NONE.
exec env SBATCH_EXPORT=ALL "${command[@]}"
