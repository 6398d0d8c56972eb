#!/usr/bin/env bash
# Trains on all hosts of a TPU slice, which find each other by the TPU's metadata:
#   export TPU_NAME=my-pod ZONE=us-west4-a
#   launch/tpu_pod.sh setup        the repository and its packages, onto every host
#   launch/tpu_pod.sh --config=configs/cc12m.py --config.data.dir=gs://b/cc12m --workdir=gs://b/runs/cc12m
#   launch/tpu_pod.sh log [HOST]   what a host (0) says, as it comes; Ctrl-C ends only the looking
#   launch/tpu_pod.sh status       what each host does
#   launch/tpu_pod.sh stop         saves a checkpoint and ends
# The run is the hosts' own: this machine may be switched off (launch/tpu_host.sh). Workdir and data
# are gs:// paths: a mounted bucket cannot rename folders, as a checkpoint needs. Variables
# (docs/launching.md): PROJECT, REPOSITORY (grain_jax, in the home folder), SOURCE (a git URL; by
# default the files of this repository are copied) and REVISION, PREPARE (a command before setup),
# PYTHON, RUN (grain), RESTARTS (20), RESTART_SECONDS (40). DRY_RUN=1 prints the commands instead.
set -euo pipefail
: "${TPU_NAME:?is the name of the TPU slice}" "${ZONE:?is the zone of the TPU slice}"
cd "$(dirname "$0")/.."

repository=${REPOSITORY:-grain_jax}
place=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})

# call COMMAND...: runs or, with DRY_RUN, prints it.
call() {
  if [ "${DRY_RUN:-0}" != 0 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# on HOST COMMAND: in the home folder of a host, or of all.
on() {
  call gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" "--worker=$1" "--command=$2"
}

# at_host WORD...: the command that runs launch/tpu_host.sh there.
at_host() {
  local text
  printf -v text ' %q' "$@"
  printf 'cd %q && RUN=%q RESTARTS=%q RESTART_SECONDS=%q bash launch/tpu_host.sh%s' \
    "$repository" "${RUN:-grain}" "${RESTARTS:-20}" "${RESTART_SECONDS:-40}" "$text"
}

setup() {
  local fetch install
  if [ -n "${SOURCE:-}" ]; then
    printf -v fetch '{ [ -d %q/.git ] || git clone -q %q %q; } && git -C %q fetch -q origin %q && ' \
      "$repository" "$SOURCE" "$repository" "$repository" "${REVISION:-HEAD}"
    printf -v fetch '%sgit -C %q checkout -q --detach FETCH_HEAD' "$fetch" "$repository"
  else
    local archive
    archive=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "rm -rf '$archive'" EXIT
    git ls-files -z --cached --others --exclude-standard --deduplicate -- . ':!.venv' |
      while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
      COPYFILE_DISABLE=1 tar --null -czf "$archive/grain_jax.tar.gz" -T - # macOS: no ._ files
    call gcloud compute tpus tpu-vm scp "$archive/grain_jax.tar.gz" "$TPU_NAME:" "${place[@]}" \
      --worker=all
    printf -v fetch 'mkdir -p %q && tar -xzf grain_jax.tar.gz -C %q' "$repository" "$repository"
  fi
  printf -v install 'cd %q && PYTHON=%q bash launch/tpu_host.sh install' "$repository" "${PYTHON:-}"
  on all "{ ${PREPARE:-true}; } && $fetch && $install"
}

case ${1:-} in
  setup) setup ;;
  log) on "${2:-0}" "$(at_host log)" ;;
  status | stop) on all "$(at_host "$1")" ;;
  -*) on all "$(at_host start "$@")" ;;
  *)
    echo "error: launch/tpu_pod.sh ${1:-}: say setup, log, status, stop, or the run's flags" \
      "(--config=... --workdir=...)." >&2
    exit 2
    ;;
esac
