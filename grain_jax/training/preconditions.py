"""What a run needs of its data, said before anything is compiled."""

from __future__ import annotations

import ml_collections
from absl import logging

from grain_jax import config as configs
from grain_jax import schema
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
  if (config.loss.rank or config.loss.intra) and not config.data.negatives:
    raise ValueError(
      "config.loss.rank and config.loss.intra need false captions: set config.data.negatives=4."
    )
