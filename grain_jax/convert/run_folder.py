"""Imported weights as the folder of a run that `grain_jax.evaluate` opens."""

from __future__ import annotations

import pathlib
from typing import Any

import ml_collections

from grain_jax import config as configs
from grain_jax import places, recipes, tokenizing
from grain_jax.convert import staging
from grain_jax.runtime import checkpoint


def default_config() -> ml_collections.ConfigDict:
  """All keys of configs/common.py."""
  return configs.resolve(recipes.load_module(recipes.FOLDER / "common.py").get_config())


def write(
  out: pathlib.Path, *, config: ml_collections.ConfigDict, params: Any, source: dict[str, str]
) -> None:
  """Writes config.json and checkpoint 0, all or nothing.

  Args:
    out: the folder, which must not exist.
    config: a whole, resolved and checked configuration.
    params: parameters of its model.
    source: where they come from, for the checkpoint's description.
  """
  with staging.staged(out) as folder:
    folder.mkdir()
    written = tokenizing.into_folder(config, folder)
    (folder / "config.json").write_text(configs.to_json(written))
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    meta = {
      "config": written.to_dict(),
      "tokenizer": tokenizing.make_or_ids(config).hash,
      "step": 0,
      "source": source,
    }
    checkpoints.save(0, {"params": params}, meta)
    checkpoints.close()
    if places.is_bucket(out):
      (folder / "checkpoints" / "0" / checkpoint.COMMITTED).write_text("copied as a whole\n")
