#!/usr/bin/env bash
# For launch/k8s_jobset.yaml: before a new start of a pod, numbered RESTART_ATTEMPT, waits as
# launch/restarts.sh says; ends with 1 after three restarts without a new checkpoint.
#   RESTART_ATTEMPT=1 launch/k8s_wait.sh --workdir=DIR
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/restarts.sh
python=.venv/bin/python
[ -x "$python" ] || python=python3 # of the image

attempt=${RESTART_ATTEMPT:-0}
watch_workdir "$@"
# What was there when this pod started last: restarts without a new checkpoint, then checkpoints.
state="$restart_workdir/restarts-${JOB_COMPLETION_INDEX:-0}"
now=$restart_steps
if ((attempt > 0)); then
  before=$(read_note "$state")
  if [ -n "$before" ]; then
    restart_vain=$(head -n 1 <<<"$before")
    restart_steps=$(tail -n +2 <<<"$before")
  fi
  made_progress $((attempt - 1)) || exit 1
  pause=$(restart_pause)
  echo "launch/k8s_wait.sh: restart $attempt in $pause s"
  rest "$pause"
fi
write_note "$state" "$restart_vain
$now"
