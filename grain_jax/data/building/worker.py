"""`python -m grain_jax.data.building.worker RECIPE ROOT`: does the tasks on its standard input.

It ends with that, whatever it does: the build is gone, and another may write where this one does.
"""

from __future__ import annotations

import json
import os
import pathlib
import queue
import sys
import threading
import traceback

from grain_jax.data import sources
from grain_jax.data.building import tasks


def main() -> int:
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what libraries print is no answer
  recipe, root = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
  source, place = None, tasks.Place(root)
  lines: queue.SimpleQueue[str] = queue.SimpleQueue()
  threading.Thread(target=_read, args=(lines,), daemon=True).start()
  while True:
    line = lines.get()
    try:
      source = source or sources.make(recipe)
      tasks.perform(json.loads(line), source, place)
      answer = None
    except Exception as error:  # told to whoever asked, in one line
      answer = tasks.describe(error)
      if answer is None:
        traceback.print_exc()
        return 1
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _read(lines: queue.SimpleQueue[str]) -> None:
  for line in sys.stdin:
    lines.put(line)
  os._exit(0)


if __name__ == "__main__":
  sys.exit(main())
