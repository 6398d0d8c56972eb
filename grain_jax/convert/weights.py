"""Weights from a folder: to use them as they are, or to start a run from somebody's towers."""

from __future__ import annotations

import logging
import os
import pathlib
from typing import Any

import jax
import ml_collections

from grain_jax import config as configs
from grain_jax import places, schema, trees
from grain_jax.models import grain, initial
from grain_jax.runtime import checkpoint
from grain_jax.runtime import mesh as meshes

# Parameters that `config.init.PART` carries over, by the start of their names.
PARTS = {
  "image": ("image_tower/",),
  "text": ("text_tower/", "text_projection/"),
}
_INITIAL = ("model.image.init_std", "model.image.position_init")  # past, once there are weights


def load(
  path: str | os.PathLike, *, step: int | None = None
) -> tuple[ml_collections.ConfigDict, Any]:
  """(configuration, parameters) of a folder; see `open_checkpoint`."""
  return open_checkpoint(path, step=step)[:2]


def open_checkpoint(
  path: str | os.PathLike, *, step: int | None = None
) -> tuple[ml_collections.ConfigDict, Any, int | None]:
  """(configuration, parameters, step) of a folder; the step of an export is None.

  Args:
    path: workdir of a run, or what `grain_jax.convert` wrote (config.json and checkpoints/), or a
      safetensors export (config.json and model.safetensors).
    step: which checkpoint of a run; the newest by default.

  Raises:
    ValueError: there is no model in the folder; one line.
  """
  places.check(path, "path")
  folder = pathlib.Path(path)
  if not (folder / "config.json").is_file():
    raise ValueError(
      f"{folder} holds no model: there is no config.json. Give the workdir of a run, or convert a "
      "checkpoint first (python -m grain_jax.convert --help)."
    )
  # Before anything is read: whoever opens a checkpoint may show it images.
  file = folder / "config.json"
  schema.check_max_pixels(configs.read(file).data.max_pixels, f"{file}: data.max_pixels")
  if not (folder / "model.safetensors").is_file():
    return load_run(folder, step=step)
  if step is not None:
    raise ValueError(f"{folder} is an export of one checkpoint: it has no step {step}.")
  from grain_jax.convert import convert

  config, params = convert.read("safetensors", folder)
  return _without_machine_settings(config), params, None


def _without_machine_settings(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The configuration without what its run asked of its own machine, which may differ from this."""
  config.model.attention = "auto"
  return config


def load_run(
  workdir: str | os.PathLike, *, step: int | None = None
) -> tuple[ml_collections.ConfigDict, Any, int]:
  """(config, parameters, step) of a run's checkpoint; the newest unless `step` says otherwise.

  Where a run keeps a mean of its parameters (`optimizer.ema_decay`), they are that mean. The mesh
  of the configuration is set to whatever devices there are now, and the parameters are sharded as
  in the run where these allow it; else they are replicated.
  """
  places.check(workdir, "--workdir")
  folder = pathlib.Path(workdir)
  path = folder / "config.json"
  if not path.is_file():
    raise ValueError(f"--workdir={workdir}: there is no config.json; no run was started here.")
  config = configs.read(path)
  _without_machine_settings(config)
  model = grain.build(config)
  params = jax.eval_shape(lambda: initial.init_params(model, config))
  shards = config.mesh.fsdp * config.mesh.tensor
  if not (0 < shards <= jax.device_count() and jax.device_count() % shards == 0):
    config.mesh.update(fsdp=1, tensor=1)
  config.mesh.data = -1
  mesh = meshes.create(config, batches=())
  shardings = meshes.param_shardings(params, mesh, config.mesh.rules)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings
  )
  checkpoints = checkpoint.Checkpoints(folder / "checkpoints", read_only=True)
  kept = "ema" if config.optimizer.ema_decay else "params"
  state, meta = checkpoints.restore({kept: abstract}, step=step)
  checkpoints.close()
  return config, state[kept], meta["step"]


def start_from(config: ml_collections.ConfigDict, params: Any) -> Any:
  """Fresh parameters with the towers of `config.init` in their place, sharded as they were.

  Args:
    config: whole, resolved configuration; `init.image` and `init.text` name folders or are empty.
    params: fresh parameters of its model.

  Raises:
    ValueError: a folder without a model, a tower of another architecture, or weights that do not
      fit; one line with the first difference.
  """
  for part, prefixes in PARTS.items():
    path = config.init[part]
    if not path:
      continue
    where = f"config.init.{part} = {path}"
    try:
      theirs, weights = load(path)
    except ValueError as error:
      raise ValueError(f"config.init.{part}: {error}") from error
    _check_architecture(config, theirs, part, where=where)
    if part == "image":
      _warn_of_another_view(config, theirs, where=where)
    found = dict(trees.named_leaves(weights))

    def take(name: str, fresh: Any, prefixes=prefixes, found=found, where=where) -> Any:
      if not name.startswith(prefixes):
        return fresh
      if name not in found or found[name].shape != fresh.shape:
        there = list(found[name].shape) if name in found else "missing"
        raise ValueError(f"{where}: {name} is {there} there and {list(fresh.shape)} here.")
      value = meshes.to_host(found[name]).astype(fresh.dtype)
      return jax.make_array_from_callback(fresh.shape, fresh.sharding, lambda index: value[index])

    params = trees.map_with_name(take, params)
  return params


def _warn_of_another_view(ours: Any, theirs: Any, *, where: str) -> None:
  """One line where a run shows images in another way than the tower that it starts from knows.

  A recipe may want that: boxes hold in a squashed image, not in a cropped one.
  """
  seen = theirs.data.eval_resize
  squashes = ours.data.resize == "squash"  # random crops are no view of any tower
  if seen != ours.data.eval_resize or (squashes and seen != "squash"):
    logging.getLogger(__name__).warning(
      "%s: data.eval_resize is %r there; here images are shown by data.resize = %r in training and "
      "data.eval_resize = %r in evaluation.",
      where, seen, ours.data.resize, ours.data.eval_resize,
    )  # fmt: skip


def _check_architecture(ours: Any, theirs: Any, part: str, *, where: str) -> None:
  """Raises for the first key of the tower that differs: shapes alone do not show them all."""
  prefix = f"model.{part}."
  a, b = dict(configs.flatten(configs.resolve(ours))), dict(configs.flatten(theirs))
  for key, value in a.items():
    if key.startswith(prefix) and key in b and key not in _INITIAL and key != f"{prefix}variant":
      theirs_value = b[key]
      if value != theirs_value:
        hint = (
          "Resize it: python -m grain_jax.convert --image_size."
          if key == "model.image.size"
          else "Set it to that."
        )
        raise ValueError(
          f"{where}: config.{key} is {theirs_value!r} there and {value!r} here. {hint}"
        )
