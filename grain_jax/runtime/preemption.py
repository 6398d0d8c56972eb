"""When a run is to stop: SIGTERM and Ctrl-C, answered at a point that all processes agree on.

Ctrl-C is SIGTERM of the user: what is there is saved, one line is said, and the code is 130. Before
there is anything to save, and the second time, it ends the process at once, also from within a
compilation: Python's own handlers run only between two instructions of the main thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from jax.experimental import multihost_utils

from grain_jax import failures


class Preempted(Exception):
  """The run was told to stop: everything is saved, and a later start goes on."""

  def __init__(self, step: int, *, interrupted: bool = False):
    self.code = failures.EXIT_INTERRUPTED if interrupted else failures.EXIT_RESTART
    by = "Ctrl-C" if interrupted else "SIGTERM"
    super().__init__(
      f"stopped by {by}: checkpoint {step} is saved; the same command goes on from it"
    )


class StopRequested(BaseException):
  """All processes stop here. Not an Exception: what an evaluation catches must not hold it up."""


class _Interrupts:
  """Ctrl-C in this process."""

  def __init__(self):
    self.watched = False  # a run will look at `noticed`, and save
    self.noticed = False

  def happen(self, end: Callable[[int, str], Any], *, several: bool) -> None:
    """One Ctrl-C."""
    if self.watched and not self.noticed:
      self.noticed = True
      if several:  # JAX's runtime sees SIGTERM, and tells the other processes
        os.kill(os.getpid(), signal.SIGTERM)
      return
    again = "interrupted again: the newest checkpoint stays as it is"
    end(failures.EXIT_INTERRUPTED, again if self.noticed else "interrupted")


_interrupts = _Interrupts()


@contextlib.contextmanager
def interruptible(end: Callable[[int, str], Any], *, several: bool) -> Iterator[None]:
  """Within it Ctrl-C is answered at once, by a thread; outside the main thread nothing changes.

  Args:
    end: ends the process with a code and a line.
    several: there are other processes, which are to stop too.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  closing = threading.Event()

  def listen() -> None:
    while data := os.read(reader, 16):
      if closing.is_set():
        return
      for number in data:
        if number == signal.SIGINT:
          _interrupts.happen(end, several=several)

  before = signal.signal(signal.SIGINT, lambda number, frame: None)
  wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  thread = threading.Thread(target=listen, name="interrupts", daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGINT, before)
    closing.set()
    os.write(writer, b"\0")
    thread.join()
    os.close(reader)
    os.close(writer)
    _interrupts.watched = _interrupts.noticed = False


class Preemption:
  """Whether SIGTERM or Ctrl-C asked the run to stop; a context.

  With several processes JAX catches SIGTERM and finds the point at which all stop. With one, this
  class does; before `watch` the signal ends the process at once, since nothing is there to save.
  """

  def __init__(self, *, several: bool):
    """`several`: the run has other processes, which all have joined."""
    self._several = several
    self._noticed = False
    self._before: Any = None
    self._asked = 0

  def watch(self) -> None:
    """From here on the signals are noticed instead of ending the process."""
    _interrupts.watched = True
    if not self._several and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._notice)

  def _notice(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._noticed = True

  def reached(self) -> bool:
    """Whether all processes are to stop now; all of them must ask equally often."""
    self._asked += 1
    if self._several:
      return multihost_utils.reached_preemption_sync_point(self._asked)
    return self._noticed or _interrupts.noticed

  def check(self) -> None:
    """Raises StopRequested where `reached`: for what lasts longer than a step."""
    if self.reached():
      raise StopRequested

  @property
  def interrupted(self) -> bool:
    """Whether it was Ctrl-C, in this process."""
    return _interrupts.noticed

  def __enter__(self) -> Preemption:
    return self

  def __exit__(self, *exception: Any) -> None:
    _interrupts.watched = False
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)
      self._before = None
