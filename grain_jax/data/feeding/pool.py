"""Worker processes that make batches ahead of the run, in shared memory.

The processes are started afresh (a fork of a process that runs JAX may hang) and take tasks, a
chunk of a batch each, from one pipe, in the order of the batches: whoever is idle takes the next
one. What a chunk holds does not depend on who makes it. This process hands out tasks, takes in an
answer of a line a chunk, and lends the arrays as they lie in the shared memory: it sees no pixel.

However this process ends, its end of each worker's standard input closes, and the workers end.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from grain_jax import failures
from grain_jax.data import dataset as dataset_lib
from grain_jax.data import examples as examples_lib
from grain_jax.data.feeding import deaths, memory, plan

_PROGRAM = "grain_jax.data.feeding.worker"
_LENT = 4  # batches in use at a time that are lent; of further ones a copy is given
_OF_THE_RUN = (signal.SIGINT, signal.SIGTERM)
_AHEAD = 2  # chunks a worker, at least, that are made or wait for it


@dataclasses.dataclass
class _Batch:
  """A batch that is being made."""

  slot: int
  missing: int  # chunks without an answer
  error: Exception | None = None  # the first


class WorkerBatches:
  """Iterator without end of batches that workers make, each a list of arrays.

  Attributes:
    reads: what the workers have read of the split so far.
  """

  def __init__(
    self,
    examples: examples_lib.Examples,
    config: Any,
    *,
    shapes: memory.Shapes,
    chunk: int,
    start_step: int,
    pick: Callable[[int], tuple[np.ndarray, np.ndarray]],
  ):
    """Starts `config.data.workers` processes.

    Args:
      examples: of the training split; takes in which records are bad.
      config: whole configuration.
      shapes: of the arrays of a batch and their dtypes.
      chunk: records a task; divides the batch.
      start_step: of the first batch.
      pick: step -> records of its batch i64 [b / chunk, chunk], and the pass over its data that
        each is of, i64 [b / chunk, chunk].
    """
    if os.name != "posix":
      raise ValueError(
        f"config.data.workers = {config.data.workers}: this system cannot share memory by "
        "descriptors. Set it to 0: threads."
      )
    self._examples, self._pick = examples, pick
    self._next_step = self._first = start_step
    batch, workers = shapes[0][0][0], config.data.workers
    self._chunks = batch // chunk
    self._window = max(config.data.prefetch, 1, -(-_AHEAD * workers // self._chunks))
    self._count = self._window + _LENT
    self._slots = memory.Slots(shapes, self._count)
    told = plan.describe(
      examples, config, workers=workers, chunk=chunk, slots=self._count,
      shapes=[[list(shape), np.dtype(dtype).str] for shape, dtype in shapes],
    ).encode()  # fmt: skip
    descriptor = memory.create(self._slots.size + len(told))
    os.pwrite(descriptor, told, self._slots.size)
    self._slots.attach(descriptor)
    self._free = collections.deque(range(self._count))
    self._making: collections.OrderedDict[int, _Batch] = collections.OrderedDict()
    self._unsent: collections.deque[bytes] = collections.deque()
    self.reads = dataset_lib.ReadCounts(0, 0)
    self._killed_before = deaths.memory_kills()
    tasks, self._tasks = os.pipe()
    os.set_blocking(self._tasks, False)
    arguments = [str(n) for n in (descriptor, tasks, self._slots.size, len(told))]
    self._processes: list[subprocess.Popen] = []
    self._selector = selectors.DefaultSelector()
    self._finalizer = weakref.finalize(self, _end, self._processes, self._selector, self._tasks)
    try:
      for number in range(workers):
        process = _start(arguments, (descriptor, tasks))
        self._processes.append(process)
        self._selector.register(process.stdout, selectors.EVENT_READ, (number, bytearray()))
    except BaseException:
      self.close()
      raise
    finally:
      os.close(descriptor)
      os.close(tasks)
    self._schedule()

  def __iter__(self) -> WorkerBatches:
    return self

  def __next__(self) -> list[np.ndarray]:
    """The arrays of the next batch.

    Raises:
      examples.BadRecord: a record is bad, where the config says so.
      failures.TransientError: a worker was killed, or the storage of the records failed.
    """
    self._take_in(timeout=0)
    self._schedule()
    while (made := self._making[self._first]).missing:
      self._take_in(timeout=None)
    if made.error:
      raise made.error
    del self._making[self._first]
    self._first += 1
    arrays = self._hand_out(made.slot)
    self._schedule()
    return arrays

  def close(self) -> None:
    """Ends the workers, and waits for their end."""
    self._finalizer()

  def _hand_out(self, slot: int) -> list[np.ndarray]:
    lent = self._count - len(self._free) - len(self._making) - 1
    if lent >= _LENT:
      arrays = [array.copy() for array in self._slots.arrays(slot)]
      self._free.append(slot)
      return arrays
    return self._slots.lend(slot, self._free.append)  # by whatever thread collects garbage

  def _schedule(self) -> None:
    """Hands out tasks for as many batches as may be under way."""
    while len(self._making) < self._window and self._free:
      slot, step = self._free.popleft(), self._next_step
      chunks = list(zip(*self._pick(step), strict=True))
      self._making[step] = _Batch(slot, len(chunks))
      self._unsent.extend(
        plan.write_task(step=step, slot=slot, place=place, indices=indices, epochs=epochs)
        for place, (indices, epochs) in enumerate(chunks)
      )
      self._next_step += 1
    try:
      while self._unsent:
        os.write(self._tasks, self._unsent[0])  # whole or not at all: it is shorter than PIPE_BUF
        self._unsent.popleft()
    except BlockingIOError:  # the pipe is full: there is enough to do
      return
    except BrokenPipeError:  # there is no worker left, and its end says why
      return

  def _take_in(self, timeout: float | None) -> None:
    """Takes in answers: those that are there (timeout 0), or waits for some (None)."""
    for key, _ in self._selector.select(timeout):
      number, buffer = key.data
      data = os.read(key.fd, 1 << 16)
      if not data:
        raise self._death(number)
      buffer += data
      *lines, rest = bytes(buffer).split(b"\n")
      buffer[:] = rest
      for line in lines:
        self._take_in_answer(json.loads(line))

  def _take_in_answer(self, answer: dict[str, Any]) -> None:
    error = answer["error"] and plan.made_of(answer["error"])
    if answer["step"] is None:  # it could not begin
      raise error
    examples = self._examples
    for index, why in answer["bad"]:
      examples.note_bad(index, why)
    examples.false_texts += np.array(answer["false_texts"])
    self.reads = dataset_lib.ReadCounts(*(np.add(self.reads, answer["reads"]).tolist()))
    made = self._making[answer["step"]]
    made.missing -= 1
    made.error = made.error or error

  def _death(self, number: int) -> Exception:
    process = self._processes[number]
    code = process.wait()
    line = (
      f"worker {number} of the input pipeline (process {process.pid}) "
      f"{deaths.describe(code, self._killed_before)}"
    )
    if code >= 0:
      return RuntimeError(f"{line}; what it printed says why.")
    return failures.TransientError(
      f"{line}. Where memory runs out, lower config.data.workers (now {len(self._processes)}) or "
      "config.data.prefetch. The same command goes on from the last checkpoint."
    )


def _start(arguments: list[str], descriptors: tuple[int, ...]) -> subprocess.Popen:
  root = str(pathlib.Path(__file__).resolve().parents[3])
  path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
  one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
  # A launcher signals all processes of a job. This one saves, and needs its workers until then:
  # what is blocked here stays so in them.
  before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)
  try:
    return subprocess.Popen(
      [sys.executable, "-m", _PROGRAM, *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      bufsize=0,
      pass_fds=descriptors,
      env=os.environ | one_thread | {"PYTHONPATH": path},
    )
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(processes: list[subprocess.Popen], selector: selectors.BaseSelector, tasks: int) -> None:
  selector.close()
  os.close(tasks)
  for process in processes:
    process.kill()  # it only reads: nothing is half done
  for process in processes:
    process.wait()
    process.stdin.close()
    process.stdout.close()
