"""Weights that a run starts from: somebody's towers, or a whole model; `config.init`."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import ml_collections

from grain_jax import config as configs
from grain_jax import tokenizing, trees
from grain_jax.convert import resize, towers, weights
from grain_jax.runtime import mesh as meshes

# Parameters that `config.init.PART` carries over, by the start of their names.
PARTS = {"model": ("",), **towers.PREFIXES}
# Keys that say what these parameters are; a prefix ends with a dot.
_SHAPE = {
  "model": (
    "method", "model.image.", "model.text.", "model.decoder.", "model.embed_dim",
    "model.num_queries", "model.pool", "model.pool_includes_class", "model.projects_images",
    "model.logit_bias", "model.auxiliary_pool",
  ),
  "image": ("model.image.",),
  "text": ("model.text.", "model.embed_dim"),
}  # fmt: skip
# Of these keys those that are past once there are weights, a name, or may be another.
_NO_SHAPE = frozenset(
  {
    "model.decoder.dropout",
    "model.decoder.init",
    "model.image.init_std",
    "model.image.patch_dropout",
    "model.image.position_init",
    "model.image.size",
    "model.image.variant",
  }
)


def chosen(config: ml_collections.ConfigDict) -> dict[str, str]:
  """{part: folder} of `config.init`.

  Raises:
    ValueError: a whole model and a tower are both named.
  """
  found = {part: config.init[part] for part in PARTS if config.init[part]}
  if "model" in found and len(found) > 1:
    raise ValueError(
      f"config.init.model = {found['model']} is a whole model: leave config.init.image and "
      "config.init.text empty."
    )
  return found


def adopt(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, *, say: Callable[[str], None]
) -> ml_collections.ConfigDict:
  """The configuration in the shape of what it starts from, where `config.init.adopt` asks for it.

  The image size is adopted if it is 0: another one is kept, and positions are resized. The keys of
  `config.init.keep` are not adopted. A run that has begun keeps the shape that it has, whether or
  not the folder is still there.

  Args:
    config: a whole configuration.
    workdir: of the run.
    say: gets a line for each part.

  Raises:
    ValueError: a folder holds no model, or two of them go by different shapes; one line.
  """
  parts = chosen(config)
  config = _scaled(ml_collections.ConfigDict(config.to_dict()), parts)
  if not config.init.adopt:
    return config
  begun = workdir / "config.json"
  for part, folder in parts.items():
    try:
      theirs = configs.read(begun) if begun.is_file() else weights.read_config(folder, part)
    except ValueError as error:
      raise ValueError(f"config.init.{part}: {error}") from error
    adopted = []
    for key, here, there in _differences(config, theirs, part):
      configs.set_key(config, key, there)
      adopted.append(f"{key.removeprefix('model.')} {_short(there)} (was {_short(here)})")
    if part == "model" and theirs.model.logit_scale_max > config.model.logit_scale_max:
      config.model.logit_scale_max = theirs.model.logit_scale_max  # it would be clamped at once
      adopted.append(f"logit_scale_max {config.model.logit_scale_max:.4g}")
    if not config.model.image.size and part != "text":
      config.model.image.size = theirs.model.image.size
      adopted.append(f"image.size {theirs.model.image.size}")
    room, what = _least_row(config)
    if part != "image" and config.data.row_length < room:
      config.data.row_length = room
      adopted.append(f"data.row_length {room}: {what}")
    if adopted and not begun.is_file():
      say(f"config.init.{part} = {folder} is adopted: {', '.join(adopted)}")
  return config


def _least_row(config: ml_collections.ConfigDict) -> tuple[int, str]:
  """(tokens that a row must have at least, what they are)."""
  data, context = config.data, config.model.text.context
  if config.model.text.kind != "siglip":
    return context, "a full caption"
  texts = 1 + data.negatives + data.max_regions * (1 + data.negatives_per_region)
  return texts * context, f"{texts} texts of {context} each, pads included"


def _scaled(config: ml_collections.ConfigDict, parts: Iterable[str]) -> ml_collections.ConfigDict:
  """The configuration with `init.lr_scale` in `optimizer.lr_scale`, for the towers of `init`."""
  factor = config.init.lr_scale
  prefixes = [p for part in ("image", "text") if part in parts for p in PARTS[part]]
  if factor != 1.0 and prefixes:
    rules = [(f"^{'|^'.join(prefixes)}", factor)]
    config.optimizer.lr_scale = (*config.optimizer.lr_scale, *rules)
  return config


def _short(value: Any) -> str:
  return f"({', '.join(f'{x:.4g}' for x in value)})" if isinstance(value, tuple) else f"{value}"


def _differences(ours: Any, theirs: Any, part: str) -> Iterator[tuple[str, Any, Any]]:
  """(key, value here, value there) of what makes other parameters; shapes alone do not show it."""
  here, there = (dict(configs.flatten(configs.resolve(c))) for c in (ours, theirs))
  for key, value in here.items():
    shape = any(key == p or (p.endswith(".") and key.startswith(p)) for p in _SHAPE[part])
    if key == "model.text.tokenizer":  # the same in another folder is no other
      shape = shape and tokenizing.vocabulary_hash(ours) != tokenizing.vocabulary_hash(theirs)
      # The user's for weights that came without: whether it is theirs nobody can tell.
      shape = shape and not (there[key] == tokenizing.NONE and value)
    free = key in _NO_SHAPE or key in ours.init.keep
    if shape and not free and key in there and value != there[key]:
      yield key, value, there[key]


def _check_shape(ours: Any, theirs: Any, part: str, *, where: str) -> None:
  """Raises one line with every key that differs, as flags."""
  different = list(_differences(ours, theirs, part))
  if not different:
    return
  keys = [key for key, _, _ in different]
  if "method" in keys:
    raise ValueError(
      f"{where}: that is a model of method {theirs.method!r}, and this run is {ours.method!r}. "
      "Give config.init.image and config.init.text the folder instead: its towers alone."
    )
  said = ", ".join(f"{key} is {there!r} there and {here!r} here" for key, here, there in different)
  options = [f'--config.{k}="{v}"' if isinstance(v, tuple) else f"--config.{k}={v}"
             for k, _, v in different]  # fmt: skip
  raise ValueError(
    f"{where}: config.{said}. Take its shape with --config.init.adopt, or give {' '.join(options)}"
  )


def _check_logit_scale(ours: Any, theirs: Any, found: Any, *, where: str) -> None:
  """Raises one line where the first update would clamp the scale of what is started from."""
  scale, largest = float(found["logit_scale"]), ours.model.logit_scale_max
  if scale > largest + 1e-4:
    wanted = max(theirs.model.logit_scale_max, scale)
    raise ValueError(
      f"{where}: its logit_scale is {scale:.4f}, above config.model.logit_scale_max = {largest}, "
      "to which the first update would clamp it. Give "
      f"--config.model.logit_scale_max={wanted:.4f}, or --config.init.adopt."
    )


def start_from(
  config: ml_collections.ConfigDict, params: Any, *, say: Callable[[str], None] = logging.warning
) -> Any:
  """Fresh parameters with those of `config.init` in their place, sharded as they were.

  Positions of images of another size are resized (`convert.resize.position_embedding`).

  Args:
    config: whole, resolved configuration.
    params: fresh parameters of its model.
    say: gets a line for each part.

  Raises:
    ValueError: a folder without a model, of another architecture, or weights that do not fit; one
      line.
  """
  for part, path in chosen(config).items():
    where = f"config.init.{part} = {path}"
    try:
      theirs, found, step = weights.open_part(path, part)
    except ValueError as error:
      raise ValueError(f"config.init.{part}: {error}") from error
    _check_shape(config, theirs, part, where=where)
    if part == "model":
      _check_logit_scale(config, theirs, found, where=where)
    if part != "text":
      _warn_of_another_view(config, theirs, where=where)
    params, resized = _take(config, params, found, part, where=where)
    sizes = (
      f"; positions resized from {theirs.model.image.size} to {config.model.image.size} pixels"
    )
    of_step = "" if step is None else f", step {step}"
    say(f"{where}{of_step}: started from{sizes if resized else ''}")
  return params


def _take(
  config: ml_collections.ConfigDict, params: Any, found: Any, part: str, *, where: str
) -> tuple[Any, bool]:
  """(parameters with the part's in their place, whether positions were resized)."""
  named, resized = dict(trees.named_leaves(found)), []
  side = config.model.image.size // config.model.image.patch

  def take(name: str, fresh: Any) -> Any:
    if not name.startswith(PARTS[part]):
      return fresh
    if name not in named:
      raise ValueError(f"{where}: {name} is missing there and {list(fresh.shape)} here.")
    value = meshes.to_host(named[name]).astype(fresh.dtype)
    if name in resize.POSITIONS and value.shape != fresh.shape:
      value = resize.position_embedding(value, side).astype(fresh.dtype)
      resized.append(name)
    if value.shape != fresh.shape:
      there = list(value.shape)
      raise ValueError(f"{where}: {name} is {there} there and {list(fresh.shape)} here.")
    return jax.make_array_from_callback(fresh.shape, fresh.sharding, lambda index: value[index])

  return trees.map_with_name(take, params), bool(resized)


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
