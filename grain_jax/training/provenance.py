"""That a workdir, its config.json and its checkpoints are of this run."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_collections

from grain_jax import config as configs
from grain_jax.runtime import distributed, metrics


def check_workdir(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """That a config.json which is there is of the same run."""
  path = folder / "config.json"
  if path.exists():
    _check_config(folder, configs.read(path), config)


def write_config(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  if distributed.process_index() == 0:
    path = folder / "config.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(configs.to_json(config))
    temporary.replace(path)


def _check_config(
  folder: pathlib.Path, old: ml_collections.ConfigDict, config: ml_collections.ConfigDict
) -> None:
  difference = configs.first_difference(old, config)
  if difference:
    key, was, now = difference
    raise ValueError(
      f"{folder} was made by another config: config.{key} was {was!r} and is {now!r}. "
      "Use a new workdir, or the config of the old one."
    )


def check_checkpoint(
  folder: pathlib.Path,
  meta: dict[str, Any],
  config: ml_collections.ConfigDict,
  now: dict[str, Any],
) -> None:
  """That a checkpoint's `meta` is of this config, tokenizer and data; older ones lack some.

  With local region negatives the loss depends on how many devices share the batch, so that stays.
  """
  _check_config(folder, configs.from_json(json.dumps(meta["config"])), config)
  fingerprints = dict(now)
  shards = fingerprints.pop("batch_shards")
  before = meta.get("batch_shards", shards)
  if config.loss.region_negatives == "local" and before != shards:
    raise ValueError(
      f"{folder}: its checkpoints were trained with the batch on {before} devices along data and "
      f"fsdp, and there are {shards} now: with config.loss.region_negatives = 'local' the loss "
      "would be another. Use as many, or a new workdir with 'global'."
    )
  for what, value in fingerprints.items():
    was = meta.get(what, value)
    if was != value:
      raise ValueError(
        f"{folder}: its checkpoints were not trained with this {what} ({was[:12]}, not "
        f"{value[:12]}; config.data.dir = {config.data.dir}). Use a new workdir, or what they were "
        "trained with."
      )


def has_evaluation(folder: pathlib.Path, step: int) -> bool:
  """Whether the metrics hold an evaluation of `step`: a run may end between save and evaluation."""
  lines = metrics.read_jsonl(folder / "metrics.jsonl") if distributed.process_index() == 0 else []
  found = any(line["step"] == step and "train/loss" not in line for line in lines)
  return distributed.broadcast("evaluated", str(found)) == "True"
