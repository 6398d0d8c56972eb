"""From a foreign checkpoint to the folder of a run."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from grain_jax import config as configs
from grain_jax import local_files, places
from grain_jax.convert import (
  clippy,
  dino,
  foreign,
  grain_torch,
  hf_clip,
  layout,
  native,
  open_clip,
  resize,
  run_folder,
  sentence_t5,
  siglip,
  staging,
  towers,
)
from grain_jax.models import grain, initial

# Name -> reader of a file or folder.
FORMATS: dict[str, Callable[[pathlib.Path], foreign.ForeignCheckpoint]] = {
  "grain_torch": grain_torch.load,
  "hf_clip": hf_clip.load,
  "open_clip": open_clip.load,
  "ce_clip": functools.partial(open_clip.load, quick_gelu=True),
  "clippy": clippy.load,
  "dino": dino.load,
  "sentence_t5": sentence_t5.load,
  "siglip": siglip.load,
  "safetensors": native.load,
}
# Whose files may lack their tokenizer: their readers take the folder of one.
_WITH_TOKENIZER = ("clippy", "siglip")
# What a file says for certain of how it sees an image or reads a text, which is no size of the
# model: it always holds.
_ALWAYS = (
  "model.image.mean",
  "model.image.std",
  "model.image.interpolation",
  "data.eval_resize",
  "model.text.tokenizer",
)


def read(
  source: str,
  path: str | pathlib.Path,
  *,
  recipe: str | None = None,
  image_size: int | None = None,
  quick_gelu: bool | None = None,
  tokenizer: str | None = None,
) -> tuple[ml_collections.ConfigDict, Any]:
  """A foreign checkpoint as (configuration, parameters), of a tower alone where it is no more.

  Args:
    source: the format, one of `FORMATS`.
    path: file or folder of the checkpoint.
    recipe: FILE or FILE:argument that describes the model of the checkpoint; without one its sizes
      come from the file, and what is not there (heads, activations) by the format's convention.
    image_size: pixels; the position embedding is resized.
    quick_gelu: for 'open_clip', whose files may not say it; its own default is false.
    tokenizer: folder of a SentencePiece tokenizer, for formats whose files may lack it.

  Raises:
    ValueError: format, file, recipe or size cannot work; one line.
  """
  config, params, _ = _read(
    source,
    path,
    recipe=recipe,
    image_size=image_size,
    quick_gelu=quick_gelu,
    tokenizer=tokenizer,
  )
  return config, params


def _read(
  source: str,
  path: str | pathlib.Path,
  *,
  recipe: str | None = None,
  image_size: int | None = None,
  quick_gelu: bool | None = None,
  tokenizer: str | None = None,
) -> tuple[ml_collections.ConfigDict, Any, str | None]:
  """`read`, and which tower it is, None for a whole model."""
  if source not in FORMATS:
    raise ValueError(f"--from={source} is unknown. Choose from {', '.join(FORMATS)}.")
  _check_hub_name(path)
  if not places.open_place(path, "--input").exists():
    raise ValueError(f"--input={path} does not exist.")
  load = FORMATS[source]
  if quick_gelu is not None:
    if source == "ce_clip" and not quick_gelu:
      raise ValueError("--from=ce_clip: CE-CLIP's towers have QuickGELU. Leave --quick_gelu away.")
    if source not in ("open_clip", "ce_clip"):
      raise ValueError(
        f"--quick_gelu is for --from=open_clip; {source} says its activation itself."
      )
    load = functools.partial(open_clip.load, quick_gelu=quick_gelu)
  if tokenizer is not None:
    if source not in _WITH_TOKENIZER:
      raise ValueError(
        f"--tokenizer is for --from={' and --from='.join(_WITH_TOKENIZER)}; {source} has its own."
      )
    load = functools.partial(load, tokenizer=tokenizer)
  file = local_files.fetch(path, beside=True)
  try:
    found = load(file)
  except ValueError as error:
    if not places.is_bucket(path):
      raise
    raise ValueError(str(error).replace(str(file), str(path))) from error
  if found.part is not None:
    _check_options_of_tower(source, found.part, recipe=recipe, image_size=image_size)
  config = _configure(found, recipe)
  model = grain.build(config)
  abstract = jax.eval_shape(lambda: initial.init_params(model, config))
  if found.part is not None:
    abstract = towers.select(abstract, found.part)
  params = layout.read(found.rules(config), found.state, abstract, where=found.where)
  if recipe is not None:
    _check_facts(found, config, recipe)
  _hold_logit_scale(config, params)
  size = image_size or found.image_size
  if size is not None:
    resize.images(params, config, size=size)
  return config, params, found.part


def _hold_logit_scale(config: ml_collections.ConfigDict, params: Any) -> None:
  """Raises the limit of the logit scale above a published one, which it would clamp at once.

  By as much as leaves room to grow: who has such a scale had no such limit.
  """
  scale = float(params.get("logit_scale", 0.0))
  if scale > config.model.logit_scale_max:
    config.model.logit_scale_max = scale + 1.0


def _check_options_of_tower(
  source: str, part: str, *, recipe: str | None, image_size: int | None
) -> None:
  """Raises where an option is given that a tower alone has no use for."""
  if recipe is not None:
    raise ValueError(
      f"--config is for whole models, and --from={source} gives the {part} tower alone: name its "
      f"folder in the recipe, as config.init.{part}."
    )
  if part == "text" and image_size is not None:
    raise ValueError(f"--image_size: --from={source} gives the text tower alone.")


def _check_hub_name(path: str | pathlib.Path) -> None:
  """Raises the line that says how a model of the hub is fetched, where one is named."""
  name = places.hub_name(path)
  if name is not None:
    folder = f"weights/{name.rpartition('/')[2]}"
    raise ValueError(
      f"--input={path}: there is no such folder here, and nothing is downloaded. If it is a model "
      f"of the Hugging Face hub: hf download {name} --local-dir {folder}, then --input={folder}."
    )


def convert(source: str, path: str, *, out: str, **options: Any) -> ml_collections.ConfigDict:
  """Writes the run folder `out`: config.json and the weights as checkpoint 0; or a tower's.

  Args:
    source: the format, one of `FORMATS`.
    path: file or folder of the checkpoint.
    out: the folder to be, which must not exist.
    **options: of `read`.

  Returns:
    The configuration written.

  Raises:
    ValueError: as `read`, or `out` exists; one line, and nothing is left in `out`.
  """
  target = places.open_place(out, "--out")
  staging.refuse_existing(target)
  config, params, part = _read(source, path, **options)
  origin = {"format": source, "file": path}
  if part is None:
    run_folder.write(target, config=config, params=params, source=origin)
  else:
    towers.write(target, part=part, config=config, params=params, source=origin)
  return config


def _configure(found: foreign.ForeignCheckpoint, recipe: str | None) -> ml_collections.ConfigDict:
  """The whole configuration of an imported model, checked."""
  if recipe is None:
    config = run_folder.default_config()
    for key, value in {**found.assumed, **found.carried, **found.facts}.items():
      configs.set_key(config, key, value)
    configs.forget_places(config)
    if config.method == "grain":
      config.data.max_regions = min(config.data.max_regions, config.model.num_queries)
  else:
    config = configs.resolve(configs.load(recipe))
    for key in _ALWAYS:
      if key in found.facts:
        configs.set_key(config, key, found.facts[key])
    if config.method != found.facts.get("method", config.method):
      raise ValueError(
        f"{found.where} is a model of method {found.facts['method']}; --config={recipe} says "
        f"config.method = {config.method!r}."
      )
  config.data.dir = config.compile_cache = ""  # of another machine
  config.optimizer.ema_decay = 0.0  # what is imported has no mean beside it
  config.data.row_length = max(config.data.row_length, config.model.text.context)
  configs.check(config)
  return config


def _check_facts(found: foreign.ForeignCheckpoint, config: Any, recipe: str) -> None:
  """Raises where the recipe denies what the file says; shapes have been checked before."""
  flat = dict(configs.flatten(config))
  for key, value in found.facts.items():
    if flat[key] != value:
      raise ValueError(
        f"--config={recipe} says config.{key} = {flat[key]!r}, but {found.where} {value!r}."
      )
