"""`python -m grain_jax.data.feeding.worker MEMORY TASKS OFFSET LENGTH`: makes chunks of batches.

MEMORY and TASKS are descriptors: of the shared memory, where at OFFSET stands what `plan.describe`
says, and of a pipe from which all workers take tasks of one size. An answer is a line of JSON on
standard output. Imports neither JAX nor TensorFlow.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import threading
import traceback
from typing import Any

import numpy as np

from grain_jax import schema
from grain_jax.data import examples as examples_lib
from grain_jax.data.feeding import memory, plan

_FIRST_FOR_THE_KERNEL = 500  # where memory runs out: a worker before the run, which then says so


def main() -> int:
  threading.Thread(target=_end_with_the_run, daemon=True).start()
  _stand_first()
  gc.set_threshold(50_000, 10, 10)  # as `cli.prepare` has it: records are no cycles
  answers = os.dup(1)
  os.dup2(2, 1)  # what libraries print is no answer
  mapped, tasks, offset, length = map(int, sys.argv[1:])
  told = json.loads(os.pread(mapped, length, offset))
  try:
    _serve(told, mapped, tasks, answers)
  except BrokenPipeError:  # the run has ended
    return 0
  except Exception as error:
    answer = plan.describe_error(error)
    if answer is None:
      traceback.print_exc()
      return 1
    _tell(answers, {"step": None, "error": answer})
  return 0


def _end_with_the_run() -> None:
  """Ends this process with the one that started it, whatever it does and however that one ended."""
  os.read(0, 1)
  os._exit(0)


def _stand_first() -> None:
  try:
    with open("/proc/self/oom_score_adj", "w") as file:
      file.write(str(_FIRST_FOR_THE_KERNEL))
  except OSError:  # not Linux, or it is higher already
    return


def _serve(told: dict[str, Any], mapped: int, tasks: int, answers: int) -> None:
  chunk, size = told["chunk"], plan.task_size(told["chunk"])
  slots = memory.Slots(told["shapes"], told["slots"])
  slots.attach(mapped)
  os.close(mapped)
  examples = plan.restore(told)
  examples.logs = False  # the run does
  while len(task := os.read(tasks, size)) == size:
    step, slot, place, indices, epochs = plan.read_task(task)
    arrays = [a[place * chunk : (place + 1) * chunk] for a in slots.arrays(slot)]
    _tell(answers, {"step": step, **_make(examples, indices, epochs, arrays)})


def _make(
  examples: examples_lib.Examples,
  indices: np.ndarray,
  epochs: np.ndarray,
  arrays: list[np.ndarray],
) -> dict[str, Any]:
  """Makes a chunk in `arrays`; what there is to say of it."""
  known, false = len(examples.bad), examples.false_texts.copy()
  reads = examples.dataset.reads(examples.split)
  error = None
  try:
    image, *others = examples.chunk(indices, epochs, image=arrays[0]).arrays
    assert image is arrays[0]
    for target, values in zip(arrays[1:], others, strict=True):
      target[:] = values
  except Exception as raised:
    error = plan.describe_error(raised)
    if error is None:
      raise
  after = examples.dataset.reads(examples.split)
  return {
    "bad": list(itertools.islice(examples.bad.items(), known, None)),
    "false_texts": (examples.false_texts - false).tolist(),
    "reads": [after.records - reads.records, after.opens - reads.opens],
    "error": error,
  }


def _tell(answers: int, answer: dict[str, Any]) -> None:
  data = memoryview((json.dumps(answer) + "\n").encode())
  while data:
    data = data[os.write(answers, data) :]


assert next(iter(schema.BATCH)) == "image"  # which `Examples.chunk` writes in place

if __name__ == "__main__":
  sys.exit(main())
