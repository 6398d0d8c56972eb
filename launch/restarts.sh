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
  restart_workdir=${restart_workdir/#\~\//$HOME/}
  restart_steps=$(list_checkpoints)
}

# Checkpoints of steps past 0, which is saved before training; one a line, sorted. "?" where a bucket
# does not say.
list_checkpoints() {
  case $restart_workdir in
    "") ;;
    *://*)
      { in_bucket list "$restart_workdir/checkpoints" || echo "?"; } |
        grep -E '^([1-9][0-9]*|[?])$' || true
      ;;
    *)
      find -H "$restart_workdir/checkpoints" -mindepth 1 -maxdepth 1 -name '[1-9]*' \
        ! -name '*[!0-9]*' 2>/dev/null || true
      ;;
  esac | LC_ALL=C sort
}

# in_bucket list|read|write PLACE: names in a folder, or the text of a file; both may be missing, and
# an empty text is taken away. `restart_python`, where it is set, is how to start Python. Fails where
# the bucket cannot be reached.
in_bucket() {
  TF_CPP_MIN_LOG_LEVEL=3 "${restart_python[@]-${python:-python3}}" -c "$restart_in_bucket" "$@" ||
    { echo "warning: $2 cannot be reached; see the lines above." >&2; return 1; }
}
restart_in_bucket='
import sys
from etils import epath
verb, place = sys.argv[1], epath.Path(sys.argv[2])
if verb == "list" and place.exists():
  print(*[path.name for path in place.iterdir()], sep="\n")
elif verb == "read" and place.exists():
  print(place.read_text(), end="")
elif verb == "write":
  text = sys.stdin.read()
  if text:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
  else:
    place.unlink(missing_ok=True)
'

# read_note FILE: what write_note left there, in a folder or a bucket; nothing if it left nothing.
read_note() {
  case $1 in *://*) in_bucket read "$1" || true ;; *) cat "$1" 2>/dev/null || true ;; esac
}

# write_note FILE TEXT: an empty text takes it away.
write_note() {
  case $1 in
    *://*) printf %s "$2" | in_bucket write "$1" || true ;;
    *)
      if [ -n "$2" ]; then
        # The disk may be what failed.
        { mkdir -p "$(dirname "$1")" && printf '%s\n' "$2" >"$1"; } || true
      else
        rm -f "$1" || true
      fi
      ;;
  esac
}

# can_restart CODE: whether the same command may go better than the one that ended with CODE.
can_restart() {
  case $1 in 75 | 134 | 137 | 143) ;; *) return 1 ;; esac
}

# made_progress RESTARTS: to be asked when a run has ended, after so many restarts. It fails, and
# says why, when three in a row made no new checkpoint. One of which that is not known leaves the
# count as it is.
made_progress() {
  local steps
  steps=$(list_checkpoints)
  [ "$steps" != "?" ] || return 0
  if [ "$restart_steps" = "?" ]; then
    restart_steps=$steps
    return 0
  fi
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
