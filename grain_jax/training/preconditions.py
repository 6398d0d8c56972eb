"""What a run needs of its data, said before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable

import ml_collections
from absl import logging

from grain_jax import config as configs
from grain_jax import objectives, schema
from grain_jax.data import dataset as dataset_lib


def check_regions(config: ml_collections.ConfigDict, dataset: dataset_lib.Dataset) -> None:
  """That data for GRAIN's losses of boxes and descriptions has regions, by its manifest's counts.

  Nothing is said of a manifest without the count, nor where the losses are off.

  Raises:
    ValueError: it has none, and `config.data.allow_no_regions` is off; one line.
  """
  wanted = config.method == "grain" and config.data.max_regions and config.model.num_queries
  if not wanted or not (config.loss.box or config.loss.region):
    return
  split = config.data.split
  if dataset.num_regions(split) != 0:
    return
  line = (
    f"config.method = 'grain' and split {split!r} of config.data.dir = {config.data.dir} has no "
    "regions: box and region losses would be zero"
  )
  if not dict(configs.flatten(config)).get("data.allow_no_regions", True):
    raise ValueError(
      f"{line}. Build the data with regions, set config.method=clip, or allow it: "
      "config.data.allow_no_regions=True."
    )
  logging.warning("%s, as config.data.allow_no_regions allows.", line)


def check_teacher(config: ml_collections.ConfigDict, warn: Callable[[str], None]) -> None:
  """Warns of a teacher of the weights at the start where these are random."""
  started = config.init.model or (config.init.image and config.init.text)
  if objectives.needs_teacher(config) and config.loss.anchor_teacher == "initial" and not started:
    warn(
      "config.loss.anchor_teacher = 'initial', and the run starts from no model: random weights "
      "are nothing to hold on to. Name one in config.init.model, or set anchor_teacher=ema."
    )


def check_empty_slots(config: ml_collections.ConfigDict, warn: Callable[[str], None]) -> None:
  """Warns where slots without a false caption count as negatives."""
  if config.data.negatives and not config.loss.mask_invalid:
    warn(
      "config.loss.mask_invalid = False: each slot without a false caption counts as a text in "
      "contrast and intra, all of them the same. The published code counts invalid texts there, "
      "which data.build leaves out."
    )


def check_negatives(config: ml_collections.ConfigDict, dataset: dataset_lib.Dataset) -> None:
  """That data for losses of hard negatives has some, by its manifest's counts.

  Raises:
    ValueError: it has none, or the slots go by kinds and are more than these; one line.
  """
  split, where = config.data.split, f"split {config.data.split!r} of {config.data.dir}"
  kinds = len(schema.NEGATIVE_KINDS)
  if config.data.negatives_by == "kind" and config.data.negatives > kinds:
    raise ValueError(
      f"config.data.negatives = {config.data.negatives}: with negatives_by = 'kind' a slot holds "
      f"one of the {kinds} kinds ({', '.join(schema.NEGATIVE_KINDS)}). Lower it, or set "
      "config.data.negatives_by=drawn."
    )
  for key, of_regions, what in (
    ("negatives", False, "false captions"),
    ("negatives_per_region", True, "false descriptions of regions"),
  ):
    if config.data[key] and dataset.num_negatives(split, of_regions=of_regions) == 0:
      raise ValueError(
        f"config.data.{key} = {config.data[key]}, and {where} has no {what}. Set it to 0, or build "
        "data with negatives (the scenes: python -m grain_jax.data.build --source=scenes "
        "--negatives=true --out=data/scenes_negatives)."
      )
  if config.data.negatives_per_region and (config.method != "grain" or not config.data.max_regions):
    raise ValueError(
      f"config.data.negatives_per_region = {config.data.negatives_per_region} needs region "
      "queries: config.method=grain and config.data.max_regions > 0."
    )
  wanting = ("rank", "intra", "image_grounded", "text_grounded")
  asked = [f"config.loss.{key} = {config.loss[key]}" for key in wanting if config.loss[key]]
  if asked and not config.data.negatives:
    raise ValueError(
      f"{' and '.join(asked)}: false captions are needed. Set config.data.negatives=4."
    )
