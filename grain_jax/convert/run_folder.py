"""Imported weights as the folder of a run that `grain_jax.evaluate` opens."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import ml_collections

import grain_jax
from grain_jax import config as configs
from grain_jax import tokenizer as tokenizers
from grain_jax.convert import staging
from grain_jax.runtime import checkpoint

_COMMON = pathlib.Path(grain_jax.__file__).parent.parent / "configs" / "common.py"


def default_config() -> ml_collections.ConfigDict:
  """All keys of configs/common.py.

  They have that one home, which is no part of the package: the file is read by its path beside the
  package, as `config.load` reads recipes, whatever the working directory. An installed wheel has
  none; there `--config` names a recipe.
  """
  if not _COMMON.is_file():
    raise ValueError(
      f"there is no {_COMMON}: grain_jax runs outside its repository. Give --config=FILE, a recipe."
    )
  spec = importlib.util.spec_from_file_location("grain_jax_common_config", _COMMON)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return configs.resolve(module.get_config())


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
    (folder / "config.json").write_text(configs.to_json(config))
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    meta = {
      "config": config.to_dict(),
      "tokenizer": tokenizers.Tokenizer(context=config.model.text.context).hash,
      "step": 0,
      "source": source,
    }
    checkpoints.save(0, {"params": params}, meta)
    checkpoints.close()
