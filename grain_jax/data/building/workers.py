"""Tasks of a build done by worker processes on this machine.

They are started afresh, with `worker` alone: a fork of a process that runs TensorFlow or JAX may
hang, and `multiprocessing` would import the caller's main module in each of them. A worker reads a
line of JSON a task and answers with one; where this process dies, its input ends, and so does it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from grain_jax.data.building import tasks
from grain_jax.data.sources import base

_PROGRAM = "grain_jax.data.building.worker"


def executor(source: base.Source, place: tasks.Place, *, workers: int) -> tasks.Executor:
  """An executor over so many processes, which live as long as a call of it."""
  assert source.recipe is not None, f"the source {source.name} is of this process alone"

  def execute(todo: Iterator[tasks.Task], done: Callable[[tasks.Task], None]) -> None:
    first = next(todo, None)
    if first is None:
      return
    todo = itertools.chain([first], todo)
    results: queue.Queue[tuple[tasks.Task | None, Any]] = queue.Queue()
    lock, stopped = threading.Lock(), threading.Event()

    def next_task() -> tasks.Task | None:
      with lock:
        return None if stopped.is_set() else next(todo, None)

    def serve(process: subprocess.Popen) -> None:
      while (task := next_task()) is not None:
        results.put((task, _ask(process, task)))
      results.put((None, None))

    processes = [_start(source, place) for _ in range(workers)]
    threads = [threading.Thread(target=serve, args=(p,), daemon=True) for p in processes]
    try:
      for thread in threads:
        thread.start()
      working = workers
      while working:
        task, error = results.get()
        if task is None:
          working -= 1
        elif error is None:
          done(task)
        else:
          tasks.raise_described(error)
    finally:
      stopped.set()
      for process in processes:
        process.kill()
        process.wait()
      for thread in threads:
        thread.join()
      for process in processes:
        with contextlib.suppress(OSError):  # what was not sent to one that is gone
          process.stdin.close()
        process.stdout.close()

  return execute


def _start(source: base.Source, place: tasks.Place) -> subprocess.Popen:
  root = str(pathlib.Path(__file__).resolve().parents[3])
  path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
  return subprocess.Popen(
    [sys.executable, "-m", _PROGRAM, json.dumps(source.recipe), str(place.root)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {"PYTHONPATH": path},
  )


def _ask(process: subprocess.Popen, task: tasks.Task) -> dict[str, str] | None:
  """None where the task was done, else the error."""
  try:
    process.stdin.write(json.dumps(task) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
  except (OSError, ValueError):  # it is gone
    answer = ""
  if answer:
    return json.loads(answer)
  code = process.wait()
  why = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
  hint = ": the system may lack memory; lower --workers" if code in (-9, 137) else ""
  line = f"a worker of the build {why}{hint}. The same command goes on where it stopped."
  return {"kind": "transient" if code < 0 else "value", "line": line}
