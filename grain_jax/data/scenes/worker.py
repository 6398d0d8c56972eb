"""A process of `workers.records`: `python -m grain_jax.data.scenes.worker NUMBER TASK`."""

from __future__ import annotations

import contextlib
import json
import sys

from grain_jax.data.scenes import scenes, workers


def main(worker: int, task: dict) -> None:
  """Writes records `worker`, `worker` + workers, ... of a split to stdout."""
  maker = scenes.Scenes(scenes.from_dict(task["settings"]))
  with contextlib.suppress(BrokenPipeError):
    for index in range(worker, task["size"], task["workers"]):
      sys.stdout.buffer.write(workers.encode(maker.record(task["split"], index)))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
  main(int(sys.argv[1]), json.loads(sys.argv[2]))
