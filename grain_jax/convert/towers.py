"""Folders with one tower of a model, for `config.init.image` and `config.init.text` to start from.

Such a folder has config.json and, instead of a model's checkpoints, PART_tower.safetensors.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import flax.traverse_util
import ml_collections
import safetensors
import safetensors.numpy

from grain_jax import config as configs
from grain_jax import local_files, places, tokenizing, trees
from grain_jax.convert import staging

# Parameters of a part, by the start of their names.
PREFIXES = {
  "image": ("image_tower/",),
  "text": ("text_tower/", "text_projection/"),
}


def file_name(part: str) -> str:
  """Of a part's weights."""
  return f"{part}_tower.safetensors"


def find(folder: str | os.PathLike) -> str | None:
  """The part that a folder holds alone; None where it holds a model, or nothing."""
  found = [part for part in PREFIXES if (places.at(folder) / file_name(part)).is_file()]
  return found[0] if found else None


def refuse(folder: str | os.PathLike) -> None:
  """Raises one line where a folder that should hold a model has a tower alone."""
  if part := find(folder):
    raise ValueError(
      f"{folder} holds the {part} tower of a model alone: train with --config.init.{part}={folder} "
      "--config.init.adopt, and use the run."
    )


def select(params: Any, part: str) -> Any:
  """The part's parameters of a model's tree."""
  return {name: tree for name, tree in params.items() if f"{name}/" in PREFIXES[part]}


def write(
  out: pathlib.Path,
  *,
  part: str,
  config: ml_collections.ConfigDict,
  params: Any,
  source: dict[str, str],
) -> None:
  """Writes the folder of a tower, all or nothing.

  Args:
    out: the folder, which must not exist.
    part: 'image' or 'text'.
    config: whole, resolved and checked; what it says of the other parts means nothing.
    params: of the part, NumPy arrays.
    source: where they come from.

  Raises:
    ValueError: the folder is there, or the tokenizer does not fit the tower; one line.
  """
  if part == "text":
    tokenizing.make_or_ids(config)
  with staging.staged(out) as folder:
    folder.mkdir()
    written = tokenizing.into_folder(config, folder) if part == "text" else config
    (folder / "config.json").write_text(configs.to_json(written))
    state = dict(trees.named_leaves(params))
    safetensors.numpy.save_file(state, folder / file_name(part), metadata=source)


def load(folder: str | os.PathLike) -> tuple[str, ml_collections.ConfigDict, Any]:
  """(part, configuration, parameters) of a folder that `write` wrote.

  Raises:
    ValueError: the file is damaged; one line.
  """
  part = find(folder)
  assert part is not None, f"{folder} holds no tower: ask `find` first"
  path = places.at(folder) / file_name(part)
  try:
    state = safetensors.numpy.load_file(local_files.fetch(path))
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is truncated or not a safetensors file ({error}).") from error
  params = flax.traverse_util.unflatten_dict({tuple(k.split("/")): v for k, v in state.items()})
  return part, configs.read(places.at(folder) / "config.json"), params
