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
  fingerprints: dict[str, str],
) -> None:
  """That a checkpoint's `meta` is of this config, tokenizer and data; older ones lack some."""
  _check_config(folder, configs.from_json(json.dumps(meta["config"])), config)
  for what, now in fingerprints.items():
    was = meta.get(what, now)
    if was != now:
      raise ValueError(
        f"{folder}: its checkpoints were not trained with this {what} ({was[:12]}, not {now[:12]}; "
        f"config.data.dir = {config.data.dir}). Use a new workdir, or what they were trained with."
      )


def has_evaluation(folder: pathlib.Path, step: int) -> bool:
  """Whether the metrics hold an evaluation of `step`: a run may end between save and evaluation."""
  lines = metrics.read_jsonl(folder / "metrics.jsonl") if distributed.process_index() == 0 else []
  found = any(line["step"] == step and "train/loss" not in line for line in lines)
  return distributed.broadcast("evaluated", str(found)) == "True"
