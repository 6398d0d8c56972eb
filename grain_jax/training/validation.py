"""The loss on images that are not trained on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from absl import logging

from grain_jax.data import dataset as dataset_lib
from grain_jax.data import pipeline
from grain_jax.models import grain
from grain_jax.runtime import mesh as meshes
from grain_jax.runtime import metrics
from grain_jax.training import steps

_SAME = ("iou", "region_accuracy")  # reported beside the losses


def batch_size(config: ml_collections.ConfigDict, records: int, shards: int) -> int:
  """Images a batch: those of training, or as many as the split and the devices allow.

  Raises:
    ValueError: the split has fewer records than devices share a batch.
  """
  size = min(config.batch_size, records // shards * shards)
  if not size:
    raise ValueError(
      f"config.validation.split = {config.validation.split!r} has {records} records, fewer than "
      f"the {shards} devices that share a batch. Set config.validation.batches = 0."
    )
  return size


def check(config: ml_collections.ConfigDict, dataset: dataset_lib.Dataset) -> None:
  """Raises a one-line ValueError where the data lacks the split."""
  split = config.validation.split
  if config.validation.batches and split not in dataset.splits:
    raise ValueError(
      f"config.validation.split = {split!r} is not in {config.data.dir}, which has "
      f"{', '.join(dataset.splits)}. Build with --val_fraction, or set "
      "config.validation.batches = 0."
    )


def num_microbatches(config: ml_collections.ConfigDict, size: int, shards: int) -> int:
  """In how many microbatches `size` images are encoded: none larger than those of training."""
  largest = config.batch_size // shards // config.accumulate
  each = size // shards
  return next(n for n in range(-(-each // largest), each + 1) if each % n == 0)


class Validation:
  """Means of the training losses over the first batches of a split, without dropout.

  The same images and captions each time, all patches, and the teacher and the thresholds that the
  next step will have. A contrastive loss depends on how many it contrasts: 'validation/batch_size'
  says it. Bad records are left out and counted; however many, they do not end a run.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    model: grain.Grain,
    mesh: jax.sharding.Mesh,
    dataset: dataset_lib.Dataset,
  ):
    """`config` is whole and resolved; see `check`."""
    v = config.validation
    records = dataset.num_records(v.split)
    self._config = ml_collections.ConfigDict(config.to_dict())
    self._config.batch_size = batch_size(config, records, meshes.num_shards(mesh))
    self._config.data.update(split=v.split, flip=False, resize="squash", workers=0)
    self._config.data.update(max_bad_in_a_row=0, max_bad_fraction=1.0)
    self._number = min(v.batches, records // self._config.batch_size)
    self._dataset, self._mesh = dataset, mesh
    platform = mesh.devices.flat[0].platform
    options = {"config": self._config, "batch_axes": meshes.BATCH_AXES, "platform": platform}
    number = num_microbatches(config, self._config.batch_size, meshes.num_shards(mesh))
    encode = functools.partial(steps.encode_frozen, model=model, mesh=mesh, num_microbatches=number)

    def losses(params: Any, teacher: Any, terms: Any, batch: steps.Batch) -> steps.Metrics:
      taught = None if teacher is None else encode(teacher, batch)
      output = encode(params, batch)
      return steps.objective(output, batch, teacher=taught, terms=terms, **options)[1][0]

    self._losses = jax.jit(losses, out_shardings=meshes.replicated(mesh))

  def __call__(self, state: steps.TrainState, on_batch: Callable[[], None]) -> dict[str, float]:
    """{'validation/loss': ...} of `state.eval_params`, also of the parts that the objective has."""
    shards, num_shards = meshes.process_batch_shards(self._mesh.devices, jax.process_index())
    values = []
    with contextlib.closing(
      pipeline.train_batches(self._dataset, self._config, host=shards, num_hosts=num_shards)
    ) as batches:
      for _ in range(self._number):
        batch = meshes.to_global(next(batches), self._mesh)
        values.append(self._losses(state.eval_params, state.teacher, state.terms, batch))
        on_batch()
    summary = metrics.summarize(values)
    same = [k for k in summary if k.startswith("train/loss") or k.removeprefix("train/") in _SAME]
    found = {k.replace("train/", "validation/", 1): summary[k] for k in same}
    size, bad = self._config.batch_size, round(summary["train/bad_examples"])
    if bad:
      split = self._config.validation.split
      found["validation/bad_examples"] = bad
      logging.warning("validation: %d records of split %r are bad and left out.", bad, split)
    return found | {
      "validation/batch_size": size,
      "validation/examples": self._number * size - bad,
    }


def attempt(
  validation: Validation | None, state: steps.TrainState, on_batch: Callable[[], None]
) -> dict[str, float]:
  """Results of a validation, none where there is none."""
  return validation(state, on_batch) if validation else {}
