"""A configuration from file to run: overrides, sizes by name, checks before anything expensive."""

from __future__ import annotations

import ast
import json
import math
import pathlib
import re
import traceback
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ml_collections

from grain_jax import keys, places, recipes, schema, synonyms

CHOICES, FREE_KEYS, ADDED, LISTS = keys.CHOICES, keys.FREE_KEYS, keys.ADDED, keys.LISTS
VARIANTS, IN_BUCKETS = keys.VARIANTS, keys.IN_BUCKETS

_COLORS = ("model.image.mean", "model.image.std")
# Keys whose values are pairs that begin with a regex: (what a pair is, how one alone is written).
_PAIRS = {
  "optimizer.lr_scale": ("(REGEX, FACTOR)", "(('^text_tower/', 0.1),)"),
  "mesh.rules": ("(REGEX, (AXIS, ...))", "(('token_embedding$', (None, 'fsdp')),)"),
}


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """('model.image.size', 224) and so on, in the order of definition."""
  for key, value in config.items():
    if isinstance(value, (ml_collections.ConfigDict, dict)):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def unknown_key(config: ml_collections.ConfigDict, key: str) -> str:
  """The error line for a key that does not exist, with the nearest ones that do."""
  if inner := [name for name, _ in flatten(config) if name.startswith(f"{key}.")]:
    return f"config.{key} is a section. Set one of its keys, such as config.{inner[0]}."
  near = synonyms.nearest(key, [*(name for name, _ in flatten(config)), "--workdir"])
  hint = synonyms.did_you_mean(
    [name if name.startswith("--") else f"config.{name}" for name in near],
    "configs/common.py lists every key.",
  )
  return f"config.{key} is not a key of this configuration. {hint}"


def set_key(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
  """Sets `config.a.b` by its dotted name; the key must exist and the type must fit."""
  node, old = config, config
  for part in key.split("."):
    if not isinstance(old, ml_collections.ConfigDict) or part not in old:
      raise ValueError(unknown_key(config, key))
    node, old = old, old[part]
  if isinstance(old, ml_collections.ConfigDict):
    raise ValueError(unknown_key(config, key))
  if value is None and old is not None:
    raise ValueError(_none(key))
  try:
    node[part] = value
  except TypeError as error:
    raise ValueError(f"config.{key} = {value!r} is not a {type(old).__name__}.") from error


def _none(key: str) -> str:
  """The error line for a key that is None, which ml_collections lets every key be."""
  return f"config.{key} = None is no value. Give one, or leave the key as it was."


def set_from_text(config: ml_collections.ConfigDict, assignment: str) -> None:
  """Applies one 'key=value' of a config argument; the value is a Python literal or a string."""
  key, _, text = assignment.partition("=")
  try:
    value = ast.literal_eval(text)
  except (SyntaxError, ValueError):
    value = text
  set_key(config, key, value)


def load(path: str) -> ml_collections.ConfigDict:
  """The ConfigDict of a recipe: 'cc12m' or 'configs/cc12m.py', either with ':argument'."""
  places.check(path, "--config")
  name, _, arg = recipes.find(path).partition(":")
  file = pathlib.Path(name)
  module = recipes.load_module(file)
  if not hasattr(module, "get_config"):
    raise ValueError(f"--config={path}: {name} defines no get_config(arg).")
  try:
    return module.get_config(arg)
  except (AttributeError, KeyError, TypeError) as error:
    line = _recipe_error(error, file)
    if line is None:
      raise
    raise ValueError(f"--config={path}: {line}") from error


def check_places(config: ml_collections.ConfigDict) -> None:
  """Raises for the first key that is None, or an address that it cannot be; see `places`."""
  _check_given(config)
  buckets = {f"config.{key}" for key in IN_BUCKETS}
  places.check_all({f"config.{key}": value for key, value in flatten(config)}, buckets=buckets)
  for i, entry in enumerate(config.data.sources):
    if isinstance(entry, Mapping):
      places.check(str(entry.get("dir", "")), f"config.data.sources[{i}].dir", bucket=True)


def _check_given(config: ml_collections.ConfigDict) -> None:
  """Raises a one-line ValueError for the first key, or section, that is None."""
  for key, value in flatten(config):
    if value is None:
      raise ValueError(_none(key))


def _recipe_error(error: Exception, file: pathlib.Path) -> str | None:
  """What a recipe sets that there is not, or of another type, in a line; None: something else."""
  frames = list(traceback.walk_tb(error.__traceback__))
  inner = frames[-1][0].f_locals.get("self")
  if not isinstance(inner, ml_collections.ConfigDict):
    return None
  number = next((n for f, n in reversed(frames) if f.f_code.co_filename == str(file)), 0)
  where = f"line {number}"
  if isinstance(error, TypeError):
    return f"{where}: {' '.join(str(error).split())}."
  text = str(error).rpartition("instead of")[2]  # of "did you mean", or all of it
  found = re.search(r"[\"'](\w+)[\"']", text)
  key, fields = found.group(1) if found else text, list(inner.keys())
  known = [*fields, *(name for name, _ in flatten(inner))]
  elsewhere = [f"config.{name}" for name in synonyms.meant(key) if not name.startswith("--")]
  near = synonyms.by_meaning(key, known) or elsewhere or synonyms.nearest(key, known)
  hint = synonyms.did_you_mean(near, f"There are {', '.join(fields)}.")
  return f"{where}: {key!r} is not a key there. {hint}"


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A copy in which the image tower's sizes stand as numbers, whatever its variant."""
  _check_given(config)
  config = ml_collections.ConfigDict(config.to_dict())
  tower = config.model.image
  check_choice("model.image.variant", tower.variant)
  for key, value in zip(("width", "depth", "heads", "patch"), VARIANTS[tower.variant], strict=True):
    tower[key] = tower[key] or value
  tower.size = tower.size or keys.DEFAULT_SIZE
  return config


def check_choice(key: str, value: Any) -> None:
  """Raises a one-line ValueError where `value` is none of the key's CHOICES."""
  if value not in CHOICES[key]:
    raise ValueError(
      f"config.{key} = {value!r} is unknown. Choose one of {', '.join(CHOICES[key])}."
    )


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_pair(entry: Any) -> bool:
  return isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], str)


def _is_partition(value: Any) -> bool:
  """Whether a value has an entry for each dimension; which axes there are: `runtime.mesh`."""
  return isinstance(value, (tuple, list)) and all(
    axis is None or isinstance(axis, (str, tuple, list)) for axis in value
  )


def _check_tuples(flat: Mapping[str, Any]) -> None:
  """Raises a one-line ValueError for the first tuple that does not hold what its key needs."""
  for key in (*LISTS, "zero_shot.templates"):
    for i, entry in enumerate(flat[key]):
      if not isinstance(entry, str):
        raise ValueError(f"config.{key}[{i}] = {entry!r} is not a text. Write it in quotes.")
  for key, (pair, example) in _PAIRS.items():
    for i, entry in enumerate(flat[key]):
      if not _is_pair(entry) or (key == "mesh.rules" and not _is_partition(entry[1])):
        raise ValueError(
          f"config.{key}[{i}] = {entry!r} is not a pair {pair}. A single one is written {example}."
        )
  for key in _COLORS:
    if len(flat[key]) != 3 or not all(map(_is_number, flat[key])):
      raise ValueError(
        f"config.{key} = {flat[key]} is not three numbers. Give those of red, green and blue."
      )
  for i, entry in enumerate(flat["data.sources"]):  # all else of them: `data.mixture`
    if not isinstance(entry, (Mapping, ml_collections.ConfigDict)) or not entry.get("dir"):
      raise ValueError(
        f"config.data.sources[{i}] = {entry!r} is not {{'dir': FOLDER, 'weight': NUMBER}}."
      )


def _check_numbers(config: ml_collections.ConfigDict) -> None:
  """Raises a one-line ValueError for the first number past its limits (`keys`)."""
  for key, value in flatten(config):
    if config.method != "grain" and key.startswith("model.decoder."):
      continue
    for number in value if isinstance(value, tuple) else (value,):
      if not _is_number(number):
        continue
      said = f"config.{key} = {value}"
      if not math.isfinite(number):
        raise ValueError(f"{said} must be a finite number.")
      if key in keys.POSITIVE and number <= 0:
        raise ValueError(f"{said} must be positive.")
      if key in keys.LEAST and number < keys.LEAST[key]:
        off = " 0 turns it off." if key in keys.OFF_AT_ZERO else ""
        raise ValueError(f"{said} must be at least {keys.LEAST[key]}.{off}")
      if key in keys.WITHIN:
        low, high, closed, meaning = keys.WITHIN[key]
        if number < low or number > high or (number == high and not closed):
          where = f"[{low}, {high}{']' if closed else ')'}"
          raise ValueError(f"{said} must be in {where}{f': {meaning}' if meaning else ''}.")
  for pattern, factor in config.optimizer.lr_scale:
    if not _is_number(factor) or not 0 <= factor < math.inf:
      raise ValueError(
        f"config.optimizer.lr_scale: the factor of {pattern!r} is {factor!r}, and must be a finite "
        "number of at least 0."
      )


def _check_best_metric(config: ml_collections.ConfigDict, *, settled: bool) -> None:
  """Raises a one-line ValueError where no evaluation can give `checkpoint.best_metric`."""
  best = config.checkpoint.best_metric
  family = best.partition("/")[0]
  families = {name.partition(":")[0] for name in config.evals}
  if "segmentation" in families:
    families.add("grouping")
  negatives = config.data.negatives or config.data.negatives_per_region
  if not settled and ("available" in families or negatives):  # by what the data can serve
    families.add(family)
  if best and (family not in families or not config.eval_every):
    raise ValueError(
      f"config.checkpoint.best_metric = {best!r} needs config.eval_every > 0 (it is "
      f"{config.eval_every}) and begins with the name of one of config.evals, {config.evals}."
    )


def check(config: ml_collections.ConfigDict, *, settled: bool = False) -> None:
  """Raises a one-line ValueError for the first thing that cannot work in a resolved config.

  `settled`: the evaluations stand as they will be run, with none left to `sizing.available`.
  """
  check_places(config)
  flat = dict(flatten(config))
  for key in CHOICES:
    check_choice(key, flat[key])
  _check_tuples(flat)
  _check_numbers(config)
  schema.check_max_pixels(config.data.max_pixels)
  if config.save_every <= 0 and config.save_every != -1:
    raise ValueError(
      f"config.save_every = {config.save_every} must be positive, or -1: a tenth of the run."
    )
  if others := [key for key in config.init.keep if key not in keys.KEPT]:
    raise ValueError(
      f"config.init.keep: {', '.join(others)} goes with the weights. What may be kept is "
      f"{', '.join(keys.KEPT)}."
    )
  m = config.model
  if m.image.patch_dropout and m.decoder.memory_positions and config.method == "grain":
    raise ValueError(
      f"config.model.image.patch_dropout = {m.image.patch_dropout} cannot be with "
      "config.model.decoder.memory_positions, which are one for each patch. Set one of them off."
    )
  if m.pool == "query" and config.method != "grain":
    raise ValueError(
      f"config.model.pool = 'query' needs a query decoder, and config.method = {config.method!r} "
      "has none. Choose class, max or mean."
    )
  if not m.image.class_token and (
    m.pool == "class" or (m.pool == "default" and config.method == "clip")
  ):
    raise ValueError(
      f"config.model.pool = {m.pool!r} takes the class token, and config.model.image.class_token = "
      "False: there is none. Choose map, max or mean."
    )
  if config.loss.contrast == "sigmoid" and not m.logit_bias:
    raise ValueError(
      "config.loss.contrast = 'sigmoid' needs a learned bias: set config.model.logit_bias=True "
      "(SigLIP starts with config.model.logit_scale_init=2.3026, ln 10)."
    )
  query = m.pool == "query" or (m.pool == "default" and config.method == "grain")
  width = m.decoder.width if query else m.image.width
  if not m.projects_images and width != m.embed_dim:
    raise ValueError(
      f"config.model.projects_images = False: the pooled token has width {width}, and "
      f"config.model.embed_dim = {m.embed_dim}. Make them equal, or project."
    )
  if config.method == "grain" and m.num_queries < config.data.max_regions:
    raise ValueError(
      f"config.model.num_queries = {m.num_queries} is fewer than config.data.max_regions = "
      f"{config.data.max_regions}: every region needs a query. Raise num_queries or lower "
      "max_regions."
    )
  if m.image.size % m.image.patch:
    raise ValueError(
      f"config.model.image.size = {m.image.size} does not divide into patches of "
      f"{m.image.patch} pixels."
    )
  if m.image.stem == "hmlp" and (m.image.patch < 8 or m.image.patch & (m.image.patch - 1)):
    raise ValueError(
      f"config.model.image.stem = 'hmlp' builds patches of 8, 16, 32, ... pixels, not of "
      f"{m.image.patch}. Choose such a patch, or the linear stem."
    )
  towers = [("image", m.image), ("text", m.text)]
  if config.method == "grain":
    towers.append(("decoder", m.decoder))
  for name, tower in towers:
    if tower.width % tower.heads:
      raise ValueError(
        f"config.model.{name}.width = {tower.width} does not divide by its heads = {tower.heads}."
      )
  _check_best_metric(config, settled=settled)
  if config.data.row_length < m.text.context:
    raise ValueError(
      f"config.data.row_length = {config.data.row_length} is shorter than "
      f"config.model.text.context = {m.text.context}: a full caption would not fit its row."
    )


def forget_places(config: ml_collections.ConfigDict) -> None:
  """Empties all keys that name places on the machine of a run, for a configuration that leaves it.

  The tokenizer's folder goes with the model (`tokenizing.into_folder`).
  """
  for key, value in keys.OF_MACHINE.items():
    set_key(config, key, value)


def to_json(config: ml_collections.ConfigDict) -> str:
  """The configuration as JSON, keys in order; `from_json` gives it back."""
  return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
  """Inverse of `to_json`; lists come back as tuples, as the configs write them.

  A configuration of an older version gets the keys that came later, with what they mean to it.
  """

  def tuples(value: Any) -> Any:
    if isinstance(value, list):
      return tuple(tuples(v) for v in value)
    return {k: tuples(v) for k, v in value.items()} if isinstance(value, dict) else value

  values = tuples(json.loads(text))
  for key, value in ADDED.items():
    *sections, leaf = key.split(".")
    node = values
    for section in sections:
      node = node.setdefault(section, {})
    node.setdefault(leaf, value)
  return ml_collections.ConfigDict(values)


def read(path: pathlib.Path) -> ml_collections.ConfigDict:
  """The configuration in a run's or a conversion's config.json; one line where it is damaged.

  A tokenizer that the file names relative to its own folder is named with the folder.
  """
  try:
    return with_folder(from_json(path.read_text(encoding="utf-8")), path.parent)
  except (ValueError, AttributeError) as error:
    raise ValueError(
      f"{path} is not JSON of a configuration ({error}). Restore it, or use a new workdir."
    ) from error


def with_folder(
  config: ml_collections.ConfigDict, folder: pathlib.Path
) -> ml_collections.ConfigDict:
  """The configuration of a folder's config.json with the path of the tokenizer in that folder."""
  name = config.model.text.tokenizer
  whole = pathlib.PurePath(name).is_absolute() or places.is_bucket(name)
  if name not in ("", "none") and not whole:
    config.model.text.tokenizer = str(folder / name)
  return config


def first_difference(
  old: ml_collections.ConfigDict, new: ml_collections.ConfigDict, *, free: Collection[str] = ()
) -> tuple[str, Any, Any] | None:
  """(key, old value, new value) of the first key that matters to the parameters and differs.

  Args:
    old: a configuration.
    new: another.
    free: keys that may differ beside FREE_KEYS.
  """
  a, b = dict(flatten(old)), dict(flatten(new))
  for key in dict.fromkeys([*a, *b]):
    may_differ = key in FREE_KEYS or key.startswith(keys.FREE_PREFIXES) or key in free
    if not may_differ and a.get(key) != b.get(key):
      return key, a.get(key), b.get(key)
  return None
