"""Sizes of a run that its data and its machine choose: what a recipe leaves at 0, -1 or 'auto'."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import ml_collections

from grain_jax import config as configs
from grain_jax.data import dataset as dataset_lib
from grain_jax.data import sampler
from grain_jax.evals import built
from grain_jax.objectives import contrastive
from grain_jax.training import rematerialization

_SMALLEST = 8  # images a batch; contrast needs company
_LARGEST = {"cpu": 64}  # a chip's images a batch at most; elsewhere:
_LARGEST_ELSEWHERE = 256
_LARGEST_OF_ALL = 4096
_STEPS_A_PASS = 20  # that many batches at least, or their order means nothing
_PASSES = 30  # over the data; GRAIN's published run has 35
_FEWEST_STEPS = 600
# Evaluations that `config.evals = ('available',)` takes where the data can serve them.
AVAILABLE = ("zero_shot", "retrieval", "grounding", "composition", "segmentation")


# Keys that a recipe may leave open, and as what.
_OPEN = {
  "batch_size": 0,
  "eval_every": -1,
  "model.dtype": "auto",
  "model.remat": "auto",
  "model.unroll": 0,
  "optimizer.warmup_steps": -1,
  "save_every": -1,
}


def is_open(config: ml_collections.ConfigDict) -> bool:
  """Whether something is left for `choose`."""
  flat = dict(configs.flatten(config))
  length = not (config.steps or config.epochs)
  return length or any(flat[key] == value for key, value in _OPEN.items())


def keep(config: ml_collections.ConfigDict, folder: pathlib.Path) -> ml_collections.ConfigDict:
  """The configuration with what was chosen when the run in a workdir began, if there is one."""
  path = folder / "config.json"
  if not path.is_file():
    return config
  config, begun = ml_collections.ConfigDict(config.to_dict()), configs.read(path)
  flat, old = dict(configs.flatten(config)), dict(configs.flatten(begun))
  for key, value in _OPEN.items():
    if flat[key] == value:
      configs.set_key(config, key, old[key])
  if not config.steps and not config.epochs:
    config.update(steps=begun.steps, epochs=begun.epochs)
  return config


def choose(
  config: ml_collections.ConfigDict,
  *,
  records: int,
  devices: int,
  platform: str,
  memory: int | None = None,
  bfloat16: bool = True,
) -> ml_collections.ConfigDict:
  """A copy with numbers for `batch_size`, `steps`, warm-up, `eval_every`, `save_every`, `dtype`.

  And with what a step computes again, `model.remat` and `model.unroll` (`rematerialization`).

  A batch is a power of two: at least 20 of them a pass where the data allow it, 8 to 256 images a
  chip (64 on a CPU) and 4,096 in all. A run passes 30 times over the data, in 600 steps at least,
  the first tenth of them (2,000 at most) to warm up. What is given stays.

  Args:
    config: whole and resolved.
    records: of the training split.
    devices: that share a batch.
    platform: 'cpu', 'gpu' or 'tpu'.
    memory: bytes of a device that a program may use; None: not known.
    bfloat16: the devices have it.

  Raises:
    ValueError: there are fewer records than the smallest batch that the devices can share, or too
      little memory for one image.
  """
  config = ml_collections.ConfigDict(config.to_dict())
  if config.model.dtype == "auto":
    config.model.dtype = "bfloat16" if platform != "cpu" and bfloat16 else "float32"
  if not config.batch_size:
    least = -(-_SMALLEST // devices) * devices
    if records < least:
      raise ValueError(
        f"config.data.dir = {config.data.dir}: {records} records in split {config.data.split!r} "
        f"fill no batch of {least}, the least on {devices} device(s). Build more data."
      )
    most = min(_LARGEST.get(platform, _LARGEST_ELSEWHERE) * devices, _LARGEST_OF_ALL)
    size = least
    while 2 * size <= min(most, records // _STEPS_A_PASS):
      size *= 2
    config.batch_size = size
  per_epoch = sampler.steps_per_epoch(records, config.batch_size)
  if not config.steps and not config.epochs:
    config.steps = max(_PASSES * per_epoch, _FEWEST_STEPS)
  steps = config.steps or round(config.epochs * per_epoch)
  if config.optimizer.warmup_steps == -1:
    config.optimizer.warmup_steps = min(max((steps - config.optimizer.start_step) // 10, 1), 2000)
  for key in ("eval_every", "save_every"):
    if config[key] == -1:
      config[key] = max(steps // 10, 1)
  config.model.remat, config.model.unroll = rematerialization.choose(
    config, platform=platform, memory=memory, devices=devices
  )
  return config


def available(
  config: ml_collections.ConfigDict, dataset: dataset_lib.Dataset, *, say: Callable[[str], None]
) -> ml_collections.ConfigDict:
  """A copy whose `evals` have what the data's splits can serve in the place of 'available'.

  With 'available' a validation loss is left out too where the split is missing. With negatives
  zero-shot and composition are evaluated in any case: what one gains the other may cost (CE-CLIP's
  zero-shot accuracy falls from 61.0 to 45.7 over eleven sets, its own report).

  Args:
    config: whole and resolved.
    dataset: the run's own.
    say: gets a line for each that they cannot.
  """
  config = ml_collections.ConfigDict(config.to_dict())
  split = config.validation.split
  if "available" in config.evals and config.validation.batches and split not in dataset.splits:
    config.validation.batches = 0
    say(
      f"no validation loss: {config.data.dir} has no split {split!r}; build with --val_fraction=0.1"
    )
  found: list[str] = []
  for name in config.evals:
    if name != "available":
      found.append(name)
      continue
    if line := built.left_out(AVAILABLE, config):
      say(line)
    for candidate in AVAILABLE:
      if not built.wanted(candidate, config):
        continue
      try:
        built.check(candidate, config, dataset)
        found.append(candidate)
      except ValueError as error:
        say(f"not evaluated: {candidate}: {getattr(error, 'why', error)}")
  if config.data.negatives or config.data.negatives_per_region:
    families = {name.partition(":")[0] for name in config.evals} | set(found)
    for candidate in ("zero_shot", "composition"):
      if candidate in families or "available" in families:  # asked for, and answered above
        continue
      try:
        built.check(candidate, config, dataset)
        found.append(candidate)
        say(f"evaluated too, for the price of negatives: {candidate}")
      except ValueError as error:
        say(
          f"warning: a run with negatives without {candidate}, so that their price is not seen: "
          f"{error} An outside set will do: --config.datasets=DIR --config.evals={candidate}:SET"
        )
  config.evals = tuple(dict.fromkeys(found))
  return config


def describe(
  asked: ml_collections.ConfigDict,
  config: ml_collections.ConfigDict,
  *,
  records: int,
  platform: str = "cpu",
) -> str:
  """A line of what was chosen; '' where the configuration left nothing open."""
  chosen = []
  if asked.batch_size != config.batch_size:
    chosen.append(f"batch_size {config.batch_size}")
  if asked.steps != config.steps:
    passes = config.steps * config.batch_size / records
    chosen.append(f"steps {config.steps} ({passes:.0f} passes)")
  if asked.optimizer.warmup_steps != config.optimizer.warmup_steps:
    chosen.append(f"optimizer.warmup_steps {config.optimizer.warmup_steps}")
  for key in ("eval_every", "save_every"):
    if asked[key] != config[key]:
      chosen.append(f"{key} {config[key]}")
  for key in ("dtype", "remat", "unroll"):
    if asked.model[key] != config.model[key]:
      chosen.append(f"model.{key} {config.model[key]}")
  if config.loss.precision == "auto" and platform != "cpu":
    chosen.append(f"loss.precision {contrastive.product_dtype('auto', platform)}")
  if asked.evals != config.evals:
    chosen.append(f"evals {', '.join(config.evals) or 'none'}")
  return f"chosen for {records} images: {'; '.join(chosen)}" if chosen else ""
