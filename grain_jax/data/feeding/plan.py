"""What a worker has to know to make the examples of a run, as JSON; tasks and answers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from grain_jax import config as configs
from grain_jax import failures, places
from grain_jax.data import dataset as dataset_lib
from grain_jax.data import examples as examples_lib
from grain_jax.data import mixture, token_ids

_HEAD = 3  # numbers of a task before its records


def describe(examples: examples_lib.Examples, config: Any, *, workers: int, **more: Any) -> str:
  """JSON from which `restore` makes the same examples in another process.

  Args:
    examples: of a training split.
    config: whole configuration.
    workers: processes that share the machine.
    more: whatever else they must know.
  """
  dataset = examples.dataset
  parts = dataset.parts if isinstance(dataset, mixture.Mixture) else []
  found = {
    "config": config.to_dict(),
    "split": examples.split,
    "negatives": examples.negatives,
    "datasets": [
      _dataset(data, split)
      for data, split in [(p.dataset, p.split) for p in parts] or [(dataset, examples.split)]
    ],
    "mixture": parts and {"sources": dataset.sources, "split": dataset.split, "seed": dataset.seed},
    "workers": workers,
    **more,
  }
  return json.dumps(found)


def _dataset(dataset: dataset_lib.Dataset, split: str) -> dict[str, Any]:
  """Of the manifest what reading needs: the rest can be long."""
  manifest = {"splits": {split: {"shards": dataset.manifest["splits"][split]["shards"]}}}
  manifest[token_ids.KEY] = dataset.tokens
  return {"directory": str(dataset.directory), "manifest": manifest, "stamps": dataset.stamps}


def restore(told: dict[str, Any]) -> examples_lib.Examples:
  """The examples that `describe` described; shards are opened when they are read."""
  config = configs.from_json(json.dumps(told["config"]))
  opened = [
    dataset_lib.Dataset(
      d["directory"],
      d["manifest"],
      local_copy=config.data.local_copy,
      stamps={name: stamp and places.Stamp(*stamp) for name, stamp in d["stamps"].items()},
    )
    for d in told["datasets"]
  ]
  dataset: dataset_lib.Dataset | mixture.Mixture = opened[0]
  if told["mixture"]:
    dataset = mixture.Mixture(**told["mixture"], opened=opened)
  return examples_lib.Examples(
    dataset, told["split"], config, training=True, negatives=told["negatives"]
  )


def task_size(chunk: int) -> int:
  """Bytes of a task of so many records."""
  return 8 * (_HEAD + 2 * chunk)


def write_task(
  *, step: int, slot: int, place: int, indices: np.ndarray, epochs: np.ndarray
) -> bytes:
  """A task: records i64 [chunk], and the pass over its data that each is of, i64 [chunk].

  They are for the place-th chunk of a batch that is made in a slot.
  """
  return np.array([step, slot, place, *indices, *epochs], np.int64).tobytes()


def read_task(data: bytes) -> tuple[int, int, int, np.ndarray, np.ndarray]:
  """(step, slot, place, indices, epochs) of `write_task`."""
  values = np.frombuffer(data, np.int64)
  step, slot, place = values[:_HEAD].tolist()
  indices, epochs = values[_HEAD:].reshape(2, -1)
  return step, slot, place, indices, epochs


def describe_error(error: BaseException) -> dict[str, str] | None:
  """An error as JSON, for `raise_described` in the run; None: a fault of the program."""
  if isinstance(error, examples_lib.BadRecord):
    return {"kind": "bad", "line": str(error)}
  if isinstance(error, dataset_lib.ShardChanged):
    return {"kind": "changed", "line": str(error)}
  if failures.restart_helps(error):
    return {"kind": "transient", "line": failures.one_line(error)}
  if isinstance(error, (ValueError, ImportError, OSError)):
    return {"kind": "value", "line": failures.one_line(error)}
  return None


def made_of(error: dict[str, str]) -> Exception:
  """The error that `describe_error` described."""
  kinds = {
    "bad": examples_lib.BadRecord,
    "changed": dataset_lib.ShardChanged,
    "transient": failures.TransientError,
  }
  return kinds.get(error["kind"], ValueError)(error["line"])
