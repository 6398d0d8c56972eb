#!/usr/bin/env bash
# Trains on all hosts of a TPU slice, which find each other by the TPU's metadata:
#   TPU_NAME=my-pod ZONE=us-west4-a launch/tpu_pod.sh --config=configs/cc12m.py --workdir=/mnt/runs/cc12m
# The repository with its .venv must stand in REPOSITORY (grain_jax, in the home folder) on every
# host, and workdir and data on storage that all see (a mounted bucket or file share). Each host
# starts its process again, up to RESTARTS times (20), when it ended with 75 (preempted, or a
# process was lost) or was killed, after a wait and while there are new checkpoints; see
# launch/restarts.sh. DRY_RUN=1 prints the command instead.
set -euo pipefail
: "${TPU_NAME:?is the name of the TPU slice}" "${ZONE:?is the zone of the TPU slice}"

printf -v arguments ' %q' "$@"
remote="cd ${REPOSITORY:-grain_jax} && . launch/restarts.sh && watch_workdir$arguments &&"
remote+=" RESTART_SECONDS=${RESTART_SECONDS:-10} && for restarts in \$(seq 0 ${RESTARTS:-20}); do"
remote+=" code=0; .venv/bin/python -m grain_jax.main$arguments || code=\$?;"
remote+=" can_restart \$code || exit \$code; made_progress \$restarts || exit 1;"
remote+=" [ \$restarts -lt ${RESTARTS:-20} ] || exit \$code; rest \$(restart_pause); done"
command=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" "--zone=$ZONE" --worker=all "--command=$remote")
if [ "${DRY_RUN:-0}" != 0 ]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
