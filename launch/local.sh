#!/usr/bin/env bash
# Trains on this machine, on all its devices:
#   launch/local.sh --config=configs/quickstart.py --workdir=runs/quickstart [--config.key=value ...]
# or with N processes, each with its own GPU where there are any:
#   launch/local.sh N --config=... --workdir=...
# When one process fails all end. Started again, up to RESTARTS times (3), is what ended with 75
# (preempted, or a process was lost) or was killed, but not what this script was told to end; see
# launch/restarts.sh. Ctrl-C saves a checkpoint and ends with 130; a second one ends at once.
# DRY_RUN=1 prints the commands instead.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/restarts.sh
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
signals=0 # that came
stopped=0 # of them, those that end the run
interrupted=0
told=0 # processes that were sent the last one
# Sends a signal to all processes. What does not end by a second one is killed soon after.
# shellcheck disable=SC2329  # by the trap
pass_on() {
  signals=$((signals + 1)) stopped=1
  [ "$1" != INT ] || interrupted=$((interrupted + 1))
  told=${#pids[@]}
  ((told)) || return 0
  kill "-$1" "${pids[@]}" 2>/dev/null || true
  ((interrupted < 2)) || kill_after 3
}
trap 'pass_on TERM' TERM
trap 'pass_on TERM' HUP # a terminal is closed
trap 'pass_on INT' INT

# Ctrl-Z: what is in another process group is not stopped by it.
# shellcheck disable=SC2329  # by the trap
suspend() {
  signals=$((signals + 1))
  ((!${#pids[@]})) || kill -STOP "${pids[@]}" 2>/dev/null || true
  kill -STOP $$
  ((!${#pids[@]})) || kill -CONT "${pids[@]}" 2>/dev/null || true
}
trap suspend TSTP

# kill_after SECONDS: kills all processes that are left by then.
killers=()
kill_after() {
  { sleep "$1"; kill -KILL "${pids[@]}"; } </dev/null >/dev/null 2>&1 &
  killers+=($!)
  disown $!
}

# Starts all processes; returns the exit code of the first that fails, when none is left.
run() {
  local command=("$python" -m grain_jax.main "$@") first=0 port=55527 before code i pid
  if ((processes > 1)); then
    [ "${DRY_RUN:-0}" != 0 ] ||
      port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    command+=("--coordinator_address=127.0.0.1:$port" "--num_processes=$processes")
  fi
  pids=() told=0
  for ((i = 0; i < processes; i++)); do
    ((!stopped)) || break
    local one=("${command[@]}")
    ((processes == 1)) || one=(env "CUDA_VISIBLE_DEVICES=$i" "${command[@]}" "--process_id=$i")
    if [ "${DRY_RUN:-0}" != 0 ]; then
      printf '%q ' "${one[@]}"
      echo
    else
      # In a process group of its own: Ctrl-C comes to it once, from here. Without `set -m` bash
      # would have it ignore SIGINT.
      set -m
      "${one[@]}" &
      pids+=($!)
      set +m
    fi
  done
  if ((stopped)); then # before all were there: the others are sent it too
    ((told == ${#pids[@]})) ||
      kill "-$( ((interrupted)) && echo INT || echo TERM)" "${pids[@]:told}" 2>/dev/null || true
    ((${#pids[@]})) || return "$( ((interrupted)) && echo 130 || echo 143)"
  fi
  while ((${#pids[@]})); do
    before=$signals code=0
    wait -n || code=$?
    ((signals == before)) || continue # a signal came, no process ended
    # None is left, or a program was not found.
    ((code != 127)) || [ -n "$(jobs -pr)" ] || break
    if ((code && !first)); then
      first=$code
      ((code != 2)) || kill -TERM "${pids[@]}" 2>/dev/null || true # wrong flags: the others wait
      # The others notice by themselves and say why; this is for one that does not.
      kill_after 90
    fi
  done
  # What was killed before `wait -n` was reached is not among what that returns.
  for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    ((first)) || first=$code
  done
  ((!${#killers[@]})) || kill "${killers[@]}" 2>/dev/null || true
  killers=() pids=()
  ((first != 137 || !interrupted)) || first=130 # killed here
  return "$first"
}

watch_workdir "$@"
for ((restarts = 0; ; restarts++)); do
  code=0
  run "$@" || code=$?
  ((!stopped)) && can_restart "$code" || exit "$code"
  made_progress "$restarts" || exit 1
  ((restarts < ${RESTARTS:-3})) || exit "$code"
  pause=$(restart_pause)
  echo "launch/local.sh: ended with code $code, starting again in $pause s" >&2
  rest "$pause"
  ((!interrupted)) || exit 130
  ((!stopped)) || exit "$code"
done
