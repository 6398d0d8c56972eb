"""Weights from a folder: a run, what `convert` wrote, or an export."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax
import ml_collections

from grain_jax import config as configs
from grain_jax import places, schema
from grain_jax.convert import towers
from grain_jax.models import grain, initial
from grain_jax.runtime import checkpoint
from grain_jax.runtime import mesh as meshes


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
  folder = places.open_place(path, "path")
  if not (folder / "config.json").is_file():
    raise ValueError(
      f"{folder} holds no model: there is no config.json. Give the workdir of a run, or convert a "
      "checkpoint first (python -m grain_jax.convert --help)."
    )
  towers.refuse(folder)
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


def open_part(
  path: str | os.PathLike, part: str
) -> tuple[ml_collections.ConfigDict, Any, int | None]:
  """`open_checkpoint`, or for 'image' and 'text' the folder of such a tower alone (`towers`)."""
  path = places.open_place(path, "path")
  if _check_part(path, part):
    return *towers.load(path)[1:], None
  return open_checkpoint(path)


def _check_part(path: str | os.PathLike, part: str) -> bool:
  """Whether the folder holds this part alone; one line where it holds another."""
  alone = towers.find(path)
  if alone not in (None, part):
    raise ValueError(f"{path} holds the {alone} tower alone: name it as config.init.{alone}.")
  return alone is not None


def read_config(path: str | os.PathLike, part: str) -> ml_collections.ConfigDict:
  """The configuration of a folder that `open_part` opens.

  Raises:
    ValueError: there is no model in the folder; one line.
  """
  folder = places.open_place(path, "path")
  _check_holds_a_model(folder)
  _check_part(folder, part)
  return configs.read(folder / "config.json")


def _check_holds_a_model(folder: pathlib.Path) -> None:
  if name := places.hub_name(folder):
    begin = f"{folder}: there is no such folder. "
    if name.partition("/")[0] in ("weights", "runs", "data"):
      raise ValueError(
        f"{begin}A run is trained first; weights/... is what python -m grain_jax.convert writes "
        "(--from=hf_clip --input=DIR --out=weights/NAME)."
      )
    raise ValueError(
      f"{begin}A run is trained first (`make quickstart` trains runs/quickstart); a model of the "
      f"Hugging Face hub is fetched and converted: hf download {name} --local-dir DIR, then python "
      "-m grain_jax.convert --from=hf_clip --input=DIR --out=WEIGHTS."
    )
  if not (folder / "config.json").is_file():
    raise ValueError(
      f"{folder} holds no model: there is no config.json. Give the workdir of a run, or convert a "
      "checkpoint first (python -m grain_jax.convert --help)."
    )


def _without_machine_settings(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The configuration without what its run asked of its own machine, which may differ from this."""
  config.model.attention = config.model.norm = "auto"
  return config


def load_run(
  workdir: str | os.PathLike, *, step: int | None = None
) -> tuple[ml_collections.ConfigDict, Any, int]:
  """(config, parameters, step) of a run's checkpoint; the newest unless `step` says otherwise.

  Where a run keeps a mean of its parameters (`optimizer.ema_decay`), they are that mean. The mesh
  of the configuration is set to whatever devices there are now, and the parameters are sharded as
  in the run where these allow it; else they are replicated.
  """
  folder = places.open_place(workdir, "--workdir")
  path = folder / "config.json"
  if not path.is_file():
    raise ValueError(f"--workdir={workdir}: there is no config.json; no run was started here.")
  towers.refuse(folder)
  config = configs.read(path)
  _without_machine_settings(config)
  model = grain.build(config)
  params = jax.eval_shape(lambda: initial.init_params(model, config))
  if config.mesh.fsdp > 0 and config.mesh.tensor > 0:
    config.mesh.data = -1
  if not meshes.fits(config, jax.device_count()):
    config.mesh.update(data=-1, fsdp=1, tensor=1)
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
