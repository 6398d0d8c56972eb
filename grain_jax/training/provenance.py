"""That a workdir, its config.json and its checkpoints are of this run."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection
from typing import Any

import ml_collections

from grain_jax import config as configs
from grain_jax import places, tokenizing
from grain_jax.runtime import distributed, metrics
from grain_jax.training import continuation


def check_workdir(
  folder: pathlib.Path, config: ml_collections.ConfigDict, *, changing: Collection[str] = ()
) -> None:
  """That a config.json which is there is of the same run, but for the keys that it changes."""
  path = folder / "config.json"
  if path.exists():
    _check_config(folder, configs.read(path), config, changing)


def write_config(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Writes the run's config.json, and the files of a tokenizer that it names, into the workdir."""
  if distributed.process_index() == 0:
    text = configs.to_json(tokenizing.into_folder(config, folder))
    places.write_text(folder / "config.json", text)


def _check_config(
  folder: pathlib.Path,
  old: ml_collections.ConfigDict,
  config: ml_collections.ConfigDict,
  changing: Collection[str],
) -> None:
  free = {*changing, *continuation.STARTS} if changing else ()
  difference = configs.first_difference(old, config, free=free)
  if difference:
    key, was, now = difference
    purpose = (
      f" To change it on purpose add --continue_as={key}." if key in continuation.KEYS else ""
    )
    for part in ("model", "image", "text"):  # shapes come with the weights (config.init.adopt)
      if old.init[part] and not config.init[part]:
        purpose += f" It began with --config.init.{part}={old.init[part]}: give that again."
    raise ValueError(
      f"{folder} was made by another config: config.{key} was {was!r} and is {now!r}. "
      f"Use a new workdir, or the config of the old one.{purpose}"
    )


def check_checkpoint(
  folder: pathlib.Path,
  meta: dict[str, Any],
  config: ml_collections.ConfigDict,
  now: dict[str, Any],
  *,
  changing: Collection[str] = (),
) -> None:
  """That a checkpoint's `meta` is of this config, tokenizer and data; older ones lack some.

  One from before the run went on otherwise may differ in what a run may change, and in the data
  where `changing` has a key that says which they are.

  With local region negatives the loss depends on how many devices share the batch, so that stays.
  """
  before_change = 0 < config.optimizer.start_step >= meta.get("step", 0)
  free = continuation.KEYS if before_change else ()
  _check_config(folder, configs.from_json(json.dumps(meta["config"])), config, free)
  fingerprints = dict(now)
  if before_change and {"data.dir", "data.sources", "data.split"} & set(changing):
    del fingerprints["data"]
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
        f"trained with{', or --continue_as=data.dir on purpose' if what == 'data' else ''}."
      )


def has_evaluation(folder: pathlib.Path, step: int) -> bool:
  """Whether the metrics hold an evaluation of `step`: a run may end between save and evaluation."""
  lines = metrics.read_jsonl(folder / "metrics.jsonl") if distributed.process_index() == 0 else []
  found = any(
    line["step"] == step and not any(name.startswith("train/") for name in line) for line in lines
  )
  return distributed.broadcast("evaluated", str(found)) == "True"
