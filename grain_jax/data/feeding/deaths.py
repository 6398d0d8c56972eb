"""Why a worker process ended: a signal, want of memory, or a fault of the program."""

from __future__ import annotations

import pathlib
import re
import signal

# Counts of processes that the kernel killed for want of memory: of this container, of the machine.
_COUNTS = (
  "/sys/fs/cgroup/memory.events",
  "/sys/fs/cgroup/memory/memory.oom_control",
  "/proc/vmstat",
)
_LINE = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def memory_kills() -> dict[str, int]:
  """{file: processes killed for want of memory} of the counts that this system has."""
  found = {}
  for path in _COUNTS:
    try:
      match = _LINE.search(pathlib.Path(path).read_text())
    except OSError:
      continue
    if match:
      found[path] = int(match.group(1))
  return found


def describe(code: int, before: dict[str, int]) -> str:
  """What ended a process, in words.

  Args:
    code: its exit code, negative for a signal.
    before: `memory_kills` when it was started.
  """
  if code >= 0:
    return f"ended with code {code}"
  try:
    name = signal.Signals(-code).name
  except ValueError:
    name = f"signal {-code}"
  if -code == signal.SIGKILL:
    now = memory_kills()
    risen = [path for path, count in before.items() if now.get(path, 0) > count]
    if risen:
      return f"was killed by the system for want of memory ({name}; oom_kill rose in {risen[0]})"
    if not before:
      return f"was killed by {name}, perhaps by the system for want of memory"
  return f"was killed by {name}"
