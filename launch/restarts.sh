# shellcheck shell=bash
# For the launchers, which source it: whether a run is started again, and after which wait.
# A restart waits RESTART_SECONDS (10), then 6 and 30 times as long (1 and 5 minutes) while there is
# no new checkpoint; three restarts in a row without one are the last, and the run ends with 1.
restart_workdir="" # of the run
restart_steps=""   # its checkpoints when it was last looked at
restart_vain=0     # restarts in a row that made none

# watch_workdir FLAG...: from here on the checkpoints in the run's workdir are watched.
watch_workdir() {
  while (($#)); do
    case $1 in
      --workdir=* | -workdir=*) restart_workdir=${1#*=} ;;
      --workdir | -workdir) restart_workdir=${2:-} ;;
    esac
    shift
  done
  restart_steps=$(list_checkpoints)
}

# Checkpoints of steps past 0, which is saved before training; one a line, sorted.
list_checkpoints() {
  [ -z "$restart_workdir" ] ||
    find "$restart_workdir/checkpoints" -mindepth 1 -maxdepth 1 -name '[1-9]*' \
      ! -name '*[!0-9]*' 2>/dev/null | LC_ALL=C sort || true
}

# can_restart CODE: whether the same command may go better than the one that ended with CODE.
can_restart() {
  case $1 in 75 | 134 | 137 | 143) ;; *) return 1 ;; esac
}

# made_progress RESTARTS: to be asked when a run has ended, after so many restarts. It fails, and
# says why, when three in a row made no new checkpoint.
made_progress() {
  local steps
  steps=$(list_checkpoints)
  if [ -n "$(LC_ALL=C comm -13 <(echo "$restart_steps") <(echo "$steps"))" ]; then
    restart_vain=0
  elif (($1 > 0)); then
    restart_vain=$((restart_vain + 1))
  fi
  restart_steps=$steps
  ((restart_vain >= 3)) || return 0
  echo "error: $restart_vain restarts in a row made no new checkpoint in" \
    "${restart_workdir:-the workdir}: this is the end. Mend what the lines above say, and start" \
    "the same command again." >&2
  return 1
}

# Seconds to wait before the next restart.
restart_pause() {
  local factors=(1 6 30)
  echo $((${RESTART_SECONDS:-10} * factors[restart_vain]))
}

# rest SECONDS: waits, and returns early after a signal that is trapped.
rest() {
  sleep "$1" >/dev/null 2>&1 &
  wait $! || kill $! 2>/dev/null || true
}
