#!/usr/bin/env bash
# One host of a TPU slice, called by launch/tpu_pod.sh over ssh: the run is in a session of its own,
# and goes on when the connection ends. launch/local.sh starts it again, up to RESTARTS times (20).
#   launch/tpu_host.sh install | start FLAGS... | log | status | stop
# What it says is in logs/RUN.log (RUN: grain).
set -euo pipefail
cd "$(dirname "$0")/.."
run=${RUN:-grain}
log=logs/$run.log pid_file=logs/$run.pid

# The launcher's process, where it runs; a number that another process has by now is none.
running() {
  local pid
  pid=$(cat "$pid_file" 2>/dev/null) && [ -n "$pid" ] &&
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q launch/local.sh && echo "$pid"
}

install() {
  local python="" candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "error: $HOSTNAME: ${PYTHON:-python3} is not Python 3.11 or newer with venv; see PREPARE" \
      "and PYTHON in docs/launching.md." >&2
    exit 1
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  local file files=()
  for file in requirements-tpu.txt requirements-gcs.txt; do
    [ ! -f "$file" ] || files+=(-r "$file")
  done
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${files[@]}"
  echo "$HOSTNAME: $PWD is ready"
}

start() {
  local pid
  if pid=$(running); then
    echo "error: $HOSTNAME: a run is there, process $pid. See launch/tpu_pod.sh log, or stop it." >&2
    exit 1
  fi
  if [ ! -x .venv/bin/python ]; then
    echo "error: $HOSTNAME: $PWD/.venv is not there: launch/tpu_pod.sh setup comes first." >&2
    exit 1
  fi
  mkdir -p logs
  echo "$(date -u +%FT%TZ) launch/tpu_host.sh start $*" >>"$log"
  # No terminal, no hang-up signal, no standard stream of the connection. A host that comes back
  # before the others have missed it (30 s) would be taken for a stranger.
  RESTARTS=${RESTARTS:-20} RESTART_SECONDS=${RESTART_SECONDS:-40} setsid nohup bash launch/local.sh "$@" </dev/null >>"$log" 2>&1 &
  echo $! >"$pid_file"
  sleep "${WATCH_SECONDS:-5}" # long enough for a wrong flag
  if ! running >/dev/null; then
    local code=0
    wait $! || code=$?
    ((code)) || exit 0
    echo "error: $HOSTNAME: the run ended at once, with code $code:" >&2
    tail -n 5 "$log" >&2
    exit "$code"
  fi
  echo "$HOSTNAME: runs as process $(running); launch/tpu_pod.sh log shows what it says"
}

status() {
  local pid
  if pid=$(running); then
    echo "$HOSTNAME: runs as process $pid: $(tail -n 1 "$log" | tr '\r' '\n' | tail -n 1)"
  else
    echo "$HOSTNAME: does not run; last line: $(tail -n 1 "$log" 2>/dev/null)"
  fi
}

# SIGTERM: the run saves, and is not started again.
stop() {
  local pid until=$((SECONDS + ${STOP_SECONDS:-300}))
  if ! pid=$(running); then
    echo "$HOSTNAME: does not run"
    return
  fi
  kill -TERM "$pid"
  while running >/dev/null; do
    if ((SECONDS >= until)); then
      echo "error: $HOSTNAME: process $pid still runs; launch/tpu_pod.sh log may say why." >&2
      exit 1
    fi
    sleep 0.5
  done
  echo "$HOSTNAME: ended: $(tail -n 1 "$log")"
}

case ${1:-} in
  install | status | stop) "$1" ;;
  start) start "${@:2}" ;;
  log) exec tail -n 100 -F "$log" ;;
  *)
    echo "error: launch/tpu_host.sh ${1:-}: say install, start, log, status or stop." >&2
    exit 2
    ;;
esac
