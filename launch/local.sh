#!/usr/bin/env bash
# Trains on this machine, on all its devices:
#   launch/local.sh --config=configs/quickstart.py --workdir=runs/quickstart [--config.key=value ...]
# or with N processes, each with its own GPU where there are any:
#   launch/local.sh N --config=... --workdir=...
# When one process fails all end. Started again, up to RESTARTS times (3), is what ended with 75
# (preempted, or a process was lost) or was killed, but not what this script was told to end. DRY_RUN=1 prints the commands instead.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3

processes=1
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
  processes=$1
  shift
fi
((processes > 0)) || { echo "error: launch/local.sh $processes: at least 1 process." >&2; exit 2; }
if [[ "${1:-}" == --dry-run ]]; then
  DRY_RUN=1
  shift
fi

pids=()
stopped=0
# shellcheck disable=SC2329  # by the trap
pass_on() {
  stopped=1
  kill "-$1" "${pids[@]}" 2>/dev/null || true
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

# Starts all processes; returns the exit code of the first that fails, when none is left.
run() {
  local command=("$python" -m grain_jax.main "$@") first=0 killer="" port=55527 before code i
  if ((processes > 1)); then
    [ "${DRY_RUN:-0}" != 0 ] ||
      port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    command+=("--coordinator_address=127.0.0.1:$port" "--num_processes=$processes")
  fi
  pids=()
  for ((i = 0; i < processes; i++)); do
    local one=("${command[@]}")
    ((processes == 1)) || one=(env "CUDA_VISIBLE_DEVICES=$i" "${command[@]}" "--process_id=$i")
    if [ "${DRY_RUN:-0}" != 0 ]; then
      printf '%q ' "${one[@]}"
      echo
    else
      "${one[@]}" &
      pids+=($!)
    fi
  done
  while ((${#pids[@]})); do
    before=$stopped code=0
    wait -n || code=$?
    ((stopped == before)) || continue  # a signal came, no process ended
    ((code != 127)) || break           # none is left
    if ((code && !first)); then
      first=$code
      ((code != 2)) || kill -TERM "${pids[@]}" 2>/dev/null || true # wrong flags: the others wait
      # The others notice by themselves and say why; this is for one that does not.
      { sleep 90; kill -KILL "${pids[@]}"; } </dev/null >/dev/null 2>&1 &
      killer=$!
      disown "$killer"
    fi
  done
  [ -z "$killer" ] || kill "$killer" 2>/dev/null || true
  return "$first"
}

for ((attempt = 0; ; attempt++)); do
  code=0
  run "$@" || code=$?
  case $code in 75 | 134 | 137 | 143) ;; *) exit "$code" ;; esac
  ((!stopped && attempt < ${RESTARTS:-3})) || exit "$code"
  echo "launch/local.sh: ended with code $code, starting again" >&2
done
