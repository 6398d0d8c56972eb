"""What a run needs of its data, said before anything is compiled."""

from __future__ import annotations

import ml_collections
from absl import logging

from grain_jax import config as configs
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
