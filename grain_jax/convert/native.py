"""Our own names in a safetensors file beside config.json, both ways."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import jax
import ml_collections
import safetensors.numpy

from grain_jax import config as configs
from grain_jax import tokenizing, trees
from grain_jax.convert import foreign, layout, state_dicts, towers
from grain_jax.models import grain, initial


def rules(config: ml_collections.ConfigDict, part: str | None = None) -> list[layout.Rule]:
  """Every parameter (of a part) under its own name, layers stacked."""
  model = grain.build(config)
  abstract = jax.eval_shape(lambda: initial.init_params(model, config))
  tree = towers.select(abstract, part) if part else abstract
  return [rule for name, _ in trees.named_leaves(tree) for rule in layout.same(name, name)]


def load(path: pathlib.Path) -> foreign.ForeignCheckpoint:
  """Reads a folder that `save` wrote, or its file of weights; or the folder of a tower."""
  folder = path if path.is_dir() else path.parent
  part = towers.find(path) if path.is_dir() else None
  if path.is_dir():
    path /= towers.file_name(part) if part else "model.safetensors"
  carried = carried_config(json.dumps(state_dicts.read_json(folder / "config.json")), folder)
  carried["model.text.tokenizer"] = configs.read(folder / "config.json").model.text.tokenizer
  state = state_dicts.arrays(state_dicts.load(path), where=str(path))
  return foreign.ForeignCheckpoint(
    str(path),
    state,
    functools.partial(rules, part=part),
    {"method": carried["method"]},
    carried=carried,
    part=part,
  )


def carried_config(text: Any, where: Any) -> dict[str, Any]:
  """Keys and values of a configuration that a checkpoint carries as JSON."""
  try:
    config = dict(configs.flatten(configs.from_json(text)))
  except (TypeError, ValueError, AttributeError) as error:
    raise ValueError(f"{where}: its configuration cannot be read ({error}).") from error
  if config.get("method") not in grain.METHODS:
    raise ValueError(f"{where}: its configuration is none of grain_jax; it has no known method.")
  return config


def save(path: pathlib.Path, *, config: ml_collections.ConfigDict, params: Any, step: int) -> None:
  """Writes the folder `path`: model.safetensors and the run's config.json."""
  path.mkdir()
  state = layout.write(rules(config), params)
  safetensors.numpy.save_file(state, path / "model.safetensors", metadata={"step": str(step)})
  (path / "config.json").write_text(configs.to_json(tokenizing.into_folder(config, path)))
