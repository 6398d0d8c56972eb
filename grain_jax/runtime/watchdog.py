"""Notices what would otherwise hang: a process that is gone, that failed, or that is late.

Every process has one thread that tells the others each second where it stands, through the
key-value store of `jax.distributed`, and reads where they stand. A process without others only
watches itself.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from grain_jax.failures import EXIT_RESTART as RESTART

_BEATS, _FAILED, _GONE = "grain_jax/beats/", "grain_jax/failed/", "grain_jax/gone/"
_LINGER = 10.0  # seconds that the coordinator waits for the others to read why it ends
_RESTART_HINT = "Start all again: they go on from the last checkpoint."

# What a process does, in the order of a step, and whether a limit holds: compiling has none.
_PHASES = {
  "starting": ("starts", False),
  "compiling": ("compiles step {step}", False),
  "data": ("waits for the data of step {step}", True),
  "step": ("is in step {step}", True),
  "saving": ("saves checkpoint {step}", True),
  "evaluating": ("evaluates at step {step}", True),
  "closing": ("closes its input", False),
  "done": ("is done", False),
}


class KeyValueStore(Protocol):
  """The part used here of `jax.distributed`'s key-value store."""

  def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
  def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


class Watchdog:
  """Tells where this process stands, and ends it when the run cannot go on.

  Attributes:
    name: of this process in messages, such as 'process 1 of 2 (node7)'.
  """

  def __init__(
    self,
    store: KeyValueStore | None = None,
    *,
    index: int = 0,
    count: int = 1,
    limit: float = 0.0,
    leave: Callable[[int], Any] = os._exit,
  ):
    """Watches nothing before `start`.

    Args:
      store: key-value store of all processes; None where there is one.
      index: this process.
      count: processes.
      limit: longest time without progress, in seconds; 0: any.
      leave: ends the process with an exit code.
    """
    self.name = f"process {index} of {count} ({socket.gethostname()})"
    self._store, self._index, self._count, self._limit = store, index, count, limit
    self._leave = leave
    self._interval = max(1.0, count / 32)  # every process reads what all have written
    self._heartbeat_timeout = max(30.0, 5 * self._interval)
    if limit:
      self._heartbeat_timeout = max(min(self._heartbeat_timeout, limit), 3 * self._interval)
    self._mark = ("starting", 0, time.monotonic())
    self._seen: dict[int, tuple[int, float]] = {}  # process -> (its last beat, when it came)
    self._beats: dict[int, dict[str, Any]] = {}
    self._beat = 0
    self._ending = threading.Lock()
    self._words: subprocess.Popen | None = None
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
    self._stopped = threading.Event()

  def start(self) -> None:
    """From here on the process is watched."""
    if self._store is not None:
      self._words = _last_words(self.name)
    self._thread.start()

  def set_phase(self, phase: str, step: int) -> None:
    """This process makes progress: it begins `phase` of `step`."""
    self._mark = (phase, step, time.monotonic())

  def done(self) -> None:
    """The work ended well; the others need not wait for this process any more."""
    self.set_phase("done", self._mark[1])
    self._publish_beat()

  def stop(self) -> None:
    """The end of watching, to be called before the store closes and before Python ends.

    Python ends a thread that comes back from the store's C++ by unwinding it, which aborts.
    """
    self._stopped.set()
    self._thread.join(_LINGER)
    self.stop_last_words()

  def stop_last_words(self) -> None:
    """Stops the subprocess of the last words: this process ends in an orderly way."""
    if self._words is not None and self._words.poll() is None:
      self._words.communicate(b".")
    self._words = None

  def shorten_timeout(self) -> None:
    """Something failed that a lost process would explain: a shorter heartbeat timeout."""
    self._heartbeat_timeout = min(self._heartbeat_timeout, max(5.0, 3 * self._interval))

  @property
  def heartbeat_timeout(self) -> float:
    """Seconds of silence after which a process counts as lost."""
    return self._heartbeat_timeout

  def end(self, code: int, line: str, *, tell: bool = True) -> None:
    """Prints one line and ends this process; the others learn the line and end too."""
    self._ending.acquire()  # for good: a process ends once
    print(line, file=sys.stderr, flush=True)
    self.stop_last_words()
    if self._store is not None:
      try:
        if tell:
          self._set(_FAILED, {"code": code, "line": f"{self.name}: {line}"})
        self._set(_GONE, {})
        if self._index == 0:
          self._wait_for_others()
      except Exception as error:  # the coordinator is lost: nobody is there to be told
        print(f"{self.name}: the others could not be told ({_first(error)})", file=sys.stderr)
    sys.stdout.flush()
    self._leave(code)

  def _wait_for_others(self) -> None:
    """The store lives in process 0: it stays until the others have read why the run ends."""
    until = time.monotonic() + _LINGER
    while time.monotonic() < until and len(self._get(_GONE)) < self._count:
      time.sleep(0.1)

  def _set(self, folder: str, value: dict[str, Any]) -> None:
    self._store.key_value_set(f"{folder}{self._index}", json.dumps(value), allow_overwrite=True)

  def _get(self, folder: str) -> dict[int, dict[str, Any]]:
    entries = self._store.key_value_dir_get(folder)
    return {int(key.rsplit("/", 1)[-1]): json.loads(value) for key, value in entries}

  def _publish_beat(self) -> None:
    if self._store is None:
      return
    phase, step, since = self._mark
    self._beat += 1
    beat = {"beat": self._beat, "phase": phase, "step": step, "host": socket.gethostname()}
    self._set(_BEATS, {**beat, "seconds": round(time.monotonic() - since, 1)})

  def _watch(self) -> None:
    while not self._stopped.is_set():
      try:
        verdict = self.check()
      except Exception as error:  # of the store: its process is gone
        line = f"process 0, which all meet at, is lost ({_first(error)}). {_RESTART_HINT}"
        verdict = (RESTART, line, False)
      if verdict is not None:
        self.end(verdict[0], verdict[1], tell=verdict[2])
        return
      self._sleep()

  def _sleep(self) -> None:
    """Until the next look. Where it took far longer, all of the process was stopped (Ctrl-Z, a
    suspended laptop): neither it nor the others are late for that."""
    began = time.monotonic()
    self._stopped.wait(self._interval)
    stood = time.monotonic() - began - self._interval
    if stood > self._interval:
      phase, step, since = self._mark
      self._mark = (phase, step, since + stood)
      self._seen = {p: (beat, when + stood) for p, (beat, when) in self._seen.items()}

  def check(self) -> tuple[int, str, bool] | None:
    """Tells and reads once: (exit code, line, whether to tell the others) if the run must end."""
    now = time.monotonic()
    if self._store is not None:
      self._publish_beat()
      for process, failure in sorted(self._get(_FAILED).items()):
        if process != self._index:
          return failure["code"], failure["line"], False
      self._beats = self._get(_BEATS)
      for process, beat in sorted(self._beats.items()):
        number, when = self._seen.get(process, (None, now))
        self._seen[process] = (beat["beat"], now if beat["beat"] != number else when)
        silent = now - self._seen[process][1]
        if process != self._index and beat["phase"] != "done" and silent > self._heartbeat_timeout:
          line = (
            f"process {process} of {self._count} ({beat['host']}) is lost: no sign of it for "
            f"{silent:.0f} s; it was last seen where it {_describe(beat)}. {_RESTART_HINT}"
          )
          return RESTART, line, True
    phase, step, since = self._mark
    if self._limit and _PHASES[phase][1] and now - since > self._limit:
      return RESTART, self._describe_late(now - since), True
    return None

  def _describe_late(self, seconds: float) -> str:
    """The line that says who is late."""
    head = f"no progress for {seconds:.0f} s (config.watchdog_seconds = {self._limit:g})"
    if len(self._beats) < 2:
      phase, step, _ = self._mark
      return f"{head}: the run {_describe({'phase': phase, 'step': step})}. {_RESTART_HINT}"
    order = list(_PHASES)
    position = {p: (b["step"], order.index(b["phase"])) for p, b in self._beats.items()}
    behind = [p for p in sorted(position) if position[p] == min(position.values())]
    if len(behind) == len(position):
      return f"{head}: every process {_describe(self._beats[0])}. {_RESTART_HINT}"
    late = ", ".join(
      f"process {p} of {self._count} ({self._beats[p]['host']}) is late: it "
      f"{_describe(self._beats[p])} for {self._beats[p]['seconds']:.0f} s"
      for p in behind[:4]
    )
    ahead = max(position, key=lambda p: position[p])
    return f"{head}: {late}; process {ahead} {_describe(self._beats[ahead])}. {_RESTART_HINT}"


def _describe(beat: dict[str, Any]) -> str:
  return _PHASES[beat["phase"]][0].format(step=beat["step"])


def _first(error: BaseException) -> str:
  return " ".join(str(error).split())[:120]


_LAST_WORDS = """
import sys
if not sys.stdin.buffer.read():
  print(sys.argv[1], file=sys.stderr, flush=True)
"""


def _last_words(name: str) -> subprocess.Popen:
  """A helper that says one line when this process dies without having said anything itself.

  A process that is killed cannot speak, and the runtime aborts a process whose coordinator is gone.
  """
  line = (
    f"{name} ended without a word: it was killed, ran out of memory, or process 0, which all meet "
    f"at, was lost. {_RESTART_HINT}"
  )
  return subprocess.Popen(
    [sys.executable, "-I", "-S", "-c", _LAST_WORDS, line],
    stdin=subprocess.PIPE,
    start_new_session=True,
  )
